"""Every method on the same model, the same pairs and the same number of steps."""

from __future__ import annotations

import dataclasses
import json
import sys
from dataclasses import dataclass
from functools import partial
from statistics import mean, median
from typing import Any

from rich.console import Console

from ...methods import METHODS
from ..errors import UserError
from . import plots
from .children import run_child
from .folder import RunFolder, write_json
from .processes import check_alone
from .scoring import intervals, score_model
from .settings import CompareSettings, TrainSettings, train_arguments
from .several import Shared, begin, outcomes


@dataclass(frozen=True)
class Outcome:
    """What a method made of the model, and what that cost.

    Attributes:
        method: its name, or "before" for the model as it was, which cost nothing.
        accuracy, log_odds: of the held-out pairs by length-averaged log-probabilities, whatever the method looks at;
            value, and low and high end of the 95 % interval.
        nll: nats a token of the held-out chosen answers, the same way.
        forward_passes: sequences that run forward for each pair that is trained on.
        tokens_per_step: that ran through the model in a step, padding included; without the reference's.
        seconds_per_step: the median.
        reference_seconds: of the reference's log-probabilities, once.
        peak_memory_bytes: of the process, or on the GPU.
    """

    method: str
    accuracy: dict[str, float]
    log_odds: dict[str, float]
    nll: dict[str, float]
    forward_passes: int = 0
    steps: int = 0
    tokens_per_step: float = 0.0
    seconds_per_step: float = 0.0
    reference_seconds: float = 0.0
    peak_memory_bytes: int = 0
    output: str = ""


@dataclass(frozen=True)
class Failure:
    """A method whose run began and did not come to its end, and why."""

    method: str
    reason: str
    output: str


@dataclass
class Comparison:
    """What became of the methods; the first outcome is the model before training."""

    held_out: int
    outcomes: list[Outcome]
    failed: list[Failure]


def compare(settings: CompareSettings, console: Console) -> Comparison:
    """Train by each method and evaluate, the model before training first.

    The runs are run folders in `settings.output`; `compare.json` and `compare.png` there show them together. Each run
    is a process of its own, so that its memory is its own. A comparison that was stopped goes on with `resume`.

    Raises `UserError` as `several.begin` and `several.outcomes` do.
    """
    check_alone("compare")
    runs = [
        dataclasses.replace(settings, method=name, output=settings.output / name) for name in settings.method_names()
    ]
    shared = begin("comparison", settings, runs, console)
    before = _evaluated("before", settings.model, settings, shared)
    found = Comparison(len(shared.held_out), [before], [])
    for run, outcome, reason in outcomes(runs, shared, lambda run: run.method, partial(_outcome, shared), console):
        if outcome is None:
            found.failed.append(Failure(run.method, reason, str(run.output)))
        else:
            found.outcomes.append(outcome)
        write_json(settings.output / "compare.json", dataclasses.asdict(found))
        if len(found.outcomes) > 1:
            plots.comparison(found.outcomes, settings.output / "compare.png")
    return found


def _outcome(shared: Shared, run: CompareSettings) -> Outcome:
    summary, steps = _train(run), RunFolder(run.output).metrics.read()
    costs = {
        "forward_passes": METHODS[run.method]().forward_passes,
        "steps": len(steps),
        "tokens_per_step": mean(step["tokens"] for step in steps),
        "seconds_per_step": median(step["seconds"] for step in steps),
        "reference_seconds": summary["reference_seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "output": str(run.output),
    }
    return _evaluated(run.method, str(run.output), run, shared, **costs)


def _train(settings: TrainSettings) -> dict[str, Any]:
    """`orpo-kernels train`, and its summary."""
    command = [sys.executable, "-m", "orpo_kernels.app.cli.dependent", *train_arguments(settings), "--json"]
    status, out = run_child(command)
    lines = out.splitlines()
    said = json.loads(lines[-1]) if lines else {}
    if status:
        reason = said.get("error", f"it ended with status {status}.")
        raise UserError(f"The run in {settings.output} failed: {reason}")
    return said


def _evaluated(name: str, model: str, settings: CompareSettings, shared: Shared, **costs: Any) -> Outcome:
    found = intervals(score_model(model, shared.tokenizer, shared.held_out, settings), seed=settings.seed)
    return Outcome(method=name, accuracy=found["accuracy"], log_odds=found["log_odds"], nll=found["nll"], **costs)
