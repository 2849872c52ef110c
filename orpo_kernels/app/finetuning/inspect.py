"""A look at preference data before anything is trained: what was recognised, what is refused, how long, how cut."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console

from ...transformers import TokenizedPair, UnusablePair
from ...transformers.images import tokenizer_of
from ...transformers.packing import IGNORE_INDEX
from ..data import Preferences
from ..errors import UserError
from . import plots
from .folder import claim, write_whole
from .pretrained import load_tokenizer
from .settings import InspectSettings
from .setup import Pairs, load_pairs, tokenization_of

# The lengths that are counted, in tokens.
LENGTHS = {
    "prompt": "prompt",
    "chosen": "chosen answer",
    "rejected": "rejected answer",
    "pair": "prompt and longer answer",
}


@dataclass(frozen=True)
class Inspection:
    """What there is to see.

    Attributes:
        record: counts and figures, for machines.
        pairs: what was read, and its tokens.
        lengths: of each of `LENGTHS`, the tokens of every pair before anything was cut.
        shown: indices of the pairs to look at.
        tokenizer: of the model.
    """

    record: dict[str, Any]
    pairs: Pairs
    lengths: dict[str, np.ndarray]
    shown: list[int]
    tokenizer: Any


def inspect(settings: InspectSettings, console: Console) -> Inspection:
    """Read and tokenise the data as `train` would, and look at it.

    Into `settings.output` go `lengths.png` and `problems.jsonl`, every row that cannot be used with the reason.

    Raises `UserError` for data or a tokenizer that cannot be read, and for a row that is not among the pairs.
    """
    tokenizer = load_tokenizer(settings.model)
    pairs = load_pairs(settings, tokenizer, console)
    shown = _to_show(settings, pairs.preferences)
    claim(settings.output, "inspection")
    plot, problems = settings.output / "lengths.png", settings.output / "problems.jsonl"
    lengths = _lengths(_uncut(pairs, tokenizer))
    plots.lengths({LENGTHS[name]: values for name, values in lengths.items()}, settings.max_length, plot)
    write_whole(problems, pairs.preferences.problem_lines())
    cut = [lost for pair in pairs.tokenized if (lost := pair.get("cut_tokens"))]
    record = {
        "data": settings.data,
        "model": settings.model,
        "pairs": len(pairs.tokenized),
        "layouts": dict(Counter(pairs.preferences.layouts)),
        "ignored": pairs.preferences.ignored,
        "problems": [dataclasses.asdict(problem) for problem in pairs.preferences.problems],
        "cut_pairs": len(cut),
        "cut_tokens": sum(cut),
        "max_length": settings.max_length,
        "lengths": {name: _figures(values) for name, values in lengths.items()},
        "files": [str(problems), str(plot)],
    }
    return Inspection(record, pairs, lengths, shown, tokenizer_of(tokenizer))


def _to_show(settings: InspectSettings, preferences: Preferences) -> list[int]:
    """Indices of the pairs of the rows that are asked for, or of the first ones."""
    wanted = settings.row_numbers()
    if not wanted:
        return list(range(min(settings.show, len(preferences.pairs))))
    reasons = {problem.row: problem.reason for problem in preferences.problems}
    for row in wanted:
        if row not in preferences.rows:
            reason = f"cannot be used: {reasons[row]}" if row in reasons else "is not there"
            raise UserError(f"Row {row} of {settings.data} {reason}.")
    return [index for index, row in enumerate(preferences.rows) if row in wanted]


def _uncut(pairs: Pairs, tokenizer: Any) -> Iterator[TokenizedPair]:
    """All pairs that the tokenizer can take, whatever their length."""
    tokenize = tokenization_of(tokenizer)
    for index, pair in enumerate(pairs.offered.pairs):
        tokenized = pairs.tokens.get(index)
        if tokenized is None or "cut_tokens" in tokenized:
            try:
                tokenized = tokenize(pair, tokenizer)
            except UnusablePair:
                continue
        yield tokenized


def _lengths(pairs: Iterable[TokenizedPair]) -> dict[str, np.ndarray]:
    rows = []
    for pair in pairs:
        chosen, rejected = len(pair["chosen_input_ids"]), len(pair["rejected_input_ids"])
        prompts = [_prompt(pair["chosen_labels"]), _prompt(pair["rejected_labels"])]
        rows.append((max(prompts), chosen - prompts[0], rejected - prompts[1], max(chosen, rejected)))
    return dict(zip(LENGTHS, np.array(rows, dtype=np.int64).T, strict=True))


def _prompt(labels: Sequence[int]) -> int:
    return next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)


def _figures(values: np.ndarray) -> dict[str, float]:
    return {
        "least": int(values.min()),
        "median": float(np.median(values)),
        "mean": round(float(values.mean()), 1),
        "95 %": float(np.percentile(values, 95)),
        "most": int(values.max()),
    }
