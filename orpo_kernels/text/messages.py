"""The messages of a chat: as people write them, and as chat templates take them. Plain Python.

A message is a mapping with `role` and `content`, or ShareGPT's `from` and `value`. `normalised` gives roles their
usual names and makes contents strings; whatever else a message holds (tool_calls, reasoning_content, name, ...) stays,
because the chat template may print it. `carries_text` tells what of a row or a message must not be left unread.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from typing import Any

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "function": "tool",
    "function_call": "assistant",
    "function_response": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
REASONING = ("reasoning_content", "reasoning", "thinking")  # of an answer; templates leave it out of earlier turns
# What of a message can be the whole answer when its content is empty.
SPOKEN = ("tool_calls", *REASONING)
PRINTED = ("role", "content", "name", "tool_call_id", *SPOKEN)  # keys of messages that templates know
# Columns and keys that belong to the conversation wherever they are, even if they hold a single word.
CONVERSATION = (
    *("background", "context", "conversation", "conversations", "demonstrations", "dialogue", "document", "documents"),
    *("examples", "function_call", "functions", "history", "input", "instruction", "instructions", "messages"),
    *("passage", "persona", "query", "question", "system", "system_prompt", "tool_calls", "tools"),
)
IMAGE = "<image>"  # stands for a picture in a text, as in the files of LLaMA-Factory and ms-swift
MEDIA = ("image", "images", "video", "videos", "audio", "audios")
# Names that say something *about* a pair: whatever they hold, nobody would say it to the model.
_ABOUT = re.compile(
    r"(^|[_\-. ])("
    r"(id|idx|index|uuid|hash|url|uri|link|source|origin|dataset|subset|split|file|path|model|models|score|scores|rating|"
    r"ratings|rationale|rank|ranks|label|labels|labelling|labeling|annotation|annotations|annotator|critique|feedback|"
    r"reason|explanation|category|categories|topic|topics|type|task|tag|tags|lang|language|date|time|timestamp|created|"
    r"updated|version|status|order|margin|preference|reward|rewards|quality|difficulty|license|author|meta|metadata|info|"
    r"generations|generation|raw|original|tokens|length|logps|comment|comments|notes|title|severity|vulnerability|"
    r"vulnerabilities|country|countries|principle|judge|judgement|judgment|verdict|config)s?"
    r")($|[_\-. ])"
    # Words that could be the prompt's by themselves, and are an answer's behind its name.
    r"|^(chosen|rejected)[_\-. ](reasoning|policy|policies|analysis|evaluation|evaluator)($|[_\-. ])",
    re.IGNORECASE,
)
# Words; of scripts that put no blanks between them, characters.
_WORDS = re.compile(r"[\u0e00-\u0eff\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]|\S*[^\W\d_]\S*")


class BadMessages(ValueError):
    """Messages that cannot be used. The message is the reason, a clause about "it"."""


def normalised(name: str, value: Any, images: bool = False) -> list[dict[str, Any]]:
    """The messages of `value`, a list of messages or one message: roles by their usual names, contents as strings.

    A content that is a list of text parts (`{"type": "text", "text": ...}`) is joined. ShareGPT's `function_call`
    becomes a message with `tool_calls`; arguments of tool calls that are JSON become objects, as templates want them.
    Keys that are null are left out, all others kept. With `images` a part `{"type": "image"}` becomes `IMAGE`.

    Raises `BadMessages`, naming `name`, where a message has no role, or nothing that it says, or says it in pictures.
    """
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list | tuple):
        raise BadMessages(f"its {name} is a {kind(value)}, neither a string nor a list of messages")
    if not messages:
        raise BadMessages(f"its {name} has no message")
    return [_message(name, message, images) for message in messages]


def role_of(message: Any) -> str | None:
    """The role of a message by its usual name; None if it has none."""
    role = (message.get("role") or message.get("from")) if isinstance(message, Mapping) else None
    if not isinstance(role, str):
        return None
    role = role.strip().lower()
    return ROLES.get(role, role) or None


def is_message(value: Any) -> bool:
    """Whether a value is written like a message."""
    return role_of(value) is not None and bool(value.keys() & {"content", "value", *SPOKEN})


def says_something(message: Mapping[str, Any]) -> bool:
    """Whether a normalised message has a content that is not blank, a tool call, or reasoning."""
    return bool(message["content"].strip()) or any(message.get(key) for key in SPOKEN)


def texts_of(messages: list[dict[str, Any]]) -> list[str]:
    """All strings that normalised messages hold, but their roles."""
    return [text for message in messages for key, value in message.items() if key != "role" for text in strings(value)]


def strings(value: Any, but: Collection[str] = ()) -> list[str]:
    """All strings in a value, however deep, but those under some keys."""
    if isinstance(value, Mapping):
        value = [inner for key, inner in value.items() if key not in but]
    if isinstance(value, list | tuple):
        return [text for inner in value for text in strings(inner, but)]
    return [value] if isinstance(value, str) else []


def without_marks(messages: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], set[str]]:
    """(normalised messages without the keys that only mark them, such as scores and ids; the names of these keys).

    Text under a name that says nothing about the message stays: a template may print it.
    """
    marks = {key for message in messages for key, value in message.items() if _is_mark(key, value)}
    return [{k: v for k, v in message.items() if not _is_mark(k, v)} for message in messages], marks


def _is_mark(key: str, value: Any) -> bool:
    return key not in PRINTED and bool(_ABOUT.search(key) or not any(text.strip() for text in strings(value)))


def carries_text(name: str, value: Any) -> bool:
    """Whether a column of a row, or a key of a message, may be a part of the conversation, so that it must not be lost.

    It may if it is named so (context, history, tools, ...) and not empty, or if it holds several words and its name
    does not say that it is about the pair (scores, sources, rationales, ...).
    """
    texts = [text for text in strings(value) if text.strip()]
    if name.lower() in CONVERSATION:
        return bool(texts)
    return not _ABOUT.search(name) and any(len(_WORDS.findall(text)) > 1 for text in texts)


def filled(value: Any) -> bool:
    """Whether there is anything in a value: 0 and False are something."""
    if isinstance(value, str):
        return bool(value.strip())
    return bool(value) if isinstance(value, list | tuple | Mapping) else value is not None


def kind(value: Any) -> str:
    """What a value is, in the words of JSON."""
    names = {str: "string", list: "list", dict: "object", bool: "boolean", type(None): "null"}
    return names.get(type(value), type(value).__name__)


# --- one message ---------------------------------------------------------------------------------------------------


def _message(name: str, message: Any, images: bool) -> dict[str, Any]:
    message = _with_calls(message) if isinstance(message, Mapping) else message
    role = role_of(message)
    if role is None:
        raise BadMessages(f"its {name} has a message without a role and a content that are strings: {_shown(message)}")
    spoken = "content" if message.get("content") is not None else "value"
    rest = {key: value for key, value in message.items() if value is not None and key not in ("role", "from", spoken)}
    if "tool_calls" in rest:
        rest["tool_calls"] = _tool_calls(name, rest["tool_calls"])
    content = message.get(spoken)
    if content is None and any(rest.get(key) for key in SPOKEN):
        content = ""
    return {"role": role, "content": _text(name, content, message, images), **rest}


def _text(name: str, content: Any, message: Any, images: bool) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, list | tuple):
        return "".join(_part(name, part, images) for part in content)
    raise BadMessages(f"its {name} has a message without a role and a content that are strings: {_shown(message)}")


def _part(name: str, part: Any, images: bool) -> str:
    if isinstance(part, str):
        return part
    if images and isinstance(part, Mapping) and part.get("type") == "image":
        if held := [key for key in ("image", "url", "path", "base64", "image_url") if part.get(key) is not None]:
            raise BadMessages(
                f"its {name} has a message that holds a picture ({held[0]}): put it into the column images"
            )
        return IMAGE
    of = part.get("type", "text") if isinstance(part, Mapping) else kind(part)
    if of != "text" or not isinstance(part.get("text"), str):
        raise BadMessages(f"its {name} has a message with a part of type {of!r}, but only text is served")
    return part["text"]


def _with_calls(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """ShareGPT's {"from": "function_call", "value": '{"name": ..., "arguments": ...}'} as a message with tool calls."""
    role = message.get("from", message.get("role"))
    if not isinstance(role, str) or role.strip().lower() != "function_call" or message.get("tool_calls") is not None:
        return message
    spoken = "value" if message.get("value") is not None else "content"
    rest = {key: value for key, value in message.items() if key not in ("role", "from", spoken)}
    return {**rest, "role": "assistant", "tool_calls": message.get(spoken)}


def _tool_calls(name: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls as templates take them: {"type": "function", "function": {"name": ..., "arguments": {...}}}."""
    calls = _parsed(calls) if isinstance(calls, str) else calls
    calls = [calls] if isinstance(calls, Mapping) else calls
    if not isinstance(calls, list | tuple):
        raise BadMessages(f"its {name} has tool calls that are a {kind(calls)}, not a list: {_shown(calls)}")
    return [_tool_call(name, call) for call in calls]


def _tool_call(name: str, call: Any) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise BadMessages(f"its {name} has a tool call without the name of a function: {_shown(call)}")
    arguments = function.get("arguments", {})
    arguments = _parsed(arguments) if isinstance(arguments, str) else arguments
    own = {**function, "arguments": arguments}
    if "function" not in call:
        return {"type": "function", "function": own}
    return {**{key: value for key, value in call.items() if value is not None}, "type": "function", "function": own}


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:197]}..."
