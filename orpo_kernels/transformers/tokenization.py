"""A preference pair as ids and labels: the text of `rendering.py`, tokenised, ended and cut.

**The boundary.** Prompt and response are one text and tokenised together, so that the model sees exactly the ids that
the whole text has, and the boundary between them is a *character* position, found among the tokens by their character
offsets. Tokenising the prompt alone and counting its tokens goes wrong wherever the tokenizer merges across the
boundary ("foo" + "bar" is not always two tokens). A token that straddles the boundary belongs to the response: it
carries characters of the response, whose probability would otherwise never be trained.

**The end.** With `end="single"` a response ends with exactly one end token: text gets the tokenizer's EOS, a chat turn
keeps the end-of-turn token of its template and loses what the template prints behind it (ChatML: the line break after
`<|im_end|>`; some templates: the opening of another turn). With `end="trl"` the ids are those of TRL's `ORPOTrainer`,
which keeps the line break and appends an EOS (`<|im_end|>\\n<|im_end|>`), and which puts a BOS in front of every prompt
whose tokenizer has one. (Where the template opens another turn unasked, TRL trains that, too; we do not.)

**Several turns.** Of an answer with tool results or users' turns between, all of the assistant's turns are trained,
each with its end token, and nothing else.

**Truncation** to `max_length` never leaves an empty response, and shortens both sides' prompt by the same tokens:

1. every response is promised `min(its length, max_length // 2)` tokens;
2. the prompt gives up its *first* tokens (but a BOS) until the longer response has what it was promised;
3. what is still too long loses the end of its response, and with it the end token: the answer did not end there.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, get_args

from ..text.pictures import sources_of
from .images import Processor, is_processor, read_images
from .packing import IGNORE_INDEX
from .rendering import REFERENCE, WEIGHT, Rendered, UnusablePair, as_pair, render_pair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

End = Literal["single", "trl"]
TooLong = Literal["cut", "refuse"]


class TokenizedPair(TypedDict, total=False):
    """One pair as lists of ids, ready for a `datasets.Dataset`. The names of its four columns of ids are TRL's.

    Labels are unshifted: the response's ids, and -100 on the prompt (and between the turns of an answer).

    The other keys are there where they have something to say. `cut_tokens`: how many tokens of both sides `max_length`
    cost. `weight`: what the pair's loss is multiplied by; `images`: its pictures, as the example names them;
    `ref_chosen_logps` and `ref_rejected_logps` likewise.
    """

    chosen_input_ids: list[int]
    chosen_labels: list[int]
    rejected_input_ids: list[int]
    rejected_labels: list[int]
    cut_tokens: int
    weight: float
    images: list[Any]
    ref_chosen_logps: float
    ref_rejected_logps: float


@dataclass(frozen=True)
class Refusal:
    """A pair that cannot be used: its index among the examples, and why."""

    index: int
    reason: str


class Side(NamedTuple):
    """Prompt and one of the two responses, as ids; the response's labels."""

    prompt: list[int]
    response: list[int]
    labels: list[int]

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)


def tokenize_pairs(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    end: End = "single",
    too_long: TooLong = "cut",
) -> tuple[list[TokenizedPair], list[Refusal]]:
    """Tokenise every pair that can be used, and name each one that cannot. Options as in `tokenize_pair`."""
    pairs, refused = [], []
    for index, example in enumerate(examples):
        try:
            pairs.append(tokenize_pair(example, tokenizer, max_length=max_length, end=end, too_long=too_long))
        except UnusablePair as unusable:
            refused.append(Refusal(index, str(unusable)))
    return pairs, refused


