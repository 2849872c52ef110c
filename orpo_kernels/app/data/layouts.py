"""How a row writes preference pairs. Each row is looked at by itself: a file may mix layouts.

| layout       | columns                                                               | known from               |
|--------------|-----------------------------------------------------------------------|--------------------------|
| text         | prompt, chosen, rejected: strings                                     | TRL                      |
| chat         | prompt: messages; chosen, rejected: messages, one message or a string | TRL, axolotl             |
|              | the same with `conversations` as the prompt                           | LLaMA-Factory's ShareGPT |
|              | question, or instruction and input; system, history, tools if any     | Orca, Alpaca             |
| conversation | chosen, rejected: whole conversations                                 | UltraFeedback            |
|              | one of them whole, of the other the answer alone: ms-swift's          | ms-swift                 |
|              | `messages` with `rejected_response` or `rejected_messages`            |                          |
| transcript   | chosen, rejected: "Human: ..." and "Assistant: ..." in turns          | Anthropic HH             |

A message is `{"role": ..., "content": ...}` or ShareGPT's `{"from": ..., "value": ...}` (`text/messages.py`). The
prompt of conversations and transcripts is what both sides have in common, up to a question.

An answer may have several messages (the assistant's, a tool's, the assistant's again), so **a list of messages is one
answer; a list of strings, or of lists of messages, is several**. Several rejected answers are a pair each, with the one
chosen answer, and several chosen ones with the one rejected.

`tools`, `chat_template_kwargs`, `enable_thinking`, `weight` and `images` go into the pair. What else a row holds is
looked at by `columns.Fields.ignored`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

from ...text.chats import PlainText, parsed
from ...text.columns import OPTIONAL, BadRow, Columns, Fields
from ...text.messages import BadMessages, filled, kind, normalised, role_of, says_something, strings, without_marks
from ...text.pictures import sources_of

Layout = Literal["text", "chat", "conversation", "transcript"]
Messages = list[dict[str, Any]]

TURN = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


@dataclass
class Reading:
    """What a row gave.

    Attributes:
        pairs: each with its layout.
        refused: why other pairs of the row cannot be used, clauses about "it".
        ignored: columns, and keys of messages, that are no text of the conversation and were not read.
    """

    pairs: list[tuple[Layout, dict[str, Any]]] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    ignored: set[str] = field(default_factory=set)


def read_row(row: Any, layout: Layout | None, columns: Columns) -> Reading:
    """The pairs of a row, as `PreferenceCollator` takes them, each in its layout (`layout`, if one is given).

    Raises `BadMessages` with the reason if the row as a whole cannot be used.
    """
    if not isinstance(row, Mapping):
        raise BadRow(f"it is a {kind(row)}, not an object with chosen and rejected")
    fields = Fields(row, columns, as_text=layout == "text")
    several = _several(fields)
    options = _options(fields)
    reading = Reading()
    for number, (chosen, rejected) in enumerate(several, start=1):
        try:
            found, pair = _pair(fields, layout, chosen, rejected)
            pair, marks = _without_marks({**pair, **options})
            _check(pair)
        except BadMessages as bad:
            reading.refused.append(str(bad) if len(several) == 1 else f"{bad} (answer {number} of {len(several)})")
            continue
        reading.pairs.append((found, pair))
        reading.ignored |= marks
    if reading.pairs:
        reading.ignored |= fields.ignored(pair for _, pair in reading.pairs)
    return reading


def _several(fields: Fields) -> list[tuple[Any, Any]]:
    """The (chosen, rejected) answers of a row."""
    chosen, rejected = (_alternatives(fields.need(name)) for name in ("chosen", "rejected"))
    if len(chosen) > 1 and len(rejected) > 1:
        raise BadRow(
            f"it has {len(chosen)} chosen and {len(rejected)} rejected answers, and does not say which belong "
            "together; write a row for each pair"
        )
    return list(product(chosen, rejected))


def _alternatives(value: Any) -> list[Any]:
    is_several = isinstance(value, list) and value and any(all(isinstance(x, of) for x in value) for of in (str, list))
    return value if is_several else [value]


def _pair(fields: Fields, layout: Layout | None, chosen: Any, rejected: Any) -> tuple[Layout, dict[str, Any]]:
    found = layout or _recognise(fields, chosen, rejected)
    if found == "text":
        return found, _text(fields, chosen, rejected)
    readers: dict[Layout, Callable] = {"chat": _chat, "conversation": _conversation, "transcript": _transcript}
    prompt, chosen, rejected = readers[found](fields, chosen, rejected)
    return found, {"prompt": _with_system(fields, prompt), "chosen": chosen, "rejected": rejected}


def _recognise(fields: Fields, chosen: Any, rejected: Any) -> Layout:
    """The layout of a pair of answers and what is beside them. Raises `BadRow` if it is none."""
    sides = (chosen, rejected)
    has_prompt = fields.column("prompt") is not None
    if all(map(_is_conversation, sides)) or (not has_prompt and any(map(_has_question, sides))):
        return "conversation"
    turns = TURN.match if has_prompt else TURN.search
    if all(isinstance(side, str) and turns(side) for side in sides):
        return "transcript"
    if not has_prompt:
        raise BadRow(
            f"it has no {fields.columns.get('prompt') or 'prompt (nor question, instruction, query, ...)'}, and chosen "
            "and rejected are not conversations that include it"
        )
    # A question, an instruction or what only a template can print is a chat's; a prompt is text that is continued.
    is_prompt = fields.column("prompt") in ("prompt", fields.columns.get("prompt"))
    if not is_prompt or not isinstance(fields.get("prompt"), str) or any(map(fields.has, OPTIONAL)):
        return "chat"
    return "text" if all(isinstance(side, str) for side in sides) else "chat"


# --- the layouts: (prompt, chosen, rejected) -----------------------------------------------------------------------


def _text(fields: Fields, chosen: Any, rejected: Any) -> dict[str, Any]:
    pair = {"prompt": fields.question(), "chosen": chosen, "rejected": rejected}
    for name, part in pair.items():
        if not isinstance(part, str):
            raise BadRow(f"its {name} is a {kind(part)}, not a string")
    return {name: PlainText(part) for name, part in pair.items()} if fields.as_text else pair


def _chat(fields: Fields, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    prompt = fields.question()
    if isinstance(prompt, str):
        messages = [*_history(fields), {"role": "user", "content": prompt}]
    else:
        messages = normalised("prompt", prompt, images=fields.has("images"))
    return messages, _answer("chosen", chosen), _answer("rejected", rejected)


def _answer(name: str, answer: Any, images: bool = False) -> Messages:
    return normalised(name, {"role": "assistant", "content": answer} if isinstance(answer, str) else answer, images)


def _conversation(fields: Fields, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    images = fields.has("images")
    sides = _answer("chosen", chosen, images), _answer("rejected", rejected, images)
    whole = [_has_question(side) for side in (chosen, rejected)]
    if not any(whole):
        raise BadRow("neither its chosen nor its rejected is a conversation with a question")
    if all(whole):
        return _apart(*sides)
    (prompt, answer), other = _last_answer(sides[whole.index(True)]), sides[whole.index(False)]
    return (prompt, answer, other) if whole[0] else (prompt, other, answer)


def _transcript(fields: Fields, chosen: Any, rejected: Any) -> tuple[Messages, Messages, Messages]:
    return _apart(_turns("chosen", chosen), _turns("rejected", rejected))


def _turns(name: str, transcript: Any) -> Messages:
    """ "\\n\\nHuman: Hello\\n\\nAssistant: Hi" as messages."""
    if not isinstance(transcript, str):
        raise BadRow(f"its {name} is a {kind(transcript)}, not a transcript")
    before, *parts = TURN.split(transcript)
    if before.strip() or not parts:
        raise BadRow(f"its {name} does not begin with a turn (Human: or Assistant:)")
    roles = {"Human": "user", "Assistant": "assistant"}
    turns = zip(parts[::2], parts[1::2], strict=True)
    return [{"role": roles[speaker], "content": content.strip()} for speaker, content in turns]


def _apart(chosen: Messages, rejected: Messages) -> tuple[Messages, Messages, Messages]:
    """Two conversations as what they have in common, up to a message that asks for an answer, and the answers."""
    bare = zip(without_marks(chosen)[0], without_marks(rejected)[0], strict=False)  # scores may differ
    common = next((i for i, both in enumerate(bare) if both[0] != both[1]), min(len(chosen), len(rejected)))
    while common > 0 and chosen[common - 1]["role"] not in ("user", "tool"):
        common -= 1
    if common == 0:
        raise BadRow("its chosen and rejected conversations do not begin with the same question")
    return chosen[:common], chosen[common:], rejected[common:]


def _last_answer(conversation: Messages) -> tuple[Messages, Messages]:
    """A conversation up to the assistant's last messages, and these."""
    end = len(conversation)
    while end > 0 and conversation[end - 1]["role"] == "assistant":
        end -= 1
    return conversation[:end], conversation[end:]


