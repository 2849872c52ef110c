"""Chats that arrive as text: a string of JSON, or a cell as Python or numpy prints a list of messages."""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping
from typing import Any

from .messages import is_message, role_of

# An answer can be JSON that somebody asked for; these roles make it a chat.
SPEAKERS = ("system", "developer", "user", "assistant", "tool")
_ROLE = re.compile(r"""['"](role|from)['"]\s*:""")
_HINT = re.compile("role|from|speaker")
_WHO, _WHAT = ("role", "speaker"), ("content", "value", "text", "message")  # keys of a message as somebody writes it
_OPENING = re.compile(r"""\s*\[*\s*\{\s*['"](role|from|content|value)['"]\s*:\s*['"]""")
_STRING_OR_GAP = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\}\s*\{""", re.DOTALL)


class PlainText(str):
    """A text that is to be taken as it stands, though it may be written like a chat."""

    __slots__ = ()


def chat_or_text(text: str) -> Any:
    """The messages (or lists of messages) that a text writes down; the text itself if it is none, or a `PlainText`."""
    if isinstance(text, PlainText) or not text.lstrip().startswith(("[", "{", '"')) or not _HINT.search(text):
        return text
    try:
        value = parsed(text)
        value = parsed(value) if isinstance(value, str) else value  # JSON that was written as JSON once more
    except ValueError:
        return text
    return value if _is_chat(value) else text


def why_no_text(text: str, *, is_prompt: bool = False) -> str | None:
    """Why a text that is no chat cannot be taken as it stands, either, a clause about "it"; None if it can.

    It may be a chat that was cut off; a prompt also one whose messages are written in a way that is not known.
    """
    if isinstance(text, PlainText) or not text.lstrip().startswith(("[", "{")) or not _HINT.search(text):
        return None
    try:
        value = parsed(text)
    except ValueError:
        return "cannot be parsed" if _OPENING.match(text) and _ROLE.search(text) else None
    unknown = is_prompt and not _is_chat(value) and _holds_messages(value)
    return "is none that is known" if unknown else None


def _holds_messages(value: Any) -> bool:
    """Whether a message, in whatever words, is the value, or in its list, or in one of its lists."""
    held = [value, *(value.values() if isinstance(value, Mapping) else ())]
    return any(_names_its_speaker(one) for part in held for one in (part if isinstance(part, list) else [part]))


def _names_its_speaker(value: Any) -> bool:
    return isinstance(value, Mapping) and any(map(value.get, _WHO)) and any(key in value for key in _WHAT)


def parsed(text: str) -> Any:
    """The value that a text writes as JSON, as Python or as numpy does. Raises `ValueError` if it is none of them."""
    for read in (json.loads, _literal, _numpy):
        try:
            return read(text)
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            continue
    raise ValueError("it is neither JSON nor written as Python or numpy print it")


def _literal(text: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on escapes that are none
        return ast.literal_eval(text.strip())


def _numpy(text: str) -> Any:
    """numpy prints no commas between the objects of an array."""
    return _literal(_STRING_OR_GAP.sub(lambda found: found[1] or "}, {", text))


def _is_chat(value: Any) -> bool:
    if isinstance(value, list) and value and all(isinstance(inner, list) for inner in value):
        return all(map(_is_chat, value))
    messages = value if isinstance(value, list) else [value]
    return all(map(is_message, messages)) and any(role_of(message) in SPEAKERS for message in messages)
