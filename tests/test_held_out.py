"""Held out means never trained on, whatever is evaluated later; and two models are compared on the same pairs."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from rich.console import Console

from orpo_kernels.app.cli import main
from orpo_kernels.app.data import split_pairs
from orpo_kernels.app.finetuning import compare, sweep, train
from orpo_kernels.app.finetuning.scoring import SCORES

from .commands import pair, records, run, save_tiny, write_rows
from .training import tokenizer

FAST = ("--batch-size", "2", "--max-steps", "1", "--lr", "1e-4")
ROWS = [pair(number, length=1 + 3 * (number % 2)) for number in range(12)]  # every other one has a long prompt


@pytest.fixture
def data(tmp_path) -> str:
    return write_rows(tmp_path / "pairs.jsonl", ROWS)


@contextlib.contextmanager
def spied() -> Iterator[set[str]]:
    """The chosen answers that the trainer is given, as runs go by."""
    seen: set[str] = set()
    make = train.PreferenceTrainer

    def spy(*args: Any, train_dataset: Any, **options: Any) -> Any:
        for one in train_dataset:
            answer = [label for label in one["chosen_labels"] if label != -100]
            seen.add(tokenizer().decode(answer, skip_special_tokens=True).strip())
        return make(*args, train_dataset=train_dataset, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "PreferenceTrainer", spy)
        yield seen


@pytest.fixture
def trained_on() -> Iterator[set[str]]:
    with spied() as seen:
        yield seen


class Trained(NamedTuple):
    folder: Path
    data: str
    summary: dict[str, Any]
    on: set[str]


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory) -> Trained:
    """A run that holds out half of the pairs, to be looked at by many."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_rows(folder / "pairs.jsonl", ROWS)
    with spied() as seen:
        summary = run("train", model, data, "--output", folder / "run", "--eval-split", 6, *FAST)
    return Trained(folder / "run", data, summary, seen)


def evaluated(folder: Path, rows: list[dict[str, str]] = ROWS) -> set[str]:
    """The chosen answers of the rows that an evaluation has rated."""
    return {rows[record["row"] - 1]["chosen"].strip() for record in records(folder, "pairs")}


# --- one run, evaluated in other ways ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "flags", [("--max-length", 64), ("--max-length", 30, "--too-long", "leave-out"), ("--seed", 3)]
)
def test_what_was_trained_on_is_never_held_out(flags, model, data, tmp_path, trained_on):
    """The training left pairs out that were too long; the evaluation takes others, of the run or of its model."""
    summary = run("train", model, data, "--output", tmp_path / "run", "--eval-split", 6, *FAST, *flags)
    assert len(trained_on) == summary["pairs"]
    ways = [("", ()), ("model", ("--max-length", 256)), ("", ("--max-length", 24)), ("model", ("--seed", 1))]
    for number, (where, more) in enumerate(ways):
        output = tmp_path / f"e{number}"
        record = run("evaluate", tmp_path / "run" / where, data, "--eval-split", 6, "--output", output, *more)
        assert record["pairs"] >= summary["held_out"]
        assert not evaluated(output) & trained_on
        assert record["trained_on"] == len(trained_on)


def test_rows_that_come_later_change_no_side(trained, tmp_path):
    rows = [pair(100), *ROWS[:5], pair(101), *ROWS[5:], pair(102)]
    longer = write_rows(tmp_path / "longer.jsonl", rows)
    record = run("evaluate", trained.folder, longer, "--eval-split", 6, "--output", tmp_path / "e")
    assert record["pairs"] == trained.summary["held_out"] == 6
    assert not evaluated(tmp_path / "e", rows) & trained.on


def test_without_a_split_it_says_how_many_were_trained_on(trained, tmp_path):
    record = run("evaluate", trained.folder, trained.data, "--output", tmp_path / "e")
    assert record["pairs"] == 12
    assert record["trained_on"] == trained.summary["pairs"]


def test_what_either_model_was_trained_on_is_left_out(trained, model, tmp_path, trained_on):
    run("train", model, trained.data, "--output", tmp_path / "run", "--eval-split", 6, "--seed", 1, *FAST)
    either = trained.on | trained_on
    assert 6 < len(either) < 12  # else this shows nothing
    arguments = ("evaluate", trained.folder, trained.data, "--against", tmp_path / "run", "--eval-split", 6)
    record = run(*arguments, "--output", tmp_path / "e")
    assert evaluated(tmp_path / "e") == {row["chosen"].strip() for row in ROWS} - either
    assert record["trained_on"] == len(either)