def tokenize_pair(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase | Processor,
    *,
    max_length: int | None = None,
    end: End = "single",
    too_long: TooLong = "cut",
) -> TokenizedPair:
    """Tokenise one pair; the module's docstring has the rules.

    `example` has the fields `prompt`, `chosen` and `rejected`, in one of two forms:

    - *plain*: three strings. The response follows the prompt with nothing in between; a tokenizer that puts a BOS
      before a text puts it there once.
    - *chat*: `prompt` a list of messages (`{"role": ..., "content": ...}`) whose last is the user's or a tool's,
      `chosen` and `rejected` each a list of messages that begins and ends with the assistant's, or a string for one
      such message. The tokenizer's chat template renders it. A message may hold more (`tool_calls`,
      `reasoning_content`, ...), its content may be a list of text parts; `tools` (a list of JSON schemas) and
      `chat_template_kwargs` (a mapping, such as `{"enable_thinking": False}`) go to the template as well.

    Chats may be written as text (JSON, or as Python prints them), all of them then.

    `weight` (or `sample_weight`), a number of at least 0, is what the pair's loss is to be multiplied by;
    `enable_thinking` goes to the template. What else an example holds is not read; where that may be text, the pair is
    refused.

    With a model's processor (`AutoProcessor`) in the tokenizer's place a pair may have pictures in its prompt: `images`
    (or `image`), a list of paths, bytes or PIL images, and for each in turn a part `{"type": "image"}` or the text
    `<image>`; where there is no place for one, all stand in front of the first message of the user. A pair whose
    picture is missing or broken is refused, and so is one of which `max_length` would cut a picture.

    `max_length` (tokens, at least 2) bounds prompt + response; None truncates nothing. What is longer is cut, or with
    `too_long="refuse"` refused.

    Raises `UnusablePair` (a `ValueError`) with the reason if a field is missing or of the wrong type, if a response is
    empty, if chosen and rejected are the same (also: after truncation), if no token of the prompt is left to predict
    the response's first from, or if the chat template loses or changes what a message says. Raises `TypeError` or
    `ValueError` for a tokenizer without character offsets, EOS or (for chat) template.
    """
    tokenizer, processor = _apart(tokenizer)
    check_options(tokenizer, max_length, end, too_long)
    example = as_pair(example)
    images = sources_of(example) if processor else []
    rendered = render_pair(example, tokenizer, len(images), processor.mark if processor else "")
    if processor and images:
        rendered = processor.expanded(rendered, read_images(images, processor.urls))
    sides = [_finish(side, tokenizer, end) for side in rendered]
    chosen, rejected = sides
    if max_length is not None:
        if too_long == "refuse" and (longest := max(map(len, sides))) > max_length:
            raise UnusablePair(f"it has {longest} tokens, more than max_length={max_length}")
        chosen, rejected = _truncate(sides, max_length, tokenizer.bos_token_id)
        if processor and images:
            _check_pictures_whole(sides[0], chosen, processor, max_length)
    _check_sides(chosen, rejected, max_length)
    pair = pair_of(chosen, rejected, sum(map(len, sides)) - len(chosen) - len(rejected), example)
    if images:
        pair["images"] = images
    return pair


def pair_of(chosen: Side, rejected: Side, cut_tokens: int, example: Mapping[str, Any]) -> TokenizedPair:
    """Both sides and the numbers of their example as one pair, which has lost so many tokens."""
    pair: TokenizedPair = {
        "chosen_input_ids": chosen.prompt + chosen.response,
        "chosen_labels": [IGNORE_INDEX] * len(chosen.prompt) + chosen.labels,
        "rejected_input_ids": rejected.prompt + rejected.response,
        "rejected_labels": [IGNORE_INDEX] * len(rejected.prompt) + rejected.labels,
    }
    if cut_tokens:
        pair["cut_tokens"] = cut_tokens
    pair.update(numbers_of(example))
    return pair


def _apart(given: Any) -> tuple[Any, Processor | None]:
    """The tokenizer, and the processor if one was given in its place."""
    if is_processor(given):
        given = Processor(given)
    return (given.tokenizer, given) if isinstance(given, Processor) else (given, None)


