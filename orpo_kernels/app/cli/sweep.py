"""`orpo-kernels sweep MODEL DATA`."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Any

from ..finetuning.settings import SweepSettings, resuming_command
from .console import Output, table
from .flags import command

if TYPE_CHECKING:
    from ..finetuning.sweep import Point, Sweep

SHOWN = {
    "accuracy": ("accuracy", "{:.1%}", "{:+.1%}"),
    "log_odds": ("log-odds", "{:+.3f}", "{:+.3f}"),
    "nll": ("NLL", "{:.3f}", "{:+.3f}"),
}


@command(SweepSettings)
def sweep(settings: SweepSettings, output: Output) -> None:
    """Find lambda (and the learning rate) on held-out pairs: train with each, and compare.

        orpo-kernels sweep HuggingFaceTB/SmolLM2-135M-Instruct pairs.jsonl --betas 0,0.1,0.5 --max-steps 100

    The flags are those of `train`. A sweep that was stopped goes on with --resume, and more lambdas can be added so. A
    run that fails, as one that diverges, is named, and the others go on; exit status 2 if all fail.
    """
    with output.loading():
        from ..finetuning.processes import leave
        from ..finetuning.sweep import command_line, sweep, winner
    try:
        found = sweep(settings, output.console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"To go on: {shlex.join(resuming_command('sweep', settings))}") from None
    best = winner(found.points)
    again = shlex.join(command_line(settings, best))
    record = {**found.record(), "command": again, "plot": str(settings.output / "sweep.png")}
    output.result(record, _table(found, best), f"The winner's command line:\n{again}\nPlot: {record['plot']}")
    leave()


def _table(found: Sweep, best: Point) -> Any:
    title = f"{best.held_out} held-out pairs; differences to the least lambda, 95 % intervals"
    shown = table(title, "lambda", "lr", *(title for title, _, _ in SHOWN.values()))
    for point in found.points:
        cells = [_cell(point, name, form, signed) for name, (_, form, signed) in SHOWN.items()]
        shown.add_row(f"{point.beta:g}", f"{point.lr:g}", *cells, style="bold" if point is best else "")
    for run in found.failed:
        shown.add_row(f"{run.beta:g}", f"{run.lr:g}", "failed", style="red")
    if found.failed:
        reasons = (f"lambda {run.beta:g}, learning rate {run.lr:g}: {run.reason}" for run in found.failed)
        shown.caption = "\n".join(reasons)
    return shown


def _cell(point: Point, name: str, form: str, signed: str) -> str:
    value = form.format(getattr(point, name))
    if point.difference is None:
        return value
    of, low, high = (signed.format(point.difference[name][end]) for end in ("value", "low", "high"))
    return f"{value} ({of})\n{low} to {high}"
