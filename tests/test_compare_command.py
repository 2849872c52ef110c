"""`orpo-kernels compare`, and `train` by the other methods, with a tiny random model."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from rich.console import Console

from orpo_kernels.app.cli import main
from orpo_kernels.app.finetuning import compare, plots
from orpo_kernels.app.finetuning.settings import TrainSettings, train_arguments
from orpo_kernels.app.finetuning.train import train
from orpo_kernels.transformers import causal_lm_answers

from .commands import records, run, write_chats

FAST = ("--batch-size", "2", "--lr", "1e-3", "--eval-split", "4", "--max-length", "64", "--max-steps", "4")
ALL = ["sft", "orpo", "dpo", "simpo", "cpo"]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    return write_chats(tmp_path_factory.mktemp("data") / "pairs.jsonl", 20)


def in_this_process(settings: TrainSettings) -> dict[str, Any]:
    return train(settings, Console(stderr=True))


@pytest.fixture(scope="module")
def compared(model, data, tmp_path_factory) -> tuple[Path, dict[str, Any]]:
    """A comparison of all methods, in this process: its folder and what it says."""
    folder = tmp_path_factory.mktemp("compared") / "c"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare, "_train", in_this_process)
        patch.setattr(plots, "curves", lambda *_: None)
        said = run("compare", model, data, "--output", folder, *FAST)
    return folder, said


@pytest.mark.parametrize("method", ALL)
def test_train_by_every_method(method, compared):
    folder = compared[0] / method
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["method"] == method
    assert summary["beta"] == {"sft": 1.0, "simpo": 2.0}.get(method, 0.1)
    if method in ("dpo", "simpo"):  # what they learn of preferences need not hold for the held-out pairs
        assert summary["after"]["loss"] != summary["before"]["loss"]
    else:
        assert summary["after"]["loss"] < summary["before"]["loss"]
    if method == "dpo":  # at first the model is its own reference
        assert summary["before"]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (summary["reference_seconds"] > 0) == (method == "dpo")
    steps = records(folder)
    assert len(steps) == 4
    assert (steps[0]["log_odds"] is None) == (method == "sft")


def test_interrupted_in_the_reference_it_says_how_to_go_on(model, data, tmp_path, monkeypatch, capsys):
    """Nothing was trained, so the folder holds no run to be resumed, but what the reference has said is kept."""
    arguments = ("train", model, data, "--output", tmp_path / "run", *FAST, "--method", "dpo")
    calls: list[int] = []

    def stop(*args: Any, **batch: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return causal_lm_answers(*args, **batch)

    with monkeypatch.context() as patch:
        patch.setattr("orpo_kernels.transformers.reference_model.causal_lm_answers", stop)
        assert main([*map(str, arguments)]) == 130
    told = capsys.readouterr().out.replace("\n", " ")
    assert "Nothing was trained yet: give the same command again." in told
    monkeypatch.setattr("orpo_kernels.transformers.reference_model.causal_lm_answers", stop)
    assert run(*arguments)["before"]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert len(calls) == 4 + 5 + 2  # of 8 batches to train on, and 2 held out


def test_options_of_another_method_are_refused(model, data, tmp_path):
    said = run("train", model, data, "--output", tmp_path, "--gamma", 1, status=2)
    assert "--gamma is SimPO's, but the method is orpo" in said["error"]
    said = run("compare", model, data, "--output", tmp_path, "--methods", "sft,ppo", status=2)
    assert "--methods has 'ppo', but the methods are orpo, sft" in said["error"]


@pytest.mark.draws
def test_compare_in_one_table_and_one_plot(compared, model, data, monkeypatch, capsys):
    """Then once more, when everything is there already."""
    monkeypatch.setattr(compare, "_train", in_this_process)
    folder, record = compared
    outcomes = {outcome["method"]: outcome for outcome in record["outcomes"]}
    assert list(outcomes) == ["before", *ALL]
    passes = {name: outcomes[name]["forward_passes"] for name in ALL}
    assert passes == {"sft": 1, "orpo": 2, "dpo": 4, "simpo": 2, "cpo": 2}
    assert outcomes["sft"]["tokens_per_step"] < outcomes["orpo"]["tokens_per_step"]
    assert outcomes["dpo"]["tokens_per_step"] == outcomes["orpo"]["tokens_per_step"]
    for name in ALL:
        assert outcomes[name]["steps"] == 4
        assert outcomes[name]["seconds_per_step"] > 0
        assert outcomes[name]["accuracy"]["low"] <= outcomes[name]["accuracy"]["value"] <= 1
        assert outcomes[name]["log_odds"]["value"] != outcomes["before"]["log_odds"]["value"]
    assert outcomes["sft"]["nll"]["value"] < outcomes["before"]["nll"]["value"]
    assert len(json.loads((folder / "compare.json").read_text())["outcomes"]) == 6

    assert main(["compare", model, data, "--output", str(folder), *FAST, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "NLL" in shown
    assert all(name in shown for name in ("before", *ALL))
    assert Path(record["plot"]).read_bytes().startswith(b"\x89PNG")
    said = run("compare", model, data, "--output", folder, *FAST, status=2)
    assert "holds a run already" in said["error"]


def test_each_run_is_a_process_and_what_fails_in_it_is_said(model, data, tmp_path):
    record = run("compare", model, data, "--output", tmp_path / "c", *FAST, "--methods", "dpo")
    before, dpo = record["outcomes"]
    assert (before["method"], dpo["method"]) == ("before", "dpo")
    assert dpo["peak_memory_bytes"] > 0
    assert dpo["reference_seconds"] > 0
    said = run("compare", model, data, "--output", tmp_path / "c", *FAST, "--methods", "dpo", status=2)
    assert "The run in" in said["error"]
    assert "holds a run already" in said["error"]


def test_the_arguments_of_a_run_say_all_of_it(data, tmp_path):
    settings = TrainSettings(
        model="m", data=data, output=tmp_path, method="simpo", gamma=2.0, prompt_nll=False, lora=True
    )
    words = train_arguments(settings)
    assert words[:3] == ["train", "m", data]
    for expected in (["--method", "simpo"], ["--gamma", "2.0"], ["--no-prompt-nll"], ["--lora"], ["--output"]):
        assert all(word in words for word in expected)
    assert "--beta" not in words
