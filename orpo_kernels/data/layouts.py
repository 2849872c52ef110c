"""How a row writes a preference pair. Each row is looked at by itself: a file may mix layouts.

| layout       | columns                                                               | known from          |
|--------------|-----------------------------------------------------------------------|---------------------|
| text         | prompt, chosen, rejected: strings                                     | TRL                 |
| chat         | prompt: messages; chosen, rejected: messages, one message or a string | TRL, LLaMA-Factory  |
|              | question, instruction or input, and system if any; chosen, rejected   | Intel Orca, Argilla |
| conversation | chosen, rejected: whole conversations                                 | UltraFeedback       |
| transcript   | chosen, rejected: "Human: ..." and "Assistant: ..." in turns          | Anthropic HH        |

A message is `{"role": ..., "content": ...}` or ShareGPT's `{"from": ..., "value": ...}`. The prompt of conversations
and transcripts is what both sides have in common; a prompt column beside conversations
(UltraFeedback has one) repeats it and is not looked at.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

Layout = Literal["text", "chat", "conversation", "transcript"]
Columns = Mapping[str, str]  # field (prompt, chosen, rejected, system) -> the column that has it

ALIASES = {
    "prompt": ("prompt", "question", "instruction", "input", "conversations"),
    "chosen": ("chosen", "chosen_response"),
    "rejected": ("rejected", "rejected_response"),
    "system": ("system", "system_prompt"),
}
ROLES = {"human": "user", "gpt": "assistant", "bot": "assistant", "function": "tool", "observation": "tool"}
TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


class BadRow(ValueError):
    """A row that is no preference pair. The message is the reason, a clause about "it"."""


def recognise(row: Mapping[str, Any], columns: Columns) -> Layout:
    """The layout of a row. Raises `BadRow` if it is none of them."""
    chosen, rejected = field(row, "chosen", columns), field(row, "rejected", columns)
    prompt = _optional(row, "prompt", columns)
    if _is_conversation(chosen) and _is_conversation(rejected):
        return "conversation"
    if prompt is None and all(isinstance(side, str) and TURN.search(side) for side in (chosen, rejected)):
        return "transcript"
    if prompt is None:
        names = columns.get("prompt") or f"prompt ({', '.join(ALIASES['prompt'])})"
        raise BadRow(f"it has no {names}, and chosen and rejected are not conversations that include it")
    strings = all(isinstance(part, str) for part in (prompt, chosen, rejected))
    # A question, an instruction or a system message is a chat's; a prompt is text that the answer continues.
    from_a_chat = _name(row, "prompt", columns) not in ("prompt", columns.get("prompt"))
    return "text" if strings and not from_a_chat and not _optional(row, "system", columns) else "chat"


def read_pair(row: Any, layout: Layout | None, columns: Columns) -> tuple[Layout, dict[str, Any]]:
    """The pair of a row, as `PreferenceCollator` takes it, and its layout (`layout`, if one is given).

    Raises `BadRow` with the reason if there is none, or it is none to learn from.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"it is a {_kind(row)}, not an object with chosen and rejected")
    found = layout or recognise(row, columns)
    read = {"text": _text, "chat": _chat, "conversation": _conversation, "transcript": _transcript}[found]
    pair = read(row, columns)
    _check(pair)
    return found, pair


def field(row: Mapping[str, Any], name: str, columns: Columns) -> Any:
    """A field of a row that has to be there."""
    value = _optional(row, name, columns)
    if value is None:
        raise BadRow(f"it has no {columns.get(name) or ' or '.join(ALIASES[name])}")
    return value


def _optional(row: Mapping[str, Any], name: str, columns: Columns) -> Any:
    return row.get(_name(row, name, columns))


def _name(row: Mapping[str, Any], name: str, columns: Columns) -> str:
    """The column that has the field: the one that was told, or the first that is not null."""
    if name in columns:
        return columns[name]
    return next((alias for alias in ALIASES[name] if row.get(alias) is not None), name)


# --- the layouts ---------------------------------------------------------------------------------------------------


