"""A run's folder: what is not ours stays, and what is damaged is never gone on from without a word."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from hypothesis import given, settings
from hypothesis import strategies as st

from orpo_kernels.app.cli import main
from orpo_kernels.app.errors import UserError
from orpo_kernels.app.finetuning import plots, train
from orpo_kernels.app.finetuning.folder import (
    COMPLETE,
    MARK,
    RunFolder,
    claim,
    mark_complete,
    processes_of,
    whole_folder,
)
from orpo_kernels.app.finetuning.manifest import differing, manifest, sealed, unsealed
from orpo_kernels.app.finetuning.progress import Recorder

from .commands import assert_same_run, command, run, write_chats
from .training import tiny

STEPS = ("--max-steps", "4", "--save-every", "1", "--eval-every", "2", "--batch-size", "1", "--max-length", "48")
STEPS += ("--eval-split", "2", "--lr", "1e-3")
few = settings(max_examples=max(6, settings().max_examples // 5))  # each of them is a run
NAMES = ("settings.yaml", "curves.png", "problems.jsonl", "metrics.jsonl", "model", "summary.json", "notes.txt", MARK)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def quick():
    """Without what costs time and is not looked at here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        patch.setattr(plots, "curves", lambda steps, evaluations, path: path.write_bytes(b"curves"))
        patch.setattr(train, "_tensorboard", lambda folder: [])
        yield


@pytest.fixture(scope="module")
def inputs(model, tmp_path_factory, quick) -> tuple[str, str]:
    return model, write_chats(tmp_path_factory.mktemp("inputs") / "pairs.jsonl", 8)


