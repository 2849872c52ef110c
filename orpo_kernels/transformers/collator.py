"""Preference data as batches: tokenise (prompt, chosen, rejected), then pad the pairs into one concatenated batch, or
pack them into rows that hold every prompt once (`packing.py`).

**The boundary.** Prompt and response are rendered as one text and tokenised together, so that the model sees exactly
the ids that the whole text has, and the boundary between them is a *character* position, found among the tokens by
their character offsets. Tokenising the prompt alone and counting its tokens goes wrong wherever the tokenizer merges
across the boundary ("foo" + "bar" is not always two tokens). A token that straddles the boundary belongs to the
response: it carries characters of the response, whose probability would otherwise never be trained.

**The end.** With `end="single"` a response ends with exactly one end token: text gets the tokenizer's EOS, a chat turn
keeps the end-of-turn token of its template and loses what the template prints behind it (ChatML: the line break after
`<|im_end|>`). With `end="trl"` the ids are those of TRL's `ORPOTrainer`, which keeps the line break and appends an EOS
(`<|im_end|>\\n<|im_end|>`), and which puts a BOS in front of every prompt whose tokenizer has one.

**Truncation** to `max_length` never leaves an empty response, and shortens both sides' prompt by the same tokens:

1. every response is promised `min(its length, max_length // 2)` tokens;
2. the prompt gives up its *first* tokens (but a BOS) until the longer response has what it was promised;
3. what is still too long loses the end of its response, and with it the end token: the answer did not end there.

**Refusal.** A pair that cannot be used is never dropped silently: `tokenize_pairs` lists it with the reason,
`tokenize_pair` and the collator raise.
"""

from __future__ import annotations

import os.path
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, get_args

import torch
from torch import Tensor

from .packing import IGNORE_INDEX, SIDES, pack_pairs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

End = Literal["single", "trl"]
Packing = Literal["auto", "padded", "shared"]
Answers = Literal["both", "chosen"]
REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")  # TRL's names for a pair's columns


class TokenizedPair(TypedDict):
    """One pair as lists of ids, ready for a `datasets.Dataset`. The column names are TRL's.

    Labels are unshifted: the response's ids, and -100 on the prompt.
    """

    chosen_input_ids: list[int]
    chosen_labels: list[int]
    rejected_input_ids: list[int]
    rejected_labels: list[int]


@dataclass(frozen=True)
class Refusal:
    """A pair that cannot be used: its index among the examples, and why."""

    index: int
    reason: str


class UnusablePair(ValueError):
    """A pair that cannot be used. The message is the reason, a clause about "it"."""


class _Side(NamedTuple):
    """Prompt and one of the two responses, as ids."""

    prompt: list[int]
    response: list[int]


