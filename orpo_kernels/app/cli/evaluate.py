"""`orpo-kernels evaluate MODEL DATA`."""

from __future__ import annotations

from typing import Any

from ..finetuning.settings import EvaluateSettings
from .console import Output, interval, table
from .flags import command

TITLES = {
    "accuracy": ("prefers the chosen answer", "{:.1%}", "{:+.1%}"),
    "margin": ("margin, nats a token", "{:+.3f}", "{:+.3f}"),
    "log_odds": ("log-odds", "{:+.3f}", "{:+.3f}"),
    "chosen_perplexity": ("perplexity, chosen", "{:.2f}", "{:+.2f}"),
    "rejected_perplexity": ("perplexity, rejected", "{:.2f}", "{:+.2f}"),
}


@command(EvaluateSettings)
def evaluate(settings: EvaluateSettings, output: Output) -> None:
    """Rate preference pairs: accuracy, margins, log-odds, perplexities, each with a 95 % interval.

    With --against, both models rate the same pairs, and the intervals of the differences say what is more than chance.

        orpo-kernels evaluate runs/first pairs.jsonl --eval-split 0.1 --against HuggingFaceTB/SmolLM2-135M-Instruct
    """
    with output.loading():
        from ..finetuning.evaluate import evaluate
    record = evaluate(settings, output.console)
    output.result(record, _table(record), f"Written: {', '.join(record['files'])}")


def _table(record: dict[str, Any]) -> Any:
    difference = ["difference"] if record["difference"] else []
    shown = table(f"{record['pairs']} pairs (with 95 % intervals)", "", *record["models"], *difference)
    for metric, (title, form, signed) in TITLES.items():
        cells = [interval(values[metric], form) for values in record["models"].values()]
        if record["difference"]:
            cells.append(interval(record["difference"][metric], signed))
        shown.add_row(title, *cells)
    return shown
