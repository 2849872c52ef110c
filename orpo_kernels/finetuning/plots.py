"""What is looked at rather than read."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: needs no display, and is nobody's global
from matplotlib.ticker import MaxNLocator

from .folder import write_whole
from .progress import SHOWN_OVER

if TYPE_CHECKING:
    from .comparison import Outcome
    from .scoring import Scores
    from .search import Point

PANELS = {"loss": "loss", "nll_loss": "NLL", "log_odds": "log-odds", "accuracy": "preference accuracy"}


def curves(steps: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]], path: Path) -> None:
    """Loss, NLL, log-odds and accuracy of the training batches, and of the held-out pairs."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True)
    for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
        at, values = _known(steps, name)
        axis.plot(at, values, color="tab:blue", alpha=0.3)
        axis.plot(at, _running_mean(values), color="tab:blue", label=f"training, mean of {SHOWN_OVER} steps")
        if evaluations:
            axis.plot(*_known(evaluations, name), "o--", color="tab:orange", label="held out")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes[0, 0].legend()
    for axis in axes[1]:
        axis.set_xlabel("step")
    save(figure, path)


def margins(scores: Mapping[str, Scores], path: Path) -> None:
    """How the margins of the pairs are spread, of one model or of several."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    bins = np.histogram_bin_edges(np.concatenate([one.margins for one in scores.values()]), bins=40)
    for name, one in scores.items():
        share = float((one.margins > 0).mean())
        axis.hist(one.margins, bins=list(bins), alpha=0.55, label=f"{name}: {share:.0%} above 0")
    axis.axvline(0, color="black", linewidth=1)
    axis.set_xlabel("margin: mean log-probability of the chosen answer's tokens minus that of the rejected one's")
    axis.set_ylabel("pairs")
    axis.legend()
    save(figure, path)


def sweep(points: Sequence[Point], path: Path) -> None:
    """Accuracy (with its standard error) and NLL on the held-out pairs against lambda, a line for a learning rate."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    smallest = min((point.beta for point in points if point.beta > 0), default=1.0)
    for lr in sorted({point.lr for point in points}):
        of_lr = sorted((point for point in points if point.lr == lr), key=lambda point: point.beta)
        betas, label = [point.beta for point in of_lr], f"learning rate {lr:g}"
        accuracies, errors = [point.accuracy for point in of_lr], [point.accuracy_error for point in of_lr]
        left.errorbar(betas, accuracies, yerr=errors, marker="o", capsize=3, label=label)
        right.plot(betas, [point.nll_loss for point in of_lr], "o-", label=label)
    for axis, title in ((left, "preference accuracy, held out"), (right, "NLL, held out")):
        axis.set_xscale("symlog", linthresh=smallest)  # has a place for 0
        axis.set_xlabel("lambda")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    right.legend()
    save(figure, path)


def comparison(outcomes: Sequence[Outcome], path: Path) -> None:
    """Accuracy and NLL on the held-out pairs against the time of a step, a point for a method."""
    before, *methods = outcomes
    figure = Figure(figsize=(9, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    panels = {"accuracy": "preference accuracy, held out", "nll": "NLL of the chosen answers, held out"}
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        axis.axhline(getattr(before, name)["value"], color="gray", linestyle="--", label="before training")
        for number, outcome in enumerate(methods):
            of = getattr(outcome, name)
            spread = [[of["value"] - of["low"]], [of["high"] - of["value"]]]
            axis.errorbar(outcome.seconds_per_step, of["value"], yerr=spread, fmt="o", capsize=3, color=f"C{number}")
            axis.annotate(outcome.method, (outcome.seconds_per_step, of["value"]), (6, 4), textcoords="offset points")
        axis.set_xlim(0, 1.2 * max(outcome.seconds_per_step for outcome in methods))  # room for the names
        axis.set_xlabel("seconds a step")
        axis.set_title(title)
        axis.grid(alpha=0.3)
        axis.legend()
    save(figure, path)


def _known(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    known = [record for record in records if record[name] is not None]
    return [record["step"] for record in known], [record[name] for record in known]


def _running_mean(values: Sequence[float]) -> list[float]:
    return [float(np.mean(values[max(0, i - SHOWN_OVER + 1) : i + 1])) for i in range(len(values))]


def save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())
