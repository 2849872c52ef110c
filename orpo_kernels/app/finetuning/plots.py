"""The pictures of runs, sweeps, comparisons, evaluations and inspections."""

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
    from .compare import Outcome
    from .scoring import Scores
    from .sweep import Point

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
        shown = name.lstrip("_").replace("$", r"\$")  # matplotlib would hide the one, and set the other as a formula
        axis.hist(one.margins, bins=list(bins), alpha=0.55, label=f"{shown}: {share:.0%} above 0")
    axis.axvline(0, color="black", linewidth=1)
    axis.set_xlabel("margin: mean log-probability of the chosen answer's tokens minus that of the rejected one's")
    axis.set_ylabel("pairs")
    axis.legend()
    save(figure, path)


def lengths(counts: Mapping[str, np.ndarray], limit: int, path: Path) -> None:
    """How the lengths (pairs,) of what each pair is made of are spread; `limit` is where pairs are cut."""
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    for axis, (name, values) in zip(figure.subplots(1, len(counts)), counts.items(), strict=True):
        axis.hist(values, bins=40, color="tab:blue")
        axis.set_title(f"{name}\nmedian {np.median(values):.0f}", fontsize="medium")
        axis.set_xlabel("tokens")
        axis.set_ylim(bottom=0)
    axis.axvline(limit, color="tab:red", linestyle="--", label=f"max. length {limit}")
    axis.legend(fontsize="small")
    figure.axes[0].set_ylabel("pairs")
    save(figure, path)


def sweep(points: Sequence[Point], path: Path) -> None:
    """Accuracy, log-odds and NLL on the held-out pairs against lambda, a line for a learning rate.

    The bars are the 95 % intervals of the differences to the least lambda: one that stays clear of the dashed line is
    more than chance.
    """
    figure = Figure(figsize=(12, 4.3), layout="constrained")
    panels = {"accuracy": "preference accuracy", "log_odds": "log-odds", "nll": "NLL of the chosen answers"}
    axes = figure.subplots(1, len(panels))
    lambdas = sorted({point.beta for point in points})  # evenly spaced, as powers would be, but with a place for 0
    for axis, (name, title) in zip(axes, panels.items(), strict=True):
        for number, lr in enumerate(sorted({point.lr for point in points})):
            of_lr = sorted((point for point in points if point.lr == lr), key=lambda point: point.beta)
            at, values = [lambdas.index(point.beta) for point in of_lr], [getattr(point, name) for point in of_lr]
            spreads = [_spread(point.difference[name]) if point.difference else (0.0, 0.0) for point in of_lr]
            label, color = f"learning rate {lr:g}", f"C{number}"
            axis.errorbar(
                at, values, yerr=list(zip(*spreads, strict=True)), marker="o", capsize=3, color=color, label=label
            )
            axis.axhline(values[0], color=color, linestyle="--", linewidth=1)
        axis.set_xticks(range(len(lambdas)), [f"{beta:g}" for beta in lambdas])
        axis.set_xlabel("lambda")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.suptitle("Held-out pairs. Bars: 95 % interval of the difference to the least lambda", fontsize="medium")
    save(figure, path)


def _spread(of: dict[str, float]) -> tuple[float, float]:
    """How far below and above a value its interval ends."""
    return of["value"] - of["low"], of["high"] - of["value"]


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
            at, color, (below, above) = outcome.seconds_per_step, f"C{number}", _spread(of)
            axis.errorbar(
                at, of["value"], yerr=[[below], [above]], fmt="o", capsize=3, color=color, label=outcome.method
            )
        axis.set_xlim(0, 1.1 * max(outcome.seconds_per_step for outcome in methods))
        axis.set_xlabel("seconds a step")
        axis.set_title(title)
        axis.grid(alpha=0.3)
    axes[0].legend()
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
