"""A preference pair as text: the tokenizer's chat template around its messages, and where in that text the answers are.

**Where an answer begins and ends.** The template is asked, not guessed at: the conversation is rendered a second and a
third time with other words in place of the answer (`PROBES`, which begin and end with different letters). What all
three texts begin with is in front of the answer, what they end with is behind it. So it does not matter what a template
does with the generation prompt: some open a turn with more than a finished one keeps (DeepSeek-R1 and its `<think>`),
some print the next turn's header whatever they are asked for. What the generation prompt says is not the answer's.

**Nothing is lost.** A template can drop what it does not know (a system message, tool calls, tools) or change it
(reasoning cut out of an answer, upper case). Every message of the prompt has to be found in the text in front of the
answers, every answer whole in its place; but for white space at the ends and around `<think>` and `</think>`, which
templates trim. Otherwise the pair is refused with the template's fault. Reasoning of earlier turns is the exception:
templates leave it out by design.
"""

from __future__ import annotations

import json
import os.path
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..text.chats import chat_or_text, why_no_text
from ..text.columns import ALIASES
from ..text.messages import (
    IMAGE,
    MEDIA,
    REASONING,
    BadMessages,
    carries_text,
    filled,
    kind,
    normalised,
    role_of,
    says_something,
    strings,
)
from ..text.pictures import IMAGES
from .packing import SIDES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBES = ("Apple pie", "Zebra cub")
# What a pair may hold beside prompt, chosen and rejected.
TOOLS, TEMPLATE_OPTIONS, WEIGHT = "tools", "chat_template_kwargs", "weight"
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's names for a pair's columns
KNOWN = {"prompt", *SIDES, TOOLS, TEMPLATE_OPTIONS, WEIGHT, *REFERENCE, *IMAGES}
# Other names of these, as files of data have them.
_SAMPLE_WEIGHT, _THINKING = "sample_weight", "enable_thinking"
_OTHER_LAYOUTS = "; `orpo_kernels.app.data.load_preferences` reads files in other layouts"
_OTHER_NAMES = {alias for name in ("prompt", *SIDES) for alias in ALIASES[name] if alias != name}
_OURS = {"conversation", "messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message"}
_THOUGHTS = re.compile(r"<think>.*?</think>|^.*?</think>", re.DOTALL)
_NO_THOUGHTS = re.compile(r"^\s*(?:<think>)?\s*</think>")
_AROUND_THOUGHTS = re.compile(r"\s*</?think>\s*")


class UnusablePair(ValueError):
    """A pair that cannot be used. The message is the reason, a clause about "it"."""


@dataclass(frozen=True)
class Rendered:
    """One side of a pair as text.

    Attributes:
        text: prompt and answer, as the model is to see them.
        answers: (start, stop) of each turn of the answer in `text`, in order, without what the template prints behind
            it. The prompt is all in front of the first.
        is_chat: whether a chat template made the text.
        opens_next: whether the template may go on with the opening of another turn: it does not listen to
            `add_generation_prompt`.
    """

    text: str
    answers: tuple[tuple[int, int], ...]
    is_chat: bool
    opens_next: bool = False

    @property
    def prompt(self) -> str:
        return self.text[: self.answers[0][0]]


def render_pair(
    example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, pictures: int = 0, mark: str = ""
) -> tuple[Rendered, Rendered]:
    """(chosen, rejected) of a pair; `tokenize_pair` says what a pair is.

    pictures, mark: how many it has, and what the model's processor wants to find in the text for each; "" for a model
    of text, which has none.

    Raises `UnusablePair` with the reason, and `ValueError` for a tokenizer without a chat template where one is needed.
    """
    example = as_pair(example)
    _check_media(example, mark)
    if missing := [field for field in ("prompt", *SIDES) if example.get(field) is None]:
        raise UnusablePair(f"it has no {' and no '.join(missing)}{_elsewhere(example)}")
    prompt = example["prompt"]
    if isinstance(prompt, str):
        chosen, rejected = _plain({**example, "prompt": _marked(prompt, pictures, mark) if pictures else prompt})
    elif isinstance(prompt, list):
        chosen, rejected = _chat(example, tokenizer, pictures, mark)
    else:
        raise UnusablePair(f"its prompt is a {kind(prompt)}, neither a string nor a list of messages")
    if chosen.text == rejected.text:
        raise UnusablePair("its chosen and rejected responses are the same")
    _check_rest(example, chosen.text + rejected.text)
    if mark:
        for name, side in zip(SIDES, (chosen, rejected), strict=True):
            _check_marks(name, side, pictures, mark)
    return chosen, rejected


