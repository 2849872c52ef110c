"""`orpo-kernels compare`, and `train` by the other methods: a tiny random model, each run a process of its own."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from orpo_kernels.app.cli import main
from orpo_kernels.app.finetuning import compare
from orpo_kernels.app.finetuning.settings import TrainSettings, train_arguments
from orpo_kernels.app.finetuning.train import train
from orpo_kernels.transformers import causal_lm_answers

from .training import chat_examples, tiny, tokenizer

FAST = ("--batch-size", "2", "--lr", "1e-3", "--eval-split", "4", "--max-length", "64", "--max-steps", "4")
ALL = ["sft", "orpo", "dpo", "simpo", "cpo"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("models") / "tiny"
    tiny(initializer_range=0.02).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in chat_examples(20)))
    return str(path)


@pytest.fixture
def run(capsys) -> Callable[..., Any]:
    """A command line with --json in this process; returns what it prints for machines."""

    def run(*arguments: Any, status: int = 0) -> Any:
        capsys.readouterr()
        assert main([*map(str, arguments), "--json"]) == status, capsys.readouterr().err
        return json.loads(capsys.readouterr().out)

    return run


@pytest.mark.parametrize("method", ALL)
def test_train_by_every_method(method, run, model, data, tmp_path):
    summary = run("train", model, data, "--output", tmp_path / "run", *FAST, "--method", method)
    assert summary["method"] == method
    assert summary["beta"] == {"sft": 1.0, "simpo": 2.0}.get(method, 0.1)
    if method in ("dpo", "simpo"):  # what they learn of preferences need not hold for the held-out pairs
        assert summary["after"]["loss"] != summary["before"]["loss"]
    else:
        assert summary["after"]["loss"] < summary["before"]["loss"]
    if method == "dpo":  # at first the model is its own reference
        assert summary["before"]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert (summary["reference_seconds"] > 0) == (method == "dpo")
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(steps) == 4
    assert (steps[0]["log_odds"] is None) == (method == "sft")


def test_interrupted_in_the_reference_it_says_how_to_go_on(run, model, data, tmp_path, monkeypatch, capsys):
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


def test_options_of_another_method_are_refused(run, model, data, tmp_path):
    said = run("train", model, data, "--output", tmp_path, "--gamma", 1, status=2)
    assert "--gamma is SimPO's, but the method is orpo" in said["error"]
    said = run("compare", model, data, "--output", tmp_path, "--methods", "sft,ppo", status=2)
    assert "--methods has 'ppo', but the methods are orpo, sft" in said["error"]


@pytest.mark.draws
def test_compare_in_one_table_and_one_plot(run, model, data, tmp_path, monkeypatch, capsys):
    """All methods, in this process; then once more, when everything is there already."""
    trained: list[str] = []

    def here(settings: TrainSettings) -> dict[str, Any]:
        trained.append(settings.method)
        from rich.console import Console

        return train(settings, Console(stderr=True))

    monkeypatch.setattr(compare, "_train", here)
    record = run("compare", model, data, "--output", tmp_path / "c", *FAST)
    outcomes = {outcome["method"]: outcome for outcome in record["outcomes"]}
    assert list(outcomes) == ["before", *ALL]
    assert trained == ALL
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
    assert Path(record["plot"]).read_bytes().startswith(b"\x89PNG")
    assert len(json.loads((tmp_path / "c" / "compare.json").read_text())["outcomes"]) == 6

    assert main(["compare", model, data, "--output", str(tmp_path / "c"), *FAST, "--resume"]) == 0
    shown = capsys.readouterr().out
    assert "NLL" in shown
    assert all(name in shown for name in ("before", *ALL))
    said = run("compare", model, data, "--output", tmp_path / "c", *FAST, status=2)
    assert "holds a run already" in said["error"]


def test_each_run_is_a_process_and_what_fails_in_it_is_said(run, model, data, tmp_path):
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
