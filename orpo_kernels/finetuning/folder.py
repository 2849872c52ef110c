"""The folder of a run. Whatever stops the process or the machine, nothing half-written in it is ever taken for whole.

    settings.yaml       what the run was started with; `--config` takes it
    problems.jsonl      rows of the data that could not be used, and why
    metrics.jsonl       a line per optimizer step
    evaluations.jsonl   a line per evaluation on the held-out pairs
    checkpoints/        the latest two, each with the file `complete` (by how many processes) once it is
    model/, merged/     the result
    scores.json         of a run of a sweep, in place of a model: how it rates each held-out pair
    curves.png, summary.json, tensorboard/

A file or folder is written under another name, flushed to the disk, and renamed. Lines are appended: a last one without
its line break does not count.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

COMPLETE = "complete"


class RunFolder:
    """Names and reads what is in a run folder, and makes the folder."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.settings = path / "settings.yaml"
        self.problems = path / "problems.jsonl"
        self.metrics = JsonLines(path / "metrics.jsonl")
        self.evaluations = JsonLines(path / "evaluations.jsonl")
        self.checkpoints = path / "checkpoints"
        self.model = path / "model"
        self.merged = path / "merged"
        self.scores = path / "scores.json"
        self.curves = path / "curves.png"
        self.summary = path / "summary.json"
        self.tensorboard = path / "tensorboard"
        path.mkdir(parents=True, exist_ok=True)

    def results(self) -> list[Path]:
        """What there is of what a run would write over."""
        names = (self.metrics.path, self.evaluations.path, self.model, self.merged, self.summary)
        return [*self.checkpoints.glob("checkpoint-*"), *(path for path in names if path.exists())]

    def clean(self) -> None:
        """Remove what a finished run does not need."""
        shutil.rmtree(self.checkpoints, ignore_errors=True)

    def finished(self) -> dict[str, Any] | None:
        """The summary of a run that came to its end."""
        return json.loads(self.summary.read_text(encoding="utf-8")) if self.summary.exists() else None

    def latest_checkpoint(self) -> Path | None:
        """The latest complete one. Those that are not complete are removed."""
        complete = []
        for folder in self.checkpoints.glob("checkpoint-*"):
            if (folder / COMPLETE).exists():
                complete.append(folder)
            else:
                shutil.rmtree(folder)
        return max(complete, key=step_of, default=None)

    def rewind(self, step: int) -> None:
        """Forget what was logged behind a step."""
        for log in (self.metrics, self.evaluations):
            if log.path.exists():
                log.replace([record for record in log.read() if record["step"] <= step])


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def mark_complete(checkpoint: Path, processes: int = 1) -> None:
    """To be called when all of a checkpoint is written, by so many processes."""
    _sync_tree(checkpoint)
    write_whole(checkpoint / COMPLETE, str(processes))


def processes_of(checkpoint: Path) -> int:
    """By how many processes a complete checkpoint was written."""
    return int((checkpoint / COMPLETE).read_text() or 1)  # runs that began before there could be several wrote nothing


class JsonLines:
    """Records, a line each."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def append(self, record: dict[str, Any]) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(record))

    def read(self) -> list[dict[str, Any]]:
        """All whole lines; none where there is no file."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8", errors="replace").split("\n")
        return [json.loads(line) for line in lines[:-1]]

    def replace(self, records: list[dict[str, Any]]) -> None:
        write_whole(self.path, "".join(map(_line, records)))


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


# --- whole or not at all -------------------------------------------------------------------------------------------


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file; until all of it is on the disk, `path` is what it was."""
    scratch = path.with_name(f".{path.name}.unfinished")
    with scratch.open("wb") as file:
        file.write(content.encode() if isinstance(content, str) else content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
    _sync(path.parent)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends without an error."""
    scratch = path.with_name(f".{path.name}.unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    yield scratch
    _sync_tree(scratch)
    shutil.rmtree(path, ignore_errors=True)
    scratch.rename(path)
    _sync(path.parent)


def _sync_tree(folder: Path) -> None:
    for path in (*folder.rglob("*"), folder):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