def as_pair(example: Mapping[str, Any]) -> Mapping[str, Any]:
    """The example with chats that are written as text as messages, and options by their usual names.

    Raises `UnusablePair`.
    """
    if not isinstance(example, Mapping):
        raise UnusablePair(f"it is a {type(example).__name__}, not a mapping with prompt, chosen and rejected")
    pair = {**example, **{name: _read(name, example[name]) for name in ("prompt", *SIDES) if name in example}}
    written = [isinstance(example.get(name), str) and not isinstance(pair[name], str) for name in SIDES if name in pair]
    if any(written) and not all(written) and all(isinstance(example.get(name), str) for name in SIDES):
        raise UnusablePair("of its answers one is written like a chat, the other is not")
    weight, thinking = pair.pop(_SAMPLE_WEIGHT, None), pair.pop(_THINKING, None)
    if weight is not None and pair.get(WEIGHT) is None:
        pair[WEIGHT] = weight
    if thinking is not None:
        flag = {"true": True, "false": False}.get(str(thinking).strip().lower())
        if flag is None:
            raise UnusablePair(f"its {_THINKING} is {thinking!r}, neither true nor false")
        pair[TEMPLATE_OPTIONS] = {**_options(pair.get(TEMPLATE_OPTIONS)), _THINKING: flag}
    return pair


def _read(name: str, value: Any) -> Any:
    value = chat_or_text(value) if isinstance(value, str) else value
    if isinstance(value, str) and (why := why_no_text(value, is_prompt=name == "prompt")):
        raise UnusablePair(f"its {name} is written like a chat but {why} (`text.chats.PlainText` takes it as text)")
    return [value] if isinstance(value, Mapping) else value


def _elsewhere(example: Mapping[str, Any]) -> str:
    """Where to go with an example in another layout: its answers hold the prompt, or other names are used."""
    has_answers = all(example.get(name) is not None for name in SIDES)
    return _OTHER_LAYOUTS if has_answers or example.keys() & _OTHER_NAMES else ""


def messages_of(name: str, value: Any, images: bool = False) -> list[dict[str, Any]]:
    """The messages of the prompt or of an answer, checked; those of a pair with `images`. Raises `UnusablePair`."""
    value = [{"role": "assistant", "content": value}] if isinstance(value, str) and name != "prompt" else value
    try:
        messages = normalised(name, value, images)
    except BadMessages as bad:
        raise UnusablePair(str(bad)) from bad
    last = messages[-1]
    if name == "prompt":
        if last["role"] not in ("user", "tool"):
            raise UnusablePair(f"the last message of its prompt is by {last['role']!r}, not by 'user' or 'tool'")
        return messages
    for where, message in (("begins", messages[0]), ("ends", last)):
        if message["role"] != "assistant":
            raise UnusablePair(
                f"its {name} {where} with a message by {message['role']!r}: an answer begins and ends with 'assistant'"
                f"{_OTHER_LAYOUTS if role_of(messages[0]) != 'assistant' else ''}"
            )
    if not says_something(last):
        raise UnusablePair(f"its {name} response is empty")
    return messages


def _plain(example: Mapping[str, Any]) -> list[Rendered]:
    prompt, rendered = example["prompt"], []
    read = {TOOLS: _tools(example.get(TOOLS)), TEMPLATE_OPTIONS: _options(example.get(TEMPLATE_OPTIONS))}
    if unprinted := [name for name, value in read.items() if value]:
        raise UnusablePair(f"it has {unprinted[0]}, but its prompt is a string, which no chat template prints")
    for name in SIDES:
        response = example[name]
        if not isinstance(response, str):
            raise UnusablePair(
                f"its prompt is a string but its {name} is a {kind(response)}: both are text or both are chat"
                f"{_OTHER_LAYOUTS}"
            )
        if not response.strip():
            raise UnusablePair(f"its {name} response is empty")
        text = prompt + response
        rendered.append(Rendered(text, ((len(prompt), len(text)),), is_chat=False))
    return rendered