@pytest.fixture(scope="module")
def runs(inputs, tmp_path_factory) -> SimpleNamespace:
    """A run that is finished, and the same one stopped behind step 3; both are to be copied."""
    folder = tmp_path_factory.mktemp("runs")

    own = Recorder.on_step_end

    def stop(self: Any, args: Any, state: Any, control: Any, **options: Any) -> None:
        if state.global_step == 4:
            raise KeyboardInterrupt
        own(self, args, state, control, **options)

    run("train", *inputs, *STEPS, "--output", folder / "finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Recorder, "on_step_end", stop)
        with contextlib.suppress(KeyboardInterrupt), contextlib.redirect_stderr(io.StringIO()):
            main(["train", *inputs, *STEPS, "--output", str(folder / "stopped")])
    assert {path.name for path in (folder / "stopped" / "checkpoints").iterdir()} == {"checkpoint-2", "checkpoint-3"}
    return SimpleNamespace(finished=folder / "finished", stopped=folder / "stopped")


def resumed(inputs: tuple[str, str], folder: Path) -> tuple[int, dict[str, Any], str]:
    return command("train", *inputs, *STEPS, "--output", folder, "--resume")


# --- what is not ours ----------------------------------------------------------------------------------------------


def test_the_checkpoints_of_somebody_else(inputs, tmp_path):
    """The instance that was reported: they were removed, and other files were written over."""
    (tmp_path / "checkpoints" / "checkpoint-7").mkdir(parents=True)
    for name in ("checkpoints/best.pt", "checkpoints/checkpoint-7/model.safetensors", "curves.png", "problems.jsonl"):
        (tmp_path / name).write_text("precious")
    before = contents(tmp_path)
    for more in ((), ("--resume",)):
        said = run("train", *inputs, *STEPS, "--output", tmp_path, *more, status=2)
        assert "holds checkpoints, curves.png, problems.jsonl, but no run of ours" in said["error"]
        assert contents(tmp_path) == before


FILES = st.dictionaries(
    st.builds(
        lambda folder, name: folder + name,
        st.sampled_from(["", "checkpoints/", "checkpoints/checkpoint-2/", "model/", "tensorboard/", "mine/"]),
        st.sampled_from(
            [*NAMES[:4], "config.json", "evaluation.json", "pairs.jsonl", "sweep.json", "compare.json", "a"]
        ),
    ),
    st.binary(max_size=20),
    min_size=1,
    max_size=4,
)


@given(files=FILES, word=st.sampled_from(["train", "evaluate", "sweep", "compare"]))
def test_a_folder_that_holds_anything_is_left_as_it_is(files, word, inputs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("somebodys")
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    before = contents(folder)
    said = run(word, *inputs, "--output", folder, status=2)
    assert any(name.partition("/")[0] in said["error"] for name in files)
    assert contents(folder) == before


@few
@given(
    where=st.lists(
        st.sampled_from(
            ["", "checkpoints/", "checkpoints/checkpoint-2/", "checkpoints/mine/", "model/", "tensorboard/"]
        ),
        min_size=1,
        unique=True,
    ),
    name=st.sampled_from(["notes.txt", "best.ckpt", "checkpoint-best", ".hidden"]),
    which=st.sampled_from(["stopped", "finished"]),
    flags=st.sampled_from([("--resume",), (), ("--resume", "--lr", "2")]),
)
def test_a_file_that_is_put_into_a_run_stays(where, name, which, flags, inputs, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    shutil.copytree(getattr(runs, which), folder)
    mine = {folder / place / name: f"mine, in {place}".encode() for place in where}
    for path, content in mine.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    status, _, _ = command("train", *inputs, *STEPS, *flags, "--output", folder)
    assert status == (0 if flags == ("--resume",) else 2)
    assert {path: path.read_bytes() for path in mine} == mine
    if status == 0:
        left = {path.name for path in folder.rglob("checkpoints/**/*") if path.is_file()}
        assert left <= {name}, "what a finished run does not need"


def test_claims(tmp_path):
    claim(tmp_path / "new" / "one", "sweep")
    claim(tmp_path / "new" / "one", "sweep")
    with pytest.raises(UserError, match=r"holds \.orpo-kernels\.json, but no run of ours"):
        claim(tmp_path / "new" / "one", "run")
    (tmp_path / "new" / "file").write_text("")
    for path in (tmp_path / "new" / "file", tmp_path / "new" / "file" / "below"):
        with pytest.raises(UserError, match="choose another --output"):
            claim(path, "evaluation")
    with pytest.raises(UserError, match="holds file, one, but no comparison of ours"):
        claim(tmp_path / "new", "comparison")


def test_a_run_goes_on_from_what_all_nodes_have(tmp_path, monkeypatch):
    for step in (2, 4):
        checkpoint = tmp_path / "checkpoints" / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "trainer_state.json").touch()
        mark_complete(checkpoint)
    for of_another, found in (({2, 4}, 4), ({2}, 2), ({2, 6}, 2)):
        monkeypatch.setattr(train, "of_all", lambda own, other=of_another: [own, other])
        assert train._latest_of_all(RunFolder(tmp_path)).name == f"checkpoint-{found}"
    for of_another in (set(), {6}):
        monkeypatch.setattr(train, "of_all", lambda own, other=of_another: [own, other])
        with pytest.raises(UserError, match="on some nodes alone"):
            train._latest_of_all(RunFolder(tmp_path))


def test_what_a_folder_held_is_in_it_still(tmp_path):
    def write(content: str) -> None:
        with whole_folder(tmp_path / "model") as scratch:
            (scratch / "ours").write_text(content)

    write("old")
    (tmp_path / "model" / "notes").mkdir()
    (tmp_path / "model" / "notes" / "mine").write_text("mine")
    write("new")
    assert contents(tmp_path) == {"model/ours": b"new", "model/notes/mine": b"mine"}
    (tmp_path / "model").rename(tmp_path / ".model.before")  # stopped between the two names
    write("newer")
    assert contents(tmp_path) == {"model/ours": b"newer", "model/notes/mine": b"mine"}


# --- what a run was started with -----------------------------------------------------------------------------------


def changed_pairs(model: Path, data: Path) -> None:
    data.write_text(data.read_text().replace("The dog sat", "The dog lay"))


def one_pair_more(model: Path, data: Path) -> None:
    data.write_text(data.read_text() + json.dumps({"prompt": "more", "chosen": "yes", "rejected": "no"}) + "\n")


def another_model(model: Path, data: Path) -> None:
    lm = tiny(initializer_range=0.02)
    with torch.no_grad():
        lm.lm_head.weight[0, 0] += 1
    lm.save_pretrained(model)


def another_template(model: Path, data: Path) -> None:
    template = model / "chat_template.jinja"
    template.write_text(template.read_text() + "{# as it was #}")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (changed_pairs, "the pairs to train on (then 6, now 6)"),
        (one_pair_more, "now 7)"),
        (another_model, "the model's file model.safetensors"),
        (another_template, "the model's file chat_template.jinja"),
    ],
)
@pytest.mark.parametrize("which", ["stopped", "finished"])
def test_a_run_goes_on_with_what_it_was_started_with(which, change, named, inputs, runs, tmp_path):
    model, data = tmp_path / "model", tmp_path / "pairs.jsonl"
    shutil.copytree(inputs[0], model)
    shutil.copy(inputs[1], data)
    folder = tmp_path / "run"
    shutil.copytree(getattr(runs, which), folder)
    with pytest.MonkeyPatch.context() as patch:  # the same paths as when it was started, and others in them
        patch.setattr(train, "_plain", lambda settings: dict.fromkeys(["model", "data"], "there"))
        mark = unsealed((folder / MARK).read_text())
        assert mark is not None
        same = {"model": "there", "data": "there"}
        (folder / MARK).write_text(sealed({**mark, "settings": same}))
        (folder / "settings.yaml").write_text(json.dumps(same))
        change(model, data)
        before = contents(folder)
        status, said, _ = resumed((str(model), str(data)), folder)
        assert status == 2
        assert "Since the run" in said["error"]
        assert named in said["error"]
        assert contents(folder).keys() == before.keys()