def _text(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    pair = {name: field(row, name, columns) for name in ("prompt", "chosen", "rejected")}
    for name, part in pair.items():
        if not isinstance(part, str):
            raise BadRow(f"its {name} is a {_kind(part)}, not a string")
    return pair


def _chat(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    prompt = field(row, "prompt", columns)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else _messages("prompt", prompt)
    system = _optional(row, "system", columns)
    if system is not None and not isinstance(system, str):
        raise BadRow(f"its system is a {_kind(system)}, not a string")
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    return _pair(messages, *(_answer(name, field(row, name, columns)) for name in ("chosen", "rejected")))


def _answer(name: str, answer: Any) -> list[dict[str, str]]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return _messages(name, [answer] if isinstance(answer, Mapping) else answer)


def _conversation(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    return _apart(*(_messages(name, field(row, name, columns)) for name in ("chosen", "rejected")))


def _transcript(row: Mapping[str, Any], columns: Columns) -> dict[str, Any]:
    return _apart(*(_turns(name, field(row, name, columns)) for name in ("chosen", "rejected")))


def _turns(name: str, transcript: Any) -> list[dict[str, str]]:
    """ "\\n\\nHuman: Hello\\n\\nAssistant: Hi" as messages."""
    if not isinstance(transcript, str):
        raise BadRow(f"its {name} is a {_kind(transcript)}, not a transcript")
    before, *parts = TURN.split(transcript)
    if before.strip() or not parts:
        raise BadRow(f"its {name} does not begin with a turn (Human: or Assistant:)")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": content.strip()} for speaker, content in turns]


def _apart(chosen: list[dict[str, str]], rejected: list[dict[str, str]]) -> dict[str, Any]:
    """Two conversations as what they have in common, up to a message that asks for an answer, and the answers."""
    common = next((i for i, both in enumerate(zip(chosen, rejected, strict=False)) if both[0] != both[1]), None)
    common = min(len(chosen), len(rejected)) if common is None else common
    while common > 0 and chosen[common - 1]["role"] not in ("user", "tool"):
        common -= 1
    if common == 0:
        raise BadRow("its chosen and rejected conversations do not begin with the same question")
    return _pair(chosen[:common], chosen[common:], rejected[common:])


def _pair(prompt: list, chosen: list, rejected: list) -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# --- messages ------------------------------------------------------------------------------------------------------


def _is_conversation(value: Any) -> bool:
    """Messages of more than the assistant."""
    return isinstance(value, list) and any(
        isinstance(message, Mapping) and _role(message) not in (None, "assistant") for message in value
    )


def _role(message: Mapping[str, Any]) -> str | None:
    role = message.get("role", message.get("from"))
    return ROLES.get(role, role) if isinstance(role, str) else None


def _messages(name: str, value: Any) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise BadRow(f"its {name} is a {_kind(value)}, neither a string nor a list of messages")
    if not value:
        raise BadRow(f"its {name} has no message")
    messages = []
    for message in value:
        role = _role(message) if isinstance(message, Mapping) else None
        content = message.get("content", message.get("value")) if isinstance(message, Mapping) else None
        if role is None or not isinstance(content, str):
            raise BadRow(f"its {name} has a message without a role and a content that are strings")
        messages.append({"role": role, "content": content})
    return messages


# --- what makes a pair -----------------------------------------------------------------------------------------------


def _check(pair: Mapping[str, Any]) -> None:
    """Refuse what there is nothing to learn from, or what no tokenizer takes."""
    for name, part in pair.items():
        messages = [{"role": "", "content": part}] if isinstance(part, str) else part
        for message in messages:
            for text in message.values():
                if not _encodable(text):
                    raise BadRow(f"its {name} holds bytes or a surrogate that are not UTF-8")
        if name == "prompt":
            if not isinstance(part, str) and messages[-1]["role"] not in ("user", "tool"):
                raise BadRow(f"the last message of its prompt is by {messages[-1]['role']!r}, not by 'user' or 'tool'")
            continue
        if others := {message["role"] for message in messages} - {"", "assistant"}:
            raise BadRow(f"its {name} has a message by {min(others)!r} behind the prompt; an answer is the assistant's")
        if not messages or not messages[-1]["content"].strip():
            raise BadRow(f"its {name} answer is empty")
    if pair["chosen"] == pair["rejected"]:
        raise BadRow("its chosen and rejected answers are the same")


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _kind(value: Any) -> str:
    names = {str: "string", list: "list", dict: "object", type(None): "null"}
    return names.get(type(value), type(value).__name__)