@pytest.mark.parametrize("where", ["", "model"])
def test_a_run_that_begins_with_a_runs_model_inherits_what_that_was_trained_on(where, trained, tmp_path, trained_on):
    arguments = ("train", trained.folder / where, trained.data, "--output", tmp_path / "run", "--eval-split", 6)
    summary = run(*arguments, "--seed", 1, *FAST)
    either = trained.on | trained_on
    assert summary["held_out"] == len({row["chosen"].strip() for row in ROWS} - either) < 6
    run("evaluate", tmp_path / "run", trained.data, "--eval-split", 6, "--output", tmp_path / "e")
    assert not evaluated(tmp_path / "e") & either


def test_other_data_has_nothing_held_out(trained, tmp_path):
    other = write_rows(tmp_path / "other.jsonl", [pair(number) for number in range(50, 56)])
    said = run("evaluate", trained.folder, other, "--eval-split", 2, "--output", tmp_path / "e", status=2)
    assert "none of the 6 pairs" in said["error"]


@pytest.mark.parametrize("content", [None, "", "[]", '{"trained": 1, "held_out": []}', "\0"])
def test_a_run_whose_record_is_gone_or_damaged(content, trained, tmp_path):
    shutil.copytree(trained.folder, tmp_path / "run")
    record = tmp_path / "run" / "split.json"
    record.unlink() if content is None else record.write_text(content)
    arguments = ("evaluate", tmp_path / "run", trained.data, "--output", tmp_path / "e")
    said = run(*arguments, "--eval-split", 6, status=2)
    assert "no pair can be called held out" in said["error"]
    assert run(*arguments)["pairs"] == 12  # nothing is called held out


def test_the_same_models_folder_elsewhere_is_no_run(trained, tmp_path):
    """A folder whose neighbours look like a run's is taken for what it is."""
    shutil.copytree(trained.folder, tmp_path / "run")
    other = save_tiny(tmp_path / "run" / "another")
    record = run("evaluate", other, trained.data, "--eval-split", 6, "--output", tmp_path / "e")
    assert (record["pairs"], record["trained_on"]) == (6, 0)


# --- two models ----------------------------------------------------------------------------------------------------


def test_models_are_compared_on_the_pairs_that_both_take(model, data, tmp_path):
    short = save_tiny(tmp_path / "short", max_position_embeddings=24)
    arguments = (data, "--too-long", "leave-out", "--batch-size", 3)
    alone = run("evaluate", short, *arguments, "--output", tmp_path / "alone")
    assert 0 < alone["pairs"] < 12
    for first, second in ((model, short), (short, model)):
        record = run("evaluate", first, *arguments, "--against", second, "--output", tmp_path / "both")
        assert record["pairs"] == alone["pairs"]
        assert record["left_out"] == {first: 12 - 12 * (first == model) - alone["pairs"] * (first == short)} | {
            second: 12 - 12 * (second == model) - alone["pairs"] * (second == short)
        }
        for name in SCORES:
            value = {which: record["models"][which][name]["value"] for which in (first, second)}
            assert record["difference"][name]["value"] == pytest.approx(value[first] - value[second])
            assert value[short] == pytest.approx(alone["models"][short][name]["value"], rel=1e-5)
        assert evaluated(tmp_path / "both") == evaluated(tmp_path / "alone")


def test_models_that_take_no_pair_together(model, data, tmp_path):
    write_rows(Path(data), [row for row in ROWS if len(row["prompt"]) > 30])
    short = save_tiny(tmp_path / "short", max_position_embeddings=24)
    arguments = ("evaluate", model, data, "--against", short, "--too-long", "leave-out")
    assert "no pair" in run(*arguments, "--output", tmp_path / "e", status=2)["error"]


# --- nothing left, on either side ----------------------------------------------------------------------------------


def test_a_held_out_side_of_which_nothing_is_left_is_refused(model, data, tmp_path):
    """The answers of the held-out pairs are too long, which does not change the sides."""
    held_out = set(split_pairs(ROWS, 2, seed=0)[1])
    rows = [{**row, "chosen": " a long one" * 20} if i in held_out else row for i, row in enumerate(ROWS)]
    write_rows(Path(data), rows)
    short = ("--max-length", 60, "--too-long", "leave-out")
    arguments = ("train", model, data, *FAST, *short, "--output", tmp_path / "run", "--eval-split")
    said = run(*arguments, 2, status=2)
    assert "All 2 pairs that --eval-split 2 holds out were refused or left out" in said["error"]
    assert "give a larger one, or 0 to hold out none" in said["error"]
    assert not (tmp_path / "run").exists()
    for number, count in ((4, 2), (0, 0)):
        summary = run(*arguments[:-2], tmp_path / f"run{number}", "--eval-split", number)
        assert summary["held_out"] == count
        assert (summary["before"] is None) == (count == 0)


