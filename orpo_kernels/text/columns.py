"""Which column of a row is what, and what a row holds beside what is read: repeated, not text, or refused."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .chats import chat_or_text, why_no_text
from .messages import CONVERSATION, MEDIA, BadMessages, carries_text, filled, strings, texts_of

Columns = Mapping[str, str]  # field -> the column that has it

ALIASES = {
    "prompt": ("prompt", "question", "instruction", "query", "input", "conversations", "messages"),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response", "rejected_messages"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
    "chat_template_kwargs": ("chat_template_kwargs",),
    "enable_thinking": ("enable_thinking",),
    "weight": ("weight", "sample_weight"),
    "images": ("images", "image"),
}
# ms-swift's rows have the chosen answer at the end of `messages`, or as `response`.
SWIFT_REJECTED, SWIFT_CHOSEN = ("rejected_response", "rejected_messages"), ("messages", "response")
# Fields that a pair can do without, and what pandas and Python write into the cell of a text where there is nothing.
OPTIONAL = ("system", "history", "tools", "chat_template_kwargs", "enable_thinking")
NOTHING = ("None", "nan", "NaN", "<NA>")
# Conversations: another answer to the pair's question may stand in them. Other text of a conversation is the prompt's.
WHOLE = ("conversation", "conversations", "dialogue", "messages")
ASKED = {*CONVERSATION, *ALIASES["prompt"]} - {*WHOLE}
_SPEAKERS = {
    *("human", "user", "assistant", "system", "model", "gpt", "bot", "ai"),
    *("question", "answer", "instruction", "response"),
}
_MARKS = re.compile(r"<\|?/?\w+\|?>|\[/?\w+\]")  # of chat templates


class BadRow(BadMessages):
    """A row that is no preference pair. The message is the reason, a clause about "it"."""


class UnreadColumns(BadRow):
    """A row whose `columns` may hold a part of the conversation, and are no field's."""

    def __init__(self, reason: str, columns: list[str]) -> None:
        super().__init__(reason)
        self.columns = columns


class Fields:
    """A row by its fields. It remembers which columns were read.

    Args:
        row: columns and values. Chats that are written as text become messages, unless `as_text`.
        columns: the columns of fields, where they were told.
    """

    def __init__(self, row: Mapping[str, Any], columns: Columns, *, as_text: bool = False) -> None:
        self.row = {
            str(name): chat_or_text(value) if isinstance(value, str) and not as_text else value
            for name, value in row.items()
        }
        self.as_text = as_text
        self.columns = columns
        for field in OPTIONAL:
            for name in (columns[field],) if field in columns else ALIASES[field]:
                if self.row.get(name) in NOTHING:
                    self.row[name] = None
        self.read: set[str] = set()
        self._check_sides(row)

    def column(self, field: str) -> str | None:
        """The column that has a field: the one that was told, or the first that is filled, or else not null."""
        if field in self.columns:
            column = self.columns[field]
            return column if self.row.get(column) is not None else None
        aliases = ALIASES[field]
        if field == "chosen" and self.column("rejected") in SWIFT_REJECTED:
            aliases += SWIFT_CHOSEN
        if field == "prompt" and self.column("chosen") == "messages":
            aliases = aliases[:-1]
        there = [alias for alias in aliases if self.row.get(alias) is not None]
        return next((alias for alias in there if filled(self.row[alias])), there[0] if there else None)

    def has(self, field: str) -> bool:
        """Whether a field is filled."""
        column = self.column(field)
        return column is not None and filled(self.row[column])

    def get(self, field: str) -> Any:
        """The value of a field, which counts as read then; None if there is none. Raises `BadRow` for half a chat."""
        column = self.column(field)
        if column is None:
            return None
        self.read.add(column)
        value = self.row[column]
        if isinstance(value, str) and not self.as_text and (why := why_no_text(value, is_prompt=field == "prompt")):
            raise BadRow(f"its {column} is written like a chat but {why} (--layout text takes it as text)")
        return value

    def need(self, field: str) -> Any:
        """The value of a field that has to be there."""
        value = self.get(field)
        if value is None:
            raise BadRow(f"it has no {self.columns.get(field) or ' or '.join(ALIASES[field][:2])}")
        return value

    def _check_sides(self, row: Mapping[str, Any]) -> None:
        """Refuse two answers of which one is written like a chat: is that the answer's text, or how it was stored?"""
        chosen, rejected = self.column("chosen"), self.column("rejected")
        if chosen in (None, "messages") or rejected in (None, "rejected_messages"):
            return
        sides = (chosen, rejected)
        if all(isinstance(row.get(side), str) for side in sides):
            are_text = [isinstance(self.row[side], str) for side in sides]
            if any(are_text) and not all(are_text):
                chat, text = sorted(sides, key=lambda side: isinstance(self.row[side], str))
                raise BadRow(
                    f"its {chat} is written like a chat, its {text} is not (--layout text takes both as they stand)"
                )

    def question(self) -> Any:
        """The prompt; of an instruction with an input both, a line each, as LLaMA-Factory joins them."""
        value = self.need("prompt")
        more = self.row.get("input")
        if self.column("prompt") != "instruction" or not isinstance(value, str) or not isinstance(more, str):
            return value
        self.read.add("input")
        joined = not more.strip() or value == more or value.endswith(f"\n{more}")
        return value if joined else f"{value}\n{more}"

    def ignored(self, pairs: Iterable[Mapping[str, Any]]) -> set[str]:
        """The columns that nothing read and that hold no part of the conversation.

        Raises `UnreadColumns` for all that may hold a part of it which no pair repeats.
        """
        unread = {name: value for name, value in self.row.items() if name not in self.read and filled(value)}
        if not unread:
            return set()
        said = _Said(pairs)
        media = [name for name in unread if name.lower() in MEDIA]
        repeated = {name: self._repeated(name, value, said) for name, value in unread.items() if name not in media}
        if lost := [name for name, found in repeated.items() if found is None]:
            raise UnreadColumns(_why_lost(lost, [*lost, *media]), [*lost, *media])
        if media:
            names = ",".join(media)
            raise UnreadColumns(
                f"it has {' and '.join(media)}, but only text is served (--ignore-columns {names} leaves them out)",
                media,
            )
        return {name or '""' for name, found in repeated.items() if not found}

    def _repeated(self, name: str, value: Any, said: _Said) -> bool | None:
        """Whether pairs repeat the text of a column; None if it would be lost."""
        texts = [text for text in strings(value, but=("role", "from")) if text.strip()]
        is_asked = name.lower() in ASKED
        if not texts or not (is_asked or carries_text(name, value)):
            return False
        repeated = [said.repeats(text, only_asked=is_asked) for text in texts]
        if all(repeated):
            return True
        if name.lower() in WHOLE and isinstance(value, list) and len(texts) > 1 and all(repeated[:-1]):
            return False  # another answer to the same question
        return None


