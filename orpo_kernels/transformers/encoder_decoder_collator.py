"""Preference pairs for an encoder-decoder model: the prompt goes to its encoder, the answers to its decoder.

Prompt and answers are separate texts here. Each has the special tokens that the tokenizer puts around a text; the
answers have those of a target, which are others for mBART, NLLB and Marian. An answer always ends in an end token, also
where the tokenizer puts none (T5Gemma's). With `end="trl"` nothing is added, and the ids are those of TRL's
`ORPOTrainer`, except in what is cut and where targets have special tokens of their own.

A tokenised pair has the columns of every `TokenizedPair`: the prompt's tokens stand in front of both answers, with
labels -100.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from torch import nn

from .collator import PreferenceCollator, pad_ids, pad_rows, padding_id
from .encoder_decoder import ShiftRight
from .packing import IGNORE_INDEX, SIDES, prompt_length
from .rendering import Rendered, UnusablePair, as_pair, render_pair
from .tokenization import End, Side, TokenizedPair, TooLong, check_options, pair_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class EncoderDecoderCollator(PreferenceCollator):
    """`PreferenceCollator` for an encoder-decoder model, which says what its decoder reads:

        EncoderDecoderCollator(tokenizer, max_length=512, shift=ShiftRight.of(model))

    `PreferenceTrainer` makes one of a `PreferenceCollator` when its model is such a model.

    `collator(examples)` of B pairs returns int64 tensors, padded on the right: `input_ids` and `attention_mask` (B, S),
    the prompts; `labels` and `decoder_input_ids` (2B, T), the B chosen answers first, then the rejected ones. With
    `answers="chosen"`, (B, T), and `chosen_only=True`.

    Examples are those of `tokenize_pair`; an answer is one turn. `max_length` bounds the prompt, and each answer, by
    itself: the prompt loses its first tokens, an answer its last; special tokens around a prompt stay. Raises
    `ValueError` for `packing="shared"`.
    """

    shift: ShiftRight | None = None

    def __post_init__(self) -> None:
        if self.shift is None:
            raise ValueError(
                "shift is None, but the batch says what the decoder reads; give shift=ShiftRight.of(model)."
            )
        self._check_options(needs_offsets=False)
        if self.packing == "shared":
            raise ValueError(
                'packing is "shared", but the model is an encoder-decoder model, whose encoder runs once for both '
                'answers in any case; leave packing at "auto".'
            )

    @classmethod
    def of(cls, collator: PreferenceCollator, model: nn.Module) -> EncoderDecoderCollator:
        """With the options of another collator."""
        options = {field.name: getattr(collator, field.name) for field in fields(collator)}
        return cls(**options | {"shift": ShiftRight.of(model), "processor": None})

    def _tokenize(self, example: Mapping[str, Any], **options: Any) -> TokenizedPair:
        return tokenize_in_two_parts(example, self.tokenizer, **options)

    def _checked(self, pair: Mapping[str, Any]) -> Mapping[str, Any]:
        chosen, rejected = (_parts(pair, side) for side in SIDES)
        if chosen[0] != rejected[0]:
            raise UnusablePair("its two sides have different prompts, and the encoder runs once for both")
        longest = max(map(len, (*chosen, *rejected)))
        if self.max_length is not None and longest > self.max_length:
            raise UnusablePair(
                f"it was tokenised to {longest} tokens in a part, more than max_length={self.max_length}"
            )
        return pair

    def _batch(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        assert self.shift is not None
        chosen_only, aligned = self.answers == "chosen", bool(self.aligned)
        prompts = [_parts(pair, "chosen")[0] for pair in pairs]
        answers = [_parts(pair, side)[1] for side in (SIDES[:1] if chosen_only else SIDES) for pair in pairs]
        labels = pad_rows(answers, IGNORE_INDEX, aligned)
        batch: dict[str, Any] = pad_ids(prompts, padding_id(self.tokenizer), aligned)
        batch |= {"decoder_input_ids": self.shift(labels), "labels": labels}
        return {**batch, "chosen_only": True} if chosen_only else batch


def _parts(pair: Mapping[str, Any], side: str) -> tuple[list[int], list[int]]:
    """Prompt and labels of the answer. Raises `UnusablePair` where one of the columns does not say it."""
    ids, labels = pair.get(f"{side}_input_ids"), pair.get(f"{side}_labels")
    if ids is None or labels is None or len(ids) != len(labels):
        raise UnusablePair(f"it is tokenised but lacks {side}_input_ids and {side}_labels of one length")
    start = prompt_length(labels)
    if start in (0, len(labels)):
        raise UnusablePair(f"its {side} side has no {'prompt' if start == 0 else 'response'}: see its labels")
    return list(ids[:start]), list(labels[start:])


# --- text to tokens ------------------------------------------------------------------------------------------------


def tokenize_in_two_parts(
    example: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    end: End = "single",
    too_long: TooLong = "cut",
) -> TokenizedPair:
    """`tokenize_pair` for an encoder-decoder model; `EncoderDecoderCollator` says what differs.

    Raises `UnusablePair` with the reason, and `ValueError` for options or a tokenizer that can work for no pair.
    """
    check_options(tokenizer, max_length, end, too_long, needs_offsets=False)
    example = as_pair(example)
    chosen, rejected = render_pair(example, tokenizer)
    if chosen.prompt != rejected.prompt:
        raise UnusablePair(
            "its chat template gives its two sides different prompts, and the encoder runs once for both"
        )
    prompt, surplus = _prompt(chosen, tokenizer, max_length)
    answers = []
    for side, rendered in zip(SIDES, (chosen, rejected), strict=True):
        answer = _answer(side, rendered, tokenizer, end)
        answers.append(answer[:max_length])
        surplus += len(answer) - len(answers[-1])
    if surplus and too_long == "refuse":
        raise UnusablePair(f"it has {surplus} tokens more than max_length={max_length} leaves its parts")
    if answers[0] == answers[1]:
        raise UnusablePair(f"its chosen and rejected responses are the same ids when cut to {max_length} tokens")
    if not prompt:
        raise UnusablePair("its prompt has no token for the encoder to read")
    chosen_side, rejected_side = (Side(prompt, answer, labels=answer) for answer in answers)
    return pair_of(chosen_side, rejected_side, surplus, example)


def _prompt(side: Rendered, tokenizer: PreTrainedTokenizerBase, max_length: int | None) -> tuple[list[int], int]:
    """Its ids, and how many tokens `max_length` has cost: those behind the special ones that it begins with."""
    encoding: Any = tokenizer(side.prompt, return_special_tokens_mask=True, verbose=False)
    ids, special = list(encoding["input_ids"]), list(encoding["special_tokens_mask"])
    if side.is_chat and ids[:2] == [tokenizer.bos_token_id] * 2:  # the template's, and the tokenizer's
        ids, special = ids[1:], special[1:]
    surplus = 0 if max_length is None else max(0, len(ids) - max_length)
    first = special.index(0) if 0 in special else len(ids)
    return ids[:first] + ids[first + surplus :], surplus


def _answer(name: str, side: Rendered, tokenizer: PreTrainedTokenizerBase, end: End) -> list[int]:
    if len(side.answers) > 1:
        raise UnusablePair(f"its {name} answer has several turns, and the decoder of the model writes one")
    encoding: Any = tokenizer(text_target=side.text[slice(*side.answers[0])], verbose=False)
    ids, eos = list(encoding["input_ids"]), tokenizer.eos_token_id
    is_ended = eos in ids[-2:]  # mBART's language may follow it
    return ids if end == "trl" or is_ended else [*ids, eos]