@dataclass
class PreferenceCollator:
    """Makes batches for `causal_lm_orpo_loss` of raw examples, or of pairs that `tokenize_pair` has tokenised.

    `collator(examples)` of B pairs returns, by `packing`:

    - "auto", the default: "padded", unless one of the trainers of this package finds that its model allows "shared".
    - "padded": int64 tensors of shape (2B, T), the B chosen sequences first, padded on the right: `input_ids`,
      `attention_mask` (1 on tokens, made from the lengths: pad and EOS may be one id) and `labels` (unshifted, -100 on
      prompt and padding). Right for every model.
    - "shared": `input_ids` (R, T) int64 in at most B rows, every prompt once, and `packed`, the `PackedPairs` that says
      where everything is. The loss and its gradients are the same, but some models do not allow it (ALiBi, recurrent
      layers, flash-attention); `refuses_shared_prompt(model)` says why, and the loss refuses such a batch.

    With `answers="chosen"` the rejected answers are left out, as SFT trains: a padded batch then has B rows and says
    `chosen_only=True`. Pairs that have the columns `ref_chosen_logps` and `ref_rejected_logps` (TRL's names for the
    summed log-probabilities of a reference model) give the batch `reference_logps`, (2B,) float64, chosen ones first.

    See `tokenize_pair` for the forms of an example and for the options. Raises `ValueError`, naming the index and the
    reason, when a pair cannot be used.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    end: End = "single"
    packing: Packing = "auto"
    answers: Answers = "both"

    def __post_init__(self) -> None:
        _check_options(self.tokenizer, self.max_length, self.end)
        if self.packing not in get_args(Packing):
            raise ValueError(f"packing must be one of {get_args(Packing)}; got {self.packing!r}.")
        if self.answers not in get_args(Answers):
            raise ValueError(f"answers must be one of {get_args(Answers)}; got {self.answers!r}.")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = [self._tokenized(index, example) for index, example in enumerate(examples)]
        if not pairs:
            raise ValueError("The batch holds no pair; give the collator at least one example.")
        padding_id = _padding_id(self.tokenizer)
        if self.packing == "shared":
            batch = pack_pairs([_chosen_alone(p) for p in pairs] if self.answers == "chosen" else pairs, padding_id)
        elif self.answers == "chosen":
            batch = {**pad_pairs(pairs, padding_id, SIDES[:1]), "chosen_only": True}
        else:
            batch = pad_pairs(pairs, padding_id)
        return batch | _reference_logps(examples)

    def tokenized(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """The pair as it goes into a batch. Raises `UnusablePair`."""
        if isinstance(example, Mapping) and "chosen_input_ids" in example:
            return _checked(example, self.max_length)
        return tokenize_pair(example, self.tokenizer, max_length=self.max_length, end=self.end)

    def _tokenized(self, index: int, example: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return self.tokenized(example)
        except UnusablePair as unusable:
            raise ValueError(f"Pair {index} of the batch cannot be used: {unusable}.") from unusable


def tokenize_pairs(
    examples: Iterable[Mapping[str, Any]],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    end: End = "single",
) -> tuple[list[TokenizedPair], list[Refusal]]:
    """Tokenise every pair that can be used, and name each one that cannot. Options as in `tokenize_pair`."""
    pairs, refused = [], []
    for index, example in enumerate(examples):
        try:
            pairs.append(tokenize_pair(example, tokenizer, max_length=max_length, end=end))
        except UnusablePair as unusable:
            refused.append(Refusal(index, str(unusable)))
    return pairs, refused


def tokenize_pair(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    end: End = "single",
) -> TokenizedPair:
    """Tokenise one pair; the module's docstring has the rules.

    `example` has the fields `prompt`, `chosen` and `rejected`, in one of two forms:

    - *plain*: three strings. The response follows the prompt with nothing in between; a tokenizer that puts a BOS
      before a text puts it there once.
    - *chat*: `prompt` a list of messages (`{"role": ..., "content": ...}`) whose last is the user's or a tool's,
      `chosen` and `rejected` each a list of the assistant's messages, or a string for one such message. The
      tokenizer's chat template renders it.

    `max_length` (tokens, at least 2) bounds prompt + response; None truncates nothing.

    Raises `UnusablePair` (a `ValueError`) with the reason if a field is missing or of the wrong type, if a response is
    empty, if chosen and rejected are the same (also: after truncation), or if no token of the prompt is left to predict
    the response's first from. Raises `TypeError` or `ValueError` for a tokenizer without character offsets, EOS or (for
    chat) template.
    """
    _check_options(tokenizer, max_length, end)
    texts = _render(example, tokenizer)
    chosen, rejected = (_split(texts.prompt, text, tokenizer) for text in (texts.chosen, texts.rejected))
    chosen, rejected = (_finish(side, texts.is_chat, tokenizer, end) for side in (chosen, rejected))
    if max_length is not None:
        chosen, rejected = _truncate(chosen, rejected, max_length, tokenizer.bos_token_id)
    _check_sides(chosen, rejected, max_length)
    return {
        "chosen_input_ids": chosen.prompt + chosen.response,
        "chosen_labels": [IGNORE_INDEX] * len(chosen.prompt) + chosen.response,
        "rejected_input_ids": rejected.prompt + rejected.response,
        "rejected_labels": [IGNORE_INDEX] * len(rejected.prompt) + rejected.response,
    }


def _check_options(tokenizer: PreTrainedTokenizerBase, max_length: int | None, end: str) -> None:
    if not getattr(tokenizer, "is_fast", False):
        raise TypeError(
            f"{type(tokenizer).__name__} gives no character offsets, by which the boundary between prompt and response "
            "is found; load the model's fast tokenizer (use_fast=True)."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("The tokenizer has no EOS token, so a response could not end; set tokenizer.eos_token.")
    if max_length is not None and max_length < 2:
        raise ValueError(f"max_length must be at least 2, one token of prompt and one of response; got {max_length}.")
    if end not in get_args(End):
        raise ValueError(f"end must be one of {get_args(End)}; got {end!r}.")


# --- texts ---------------------------------------------------------------------------------------------------------


class _Texts(NamedTuple):
    """The prompt, and the whole text (prompt included) of either side."""

    prompt: str
    chosen: str
    rejected: str
    is_chat: bool


def _render(example: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase) -> _Texts:
    if not isinstance(example, Mapping):
        raise UnusablePair(f"it is a {type(example).__name__}, not a mapping with prompt, chosen and rejected")
    missing = [field for field in ("prompt", "chosen", "rejected") if example.get(field) is None]
    if missing:
        raise UnusablePair(f"it has no {' and no '.join(missing)}")
    prompt, chosen, rejected = example["prompt"], example["chosen"], example["rejected"]
    if isinstance(prompt, str):
        texts = _render_plain(prompt, chosen, rejected)
    elif isinstance(prompt, list):
        texts = _render_chat(prompt, chosen, rejected, tokenizer)
    else:
        raise UnusablePair(f"its prompt is a {type(prompt).__name__}, neither a string nor a list of messages")
    if texts.chosen == texts.rejected:
        raise UnusablePair("its chosen and rejected responses are the same")
    return texts


def _render_plain(prompt: str, chosen: Any, rejected: Any) -> _Texts:
    for name, response in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(response, str):
            kind = type(response).__name__
            raise UnusablePair(f"its prompt is a string but its {name} is a {kind}: both are text or both are chat")
        if not response.strip():
            raise UnusablePair(f"its {name} response is empty")
    return _Texts(prompt, prompt + chosen, prompt + rejected, is_chat=False)


def _render_chat(prompt: list, chosen: Any, rejected: Any, tokenizer: PreTrainedTokenizerBase) -> _Texts:
    if tokenizer.chat_template is None:
        raise ValueError("The prompt is a chat, but the tokenizer has no chat template; set tokenizer.chat_template.")
    _check_messages("prompt", prompt)
    if prompt[-1]["role"] not in ("user", "tool"):
        raise UnusablePair(f"the last message of its prompt is by {prompt[-1]['role']!r}, not by 'user' or 'tool'")
    answers = [_answer(name, answer) for name, answer in (("chosen", chosen), ("rejected", rejected))]
    opening = _apply_template(tokenizer, prompt, add_generation_prompt=True)
    texts = [_apply_template(tokenizer, prompt + answer, add_generation_prompt=False) for answer in answers]
    # Some templates open a turn with more than a finished one keeps (DeepSeek-R1 and its `<think>`). The prompt is
    # what both sides share with the opening.
    shared = os.path.commonprefix([opening, *texts])  # noqa: RUF071 (strings, not paths)
    return _Texts(shared, texts[0], texts[1], is_chat=True)


def _answer(name: str, answer: Any) -> list[dict[str, Any]]:
    messages = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    _check_messages(name, messages)
    if others := {message["role"] for message in messages} - {"assistant"}:
        raise UnusablePair(f"its {name} has a message by {others.pop()!r}; a response is the assistant's alone")
    if not messages[-1]["content"].strip():
        raise UnusablePair(f"its {name} response is empty")
    return messages


def _check_messages(name: str, messages: Any) -> None:
    if not isinstance(messages, list):
        raise UnusablePair(f"its {name} is a {type(messages).__name__}, neither a string nor a list of messages")
    if not messages:
        raise UnusablePair(f"its {name} has no message")
    for message in messages:
        if not isinstance(message, Mapping) or not all(isinstance(message.get(k), str) for k in ("role", "content")):
            raise UnusablePair(f"its {name} has a message without a role and a content that are strings: {message!r}")


def _apply_template(tokenizer: PreTrainedTokenizerBase, messages: list, *, add_generation_prompt: bool) -> str:
    from jinja2 import TemplateError  # transformers needs it for any template, but only then

    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except TemplateError as error:  # such as "roles must alternate"
        raise UnusablePair(f"the chat template refuses it: {error}") from error
    assert isinstance(text, str)
    return text


# --- tokens --------------------------------------------------------------------------------------------------------


def _split(prompt: str, text: str, tokenizer: PreTrainedTokenizerBase) -> _Side:
    """The ids of `text`, split where the response begins."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoding["input_ids"], encoding["offset_mapping"]
    first = next((i for i, (_, stop) in enumerate(offsets) if stop > len(prompt)), len(ids))
    if first > 0 and _true_stop(ids[first - 1], offsets[first - 1], text, tokenizer) > len(prompt):
        first -= 1
    return _Side(ids[:first], ids[first:])


