"""`orpo-kernels compare MODEL DATA`."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

from ..finetuning.settings import CompareSettings, resuming_command
from .console import Output, interval, table
from .flags import command

if TYPE_CHECKING:
    from ..finetuning.compare import Comparison


COLUMNS = (
    *("method", "prefers the chosen", "log-odds", "NLL of the chosen", "forward\npasses a pair", "tokens\na step"),
    *("s a step", "reference, s", "peak GiB"),
)


@command(CompareSettings)
def compare(settings: CompareSettings, output: Output) -> None:
    """Train by SFT, ORPO, DPO, SimPO and CPO: the same model, pairs and steps, side by side.

        orpo-kernels compare HuggingFaceTB/SmolLM2-135M-Instruct pairs.jsonl --max-steps 100

    The flags are those of `train`; each method has its own default options. A comparison that was stopped goes on with
    --resume, and more methods can be added so. A run that fails is named, and the others go on; exit status 2 if all
    fail.
    """
    with output.loading():
        from ..finetuning.compare import compare
    try:
        found = compare(settings, output.console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"To go on: {shlex.join(resuming_command('compare', settings))}") from None
    plot = str(settings.output / "compare.png")
    output.result({**dataclasses.asdict(found), "plot": plot}, _table(found), f"Plot: {plot}")


def _table(found: Comparison) -> Any:
    shown = table("Held-out pairs (with 95 % intervals), and what training cost", *COLUMNS)
    for outcome in found.outcomes:
        cells = [
            interval(outcome.accuracy, "{:.1%}"),
            interval(outcome.log_odds, "{:+.3f}"),
            interval(outcome.nll, "{:.3f}"),
        ]
        if outcome.steps:
            cells += [
                str(outcome.forward_passes),
                f"{outcome.tokens_per_step:.0f}",
                f"{outcome.seconds_per_step:.2f}",
                f"{outcome.reference_seconds:.1f}" if outcome.reference_seconds else "",
                f"{outcome.peak_memory_bytes / 2**30:.2f}",
            ]
        shown.add_row(outcome.method, *cells)
    for failure in found.failed:
        shown.add_row(failure.method, "failed", style="red")
    if found.failed:
        shown.caption = "\n".join(f"{failure.method}: {failure.reason}" for failure in found.failed)
    return shown
