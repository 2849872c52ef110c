"""What a run leaves and shows: the metrics as JSON Lines, the curves as a PNG, and the tables on the terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from rich.table import Table

from .cost import Comparison
from .data import Fact
from .scoring import Scores
from .training import Step

PANELS = {"loss": "loss", "nll": "NLL", "log_odds": "log-odds", "accuracy": "preference accuracy"}
SMOOTHED_OVER = 10  # steps; one batch's accuracy is a handful of coin flips


class RunFolder:
    """The folder of one run; a new run into the same folder replaces what is there.

    metrics.jsonl: a line per record, written when it is known, so that an interrupted run has all it did.
    curves.png: see `plot`.
    """

    def __init__(self, path: Path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        self.metrics, self.curves = path / "metrics.jsonl", path / "curves.png"
        self.curves.unlink(missing_ok=True)
        self.metrics.unlink(missing_ok=True)

    def write(self, kind: str, **values: Any) -> None:
        """Append one record."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"kind": kind, **values}, ensure_ascii=False) + "\n")

    def plot(self, steps: Sequence[Step], before: Scores, after: Scores | None) -> None:
        """Loss, NLL, log-odds and accuracy of the training batches, and the held-out values before and after."""
        figure = Figure(figsize=(9, 6), layout="constrained")  # not pyplot's: needs no display and is nobody's global
        axes = figure.subplots(2, 2, sharex=True)
        for axis, (name, title) in zip(axes.flat, PANELS.items(), strict=True):
            values = [getattr(step, name) for step in steps]
            at = [step.step for step in steps]
            axis.plot(at, values, color="tab:blue", alpha=0.3)
            axis.plot(at, _running_mean(values), color="tab:blue", label=f"training, mean of {SMOOTHED_OVER} steps")
            if name in before.summary():
                held_out = {0: before} | ({len(steps): after} if after is not None else {})
                heights = [scores.summary()[name] for scores in held_out.values()]
                axis.plot(list(held_out), heights, "o--", color="tab:orange", label="held out")
                axis.legend()
            axis.set_title(title)
            axis.grid(alpha=0.3)
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        for axis in axes[1]:
            axis.set_xlabel("step")
        figure.savefig(self.curves, dpi=120)


def _running_mean(values: Sequence[float]) -> list[float]:
    return [float(np.mean(values[max(0, i - SMOOTHED_OVER + 1) : i + 1])) for i in range(len(values))]


def live(steps: Sequence[Step]) -> str:
    """The latest metrics in a line, each a mean over the last few steps."""
    means = {name: np.mean([getattr(step, name) for step in steps[-SMOOTHED_OVER:]]) for name in PANELS}
    return "loss {loss:.3f}  NLL {nll:.3f}  log-odds {log_odds:+.2f}  accuracy {accuracy:.0%}".format(**means)


def scores_line(scores: Scores) -> str:
    """Held-out accuracy and log-odds in a sentence."""
    summary = scores.summary()
    return (
        f"Of {summary['pairs']} held-out pairs the model prefers the right answer in {summary['accuracy']:.0%}, "
        f"with mean log-odds of {summary['log_odds']:+.2f}."
    )


def scores_table(before: Scores, after: Scores) -> Table:
    """Held-out accuracy and log-odds before and after, by topic and over all."""
    table = Table(title="Held-out pairs, before → after training")
    for column in ("topic", "pairs", "prefers the right answer", "mean log-odds"):
        table.add_column(column, justify="left" if column == "topic" else "right")
    for topic in before.topics:
        table.add_row(topic, *_score_cells(before.of(topic), after.of(topic)))
    table.add_section()
    table.add_row("all", *_score_cells(before, after), style="bold")
    return table


def _score_cells(*scores: Scores) -> tuple[str, str, str]:
    summaries = [one.summary() for one in scores]
    accuracy = " → ".join(f"{summary['accuracy']:.0%}" for summary in summaries)
    log_odds = " → ".join(f"{summary['log_odds']:+.2f}" for summary in summaries)
    return str(summaries[0]["pairs"]), accuracy, log_odds


def answers_table(facts: Sequence[Fact], **said: Sequence[str]) -> Table:
    """Held-out questions, the right answers, and a column for each of what the model `said`, named by its keyword."""
    table = Table(title="What the model says to held-out questions", show_lines=True)
    for column in ("question", "right answer", *said):
        table.add_column(column, ratio=1)
    for fact, *answers in zip(facts, *said.values(), strict=True):
        table.add_row(fact.prompt, fact.chosen, *answers)
    return table


def cost_table(comparison: Comparison) -> Table:
    """Time and bytes of head + loss, side by side."""
    table = Table(
        title=f"What head + loss cost, forward and backward, on one training batch\n({comparison.positions} positions, "
        f"{comparison.rows} of which matter, vocabulary {comparison.vocabulary}; memory beside the inputs)"
    )
    for column in ("loss function", "value", "median time", "peak memory"):
        table.add_column(column, justify="left" if column == "loss function" else "right")
    for cost in (comparison.plain, comparison.ours):
        table.add_row(cost.name, f"{cost.loss:.6f}", f"{cost.seconds * 1e3:.0f} ms", f"{cost.nbytes / 2**20:.0f} MiB")
    plain, ours = comparison.plain, comparison.ours
    table.add_section()
    table.add_row("gradients alone", "", "", f"{comparison.gradient_bytes / 2**20:.0f} MiB")
    table.add_row(
        "ratio", "", f"{plain.seconds / ours.seconds:.1f} x", f"{plain.nbytes / ours.nbytes:.1f} x", style="bold"
    )
    return table
