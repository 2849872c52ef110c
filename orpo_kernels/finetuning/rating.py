"""One evaluation: a model, or two, on the same pairs; figures, values and histogram in a folder."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
import transformers
from rich.console import Console
from rich.progress import Progress

from ..data import split_pairs
from ..errors import UserError
from ..transformers import TokenizedPair
from . import plots
from .folder import write_whole
from .processes import check_alone
from .scoring import Scores, intervals, score
from .settings import EvaluateSettings
from .setup import compute_dtype, load_model, load_pairs, load_tokenizer


def rate(settings: EvaluateSettings, console: Console) -> dict[str, Any]:
    """Evaluate as the settings say.

    Into `settings.output` go `evaluation.json` (what is returned), `pairs.jsonl` (row, and every model's values of each
    pair) and `margins.png`.

    Returns:
        The number of pairs; `models`, the metrics of each by its name; `difference`, those of the model minus those of
        `against`, or None. Each metric is a value with the low and high end of its 95 % interval.

    Raises `UserError` for what cannot be evaluated.
    """
    check_alone("evaluate")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    names = list(dict.fromkeys(filter(None, (settings.model, settings.against))))
    scores: dict[str, Scores] = {}
    for name in names:
        tokenizer = load_tokenizer(name)  # each model rates the pairs in its own tokens
        rows, pairs = _pairs(settings, tokenizer, console)
        scores[name] = _score(name, tokenizer, pairs, settings, console)
    if len({len(one.log_odds) for one in scores.values()}) > 1:
        raise UserError(
            f"{settings.model} and {settings.against} cannot take the same pairs of {settings.data}: their tokenizers "
            "refuse different ones. Remove the rows that are named above."
        )
    settings.output.mkdir(parents=True, exist_ok=True)
    values, histogram, result = (settings.output / name for name in ("pairs.jsonl", "margins.png", "evaluation.json"))
    against = scores.get(settings.against) if len(names) == 2 else None
    record = {
        "data": settings.data,
        "pairs": len(rows),
        "models": {name: intervals(one, seed=settings.seed) for name, one in scores.items()},
        "difference": against and intervals(scores[settings.model], against, seed=settings.seed),
        "files": [str(path) for path in (result, values, histogram)],
    }
    write_whole(values, "".join(_line(index, row, scores) for index, row in enumerate(rows)))
    plots.margins(scores, histogram)
    write_whole(result, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return record


def _pairs(settings: EvaluateSettings, tokenizer: Any, console: Console) -> tuple[list[int], list[TokenizedPair]]:
    """(rows, tokenised pairs) to evaluate."""
    pairs = load_pairs(settings, tokenizer, console)
    which = list(range(len(pairs.tokenized)))
    if settings.eval_split:
        try:
            held_out = float(settings.eval_split)
        except ValueError as error:
            raise UserError(f"--eval-split is {settings.eval_split!r}; give the share or number of `train`.") from error
        which = sorted(split_pairs(pairs.preferences.pairs, held_out, settings.seed)[1])
        if not which:
            raise UserError(f"--eval-split {settings.eval_split} holds out none of {len(pairs.tokenized)} pairs.")
    return [pairs.preferences.rows[i] for i in which], [pairs.tokenized[i] for i in which]


def _score(name: str, tokenizer: Any, pairs: list, settings: EvaluateSettings, console: Console) -> Scores:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = load_model(name, compute_dtype(settings.dtype)).to(device)
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(f"Rating by {name}", total=len(pairs))
        try:
            return score(model, tokenizer, pairs, settings.batch_size, lambda count: progress.advance(task, count))
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} cannot be evaluated. {error}") from error


def _line(index: int, row: int, scores: dict[str, Scores]) -> str:
    fields = ("chosen_logps", "rejected_logps", "log_odds")
    values: dict[str, Any] = {
        name: {field: float(np.asarray(getattr(one, field))[index]) for field in fields} for name, one in scores.items()
    }
    return json.dumps({"row": row, **values}, ensure_ascii=False) + "\n"
