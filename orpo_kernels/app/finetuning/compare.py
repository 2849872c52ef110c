"""Every method on the same model, the same pairs and the same number of steps."""

from __future__ import annotations

import dataclasses
import gc
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

from rich.console import Console

from ...methods import METHODS
from ...transformers import TokenizedPair
from ..errors import UserError
from . import plots
from .children import run_child
from .folder import RunFolder, check_claim, claim, write_whole
from .inputs import check_inputs, check_unchanged, inputs_of
from .pretrained import load_tokenizer
from .processes import check_alone
from .records import to_json
from .remarks import say, silence_transformers
from .scoring import intervals, score_model
from .settings import CompareSettings, TrainSettings, train_arguments
from .setup import load_split
from .train import check_is_ours


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
    is a process of its own, so that its memory is its own. A comparison that was stopped goes on with `resume`. A run
    that has begun and fails is named, and the others go on.

    Raises `UserError` as `train` does for what cannot begin, if runs there were started with other pairs or another
    model, and if no run came to its end.
    """
    check_alone("compare")
    silence_transformers()
    check_claim(settings.output, "comparison")
    runs = [
        dataclasses.replace(settings, method=name, output=settings.output / name) for name in settings.method_names()
    ]
    _check_are_ours(runs)
    tokenizer = load_tokenizer(settings.model)
    _, training, held_out, _ = load_split(settings, tokenizer, console)
    inputs = inputs_of(settings.model, training, held_out)
    for run in runs:
        check_inputs(RunFolder(run.output), inputs)
    claim(settings.output, "comparison")
    before = _evaluated("before", settings.model, settings, tokenizer, held_out)
    found = Comparison(len(held_out), [before], [])
    for number, run in enumerate(runs, start=1):
        console.print(f"Run {number} of {len(runs)}: {run.method}")
        try:
            found.outcomes.append(_outcome(run, tokenizer, held_out))
        except UserError as error:
            if not RunFolder(run.output).evaluations.read():  # what cannot begin would not elsewhere, either
                raise
            found.failed.append(Failure(run.method, str(error), str(run.output)))
            say(console, str(error))
        else:
            check_unchanged(RunFolder(run.output), inputs)
        _write(found, settings.output)
    if len(found.outcomes) == 1:
        raise UserError(f"No run came to its end. {found.failed[0].reason}")
    return found


def _check_are_ours(runs: list[CompareSettings]) -> None:
    for run in runs:
        try:
            check_is_ours(run)
        except UserError as error:
            raise UserError(f"The run in {run.output} cannot begin: {error}") from error


def _outcome(run: CompareSettings, tokenizer: Any, held_out: list[TokenizedPair]) -> Outcome:
    summary = _train(run)
    costs = {
        "forward_passes": METHODS[run.method]().forward_passes,
        **_costs(run.output),
        "reference_seconds": summary["reference_seconds"],
        "peak_memory_bytes": summary["peak_memory_bytes"],
        "output": str(run.output),
    }
    return _evaluated(run.method, str(run.output), run, tokenizer, held_out, **costs)


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


def _costs(folder: Path) -> dict[str, Any]:
    steps = RunFolder(folder).metrics.read()
    return {
        "steps": len(steps),
        "tokens_per_step": mean(step["tokens"] for step in steps),
        "seconds_per_step": median(step["seconds"] for step in steps),
    }


def _evaluated(
    name: str, model: str, settings: CompareSettings, tokenizer: Any, held_out: list[TokenizedPair], **costs: Any
) -> Outcome:
    found = intervals(score_model(model, tokenizer, held_out, settings), seed=settings.seed)
    gc.collect()
    return Outcome(method=name, accuracy=found["accuracy"], log_odds=found["log_odds"], nll=found["nll"], **costs)


def _write(found: Comparison, folder: Path) -> None:
    write_whole(folder / "compare.json", to_json(dataclasses.asdict(found), indent=2) + "\n")
    if len(found.outcomes) > 1:
        plots.comparison(found.outcomes, folder / "compare.png")