def _why_lost(lost: list[str], left_out: list[str]) -> str:
    holds = f"column {lost[0]} holds" if len(lost) == 1 else f"columns {', '.join(lost)} hold"
    it, belongs = ("it", "it belongs") if len(lost) == 1 else ("them", "they belong")
    return (
        f"its {holds} text that is in no part of the pair; put {it} where {belongs}, name the column that is the "
        f"prompt (--columns prompt=...), or leave {it} out (--ignore-columns {','.join(left_out)})"
    )


def without_nulls(value: Any) -> Any:
    """A value without the null keys of its objects. Arrow gives every object of a column the keys of all others."""
    if isinstance(value, Mapping):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    return [without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


# --- what a pair says already --------------------------------------------------------------------------------------


class _Said:
    """The texts of pairs: what is asked, and what is answered."""

    def __init__(self, pairs: Iterable[Mapping[str, Any]]) -> None:
        self.asked: set[str] = set()
        self.answered: set[str] = set()
        for pair in pairs:
            for name in ("prompt", "chosen", "rejected"):
                part = pair[name] if isinstance(pair[name], list) else [{"role": "", "content": pair[name]}]
                for message in part:
                    is_answer = name != "prompt" and message["role"] in ("", "assistant")
                    (self.answered if is_answer else self.asked).update(texts_of([message]))

    def repeats(self, text: str, *, only_asked: bool) -> bool:
        """Whether a text stands in one that was said, or is made of them and the marks of a chat template."""
        said = self.asked if only_asked else self.asked | self.answered
        if text in said:
            return True
        text = rest = _flat(text)
        longest_first = sorted(filter(None, map(_flat, said)), key=len, reverse=True)
        if any(text in other and _bounded(text).search(other) for other in longest_first):
            return True
        for other in longest_first:
            if other in rest:
                rest = _bounded(other).sub(" ", rest)
        return rest != text and all(word.lower() in _SPEAKERS for word in re.findall(r"\w+", _MARKS.sub(" ", rest)))


def _bounded(text: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w){re.escape(text)}(?!\w)")


def _flat(text: str) -> str:
    """White space as single blanks: texts that differ in nothing else are the same."""
    return " ".join(text.split())