def _is_conversation(value: Any) -> bool:
    """Messages whose first is not the assistant's."""
    return isinstance(value, list) and bool(value) and role_of(value[0]) not in (None, "assistant")


def _has_question(value: Any) -> bool:
    return isinstance(value, list) and any(role_of(message) == "user" for message in value)


# --- what belongs to the prompt, and to the pair -------------------------------------------------------------------


def _with_system(fields: Fields, prompt: Messages) -> Messages:
    """The prompt with the row's system message in front, unless it has one."""
    if not fields.has("system") or prompt[0]["role"] in ("system", "developer"):
        return prompt
    system = fields.get("system")
    if not isinstance(system, str):
        raise BadRow(f"its system is a {kind(system)}, not a string")
    return [{"role": "system", "content": system}, *prompt]


def _history(fields: Fields) -> Messages:
    """Earlier turns: Alpaca's pairs of a question and an answer, or messages."""
    if not fields.has("history"):
        return []
    history = _value(fields, "history")
    if not isinstance(history, list | tuple) or not all(map(_is_exchange, history)):
        return normalised("history", history)
    roles = ("user", "assistant")
    return [{"role": r, "content": text} for exchange in history for r, text in zip(roles, exchange, strict=True)]


def _is_exchange(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and all(isinstance(text, str) for text in value)


def _options(fields: Fields) -> dict[str, Any]:
    """What a row says about its pairs: pictures, tools, options of the template, weight."""
    options: dict[str, Any] = {}
    if fields.has("images"):
        options["images"] = sources_of({"images": fields.get("images")})
    if fields.has("weight"):
        options["weight"] = _weight(fields.get("weight"))
    if fields.as_text:
        return options
    if fields.has("tools"):
        options["tools"] = _tools(_value(fields, "tools"))
    template_options = _value(fields, "chat_template_kwargs") if fields.has("chat_template_kwargs") else {}
    if not isinstance(template_options, Mapping):
        raise BadRow(f"its chat_template_kwargs is a {kind(template_options)}, not an object")
    if fields.has("enable_thinking"):
        template_options = {**template_options, "enable_thinking": _flag(fields.get("enable_thinking"))}
    if template_options:
        options["chat_template_kwargs"] = dict(template_options)
    return options


def _weight(value: Any) -> float:
    try:
        weight = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        weight = math.nan
    if not 0 <= weight < math.inf:
        raise BadRow(f"its weight is {value!r}, but has to be a finite number from 0 on")
    return weight


def _tools(value: Any) -> list[Any]:
    """Tools as templates take them: a list of objects. A tool may be written as JSON."""
    tools = value if isinstance(value, list | tuple) else [value]
    tools = [_parsed("tools", tool) if isinstance(tool, str) else tool for tool in tools if filled(tool)]
    if not all(isinstance(tool, Mapping) for tool in tools):
        raise BadRow("its tools are not a list of objects")
    return tools


def _flag(value: Any) -> bool:
    value = {"true": True, "false": False}.get(value.strip().lower()) if isinstance(value, str) else value
    if not isinstance(value, bool):
        raise BadRow("its enable_thinking is neither true nor false")
    return value


def _value(fields: Fields, name: str) -> Any:
    """A field that may be written as text."""
    value = fields.get(name)
    return _parsed(name, value) if isinstance(value, str) else value


def _parsed(name: str, text: str) -> Any:
    try:
        return parsed(text)
    except ValueError as error:
        raise BadRow(f"its {name} cannot be read: {error}") from error


def _without_marks(pair: dict[str, Any]) -> tuple[dict[str, Any], set[str]]:
    """The pair without what only marks its messages (scores, ids), and the names of that."""
    cleaned, names = dict(pair), set()
    for name in ("prompt", "chosen", "rejected"):
        if not isinstance(pair[name], str):
            cleaned[name], dropped = without_marks(pair[name])
            names |= {f"messages' {key}" for key in dropped}
    return cleaned, names


# --- what makes a pair ---------------------------------------------------------------------------------------------


def _check(pair: Mapping[str, Any]) -> None:
    """Refuse what there is nothing to learn from, or what no tokenizer takes."""
    try:
        "".join(strings(pair)).encode()
    except UnicodeEncodeError as error:
        raise BadRow("it holds bytes or a surrogate that are not UTF-8") from error
    prompt = pair["prompt"]
    if not isinstance(prompt, str) and prompt[-1]["role"] not in ("user", "tool"):
        raise BadRow(f"the last message of its prompt is by {prompt[-1]['role']!r}, not by 'user' or 'tool'")
    for name in ("chosen", "rejected"):
        _check_answer(name, pair[name])
    if pair["chosen"] == pair["rejected"]:
        raise BadRow("its chosen and rejected answers are the same")


def _check_answer(name: str, answer: Any) -> None:
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    for message in messages[:1] + messages[-1:]:
        if message["role"] != "assistant":
            raise BadRow(
                f"its {name} has a message by {message['role']!r} behind the prompt, but an answer begins and ends "
                "with the assistant's"
            )
    if not messages or not says_something(messages[-1]):
        raise BadRow(f"its {name} answer is empty")