def check_options(
    tokenizer: PreTrainedTokenizerBase, max_length: int | None, end: str, too_long: str, needs_offsets: bool = True
) -> None:
    """Raise `TypeError` or `ValueError` for what cannot work for any pair."""
    if needs_offsets and not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} gives no character offsets, by which the boundary between prompt and response "
            "is found; load the model's fast tokenizer (use_fast=True)."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no EOS token, so a response could not end; set tokenizer.eos_token.")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, one token of prompt and one of response; got {max_length}.")
    for name, value, choices in (("end", end, get_args(End)), ("too_long", too_long, get_args(TooLong))):
        if value not in choices:
            raise ValueError(f"{name} must be one of {choices}; got {value!r}.")


def numbers_of(example: Mapping[str, Any]) -> Any:
    """The weight of a pair and what a reference model gave it, where it has them. Raises `UnusablePair`."""
    numbers: dict[str, float] = {}
    for name in (WEIGHT, *REFERENCE):
        value = example.get(name)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise UnusablePair(f"its {name} is {value!r}, not a finite number")
        if name == WEIGHT and value < 0:
            raise UnusablePair(f"its weight is {value!r}, but has to be at least 0")
        numbers[name] = float(value)
    return numbers


# --- text to tokens ------------------------------------------------------------------------------------------------


