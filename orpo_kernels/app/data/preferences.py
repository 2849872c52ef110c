"""The pairs of a file or data set, where each came from, and what could not be used."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, get_args

from ...text.columns import ALIASES, BadRow, UnreadColumns
from ...text.messages import BadMessages
from ...text.pictures import beside
from ..errors import UserError
from .layouts import Layout, read_row
from .reading import Unreadable, read_rows

SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class Problem:
    """A row, or one of its pairs, that cannot be used.

    Attributes:
        row: its number, from 1; of JSON Lines, that of the line.
        reason: why, a clause about "it".
        unread: columns to be left out or put elsewhere, where they are why.
    """

    row: int
    reason: str
    unread: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"row {self.row}: {self.reason}"


@dataclass
class Preferences:
    """Preference pairs of one source.

    Attributes:
        source: the file, or the name of the data set.
        pairs: prompt, chosen and rejected of each, text or chat messages, as `PreferenceCollator` takes them; and
            tools, chat_template_kwargs, weight and images, where the row has them. The paths of images are relative to
            the file.
        rows: the number of the row that each came from. A row with several answers has several pairs.
        problems: the rows that could not be used.
        layouts: how each was written.
        ignored: columns, and keys of messages ("messages' score"), that are no part of the conversation and were not
            read, sorted.
    """

    source: str
    pairs: list[dict[str, Any]] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)

    def describe(self) -> str:
        """A sentence on what was recognised, one on what was not read, and one on what cannot be used."""
        recognised = ", ".join(f"{count} as {layout}" for layout, count in Counter(self.layouts).most_common())
        text = f"{self.source}: {_count(len(self.pairs), 'pair')} ({recognised})."
        if self.ignored:
            text += f" Not read: {', '.join(self.ignored)}."
        if not self.problems:
            return text
        shown = "; ".join(map(str, self.problems[:SHOWN_PROBLEMS]))
        rest = len(self.problems) - SHOWN_PROBLEMS
        more = f"; and {rest} more" if rest > 0 else ""
        return f"{text} {_count(len(self.problems), 'row')} cannot be used: {shown}{more}."

    def problem_lines(self) -> str:
        """The problems as JSON Lines: row, reason and unread columns of each."""
        return "".join(json.dumps(asdict(problem)) + "\n" for problem in self.problems)

    def without(self, refused: Mapping[int, str]) -> Preferences:
        """What is left when the pairs at some indices are refused, each for a reason."""
        kept = [i for i in range(len(self.pairs)) if i not in refused]
        problems = [*self.problems, *(Problem(self.rows[i], reason) for i, reason in refused.items())]
        return replace(
            self,
            pairs=[self.pairs[i] for i in kept],
            rows=[self.rows[i] for i in kept],
            problems=sorted(problems, key=lambda problem: problem.row),
            layouts=[self.layouts[i] for i in kept],
        )


def load_preferences(
    source: str,
    *,
    split: str = "train",
    layout: Layout | Literal["auto"] = "auto",
    columns: Mapping[str, str] | None = None,
    ignore_columns: Collection[str] = (),
) -> Preferences:
    """All pairs of a file (`reading.FORMATS`) or of a data set of `datasets`; nothing is dropped silently.

    Args:
        source: a path, or a name on the hub.
        split: of a data set; a file has none.
        layout: "auto" recognises it for every row (`layouts.py`). Another one is what every row has to be; "chat" makes
            a message of a prompt that is a string.
        columns: which column has a field (`columns.ALIASES`: prompt, chosen, rejected, system, ...), where the names
            are not the usual ones.
        ignore_columns: columns to leave unread. A row with another column whose text is in no part of its pairs is a
            problem.

    Raises `UserError` where nothing can be read, or no row is a pair.
    """
    columns = dict(columns or {})
    if unknown := columns.keys() - ALIASES.keys():
        raise UserError(
            f"There is no field {min(unknown)!r} to name a column for; the fields are {', '.join(ALIASES)}."
        )
    if layout != "auto" and layout not in get_args(Layout):
        raise UserError(f"There is no layout {layout!r}; the layouts are auto, {', '.join(get_args(Layout))}.")
    preferences = _collect(source, split, None if layout == "auto" else layout, columns, ignore_columns)
    if not preferences.pairs:
        raise UserError(f"{source} holds no usable pair. {_why_none(preferences)}")
    return preferences


def _collect(
    source: str, split: str, layout: Layout | None, columns: Mapping[str, str], ignore_columns: Collection[str]
) -> Preferences:
    preferences, ignored = Preferences(source), set()
    for number, row in read_rows(source, split):
        try:
            if isinstance(row, Unreadable):
                raise BadRow(str(row))
            read = {k: v for k, v in row.items() if k not in ignore_columns} if isinstance(row, Mapping) else row
            reading = read_row(read, layout, columns)
        except BadMessages as bad:
            unread = tuple(bad.columns) if isinstance(bad, UnreadColumns) else ()
            preferences.problems.append(Problem(number, str(bad), unread))
            continue
        preferences.problems += [Problem(number, reason) for reason in reading.refused]
        ignored |= reading.ignored
        for found, pair in reading.pairs:
            preferences.layouts.append(found)
            if "images" in pair and Path(source).is_file():
                pair["images"] = [beside(image, Path(source).parent) for image in pair["images"]]
            preferences.pairs.append(pair)
            preferences.rows.append(number)
    preferences.ignored = sorted(ignored)
    return preferences


def _why_none(preferences: Preferences) -> str:
    if not preferences.problems:
        return "It has no rows."
    first = preferences.problems[0]
    remedy = ""
    if first.reason.startswith("it has no ") and "--" not in first.reason:  # a field is missing
        remedy = " Other columns can be told: --columns prompt=...,chosen=...,rejected=..."
    unread = dict.fromkeys(name for problem in preferences.problems for name in problem.unread)
    if len(unread) > len(first.unread):
        remedy += f" Of all rows: --ignore-columns {','.join(unread)}."
    return f"Of row {first.row}: {first.reason}.{remedy}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