def _true_stop(token: int, offsets: tuple[int, int], text: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Where a token ends in `text`. Some tokenizers (RoBERTa's kind) leave a token's own spaces out of its offsets."""
    own, following = text[slice(*offsets)], text[offsets[1] : offsets[1] + 1]
    if not own or own.endswith(" ") or not following.startswith(" "):
        return offsets[1]
    piece = tokenizer.decode([token])
    return offsets[1] + len(piece) - len(piece.rstrip(" "))


def _finish(side: _Side, is_chat: bool, tokenizer: PreTrainedTokenizerBase, end: End) -> _Side:
    """Give the sequence its beginning (a BOS, once) and the response its end."""
    prompt, response = side
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    if bos is not None and prompt[:1] != [bos] and (end == "trl" or (not is_chat and _adds_bos(tokenizer))):
        prompt = [bos, *prompt]
    if is_chat and end == "single":
        return _Side(prompt, end_turn(response, tokenizer))
    return _Side(prompt, response if response[-1:] == [eos] else [*response, eos])


def _adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer itself begins a text with a BOS. (A chat template prints its own.)"""
    return tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]


def end_turn(response: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Cut a rendered turn behind its end-of-turn token, or give it an EOS where the template prints no such token.

    The end of turn need not be the EOS (Gemma's `<end_of_turn>`, Phi-3's `<|end|>`), and line breaks and an EOS may
    follow it. It is the first end token of the run of spaces and special tokens with which the turn ends.
    """
    run = len(response)
    while run > 0 and (_ends(response[run - 1], tokenizer) or not tokenizer.decode([response[run - 1]]).strip()):
        run -= 1
    for position in range(run, len(response)):
        if _ends(response[position], tokenizer):
            return response[: position + 1]
    return [*response, tokenizer.eos_token_id]


def _ends(token: int, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a token at the end of a turn can be what ends it: any special token but the unknown one."""
    if token in (tokenizer.eos_token_id, tokenizer.unk_token_id):
        return token == tokenizer.eos_token_id  # GPT-2 has one token for both
    return bool(tokenizer.decode([token])) and not tokenizer.decode([token], skip_special_tokens=True)


def _truncate(chosen: _Side, rejected: _Side, max_length: int, bos: int | None) -> tuple[_Side, _Side]:
    """The rule of the module's docstring. Both prompts lose the same tokens."""
    sides = (chosen, rejected)
    promised = min(max(len(side.response) for side in sides), max_length // 2)
    surplus = max(0, max(len(side.prompt) for side in sides) + promised - max_length)
    return _shortened(chosen, surplus, max_length, bos), _shortened(rejected, surplus, max_length, bos)


def _shortened(side: _Side, surplus: int, max_length: int, bos: int | None) -> _Side:
    kept = (
        1 if side.prompt[:1] == [bos] and side.prompt.count(side.prompt[0]) == 1 else 0
    )  # ChatML's "BOS" opens each turn
    prompt = side.prompt[:kept] + side.prompt[kept + surplus :]
    return _Side(prompt, side.response[: max_length - len(prompt)])


def _check_sides(chosen: _Side, rejected: _Side, max_length: int | None) -> None:
    if not chosen.prompt or not rejected.prompt:
        raise UnusablePair("no token of its prompt precedes the response, whose first token then has no prediction")
    if chosen.response == rejected.response:
        raise UnusablePair(f"its chosen and rejected responses are the same ids when cut to max_length={max_length}")


# --- batches -------------------------------------------------------------------------------------------------------


def _checked(pair: Mapping[str, Any], max_length: int | None) -> Mapping[str, Any]:
    """A pair that came tokenised, perhaps by other code."""
    for side in ("chosen", "rejected"):
        ids, labels = pair.get(f"{side}_input_ids"), pair.get(f"{side}_labels")
        if ids is None or labels is None:
            raise UnusablePair(f"it is tokenised but lacks {side}_input_ids or {side}_labels")
        if len(ids) != len(labels):
            raise UnusablePair(f"its {side}_input_ids has {len(ids)} tokens but its {side}_labels has {len(labels)}")
        if all(label == IGNORE_INDEX for label in labels[1:]):  # the first token of a sequence has no prediction
            raise UnusablePair(f"its {side} response is empty: every label is {IGNORE_INDEX}")
        if max_length is not None and len(ids) > max_length:
            raise UnusablePair(f"its {side} side was tokenised to {len(ids)} tokens, more than max_length={max_length}")
    return pair


def _chosen_alone(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The pair with nothing of its rejected side but the prompt that it shares."""
    ids, labels = list(pair["chosen_input_ids"]), list(pair["chosen_labels"])
    prompt = next(i for i, label in enumerate(labels) if label != IGNORE_INDEX)
    return {
        "chosen_input_ids": ids,
        "chosen_labels": labels,
        "rejected_input_ids": ids[:prompt],
        "rejected_labels": [IGNORE_INDEX] * prompt,
    }


def _reference_logps(examples: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What a reference model gave the answers, where every example says it."""
    if not all(column in example for column in REFERENCE for example in examples):
        return {}
    values = [float(example[column]) for column in REFERENCE for example in examples]
    return {"reference_logps": torch.tensor(values, dtype=torch.float64)}


def pad_pairs(pairs: Sequence[Mapping[str, Any]], padding_id: int, sides: Sequence[str] = SIDES) -> dict[str, Any]:
    """The padded batch of tokenised pairs, or of one of their sides."""
    ids = [pair[f"{side}_input_ids"] for side in sides for pair in pairs]
    labels = [pair[f"{side}_labels"] for side in sides for pair in pairs]
    return {
        "input_ids": _pad(ids, padding_id),
        "attention_mask": _pad([[1] * len(row) for row in ids], 0),
        "labels": _pad(labels, IGNORE_INDEX),
    }


def _padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do: no mask and no label is derived from it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def _pad(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """(rows, longest row) int64, padded on the right."""
    padded = torch.full((len(rows), max(map(len, rows))), value, dtype=torch.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
    return padded