def _split(side: Rendered, tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[tuple[int, int]]]:
    """A text's ids, and the ranges (first, behind) of those that are the answers'."""
    encoding = tokenizer(side.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    answers, behind = [], 0
    for start, stop in side.answers:
        first = next((i for i in range(behind, len(ids)) if offsets[i][1] > start), len(ids))
        if first > behind and _true_stop(ids[first - 1], offsets[first - 1], side.text, tokenizer) > start:
            first -= 1
        behind = len(ids)
        if stop < len(side.text):
            behind = next((i for i in range(first, len(ids)) if offsets[i][0] >= stop), len(ids))
        answers.append((first, behind))
    return ids, answers


def _true_stop(token: int, offsets: tuple[int, int], text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where a token ends in `text`. Some tokenizers (RoBERTa's kind) leave a token's own spaces out of its offsets."""
    own, following = text[slice(*offsets)], text[offsets[1] : offsets[1] + 1]
    if not own or own.endswith(" ") or not following.startswith(" "):
        return offsets[1]
    piece = tokenizer.decode([token])
    return offsets[1] + len(piece) - len(piece.rstrip(" "))


# --- beginning and end ---------------------------------------------------------------------------------------------


def _finish(side: Rendered, tokenizer: PreTrainedTokenizerBase, end: End) -> Side:
    """Give the sequence its beginning (a BOS, once) and every turn of the answer its end."""
    (ids, answers), bos, eos = _split(side, tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id
    opener = _opener(ids, tokenizer)
    first, last = answers[0][0], len(ids)
    labels = [IGNORE_INDEX] * len(ids)
    for start, behind in answers:
        stop = _turn_end(ids, start, behind, opener, tokenizer) if side.is_chat else None
        last = behind if stop is None else stop
        labels[start:last] = ids[start:last]
    if side.is_chat and not side.opens_next and (end == "trl" or stop is None):  # all that the template closes it with
        labels[last:], last = ids[last:], len(ids)
    response, labels = ids[first:last], labels[first:last]
    if response[-1:] != [eos] and (end == "trl" or stop is None):
        response, labels = [*response, eos], [*labels, eos]
    prompt = ids[:first]
    if bos is not None and prompt[:1] != [bos] and (end == "trl" or (not side.is_chat and _adds_bos(tokenizer))):
        prompt = [bos, *prompt]
    return Side(prompt, response, labels)


def _turn_end(
    ids: list[int], start: int, behind: int, opener: int | None, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """Behind the token that ends a turn whose text is ids[start:behind]; None where there is none.

    The end of turn need not be the EOS (Gemma's `<end_of_turn>`, Phi-3's `<|end|>`), and line breaks and an EOS may
    follow it: it is the first special token behind the text, with nothing but spaces between. One that the text ends in
    already is not doubled.
    """
    at = behind
    while at < len(ids) and not _ends(ids[at], tokenizer) and _is_blank(ids[at], tokenizer):
        at += 1
    closer = ids[at] if at < len(ids) and _ends(ids[at], tokenizer) and ids[at] != opener else None
    first = behind
    while first > start and (ids[first - 1] == closer or _is_blank(ids[first - 1], tokenizer)):
        first -= 1
    if closer is None:  # what a text ends in may be its end all the same: GPT-OSS's `<|call|>`
        return first if first > start and _ends(ids[first - 1], tokenizer) else None
    return ids.index(closer, first) + 1


def end_turn(response: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Cut a rendered turn behind its end-of-turn token, or give it an EOS where it ends in no such token."""
    run = len(response)
    while run > 0 and (_ends(response[run - 1], tokenizer) or _is_blank(response[run - 1], tokenizer)):
        run -= 1
    stop = _turn_end(response, run, run, None, tokenizer)
    return [*response, tokenizer.eos_token_id] if stop is None else response[:stop]


def _opener(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The special token that a conversation, and so every turn, begins with, if there is one: it ends no turn."""
    if ids[:1] == [tokenizer.bos_token_id] and len(ids) > 1 and _ends(ids[1], tokenizer):
        ids = ids[1:]
    return ids[0] if ids and _ends(ids[0], tokenizer) and ids[0] != tokenizer.eos_token_id else None


def _is_blank(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token is white space, or nothing that can be seen."""
    return not tokenizer.decode([token]).strip()


def _ends(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token at the end of a turn can be what ends it: any special token but the unknown one."""
    if token in (tokenizer.eos_token_id, tokenizer.unk_token_id):
        return token == tokenizer.eos_token_id  # GPT-2 has one token for both
    return bool(tokenizer.decode([token])) and not tokenizer.decode([token], skip_special_tokens=True)


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with a BOS. (A chat template prints its own.)"""
    return tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


# --- length --------------------------------------------------------------------------------------------------------


def _truncate(sides: Sequence[Side], max_length: int, bos: int | None) -> list[Side]:
    """The rule of the module's docstring. Both prompts lose the same tokens."""
    promised = min(max(len(side.response) for side in sides), max_length // 2)
    surplus = max(0, max(len(side.prompt) for side in sides) + promised - max_length)
    return [_shortened(side, surplus, max_length, bos) for side in sides]


def _shortened(side: Side, surplus: int, max_length: int, bos: int | None) -> Side:
    has_bos = side.prompt[:1] == [bos] and side.prompt.count(side.prompt[0]) == 1  # ChatML's "BOS" opens each turn
    prompt = side.prompt[:has_bos] + side.prompt[has_bos + surplus :]
    room = max_length - len(prompt)
    return Side(prompt, side.response[:room], side.labels[:room])


def _check_pictures_whole(whole: Side, cut: Side, processor: Processor, max_length: int) -> None:
    """Refuse to cut a picture, or the special tokens that open it."""
    pictures = [place for place, token in enumerate(whole.prompt) if token in processor.media_tokens]
    first = pictures[0]
    while first > 0 and _ends(whole.prompt[first - 1], processor.tokenizer):
        first -= 1
    # One of the tokens that are left may be a BOS from in front of those that are gone.
    if len(cut.prompt) < len(whole.prompt) and len(cut.prompt) - 1 < len(whole.prompt) - first:
        raise UnusablePair(f"max_length={max_length} would cut its pictures, which take {len(pictures)} tokens")


def _check_sides(chosen: Side, rejected: Side, max_length: int | None) -> None:
    if not chosen.prompt or not rejected.prompt:
        raise UnusablePair("no token of its prompt precedes the response, whose first token then has no prediction")
    if chosen.response == rejected.response and chosen.labels == rejected.labels:
        raise UnusablePair(f"its chosen and rejected responses are the same ids when cut to max_length={max_length}")
