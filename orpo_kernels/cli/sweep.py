"""`orpo-kernels sweep MODEL DATA`."""

from __future__ import annotations

import dataclasses
import shlex
from typing import TYPE_CHECKING, Any

from ..finetuning.settings import SweepSettings
from .console import Output, table
from .flags import command

if TYPE_CHECKING:
    from ..finetuning.search import Point


@command(SweepSettings)
def sweep(settings: SweepSettings, output: Output) -> None:
    """Find lambda (and the learning rate) on held-out pairs: train with each, and compare.

        orpo-kernels sweep HuggingFaceTB/SmolLM2-135M-Instruct pairs.jsonl --betas 0,0.1,0.5 --max-steps 100

    The flags are those of `train`. A sweep that was stopped goes on with --resume, and more lambdas can be added so.
    """
    with output.waiting("Loading torch and transformers …"):
        from ..finetuning import search
    points = search.sweep(settings, output.console)
    best = search.winner(points)
    again = shlex.join(search.command_line(settings, best))
    record = {
        "points": [dataclasses.asdict(point) for point in points],
        "winner": dataclasses.asdict(best),
        "command": again,
        "plot": str(settings.output / "sweep.png"),
    }
    output.result(record, _table(points, best), f"The winner's command line:\n{again}\nPlot: {record['plot']}")


def _table(points: list[Point], best: Point) -> Any:
    columns = ("lambda", "learning rate", "accuracy", "NLL", "log-odds", "seconds")
    shown = table(f"{best.held_out} held-out pairs, after training", *columns)
    for point in points:
        shown.add_row(
            f"{point.beta:g}",
            f"{point.lr:g}",
            f"{point.accuracy:.1%} ± {point.accuracy_error:.1%}",
            f"{point.nll_loss:.3f}",
            f"{point.log_odds:+.3f}",
            f"{point.seconds:.0f}",
            style="bold" if point is best else "",
        )
    return shown
