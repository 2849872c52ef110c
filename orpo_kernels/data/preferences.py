"""The pairs of a file or data set, where each came from, and what could not be used."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from ..errors import UserError
from .layouts import ALIASES, BadRow, Layout, read_pair
from .reading import Row, Unreadable, read_rows

SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used: its number, from 1 (of JSON Lines, that of the line), and why, a clause about "it"."""

    row: int
    reason: str

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


@dataclass
class Preferences:
    """Preference pairs of one source.

    Attributes:
        source: the file, or the name of the data set.
        pairs: prompt, chosen and rejected of each, text or chat messages, as `PreferenceCollator` takes them.
        rows: the number of the row that each came from.
        problems: the rows that could not be used.
        layouts: how each was written.
    """

    source: str
    pairs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)

    def describe(self) -> str:
        """A sentence on what was recognised, and one on what was not."""
        recognised = ", ".join(f"{count} as {layout}" for layout, count in Counter(self.layouts).most_common())
        text = f"{self.source}: {_count(len(self.pairs), 'pair')} ({recognised})."
        if not self.problems:
            return text
        shown = "; ".join(map(str, self.problems[:SHOWN_PROBLEMS]))
        rest = len(self.problems) - SHOWN_PROBLEMS
        more = f"; and {rest} more" if rest > 0 else ""
        return f"{text} {_count(len(self.problems), 'row')} cannot be used: {shown}{more}."

    def without(self, refused: Mapping[int, str]) -> Preferences:
        """What is left when the pairs at some indices are refused, each for a reason."""
        kept = [i for i in range(len(self.pairs)) if i not in refused]
        problems = [*self.problems, *(Problem(self.rows[i], reason) for i, reason in refused.items())]
        return Preferences(
            self.source,
            [self.pairs[i] for i in kept],
            [self.rows[i] for i in kept],
            sorted(problems, key=lambda problem: problem.row),
            [self.layouts[i] for i in kept],
        )


def load_preferences(
    source: str,
    *,
    split: str = "train",
    layout: Layout | Literal["auto"] = "auto",
    columns: Mapping[str, str] | None = None,
) -> Preferences:
    """All pairs of a file (`reading.FORMATS`) or of a data set of `datasets`; nothing is dropped silently.

    Args:
        source: a path, or a name on the hub.
        split: of a data set; a file has none.
        layout: "auto" recognises it for every row (`layouts.py`). Another one is what every row has to be; "chat" makes
            a message of a prompt that is a string.
        columns: which column has the prompt, chosen, rejected or system, where the names are not the usual ones.

    Raises `UserError` where nothing can be read, or no row is a pair.
    """
    columns = dict(columns or {})
    if unknown := columns.keys() - ALIASES.keys():
        raise UserError(
            f"There is no field {min(unknown)!r} to name a column for; the fields are {', '.join(ALIASES)}."
        )
    if layout != "auto" and layout not in get_args(Layout):
        raise UserError(f"There is no layout {layout!r}; the layouts are auto, {', '.join(get_args(Layout))}.")
    preferences = _collect(source, read_rows(source, split), None if layout == "auto" else layout, columns)
    if not preferences.pairs:
        raise UserError(f"{source} holds no usable pair. {_why_none(preferences)}")
    return preferences


def _collect(source: str, rows: Iterable[Row], layout: Layout | None, columns: Mapping[str, str]) -> Preferences:
    preferences = Preferences(source)
    for number, row in rows:
        try:
            if isinstance(row, Unreadable):
                raise BadRow(str(row))
            found, pair = read_pair(row, layout, columns)
        except BadRow as bad:
            preferences.problems.append(Problem(number, str(bad)))
            continue
        preferences.layouts.append(found)
        preferences.pairs.append(pair)
        preferences.rows.append(number)
    return preferences


def _why_none(preferences: Preferences) -> str:
    if not preferences.problems:
        return "It has no rows."
    first = preferences.problems[0]
    return (
        f"Of row {first.row}: {first.reason}. Other columns can be told: --columns prompt=...,chosen=...,rejected=..."
    )


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def split_pairs(pairs: Sequence[dict[str, Any]], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the pairs (to train on, held out), in a random order that `seed` decides.

    `held_out` is a share below 1, or a number of pairs. Pairs of one prompt stay together: none is trained on whose
    question is held out. So the number is met as nearly as the prompts allow.
    """
    groups: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        groups.setdefault(json.dumps(pair["prompt"]), []).append(index)
    order = list(groups.values())
    random.Random(seed).shuffle(order)
    wanted = round(held_out * len(pairs)) if held_out < 1 else int(held_out)
    if held_out:
        wanted = max(1, wanted)
    training: list[int] = []
    evaluation: list[int] = []
    for group in order:
        side = evaluation if len(evaluation) + len(group) <= wanted else training
        side.extend(group)
    return training, evaluation
