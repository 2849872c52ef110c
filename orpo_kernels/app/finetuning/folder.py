"""The folder of a run. Whatever stops the process or the machine, nothing half-written in it is ever taken for whole.

    settings.yaml       what the run was started with; `--config` takes it
    problems.jsonl      rows of the data that could not be used, and why
    metrics.jsonl       a line per optimizer step
    evaluations.jsonl   a line per evaluation on the held-out pairs
    checkpoints/        the latest two, each with the file `complete` (by how many processes, and the hashes of its
                        files and of the logs up to there) once it is
    model/, merged/     the result
    scores.json         of a run of a sweep, in place of a model: how it rates each held-out pair
    curves.png, summary.json, tensorboard/
    .orpo-kernels.json  the mark: the folder is ours; hashes of what the run was started with, and of its results

A file or folder is written under another name, flushed to the disk, and renamed. Lines are appended: a last one without
its line break does not count.

**What is ours.** A folder that holds anything and has no mark is left alone (`claim`). In one that is ours, the names
above are ours, and in a checkpoint those that the Trainer gives its files; all others, wherever they lie, stay.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from ..errors import UserError
from .manifest import differing, manifest, sealed, unsealed
from .processes import processes, writes
from .records import to_json

COMPLETE = "complete"
MARK = ".orpo-kernels.json"
KEPT_CHECKPOINTS = 2  # so that one is complete while another is written
OF_A_STEP = ("step", "seconds", "tokens", "memory_bytes")  # what is read of a record of the metrics
# What the Trainer writes into a checkpoint, and DPO's reference beside them.
OF_A_CHECKPOINT = (
    *("*.safetensors", "*.bin", "*.safetensors.index.json", "*.bin.index.json", "*.pt", "rng_state*.pth"),
    *("config.json", "generation_config.json", "adapter_config.json", "trainer_state.json", "README.md"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.jinja", "*.model"),
    *(COMPLETE, f".{COMPLETE}.unfinished"),
)
NAMED_TEMPLATES = "additional_chat_templates"  # of a tokenizer that has several, in a folder of their own
OF_THE_REFERENCE = ("*.jsonl",)


class RunFolder:
    """Names and reads what is in a run folder; `is_written` by this process, or by another one, which it reads."""

    def __init__(self, path: Path, is_written: bool = True) -> None:
        self.path, self.is_written = path, is_written
        self.settings = path / "settings.yaml"
        self.problems = path / "problems.jsonl"
        self.metrics = JsonLines(path / "metrics.jsonl", OF_A_STEP)
        self.evaluations = JsonLines(path / "evaluations.jsonl")
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.merged = path / "merged"
        self.scores = path / "scores.json"
        self.curves = path / "curves.png"
        self.summary = path / "summary.json"
        self.tensorboard = path / "tensorboard"

    def results(self) -> list[Path]:
        """What there is of what a run has made: nothing where none has got anywhere yet."""
        names = (self.metrics.path, self.evaluations.path, self.model, self.merged, self.scores, self.summary)
        return [*self._checkpoints(), *(path for path in names if path.exists())]

    def logs(self) -> list[Path]:
        return [self.metrics.path, self.evaluations.path]

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that came to its end. Raises `UserError` if it is damaged."""
        if not self.summary.exists():
            return None
        results = noted(self.path, "results") or {}
        if differing(self.path, {name: entry for name, entry in results.items() if name == self.summary.name}):
            raise UserError(
                f"{self.summary} is damaged: it is not what the run wrote. Restore it, or remove it to train again."
            )
        return json.loads(self.summary.read_text(encoding="utf-8"))

    def changed_results(self) -> list[str]:
        """Which of a finished run's results are no longer what it wrote, or gone."""
        return differing(self.path, noted(self.path, "results") or {})

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary, with which the run is finished, and note what its results are."""
        write_json(self.summary, summary)
        files = [*self.model.rglob("*"), *self.merged.rglob("*"), *self.logs()]
        files += [self.problems, self.scores, self.curves, self.summary]
        note(self.path, results=manifest(self.path, filter(Path.is_file, files)))

    def clean(self) -> None:
        """Remove what a finished run does not need."""
        for checkpoint in self._checkpoints():
            _remove_checkpoint(checkpoint)
        _remove_files(self.checkpoints / "reference_logps", OF_THE_REFERENCE)
        _remove_if_empty(self.checkpoints)

    # --- checkpoints ---

    def _checkpoints(self) -> list[Path]:
        """In their order, those that are not complete as well."""
        found = [path for path in self.checkpoints.glob("checkpoint-*") if re.fullmatch(r".*-\d+", path.name)]
        return sorted((path for path in found if _files(path, OF_A_CHECKPOINT)), key=step_of)

    def complete_checkpoints(self) -> list[Path]:
        """In their order. Those that are not complete are removed."""
        complete = []
        for folder in self._checkpoints():
            if (folder / COMPLETE).exists():
                complete.append(folder)
            else:
                _remove_checkpoint(folder)
        return complete

    def remove_checkpoints_behind(self, step: int) -> None:
        for checkpoint in self._checkpoints():
            if step_of(checkpoint) > step:
                _remove_checkpoint(checkpoint)

    def remove_damaged_checkpoints(self, tell: Callable[[str], None]) -> None:
        """Until the files of the latest one are as they were written."""
        for checkpoint in reversed(self.complete_checkpoints()):
            record = _completion(checkpoint)
            changed = differing(checkpoint, record["files"]) if record else [COMPLETE]
            if not changed:
                return
            tell(f"The checkpoint of step {step_of(checkpoint)} is damaged: {changed[0]} is not what the run wrote.")
            _remove_checkpoint(checkpoint)

    def remove_old_checkpoints(self) -> None:
        """All but the latest two."""
        for checkpoint in self.complete_checkpoints()[:-KEPT_CHECKPOINTS]:
            _remove_checkpoint(checkpoint)

    def rewind(self, checkpoint: Path | None) -> None:
        """Forget what was logged behind a checkpoint; without one, all of it. Raises `UserError` for damaged logs."""
        logged = _known(checkpoint)["logs"] if checkpoint else {}
        if changed := differing(self.path, logged, appended=True):
            raise UserError(_damaged(self.path / changed[0]))
        for log in self.logs():
            if log.exists():
                size, _ = logged.get(log.name, (0, ""))
                write_whole(log, log.read_bytes()[:size])


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(checkpoint: Path, processes: int = 1, logs: Iterable[Path] = ()) -> None:
    """To be called when all of a checkpoint is written, by so many processes, and what is logged up to there."""
    _sync_tree(checkpoint)
    record = {
        "processes": processes,
        "files": manifest(checkpoint, _files(checkpoint, OF_A_CHECKPOINT)),
        "logs": manifest(checkpoint.parents[1], [log for log in logs if log.exists()]),
    }
    write_whole(checkpoint / COMPLETE, sealed(record))


def processes_of(checkpoint: Path) -> int:
    """By how many processes a complete checkpoint was written."""
    return _known(checkpoint)["processes"]


def _completion(checkpoint: Path) -> dict[str, Any]:
    """What `mark_complete` wrote; nothing if it is damaged."""
    return unsealed((checkpoint / COMPLETE).read_text(encoding="utf-8", errors="replace")) or {}


def _known(checkpoint: Path) -> dict[str, Any]:
    """`_completion` of the checkpoint to go on from. Raises `UserError` if it is damaged."""
    if record := _completion(checkpoint):
        return record
    raise UserError(f"{checkpoint} is damaged: remove it to go on from the one before, or choose another --output.")


def _files(folder: Path, patterns: Iterable[str]) -> list[Path]:
    if not folder.is_dir():
        return []
    inside = [*folder.iterdir(), *(folder / NAMED_TEMPLATES).glob("*.jinja")]
    return [path for path in inside if path.is_file() and any(fnmatch(path.name, one) for one in patterns)]


def _remove_checkpoint(folder: Path) -> None:
    (folder / COMPLETE).unlink(missing_ok=True)  # first, so that half of it never counts
    _remove_files(folder, OF_A_CHECKPOINT)


def _remove_files(folder: Path, patterns: Iterable[str]) -> None:
    for path in _files(folder, patterns):
        path.unlink()
    _remove_if_empty(folder / NAMED_TEMPLATES)
    _remove_if_empty(folder)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


class JsonLines:
    """Records, a line each; each has `step`, and the other `keys`."""

    def __init__(self, path: Path, keys: Iterable[str] = ("step",)) -> None:
        self.path, self.keys = path, tuple(keys)

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; none where there is no file. Raises `UserError` for a line that is none of ours."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [self._parsed(number, line) for number, line in enumerate(lines[:-1], start=1)]

    def _parsed(self, number: int, line: str) -> dict[str, Any]:
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not all(isinstance(record.get(key), (int, float)) for key in self.keys):
            raise UserError(_damaged(self.path, f"line {number} of it"))
        return record


def _damaged(path: Path, what: str = "it") -> str:
    return f"{path} is damaged: {what} is not what the run wrote. Restore it, or choose another --output."


# --- whose a folder is ---------------------------------------------------------------------------------------------


def claim(folder: Path, kind: str) -> None:
    """Make a folder ours to write a `kind` into: "run", "sweep", "comparison", "evaluation", ...

    To be called by every process of a run. Raises `UserError` as `check_claim` does.
    """
    check_claim(folder, kind)
    state = processes()
    state.wait_for_everyone()  # until all have looked, before anybody writes
    if writes(folder) and noted(folder, "kind") != kind:
        with _told(folder):
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(folder / MARK, sealed({"kind": kind}))
    state.wait_for_everyone()


def check_claim(folder: Path, kind: str) -> None:
    """Raise `UserError`, naming what is in it, for a folder that holds anything and is no `kind` of ours."""
    with _told(folder):
        names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in names if name != f".{MARK}.unfinished"]
    if not foreign or noted(folder, "kind") == kind:
        return
    more = f" and {len(foreign) - 3} more" if len(foreign) > 3 else ""
    raise UserError(f"{folder} holds {', '.join(foreign[:3])}{more}, but no {kind} of ours: choose another --output.")


def note(folder: Path, **entries: Any) -> None:
    """Write entries into the mark of a folder."""
    write_whole(folder / MARK, sealed({**_record_of(folder), **entries}))


def noted(folder: Path, entry: str) -> Any:
    """An entry of the mark, or None."""
    return _record_of(folder).get(entry)


def _record_of(folder: Path) -> dict[str, Any]:
    with suppress(OSError):
        return unsealed((folder / MARK).read_text(encoding="utf-8", errors="replace")) or {}
    return {}


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(f"{folder} cannot be written into ({reason}): choose another --output.") from error


# --- whole or not at all -------------------------------------------------------------------------------------------


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file; until all of it is on the disk, `path` is what it was."""
    scratch = path.with_name(f".{path.name}.unfinished")
    with scratch.open("wb") as file:
        # A file's name may hold bytes that are no UTF-8 (lone surrogates here): in JSON this is their escape.
        file.write(content.encode(errors="backslashreplace") if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    _sync(path.parent)


def write_json(path: Path, record: dict[str, Any]) -> None:
    """`write_whole`, for people and machines."""
    write_whole(path, to_json(record, indent=2) + "\n")


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends without an error.

    What `path` held under other names is in it still.
    """
    scratch, before = (path.with_name(f".{path.name}.{state}") for state in ("unfinished", "before"))
    if before.exists() and not path.exists():  # stopped between the two names
        before.rename(path)
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    if path.exists():
        # What is at the top of it and was not written anew.
        shutil.copytree(
            path,
            scratch,
            symlinks=True,
            dirs_exist_ok=True,
            ignore=lambda at, names: [name for name in names if Path(at) == path and (scratch / name).exists()],
        )
    _sync_tree(scratch)
    if path.exists():
        shutil.rmtree(before, ignore_errors=True)
        path.rename(before)
    scratch.rename(path)
    shutil.rmtree(before, ignore_errors=True)
    _sync(path.parent)


@contextmanager
def told_when_full(folder: Path) -> Iterator[None]:
    """Raise `UserError` in place of what the libraries raise where no more can be written."""
    try:
        yield
    except Exception as error:
        if not _is_full(error):
            raise
        raise UserError(
            f"The disk that holds {folder} is full. Nothing that was complete is lost: free some space, and go on with "
            "--resume."
        ) from error


def _is_full(error: Exception) -> bool:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    signs = ("No space left on device", "os error 28", "PytorchStreamWriter failed", "File too large")
    return type(error).__name__ in ("RuntimeError", "SafetensorError") and any(sign in str(error) for sign in signs)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
