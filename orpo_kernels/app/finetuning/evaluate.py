"""One evaluation: a model, or two, on the same pairs; figures, values and histogram in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from rich.console import Console

from ..data import Preferences
from ..errors import UserError
from . import plots
from .folder import check_claim, claim, write_json, write_whole
from .held_out import check_number, held_out_prompts, keys, known_record, record_of
from .pretrained import load_tokenizer
from .processes import check_alone
from .records import to_json
from .remarks import say, silence_transformers
from .scoring import Scores, intervals, score_model
from .settings import EvaluateSettings, held_out_number
from .setup import Pairs, load_pairs


def evaluate(settings: EvaluateSettings, console: Console) -> dict[str, Any]:
    """Evaluate as the settings say.

    Into `settings.output` go `evaluation.json` (what is returned), `pairs.jsonl` (row, and every model's values of each
    pair) and `margins.png`.

    Returns:
        The number of pairs; `models`, the metrics of each by its name; `difference`, those of the model minus those of
        `against`, or None. Each metric is a value with the low and high end of its 95 % interval. `trained_on`: how
        many pairs a model was trained on by a run (left out under an `eval_split`); `left_out`: by each model's name,
        how many it cannot take, none of which is among the pairs.

    Raises `UserError` for what cannot be evaluated.
    """
    check_alone("evaluate")
    silence_transformers()
    check_claim(settings.output, "evaluation")
    names = list(filter(None, (settings.model, settings.against)))
    tokenizers = {name: load_tokenizer(name) for name in names}  # each model rates the pairs in its own tokens
    pairs = {name: load_pairs(settings, tokenizers[name], console) for name in names}
    offered = pairs[settings.model].offered
    asked, trained_on = _asked(settings, offered, names, console)
    which, left_out = _taken_by_all(asked, pairs, console)
    claim(settings.output, "evaluation")
    scores = {
        name: score_model(name, tokenizers[name], [pairs[name].tokens[i] for i in which], settings, console)
        for name in names
    }

    values, histogram, result = (settings.output / name for name in ("pairs.jsonl", "margins.png", "evaluation.json"))
    against = scores.get(settings.against)
    record = {
        "data": settings.data,
        "pairs": len(which),
        "trained_on": trained_on,
        "left_out": left_out,
        "models": {name: intervals(one, seed=settings.seed) for name, one in scores.items()},
        "difference": against and intervals(scores[settings.model], against, seed=settings.seed),
        "files": [str(path) for path in (result, values, histogram)],
    }
    write_whole(values, "".join(_line(at, offered.rows[i], scores) for at, i in enumerate(which)))
    plots.margins(scores, histogram)
    write_json(result, record)
    return record


# --- which pairs ---------------------------------------------------------------------------------------------------


def _asked(
    settings: EvaluateSettings, offered: Preferences, names: Sequence[str], console: Console
) -> tuple[list[int], int]:
    """(indices of the pairs to evaluate, how many pairs a model was trained on)."""
    # A run whose record is damaged has no pair that can be called held out.
    find = record_of if settings.eval_split else partial(known_record, console=console)
    records = {name: record for name in names if (record := find(name)) is not None}
    prompts = keys(offered.pairs)
    trained = {prompt for record in records.values() for prompt in record.trained}
    trained_on = sum(prompt in trained for prompt in prompts)
    if not settings.eval_split:
        if trained_on:
            of_all = f"{trained_on} of {len(prompts)} pairs were trained on"
            say(console, f"{of_all}; --eval-split takes the held-out ones.")
        return list(range(len(prompts))), trained_on
    number = held_out_number(settings.eval_split)
    assert number is not None  # the settings have looked
    if records:  # what they have held out; without a run, what `train` would hold out
        check_number(number, len(prompts), settings.data)
        held_out = frozenset[str]().union(*(record.held_out for record in records.values()))
        found = f"{sum(prompt in held_out for prompt in prompts)} of {len(prompts)} pairs are held out"
        say(console, f"{found} by {' or '.join(records)}, whatever the number.")
    else:
        held_out = held_out_prompts(offered.pairs, number, settings.seed, settings.data)
    if trained_on:
        say(console, f"{trained_on} pairs are left out: {' or '.join(records)} was trained on their prompts.")
    which = [i for i, prompt in enumerate(prompts) if prompt in held_out and prompt not in trained]
    if not which:
        by = f" by {' or '.join(records)}" if records else ""
        raise UserError(
            f"--eval-split {settings.eval_split}: none of the {len(prompts)} pairs of {settings.data} is held out{by}. "
            "Without --eval-split all of them are evaluated."
        )
    return which, trained_on


def _taken_by_all(asked: Sequence[int], pairs: dict[str, Pairs], console: Console) -> tuple[list[int], dict[str, int]]:
    """(indices of the pairs that every model can take, how many each cannot)."""
    left_out = {name: sum(i not in one.tokens for i in asked) for name, one in pairs.items()}
    which = [i for i in asked if all(i in one.tokens for one in pairs.values())]
    if not which:
        raise UserError(f"There is no pair that {' and '.join(pairs)} can take.")
    if len(which) < len(asked):
        told = ", ".join(f"{count} that {name} cannot take" for name, count in left_out.items() if count)
        say(console, f"{len(which)} of {len(asked)} pairs are evaluated; left out are {told}.")
    return which, left_out


def _line(at: int, row: int, scores: dict[str, Scores]) -> str:
    fields = ("chosen_logps", "rejected_logps", "log_odds")
    values = {name: {field: float(getattr(one, field)[at]) for field in fields} for name, one in scores.items()}
    return to_json({"row": row, **values}) + "\n"
