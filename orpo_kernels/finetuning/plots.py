"""What is looked at rather than read."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure  # not pyplot: needs no display, and is nobody's global
from matplotlib.ticker import MaxNLocator

from .folder import write_whole
from .progress import SHOWN_OVER

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


def _known(records: Sequence[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    known = [record for record in records if record[name] is not None]
    return [record["step"] for record in known], [record[name] for record in known]


def _running_mean(values: Sequence[float]) -> list[float]:
    return [float(np.mean(values[max(0, i - SHOWN_OVER + 1) : i + 1])) for i in range(len(values))]


def save(figure: Figure, path: Path) -> None:
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    write_whole(path, image.getvalue())
