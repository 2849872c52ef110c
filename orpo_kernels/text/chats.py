"""Chats that arrive as text: a string of JSON, or a cell as Python or numpy prints a list of messages."""

from __future__ import annotations

import ast
import json
import re
import warnings
from typing import Any

from .messages import is_message, role_of

# An answer can be JSON that somebody asked for; these roles make it a chat.
SPEAKERS = ("system", "developer", "user", "assistant", "tool")
_ROLE = re.compile(r"""['"](role|from)['"]\s*:""")
_OPENING = re.compile(r"""\s*\[*\s*\{\s*['"](role|from|content|value)['"]\s*:\s*['"]""")
_STRING_OR_GAP = re.compile(r"""('(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*")|\}\s*\{""", re.DOTALL)


class PlainText(str):
    """A text that is to be taken as it stands, though it may be written like a chat."""

    __slots__ = ()


def chat_or_text(text: str) -> Any:
    """The messages (or lists of messages) that a text writes down; the text itself if it is none, or a `PlainText`."""
    if isinstance(text, PlainText) or not text.lstrip().startswith(("[", "{")) or not _ROLE.search(text):
        return text
    try:
        value = parsed(text)
    except ValueError:
        return text
    return value if _is_chat(value) else text


def is_damaged(text: str) -> bool:
    """Whether a text is written like a chat but cannot be parsed, as when it was cut off."""
    if not _OPENING.match(text) or not _ROLE.search(text):
        return False
    try:
        parsed(text)
    except ValueError:
        return True
    return False


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
    return bool(messages) and all(is_message(message) and role_of(message) in SPEAKERS for message in messages)
