"""The benchmark of a whole training step runs, and measures what it says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks print with rich: pip install 'orpo-kernels[bench]'")
pytest.importorskip("trl.experimental.orpo")

from rich.console import Console
from rich.progress import Progress

from benchmarks.contest import training_step
from benchmarks.contest.training_step import OURS, PARTS, SHARED, TRL, Bench, Case
from benchmarks.report import plots, tables

from .processes import python
from .training import chat_examples, tiny, tokenizer

CASE = Case("tiny", "none", max_length=60, pairs=2)


@pytest.fixture(scope="module")
def bench() -> Bench:
    return Bench(tiny(), tokenizer(), chat_examples(), CASE, "float32")


@pytest.mark.draws
def test_everyone_takes_the_same_steps(bench, tmp_path):
    weights = [parameter.clone() for parameter in bench.model.parameters()]
    with Progress(console=Console(file=io.StringIO())) as progress:
        record = training_step.measure(bench, "float32", rounds=3, progress=progress)
    assert all(torch.equal(old, new) for old, new in zip(weights, bench.model.parameters(), strict=True))
    assert {one["name"] for one in record["contestants"]} == {TRL, OURS, SHARED}
    for one in record["contestants"]:
        assert len(one["steps"]) == 3
        assert len({step["loss"] for step in one["steps"]}) == 3
        assert min(step[part] for step in one["steps"] for part in PARTS) > 0

    shown = io.StringIO()
    Console(file=shown, width=200).print(tables.step_sheet(record).rich())
    assert TRL in shown.getvalue()
    cases = {"step/tiny/float32": json.loads(json.dumps(record))}
    plots.step(cases).savefig(tmp_path / "step.png")
    assert (tmp_path / "step.png").stat().st_size > 0


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
    assert 0.1 < float(python("-c", script)) < 0.15


def test_the_peak_of_steps(bench):
    assert training_step.peak_of_steps(bench, OURS) > 0


def test_memory_is_of_a_process_each(monkeypatch):
    monkeypatch.setattr(training_step, "last_line", lambda module, option, name, *_: {TRL: "3", OURS: "2"}[name])
    record = {"dtype": "float32", "contestants": [{"name": TRL}, {"name": OURS}]}
    with Progress(console=Console(file=io.StringIO())) as progress:
        training_step.add_memory(record, "llmbar", 2, progress)
    assert [one["peak_bytes"] for one in record["contestants"]] == [3, 2]


def test_quick_is_quick():
    options = training_step._options(["--quick"])
    assert (options.case, options.dtype, options.rounds, options.memory) == (["llmbar"], ["float32"], 3, False)