def _check_rest(example: Mapping[str, Any], text: str) -> None:
    """Refuse a pair that has more to say than is read of it."""
    for name, value in example.items():
        if name not in KNOWN and carries_text(str(name), value) and not _all_in(strings(value), text):
            raise UnusablePair(
                f"it has {str(name)!r} beside prompt, chosen and rejected, which nothing reads: put its text where it "
                "belongs, or remove it"
            )


def _check_media(example: Mapping[str, Any], mark: str) -> None:
    """Refuse what the model would not see. Video and sound are not served; pictures with a processor."""
    served = IMAGES if mark else ()
    for name, value in example.items():
        if str(name).lower() in MEDIA and name not in served and filled(value):
            raise UnusablePair(f"it has {name}, but only text {'and pictures are' if served else 'is'} served")


def _check_marks(name: str, side: Rendered, pictures: int, mark: str) -> None:
    in_prompt, in_all = side.prompt.count(mark), side.text.count(mark)
    if in_all != in_prompt:
        raise UnusablePair(f"its {name} answer has {mark!r}, but pictures are the prompt's")
    if in_prompt != pictures:
        raise UnusablePair(f"it has {pictures} pictures, but its prompt has {in_prompt} places for one ({mark})")


def _marked(prompt: str, pictures: int, mark: str) -> str:
    """With the processor's mark for every picture."""
    if IMAGE not in prompt and mark not in prompt:
        prompt = IMAGE * pictures + prompt
    return prompt.replace(IMAGE, mark)


# --- chats ---------------------------------------------------------------------------------------------------------


def _chat(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, pictures: int, mark: str) -> list[Rendered]:
    if tokenizer.chat_template is None:
        raise ValueError("The prompt is a chat, but the tokenizer has no chat template; set tokenizer.chat_template.")
    tools, options = _tools(example.get(TOOLS)), _options(example.get(TEMPLATE_OPTIONS))
    prompt, *answers = (messages_of(name, example[name], pictures > 0) for name in ("prompt", *SIDES))
    forms = _forms(tokenizer, [message for part in (prompt, *answers) for message in part])
    if pictures:
        prompt = _with_places(prompt, pictures)
        forms = iter((_with_pictures, partial(_with_marks, mark=mark)))
    reasons = []
    for form in forms:
        template = _Template(tokenizer, form, tools, options)
        try:
            rendered = [_side(template, name, prompt, answer) for name, answer in zip(SIDES, answers, strict=True)]
            for message in prompt:
                for content in message["content"].split(IMAGE) if pictures else [message["content"]]:
                    _check_heard({**message, "content": content}, rendered[0].prompt, "prompt")
            _check_tools(tools, rendered[0].prompt)
            if pictures:
                _check_marks(SIDES[0], rendered[0], pictures, mark)
        except UnusablePair as unusable:
            reasons.append(unusable)
        else:
            return rendered
    raise reasons[0]


def _with_json_arguments(message: dict[str, Any]) -> dict[str, Any]:
    """As DeepSeek-V3's template wants tool calls: their arguments as JSON."""
    if not message.get("tool_calls"):
        return message
    calls = []
    for call in message["tool_calls"]:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        calls.append({**call, "function": {**call["function"], "arguments": arguments}})
    return {**message, "tool_calls": calls}


def _with_parts(message: dict[str, Any]) -> dict[str, Any]:
    """As the templates of some models that see pictures want contents: a list of parts."""
    return {**message, "content": [{"type": "text", "text": message["content"]}]}


def _with_places(prompt: list[dict[str, Any]], pictures: int) -> list[dict[str, Any]]:
    """The prompt with all pictures in front of the first message of the user, where it has no place for one."""
    if any(IMAGE in message["content"] for message in prompt):
        return prompt
    first = next((place for place, message in enumerate(prompt) if message["role"] == "user"), 0)
    shown = {**prompt[first], "content": IMAGE * pictures + prompt[first]["content"]}
    return [*prompt[:first], shown, *prompt[first + 1 :]]


