"""One evaluation: a model, or two, on the same pairs; figures, values and histogram in a folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress

from ..data import Preferences
from ..errors import UserError
from . import plots
from .folder import check_claim, claim, write_whole
from .held_out import Record, check_number, held_out_prompts, keys, record_of
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
    scores = {name: _score(name, tokenizers[name], _at(which, pairs[name]), settings, console) for name in names}

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
    rows = [offered.rows[i] for i in which]
    write_whole(values, "".join(_line(index, row, scores) for index, row in enumerate(rows)))
    plots.margins(scores, histogram)
    write_whole(result, to_json(record, indent=2) + "\n")
    return record


# --- which pairs ---------------------------------------------------------------------------------------------------


def _asked(
    settings: EvaluateSettings, offered: Preferences, names: Sequence[str], console: Console
) -> tuple[list[int], int]:
    """(indices of the pairs to evaluate, how many pairs a model was trained on)."""
    everything = list(range(len(offered.pairs)))
    if not settings.eval_split:
        return everything, _say_what_was_trained_on(offered, names, console)
    records = {name: record for name in names if (record := record_of(name)) is not None}
    prompts = keys(offered.pairs)
    held_out = _held_out(settings, offered, records, console)
    trained = frozenset[str]().union(*(record.trained for record in records.values()))
    trained_on = sum(prompt in trained for prompt in prompts)
    if trained_on:
        say(console, f"{trained_on} pairs are left out: {' or '.join(records)} was trained on their prompts.")
    which = [i for i in everything if prompts[i] in held_out and prompts[i] not in trained]
    if not which:
        by = f" by {' or '.join(records)}" if records else ""
        raise UserError(
            f"--eval-split {settings.eval_split}: none of the {len(prompts)} pairs of {settings.data} is held out{by}. "
            "Without --eval-split all of them are evaluated."
        )
    return which, trained_on


def _held_out(
    settings: EvaluateSettings, offered: Preferences, records: dict[str, Record], console: Console
) -> frozenset[str]:
    """The prompts that runs have held out; without a run, those that `train` would hold out."""
    number = held_out_number(settings.eval_split)
    assert number is not None  # the settings have looked
    check_number(number, len(offered.pairs), settings.data)
    if not records:
        return held_out_prompts(offered.pairs, number, settings.seed, settings.data)
    prompts = frozenset[str]().union(*(record.held_out for record in records.values()))
    found = sum(prompt in prompts for prompt in keys(offered.pairs))
    say(console, f"{found} of {len(offered.pairs)} pairs are held out by {' or '.join(records)}, whatever the number.")
    return prompts


def _say_what_was_trained_on(offered: Preferences, names: Sequence[str], console: Console) -> int:
    """How many pairs a model was trained on by a run that has kept a record."""
    trained: set[str] = set()
    for name in names:
        try:
            record = record_of(name)
        except UserError as unknown:
            say(console, str(unknown))
        else:
            trained |= record.trained if record else set()
    count = sum(prompt in trained for prompt in keys(offered.pairs))
    if count:
        say(console, f"{count} of {len(offered.pairs)} pairs were trained on; --eval-split takes the held-out ones.")
    return count


def _taken_by_all(asked: Sequence[int], pairs: dict[str, Pairs], console: Console) -> tuple[list[int], dict[str, int]]:
    """(indices of the pairs that every model can take, how many each cannot)."""
    taken = {name: set(one.taken) for name, one in pairs.items()}
    left_out = {name: sum(i not in indices for i in asked) for name, indices in taken.items()}
    which = [i for i in asked if all(i in indices for indices in taken.values())]
    if not which:
        raise UserError(f"There is no pair that {' and '.join(pairs)} can take.")
    if len(which) < len(asked):
        told = ", ".join(f"{count} that {name} cannot take" for name, count in left_out.items() if count)
        say(console, f"{len(which)} of {len(asked)} pairs are evaluated; left out are {told}.")
    return which, left_out


def _at(which: Sequence[int], pairs: Pairs) -> list:
    """The tokens of the offered pairs at some indices."""
    place = {offered: index for index, offered in enumerate(pairs.taken)}
    return [pairs.tokenized[place[i]] for i in which]


# --- what they say -------------------------------------------------------------------------------------------------


def _score(name: str, tokenizer: Any, pairs: list, settings: EvaluateSettings, console: Console) -> Scores:
    with Progress(console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(escape(f"Rating by {name}"), total=len(pairs))
        try:
            return score_model(name, tokenizer, pairs, settings, lambda count: progress.advance(task, count))
        except (TypeError, ValueError) as error:
            raise UserError(f"{name} cannot be evaluated. {error}") from error


def _line(index: int, row: int, scores: dict[str, Scores]) -> str:
    fields = ("chosen_logps", "rejected_logps", "log_odds")
    values: dict[str, Any] = {
        name: {field: float(np.asarray(getattr(one, field))[index]) for field in fields} for name, one in scores.items()
    }
    return to_json({"row": row, **values}) + "\n"
