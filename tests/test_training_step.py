"""The benchmark of a whole training step runs, and measures what it says."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks print with rich: pip install 'orpo-kernels[bench]'")
pytest.importorskip("trl.experimental.orpo")

from rich.console import Console
from rich.progress import Progress

from benchmarks.contest import training_step
from benchmarks.contest.training_step import OURS, PARTS, SHARED, TRL, Bench, Case, Contestant, Result

from .training import chat_examples, tiny, tokenizer

CASE = Case("tiny", "none", max_length=60, pairs=2)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(tiny(), tokenizer(), chat_examples(), CASE, "float32")


@pytest.mark.draws
def test_everyone_takes_the_same_steps(bench, tmp_path):
    weights = [parameter.clone() for parameter in bench.model.parameters()]
    with Progress(console=Console(file=io.StringIO())) as progress:
        result = training_step.measure(bench, "float32", rounds=3, progress=progress)
    assert all(torch.equal(old, new) for old, new in zip(weights, bench.model.parameters(), strict=True))
    assert {contestant.name for contestant in result.contestants} == {TRL, OURS, SHARED}
    for contestant in result.contestants:
        assert len(contestant.steps) == 3
        assert len({step.loss for step in contestant.steps}) == 3
        for step in contestant.steps:
            assert min(step.body, step.head_and_loss, step.optimizer) > 0

    shown = io.StringIO()
    Console(file=shown, width=200).print(training_step.table(result))
    assert TRL in shown.getvalue()
    with_memory = Result(result.case, result.dtype, [replace(one, peak_bytes=2**30) for one in result.contestants])
    for name, results in {"time.png": [result], "both.png": [with_memory, with_memory]}.items():
        training_step.plot(results, tmp_path / "runs" / name)
        assert (tmp_path / "runs" / name).stat().st_size > 0
    written = json.loads(json.dumps(training_step.as_json([result])))
    assert set(written["medians"][0][result.contestants[0].name]) == {"seconds", *PARTS}


def test_no_pair_is_truncated(bench):
    for index in range(bench.batches):
        assert training_step._width(bench.batch(TRL, index)) <= CASE.max_length
    assert 0 < bench.batches < len(chat_examples()) // 2
    widths = [training_step._width(bench.batch(OURS, index)) for index in range(bench.batches)]
    assert widths[bench.widest()] == max(widths)


def test_the_parts_are_where_the_time_is(bench, monkeypatch):
    """By a clock that only the body moves: one hour in its forward, one in its backward."""
    hours = [0]
    monkeypatch.setattr(training_step, "time", SimpleNamespace(perf_counter=lambda: float(hours[0])))

    class Wait(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            hours[0] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            hours[0] += 1
            return grad

    handle = bench.model.model.layers[0].register_forward_hook(lambda module, args, output: Wait.apply(output))
    for name in bench.names:
        bench.step(name, 0)  # the probe of a model runs the body, too
        step = bench.step(name, 0)
        assert (step.body, step.head_and_loss, step.optimizer) == (2, 0, 0)
    handle.remove()


def test_another_loss_is_not_timed():
    with pytest.raises(RuntimeError, match=r"The loss of ours is 1\.001"):
        training_step.check_losses({TRL: 1.0, OURS: 1.001}, 1e-4)
    with pytest.raises(RuntimeError, match="nan"):
        training_step.check_losses({TRL: 1.0, OURS: float("nan")}, 1e-4)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set is read as Linux shows it")
def test_the_peak_is_that_of_what_ran_inside():
    """In a process of its own: what other tests have left and what they give back would count."""
    script = """
import torch
from benchmarks.contest.process import ProcessPeak
torch.ones(2**26).sum()  # a quarter of a GiB, before
with ProcessPeak(torch.device("cpu")) as nothing:
    pass
with ProcessPeak(torch.device("cpu")) as peak:
    torch.ones(2**25).sum()
print((peak.nbytes - nothing.nbytes) / 2**30)
"""
    run = subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[1], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert 0.1 < float(run.stdout) < 0.15


def test_the_peak_of_steps(bench):
    assert training_step.peak_of_steps(bench, OURS) > 0


def test_memory_is_of_a_process_each(monkeypatch):
    monkeypatch.setattr(training_step, "peak_of_a_process", lambda name, *_: {TRL: 3, OURS: 2}[name])
    result = Result("case", "float32", [Contestant(TRL, []), Contestant(OURS, [])])
    with Progress(console=Console(file=io.StringIO())) as progress:
        measured = training_step.with_memory(result, "llmbar", "float32", 2, progress)
    assert [contestant.peak_bytes for contestant in measured.contestants] == [3, 2]


def test_quick_is_quick():
    options = training_step._options(["--quick"])
    assert (options.case, options.dtype, options.rounds, options.memory) == (["llmbar"], ["float32"], 3, False)