def test_a_run_without_its_mark_is_nobodys(inputs, runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs.stopped, folder)
    (folder / MARK).unlink()
    before = contents(folder)
    status, said, _ = resumed(inputs, folder)
    assert status == 2
    assert "but no run of ours" in said["error"]
    assert contents(folder) == before


# --- damage --------------------------------------------------------------------------------------------------------


def damage(path: Path, how: str, share: float) -> None:
    content = path.read_bytes()
    at = int(share * (len(content) - 1))
    if how == "remove":
        path.unlink()
    elif how == "cut":
        path.write_bytes(content[: max(1, at)])
    else:
        path.write_bytes(content[:at] + bytes(byte ^ 0x15 for byte in content[at : at + 3]) + content[at + 3 :])


@few
@given(
    which=st.sampled_from(["stopped", "stopped", "finished"]),
    choice=st.floats(0, 1),
    how=st.sampled_from(["remove", "cut", "overwrite"]),
    share=st.floats(0, 1),
)
def test_a_damaged_run_gives_the_same_result_or_a_word(which, choice, how, share, inputs, runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "run"
    shutil.copytree(getattr(runs, which), folder)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    harmed = files[int(choice * (len(files) - 1))]
    damage(harmed, how, share)
    before = contents(folder)
    status, said, told = resumed(inputs, folder)
    assert status in (0, 2)
    if status == 2:
        assert said["error"].count("\n") == 0
        assert str(folder) in said["error"]
        return
    told_of_it = f"{harmed.relative_to(folder)} there is no longer what the run wrote" in told
    if which == "finished" and harmed.name != "summary.json":
        assert told_of_it or contents(folder) == before
        assert said == json.loads((runs.finished / "summary.json").read_text())
    else:
        assert_same_run(folder, runs.finished)


@pytest.mark.parametrize(
    ("file", "how"),
    [
        *(("model.safetensors", how) for how in ("remove", "cut", "overwrite")),
        *[("optimizer.pt", "cut"), ("trainer_state.json", "remove"), ("rng_state.pth", "overwrite")],
        *[(COMPLETE, "cut"), (COMPLETE, "remove")],
    ],
)
def test_the_checkpoint_before_a_damaged_one_is_taken_and_it_is_said(file, how, inputs, runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs.stopped, folder)
    damage(folder / "checkpoints" / "checkpoint-3" / file, how, 0.5)
    status, _, told = resumed(inputs, folder)
    assert status == 0
    assert "Going on behind step 2." in told
    if (file, how) != (COMPLETE, "remove"):  # then it is one that was never complete
        assert f"The checkpoint of step 3 is damaged: {file} is not what the run wrote." in told
    assert_same_run(folder, runs.finished)


def test_without_any_sound_checkpoint_the_run_begins_anew_and_it_is_said(inputs, runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs.stopped, folder)
    for checkpoint in (folder / "checkpoints").iterdir():
        damage(checkpoint / "optimizer.pt", "cut", 0.5)
    status, _, told = resumed(inputs, folder)
    assert status == 0
    assert "There is no checkpoint to go on from: the run begins anew." in told
    assert_same_run(folder, runs.finished)


@pytest.mark.parametrize("how", ["remove", "cut", "overwrite"])
@pytest.mark.parametrize("name", ["settings.yaml", "metrics.jsonl", "evaluations.jsonl"])
def test_what_cannot_be_made_again_is_named(name, how, inputs, runs, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(runs.stopped, folder)
    damage(folder / name, how, 0.3)
    before = contents(folder)
    status, said, _ = resumed(inputs, folder)
    assert status == 2
    assert f"{folder / name} is damaged" in said["error"]
    assert contents(folder) == before


def test_a_damaged_summary_is_named(inputs, runs, tmp_path):
    for how in ("cut", "overwrite"):
        folder = tmp_path / how
        shutil.copytree(runs.finished, folder)
        damage(folder / "summary.json", how, 0.5)
        status, said, _ = resumed(inputs, folder)
        assert (status, f"{folder / 'summary.json'} is damaged" in said["error"]) == (2, True)


def test_a_line_that_no_run_writes(tmp_path):
    log = RunFolder(tmp_path).metrics
    for line in ("{", "5", "{}", '{"step": 1}', '{"step": "x"}'):
        log.path.write_text(line + "\n")
        with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: line 1 of it"):
            log.read()


@given(content=st.binary(min_size=1, max_size=50), other=st.binary(max_size=50), more=st.binary(max_size=9))
def test_a_manifest_tells_every_change(content, other, more, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    file = folder / "file"
    file.write_bytes(content)
    written = manifest(folder, [file])
    assert differing(folder, written) == []
    file.write_bytes(other)
    assert differing(folder, written) == (["file"] if other != content else [])
    file.write_bytes(content + more)
    assert differing(folder, written, appended=True) == []
    assert differing(folder, written) == (["file"] if more else [])
    file.unlink()
    assert differing(folder, written) == ["file"]


@given(st.data())
def test_a_sealed_record_is_whole_or_none(data):
    record = {"kind": "run", "results": {"a": [1, "b"]}}
    text = sealed(record)
    assert unsealed(text) == record
    at = data.draw(st.integers(0, len(text) - 1))
    assert unsealed(text[:at]) is None
    other = data.draw(st.characters())
    found = unsealed(text[:at] + other + text[at + 1 :])
    assert found in (None, record)


def test_only_the_latest_two_checkpoints_are_kept_and_nobody_elses_are_touched(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (2, 9, 10, 11):
        checkpoint = folder.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "optimizer.pt").write_bytes(b"")
        (checkpoint / "notes").write_bytes(b"")
        mark_complete(checkpoint)
    (folder.checkpoints / "checkpoint-best").mkdir()
    (folder.checkpoints / "checkpoint-best" / "optimizer.pt").write_bytes(b"")
    folder.remove_old_checkpoints()
    ours = {path.parent.name for path in folder.checkpoints.glob("*/optimizer.pt")}
    assert ours == {"checkpoint-10", "checkpoint-11", "checkpoint-best"}
    assert len(list(folder.checkpoints.glob("*/notes"))) == 4


def test_templates_by_name_are_a_checkpoints_own(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        templates = folder.checkpoints / f"checkpoint-{step}" / "additional_chat_templates"
        templates.mkdir(parents=True)
        (templates.parent / "optimizer.pt").write_bytes(b"")
        (templates / "tool_use.jinja").write_text("{{ tools }}")
        mark_complete(templates.parent)
    (templates / "tool_use.jinja").write_text("cut o")
    folder.remove_damaged_checkpoints(lambda _: None)
    assert folder.complete_checkpoints()[-1] == folder.checkpoints / "checkpoint-2"
    folder.clean()
    assert not folder.checkpoints.exists()


# --- a full disk ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["a checkpoint", "the metrics", "the model"])
def test_a_full_disk_is_a_sentence_and_nothing_is_lost(where, inputs, runs, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    shutil.copytree(runs.stopped, folder)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    def full_as_torch_says(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail at inline_container.cc:672] . PytorchStreamWriter failed writing file data/0")

    with monkeypatch.context() as patch:
        if where == "a checkpoint":
            patch.setattr(torch, "save", full_as_torch_says)
        elif where == "the metrics":
            patch.setattr("orpo_kernels.app.finetuning.folder.JsonLines.append", full)
        else:
            patch.setattr(train, "save_as_it_came", full)
        status, said, _ = resumed(inputs, folder)
    assert status == 2
    assert f"The disk that holds {folder} is full." in said["error"]
    assert resumed(inputs, folder)[0] == 0
    assert_same_run(folder, runs.finished)


def test_a_checkpoint_to_go_on_from_that_is_damaged_is_named(tmp_path):
    """On several nodes the latest one that all have may be older than those that each has looked at."""
    checkpoint = tmp_path / "checkpoints" / "checkpoint-2"
    checkpoint.mkdir(parents=True)
    (checkpoint / COMPLETE).write_text("{}")
    for read in (RunFolder(tmp_path).rewind, processes_of):
        with pytest.raises(UserError, match="checkpoint-2 is damaged: remove it"):
            read(checkpoint)
