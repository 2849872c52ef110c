"""Every method on the same model, the same pairs and the same number of steps."""

from __future__ import annotations

import dataclasses
import gc
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
import transformers
from rich.console import Console

from ..errors import UserError
from ..methods import METHODS
from ..transformers import TokenizedPair
from . import plots
from .folder import RunFolder, write_whole
from .processes import check_alone
from .scoring import intervals, score
from .settings import CompareSettings, TrainSettings, train_arguments
from .setup import compute_dtype, load_model, load_split, load_tokenizer


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


def compare(settings: CompareSettings, console: Console) -> list[Outcome]:
    """Train by each method and evaluate, the model before training first.

    The runs are run folders in `settings.output`; `compare.json` and `compare.png` there show them together. Each run
    is a process of its own, so that its memory is its own. A comparison that was stopped goes on with `resume`.

    Raises `UserError` as `fit` does, and if nothing is held out.
    """
    check_alone("compare")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    tokenizer = load_tokenizer(settings.model)
    held_out = load_split(settings, tokenizer, console).held_out
    if not held_out:
        raise UserError(
            "Methods are compared by the held-out pairs, but none are held out: give --eval-split 0.1 or so."
        )
    names = settings.method_names()
    outcomes = [_evaluated("before", settings.model, settings, tokenizer, held_out)]
    for number, name in enumerate(names, start=1):
        console.print(f"Run {number} of {len(names)}: {name}")
        run = dataclasses.replace(settings, method=name, output=settings.output / name)
        summary = _train(run)
        costs = {
            "forward_passes": METHODS[name]().forward_passes,
            **_costs(settings.output / name),
            "reference_seconds": summary["reference_seconds"],
            "peak_memory_bytes": summary["peak_memory_bytes"],
            "output": str(run.output),
        }
        outcomes.append(_evaluated(name, str(run.output), settings, tokenizer, held_out, **costs))
        _write(outcomes, len(held_out), settings.output)
    return outcomes


def _train(settings: TrainSettings) -> dict[str, Any]:
    """`orpo-kernels train`, and its summary."""
    command = [sys.executable, "-m", "orpo_kernels", *train_arguments(settings), "--json"]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    lines = run.stdout.splitlines()
    said = json.loads(lines[-1]) if lines else {}
    if run.returncode:
        reason = said.get("error", f"it ended with status {run.returncode}.")
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
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = intervals(
        score(load_model(model, compute_dtype(settings.dtype)).to(device), tokenizer, held_out, settings.batch_size),
        seed=settings.seed,
    )
    gc.collect()
    return Outcome(method=name, accuracy=found["accuracy"], log_odds=found["log_odds"], nll=found["nll"], **costs)


def _write(outcomes: list[Outcome], held_out: int, folder: Path) -> None:
    record = {"held_out": held_out, "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]}
    write_whole(folder / "compare.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    plots.comparison(outcomes, folder / "compare.png")