def _with_pictures(message: dict[str, Any]) -> dict[str, Any]:
    """As the templates of models that see pictures want contents."""
    parts: list[dict[str, Any]] = []
    for number, text in enumerate(message["content"].split(IMAGE)):
        parts += [{"type": "image"}] if number else []
        parts += [{"type": "text", "text": text}] if text else []
    return {**message, "content": parts}


def _with_marks(message: dict[str, Any], mark: str) -> dict[str, Any]:
    """As a template that prints contents as they stand wants them."""
    return {**message, "content": message["content"].replace(IMAGE, mark)}


def _forms(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, Any]]) -> Iterator[Callable[[dict], dict]]:
    """What messages are given to a template as, where it does not print the form before."""
    yield dict
    if any(message.get("tool_calls") for message in messages):
        yield _with_json_arguments
    try:
        prints_strings = PROBES[0] in _Template(tokenizer, dict).render([{"role": "user", "content": PROBES[0]}])
    except UnusablePair:
        prints_strings = False
    if not prints_strings:  # one that does would print a list of parts as Python writes it
        yield _with_parts


def _tools(tools: Any) -> list[Any]:
    tools = json.loads(tools) if isinstance(tools, str) and tools.strip().startswith("[") else tools
    if not isinstance(tools, list | type(None)):
        raise UnusablePair(f"its tools are a {kind(tools)}, not a list")
    return tools or []


def _options(options: Any) -> dict[str, Any]:
    if options is not None and not isinstance(options, Mapping):
        raise UnusablePair(f"its {TEMPLATE_OPTIONS} are a {kind(options)}, not an object")
    if taken := (options or {}).keys() & _OURS:
        raise UnusablePair(f"its {TEMPLATE_OPTIONS} set {min(taken)}, which is not for the template's options to set")
    return {name: value for name, value in (options or {}).items() if value is not None}


