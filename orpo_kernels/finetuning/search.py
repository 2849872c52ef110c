"""Runs side by side: which lambda, which learning rate."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..errors import UserError
from . import plots
from .fit import fit
from .folder import write_whole
from .settings import SweepSettings, TrainSettings, train_arguments


@dataclass(frozen=True)
class Point:
    """One run of a sweep, and its last evaluation on the held-out pairs."""

    beta: float
    lr: float
    accuracy: float
    nll_loss: float
    log_odds: float
    held_out: int
    seconds: float
    output: str

    @property
    def accuracy_error(self) -> float:
        """Standard error of the accuracy, of one success and one failure more, so that it is never 0."""
        share = (self.accuracy * self.held_out + 1) / (self.held_out + 2)
        return math.sqrt(share * (1 - share) / (self.held_out + 2))


def sweep(settings: SweepSettings, console: Console) -> list[Point]:
    """Train once for each pair of lambda and learning rate.

    The runs are folders in `settings.output` without a model; `sweep.json` and `sweep.png` there show them together.
    A sweep that was stopped goes on with `resume`: finished runs are read, the one that was under way is resumed.

    Raises `UserError` as `fit` does, and if nothing is held out.
    """
    grid = list(itertools.product(settings.beta_values(), settings.lr_values()))
    points: list[Point] = []
    for number, (beta, lr) in enumerate(grid, start=1):
        console.print(f"Run {number} of {len(grid)}: lambda {beta:g}, learning rate {lr:g}")
        output = settings.output / f"beta-{beta:g}_lr-{lr:g}"
        summary = fit(dataclasses.replace(settings, beta=beta, lr=lr, output=output), console, save_model=False)
        points.append(_point(summary))
        gc.collect()  # the model, before the next one is loaded
        _write(points, settings.output)
    return points


def _point(summary: dict[str, Any]) -> Point:
    after = summary["after"]
    if after is None or after["accuracy"] is None:
        raise UserError(f"No held-out pair of {summary['data']} could be rated: give a larger --eval-split.")
    return Point(
        beta=summary["beta"],
        lr=summary["lr"],
        accuracy=after["accuracy"],
        nll_loss=after["nll_loss"],
        log_odds=after["log_odds"],
        held_out=summary["held_out"],
        seconds=summary["seconds"],
        output=summary["output"],
    )


def _write(points: list[Point], folder: Path) -> None:
    record = {"points": [dataclasses.asdict(point) for point in points], "winner": dataclasses.asdict(winner(points))}
    write_whole(folder / "sweep.json", json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    plots.sweep(points, folder / "sweep.png")


def winner(points: list[Point]) -> Point:
    """Of the runs whose accuracy is within one standard error of the best, the one with the lowest NLL.

    (The one-standard-error rule of Breiman et al. 1984: what the held-out pairs cannot tell apart is told apart by what
    a large lambda costs.)
    """
    best = max(points, key=lambda point: point.accuracy)
    as_good = [point for point in points if point.accuracy >= best.accuracy - best.accuracy_error]
    return min(as_good, key=lambda point: point.nll_loss)


def command_line(settings: TrainSettings, best: Point) -> list[str]:
    """`orpo-kernels train` with the winner's lambda and learning rate, and all else as it was."""
    chosen = dataclasses.replace(settings, beta=best.beta, lr=best.lr, output=settings.output / "best", resume=False)
    return ["orpo-kernels", *train_arguments(chosen)]
