"""`orpo-kernels inspect DATA --model MODEL`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..finetuning.settings import InspectSettings
from .console import Output, table
from .flags import command

if TYPE_CHECKING:
    import numpy as np

    from ..finetuning.inspect import Inspection

BINS, WIDTH = 12, 40  # of the histogram: lines, and characters of the longest bar


@command(InspectSettings)
def inspect(settings: InspectSettings, output: Output) -> None:
    """Look at preference data as the model will see it: the first thing to do with new data.

        orpo-kernels inspect pairs.jsonl --model HuggingFaceTB/SmolLM2-135M-Instruct

    What layout was recognised, which rows cannot be used and why, how long the pairs are and how many are cut, and some
    pairs token by token, with what is trained on in colours.
    """
    with output.loading():
        from ..finetuning.inspect import inspect
    found = inspect(settings, output.console)
    output.result(found.record, *_pairs(found, settings.whole), *_told(found))


def _pairs(found: Inspection, whole: bool) -> list[Any]:
    from rich.rule import Rule

    from ...transformers.showing import legend, shown

    parts: list[Any] = []
    for index in found.shown:
        parts.append(Rule(f"row {found.pairs.preferences.rows[index]}", align="left"))
        parts.append(shown(found.pairs.tokenized[index], found.tokenizer, whole))
    return [*parts, Rule("what the colours mean", align="left"), legend(), Rule()] if parts else []


def _told(found: Inspection) -> list[Any]:
    from ..finetuning.inspect import LENGTHS

    record = found.record
    figures = table("Lengths in tokens, before any cut", "", *next(iter(record["lengths"].values())))
    for name, values in record["lengths"].items():
        figures.add_row(LENGTHS[name], *(f"{value:.0f}" for value in values.values()))
    layouts = ", ".join(f"{count} as {name}" for name, count in record["layouts"].items())
    refused, cut = len(record["problems"]), record["cut_pairs"]
    return [
        figures,
        f"\n{LENGTHS['pair'].capitalize()}:\n{_histogram(found.lengths['pair'])}\n",
        f"Of {record['data']}: {record['pairs']} pairs ({layouts}), {refused} rows cannot be used, {cut} pairs are cut "
        f"to {record['max_length']} tokens and lose {record['cut_tokens']}.",
        f"Written: {', '.join(record['files'])}",
    ]


def _histogram(values: np.ndarray) -> str:
    """Bars of text: so many pairs with so many tokens."""
    import numpy as np

    least, most = int(values.min()), int(values.max())
    width = -(-(most - least + 1) // BINS)
    counts = np.bincount((values.astype(int) - least) // width)
    lines = []
    for low, count in zip(range(least, most + 1, width), counts, strict=True):
        bar = "#" * max(int(count > 0), round(WIDTH * count / counts.max()))
        lines.append(f"{low:7} to {low + width - 1:7} {bar:{WIDTH}} {count}")
    return "\n".join(lines)