@pytest.mark.parametrize("numbers", [[0], [0, 0, 0], [0, 1]])
@pytest.mark.parametrize("asked", [0.1, 0.9, 1])
def test_data_that_cannot_be_split_say_so(numbers, asked, model, tmp_path):
    """One pair, one prompt, or one prompt that the tokenizer takes."""
    rows = [pair(number) for number in numbers]
    if len(set(numbers)) > 1:
        training, _ = split_pairs(rows, 1, seed=0)
        rows[training[0]]["chosen"] = " a long one" * 20
    data = write_rows(tmp_path / "few.jsonl", rows)
    arguments = ("train", model, data, *FAST, "--max-length", 60, "--too-long", "leave-out", "--output", tmp_path / "r")
    assert "give 0, to hold out none" in run(*arguments, "--eval-split", asked, status=2)["error"]
    assert run(*arguments, "--eval-split", 0)["pairs"] == (1 if len(set(numbers)) > 1 else len(numbers))


def test_a_smaller_split_is_advised_where_it_helps(model, tmp_path):
    data = write_rows(tmp_path / "few.jsonl", ROWS[:3])
    arguments = ("train", model, data, *FAST, "--output", tmp_path / "r", "--eval-split")
    assert "to train on: give a smaller one." in run(*arguments, 0.999, status=2)["error"]
    assert run(*arguments, 1)["pairs"] == 2


def test_held_out_pairs_of_a_file_are_not_trained_on_either(model, data, tmp_path, capsys):
    held = tmp_path / "held.jsonl"
    arguments = ["train", model, data, *FAST, "--eval-split", str(held), "--output", str(tmp_path / "run")]
    write_rows(held, ROWS[:3])
    said = run(*arguments, status=2)
    assert "All 3 pairs" in said["error"]
    assert "give other pairs, or 0" in said["error"]
    write_rows(held, [*ROWS[:3], pair(50), pair(51)])
    assert main([*arguments, "--json"]) == 0
    out, told = capsys.readouterr()
    summary = json.loads(out)
    assert (summary["pairs"], summary["held_out"]) == (12, 2)
    assert f"3 held-out pairs are left out: {data} has their prompts too, which are trained on." in told


# --- runs side by side ---------------------------------------------------------------------------------------------

SIDE_BY_SIDE = {"sweep": ("--betas", ["0", "0.5"]), "compare": ("--methods", ["sft", "orpo"])}
OTHERS = [pair(number) for number in range(50, 90)]


@pytest.fixture(params=SIDE_BY_SIDE)
def several(request, model, data, tmp_path, monkeypatch) -> Callable[..., dict[str, Any]]:
    """`sweep` or `compare` by so many values, all in this process."""
    monkeypatch.setattr(compare, "_train", lambda settings: train.train(settings, Console(stderr=True)))
    flag, values = SIDE_BY_SIDE[request.param]

    def several(count: int, *more: Any, **options: Any) -> dict[str, Any]:
        arguments = (request.param, model, data, *FAST, "--eval-split", 0.5, "--output", tmp_path / "runs")
        return run(*arguments, flag, ",".join(values[:count]), *more, **options)

    return several


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("begun", [1, 2])
def test_runs_over_other_held_out_pairs_are_not_set_beside_each_other(begun, several, data, tmp_path):
    several(begun)
    write_rows(Path(data), OTHERS)
    before = contents(tmp_path / "runs")
    said = several(2, "--resume", status=2)["error"]
    assert f"Since the run in {tmp_path / 'runs'}" in said
    assert "the pairs to train on" in said
    assert "go on with what it was started with, or choose another --output." in said
    assert contents(tmp_path / "runs") == before
    if begun == 1:
        write_rows(Path(data), ROWS)
        several(2, "--resume")


def test_data_that_change_between_two_runs(several, data, tmp_path, monkeypatch):
    train_once, begun = train.train, []

    def changing(settings: Any, *arguments: Any, **options: Any) -> Any:
        begun.append(settings.output)
        if len(begun) == 2:
            write_rows(Path(data), OTHERS)
        return train_once(settings, *arguments, **options)

    monkeypatch.setattr(train, "train", changing)
    monkeypatch.setattr(sweep, "train", changing)
    said = several(2, status=2)["error"]
    assert f"changed before the run in {begun[1]} began, which cannot be compared" in said