class _Template:
    """The tokenizer's chat template with a pair's tools and options; texts that come twice are rendered once."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        form: Callable[[dict], dict],
        tools: Sequence[Any] = (),
        options: Mapping[str, Any] = MappingProxyType({}),
    ):
        self._tokenizer, self._form = tokenizer, form
        self._options = {**options, **({"tools": list(tools)} if tools else {})}
        self._rendered: list[tuple[list[dict[str, Any]], bool, str]] = []

    def render(self, messages: list[dict[str, Any]], opens: bool = False) -> str:
        """`opens`: with the generation prompt behind it. Raises `UnusablePair`."""
        for known, opened, text in self._rendered:
            if opened == opens and known == messages:
                return text
        try:
            text = self._tokenizer.apply_chat_template(
                [self._form(message) for message in messages],
                tokenize=False,
                add_generation_prompt=opens,
                **self._options,
            )
        except Exception as error:  # of many kinds: "roles must alternate", but also what its expressions raise
            raise UnusablePair(f"the chat template refuses it: {_sentence(error)}") from error
        assert isinstance(text, str)
        self._rendered.append((messages, opens, text))
        return text


def _sentence(error: Exception) -> str:
    """What a template raises on purpose is a sentence by itself; an accident needs its name."""
    from jinja2 import TemplateError, UndefinedError  # transformers needs it for any template, but only then

    on_purpose = isinstance(error, TemplateError) and not isinstance(error, UndefinedError)
    return str(error) if on_purpose else f"{type(error).__name__}: {error}"


def _side(template: _Template, name: str, prompt: list[dict[str, Any]], answer: list[dict[str, Any]]) -> Rendered:
    text = template.render(prompt + answer)
    spans: list[tuple[int, int]] = []
    for index, message in enumerate(answer):
        if message["role"] != "assistant":
            _check_heard(message, text, f"{name} answer")
            continue
        is_last = index == len(answer) - 1
        before = prompt + answer[:index]
        upto = text if is_last else template.render([*before, message])
        start, own, stop = _place(template, before, upto)
        _check_answer(name, message, upto[own:stop])
        if upto[:stop] != text[:stop]:  # the template writes a turn another way once others follow
            start, stop = _found(name, upto[start:stop], text, spans[-1][1] if spans else 0)
        spans.append((start, stop))
    return Rendered(text, tuple(spans), True, template.render(prompt) == template.render(prompt, opens=True))


def _place(template: _Template, before: list[dict[str, Any]], text: str) -> tuple[int, int, int]:
    """(start, own, stop) in `text` of its last message, the text being `before` and that message.

    text[own:stop] is what the message says. What a finished turn prints between the generation prompt and that
    (GPT-OSS's channel, Qwen3's empty thoughts) is for the model to say too, and begins at `start`.
    """
    probes = [template.render([*before, {"role": "assistant", "content": words}]) for words in PROBES]
    own = len(_common_prefix([text, *probes]))
    stop = len(text) - len(_common_prefix([text[::-1], *(probe[::-1] for probe in probes)]))
    opening = template.render(before, opens=True)
    goes_on = text.startswith(opening) and opening != template.render(before)  # some templates do not listen
    return min(len(opening), own) if goes_on else own, own, max(own, stop)


def _found(name: str, said: str, text: str, behind: int) -> tuple[int, int]:
    """Where a turn is that was written another way when it was the last: with empty thoughts in front, say."""
    said = _NO_THOUGHTS.sub("", said).strip()
    start = text.find(said, behind)
    if not said or start < 0:
        raise UnusablePair(f"the chat template writes an earlier turn of its {name} answer another way than the last")
    return start, start + len(said)


def _common_prefix(texts: Sequence[str]) -> str:
    return os.path.commonprefix(list(texts))  # noqa: RUF071 (strings, not paths)


# --- nothing is lost -----------------------------------------------------------------------------------------------


def _check_answer(name: str, message: Mapping[str, Any], rendered: str) -> None:
    changed = next((key for key, value in message.items() if not _all_in(_texts_of(key, value), rendered)), None)
    is_bare = not any(strings(value) for key, value in message.items() if key not in ("role", "content"))
    if changed is None and is_bare and _without_thought_marks(rendered) != _without_thought_marks(message["content"]):
        changed = "content"  # more than that
    if changed is not None:
        shown = _shown(rendered)
        raise UnusablePair(f"the chat template changes its {name} answer: of its {changed} it prints {shown}")


def _without_thought_marks(text: str) -> str:
    return _AROUND_THOUGHTS.sub("", text).strip()


def _check_heard(message: Mapping[str, Any], rendered: str, where: str) -> None:
    """Of a message that the model reads, and is not trained to say."""
    for key, value in message.items():
        texts = [] if key in REASONING else _texts_of(key, value)
        if message["role"] == "assistant" and key == "content":
            texts = _THOUGHTS.split(value)
        if not _all_in(texts, rendered):
            raise UnusablePair(
                f"the chat template leaves out the {key} of a message by {message['role']!r} in its {where}"
            )


def _check_tools(tools: Sequence[Any], rendered: str) -> None:
    if not all(map(_has_name, tools)):
        raise UnusablePair("its tools have no names; a tool is a JSON schema of a function")
    if not _all_in([tool.get("function", tool)["name"] for tool in tools], rendered):
        raise UnusablePair("the chat template does not print its tools")


def _has_name(tool: Any) -> bool:
    function = tool.get("function", tool) if isinstance(tool, Mapping) else None
    return isinstance(function, Mapping) and isinstance(function.get("name"), str)


def _texts_of(key: str, value: Any) -> list[str]:
    """The strings of a message's key that have to be in its text."""
    if key == "content" or key in REASONING:
        end = ["</think>"] if "</think>" in value else []  # the beginning may be the generation prompt's
        return [*_AROUND_THOUGHTS.split(value), *end]
    if key == "tool_calls":
        return [text for call in value for part in call["function"].values() for text in strings(part)]
    return strings(value) if key != "role" and carries_text(key, value) else []


def _all_in(texts: Sequence[str], rendered: str) -> bool:
    """Whether each text is in `rendered`, but for white space at its ends, as it is or escaped as in JSON."""
    return all(_is_in(text.strip(), rendered) for text in texts)


def _is_in(text: str, rendered: str) -> bool:
    return text in rendered or any(json.dumps(text, ensure_ascii=ascii)[1:-1] in rendered for ascii in (False, True))


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 60 else f"{text[:57]!r}..."
