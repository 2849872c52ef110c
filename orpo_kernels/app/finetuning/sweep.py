"""Runs side by side: which lambda, which learning rate."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.console import Console

from ..errors import Diverged, UserError
from . import plots
from .folder import RunFolder, write_json, write_whole
from .pretrained import compute_dtype
from .processes import writes
from .scoring import Scores, intervals, score
from .settings import SweepSettings, train_arguments
from .several import begin, outcomes
from .train import Trained, train

COMPARED = ("accuracy", "log_odds", "nll")


@dataclass(frozen=True)
class Point:
    """One run of a sweep, and what became of the held-out pairs.

    Attributes:
        accuracy: the share of pairs whose chosen answer has the higher mean log-probability.
        log_odds: mean over pairs.
        nll: nats a token of the chosen answers.
        difference: those three minus those of the run with the least lambda at the same learning rate, each with the
            low and high end of its 95 % interval; None for that run itself.
        as_good: whether the accuracy is within one standard error of the best run's.
    """

    beta: float
    lr: float
    accuracy: float
    log_odds: float
    nll: float
    difference: dict[str, dict[str, float]] | None
    as_good: bool
    held_out: int
    seconds: float
    output: str


@dataclass(frozen=True)
class Failure:
    """A run that began and did not come to its end, and why."""

    beta: float
    lr: float
    reason: str
    output: str


@dataclass
class Sweep:
    """What became of the runs."""

    points: list[Point]
    failed: list[Failure]

    def record(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "winner": dataclasses.asdict(winner(self.points)) if self.points else None}


def sweep(settings: SweepSettings, console: Console) -> Sweep:
    """Train once for each pair of lambda and learning rate.

    The runs are folders in `settings.output` without a model; `sweep.json` and `sweep.png` there show them together.
    A sweep that was stopped goes on with `resume`: finished runs are read, the one that was under way is resumed.

    Raises `UserError` as `several.begin` and `several.outcomes` do.
    """
    grid = [_run(settings, *values) for values in itertools.product(settings.beta_values(), settings.lr_values())]
    shared = begin("sweep", settings, grid, console)
    finished: list[tuple[dict[str, Any], Scores]] = []
    found = Sweep([], [])

    def one(run: SweepSettings) -> tuple[dict[str, Any], Scores]:
        return train(run, console, keep=_keep_scores), _scores(RunFolder(run.output))

    for run, outcome, reason in outcomes(grid, shared, _named, one, console):
        if outcome is None:
            found.failed.append(Failure(run.beta, run.peak_lr, reason, str(run.output)))
        else:
            finished.append(outcome)
            found.points = side_by_side(finished, settings.seed)
        if writes(settings.output):
            write_json(settings.output / "sweep.json", found.record())
            if found.points:
                plots.sweep(found.points, settings.output / "sweep.png")
    return found


def _run(settings: SweepSettings, beta: float, lr: float) -> SweepSettings:
    output = settings.output / f"beta-{beta:g}_lr-{lr:g}"
    return dataclasses.replace(settings, beta=beta, lr=lr, lrs="", output=output)


def _named(run: SweepSettings) -> str:
    return f"lambda {run.beta:g}, learning rate {run.lr:g}"


def _keep_scores(trained: Trained) -> None:
    """Keep how the model rates each held-out pair: runs are compared pair by pair."""
    dtype, device = compute_dtype(trained.settings.dtype), trained.model.device.type
    with torch.autocast(device, dtype, enabled=dtype is not torch.float32):
        try:
            scores = score(trained.model, trained.tokenizer, trained.held_out, trained.settings.batch_size)
        except Diverged as error:  # of which the other processes, if there are any, do not know
            raise UserError(f"{error} Give a smaller --lr.") from error
    columns = {name: values.tolist() for name, values in vars(scores).items()}
    write_whole(trained.folder.scores, json.dumps(columns) + "\n")


def _scores(folder: RunFolder) -> Scores:
    if not folder.scores.exists():
        raise UserError(f"The run in {folder.path} is none of a sweep: it has no {folder.scores.name}. Move it away.")
    columns = json.loads(folder.scores.read_text(encoding="utf-8"))
    return Scores(**{name: np.array(values) for name, values in columns.items()})


def side_by_side(runs: Sequence[tuple[dict[str, Any], Scores]], seed: int = 0) -> list[Point]:
    """The runs (summary, scores of the same held-out pairs) as points."""
    best = max((scores for _, scores in runs), key=lambda scores: scores.metrics()["accuracy"])
    points = []
    for summary, scores in runs:
        least, base = min((run for run in runs if run[0]["lr"] == summary["lr"]), key=lambda run: run[0]["beta"])
        metrics, difference = scores.metrics(), None
        if least is not summary:
            found = intervals(scores, base, seed)
            difference = {name: found[name] for name in COMPARED}
        values: dict[str, Any] = {name: float(metrics[name]) for name in COMPARED}
        point = Point(
            **values,
            **{name: summary[name] for name in ("beta", "lr", "seconds", "output")},
            difference=difference,
            as_good=_within_one_error(scores, best),
            held_out=len(scores.log_odds),
        )
        points.append(point)
    return points


def _within_one_error(scores: Scores, best: Scores) -> bool:
    """Whether the accuracy falls short of the best by no more than one standard error of that difference.

    Of paired shares, with one pair more for either side, so that the error is never 0 (Bonett and Price 2012, Adjusted
    Wald confidence interval for a difference of binomial proportions based on paired data).
    """
    ours, theirs = scores.margins > 0, best.margins > 0
    lost, won, pairs = (theirs & ~ours).sum() + 1, (ours & ~theirs).sum() + 1, len(ours) + 2
    difference = (lost - won) / pairs
    error = math.sqrt(((lost + won) / pairs - difference**2) / pairs)
    return bool(difference <= error)


def winner(points: list[Point]) -> Point:
    """Of the runs that are as good as the best, the one with the lowest NLL.

    (The one-standard-error rule of Breiman et al. 1984: what the held-out pairs cannot tell apart is told apart by what
    a large lambda costs.)
    """
    return min((point for point in points if point.as_good), key=lambda point: point.nll)


def command_line(settings: SweepSettings, best: Point) -> list[str]:
    """`orpo-kernels train` with the winner's lambda and learning rate, and all else as it was."""
    output = settings.output / "best"
    chosen = dataclasses.replace(settings, beta=best.beta, lr=best.lr, lrs="", output=output, resume=False)
    return ["orpo-kernels", *train_arguments(chosen)]
