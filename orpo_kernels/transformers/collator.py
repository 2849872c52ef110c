"""Preference data as batches: pairs of ids (`tokenization.py`) padded into one concatenated batch, or packed into rows
that hold every prompt once (`packing.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor

from .images import Processor, is_processor, read_images
from .packing import IGNORE_INDEX, SIDES, Packing, aligned_width, pack_pairs, prompt_length
from .rendering import REFERENCE, WEIGHT, UnusablePair
from .tokenization import End, TokenizedPair, TooLong, check_options, tokenize_pair

if TYPE_CHECKING:
    from rich.console import Console
    from transformers import PreTrainedTokenizerBase

Sides = Literal["both", "chosen"]


@dataclass
class PreferenceCollator:
    """Makes batches for `causal_lm_orpo_loss` of raw examples, or of pairs that `tokenize_pair` has tokenised.

    `collator(examples)` of B pairs returns, by `packing`:

    - "auto", the default: "padded", unless one of the trainers of this package finds that its model allows "shared" and
      that it is faster where it runs (`sharing.automatic_packing`).
    - "measure": as "auto", but when training begins those trainers time both on a few batches, and keep the faster.
    - "padded": int64 tensors of shape (2B, T), the B chosen sequences first, padded on the right: `input_ids`,
      `attention_mask` (1 on tokens, made from the lengths: pad and EOS may be one id) and `labels` (unshifted, -100 on
      prompt and padding). Right for every model.
    - "shared": `input_ids` (R, T) int64 in at most B rows, every prompt once, and `packed`, the `PackedPairs` that says
      where everything is. The loss and its gradients are the same, but some models do not allow it (ALiBi, recurrent
      layers, flash-attention); `refuses_shared_prompt(model)` says why, and the loss refuses such a batch.

    With `aligned` the width T is rounded up to one of few (`aligned_width`), which a GPU's libraries have seen before;
    None, the default, is True where one of the trainers of this package has a GPU.

    With `answers="chosen"` the rejected answers are left out, as SFT trains: a padded batch then has B rows and says
    `chosen_only=True`. Pairs that have the columns `ref_chosen_logps` and `ref_rejected_logps` (TRL's names for the
    summed log-probabilities of a reference model) give the batch `reference_logps`, (2B,) float64, chosen ones first;
    pairs with a `weight` give it `pair_weights`, (B,) float64, 1 for a pair without one.

    With a model's processor (`AutoProcessor`) as `tokenizer`, pairs may have pictures (`tokenize_pair`); the batch then
    has what the processor makes of them (`pixel_values`, ...), in the order of its rows, a shared prompt's once. They
    are read and processed here. `image_urls=True` also fetches those on the net.

    See `tokenize_pair` for the forms of an example and for the options. Raises `ValueError`, naming the index and the
    reason, when a pair cannot be used.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int | None = None
    end: End = "single"
    packing: Packing = "auto"
    answers: Sides = "both"
    too_long: TooLong = "cut"
    aligned: bool | None = None
    image_urls: bool = False
    processor: Processor | None = None

    def __post_init__(self) -> None:
        if is_processor(self.tokenizer):
            self.processor = Processor(self.tokenizer, self.image_urls)
            self.tokenizer = self.processor.tokenizer
        self._check_options()

    def _check_options(self, needs_offsets: bool = True) -> None:
        check_options(self.tokenizer, self.max_length, self.end, self.too_long, needs_offsets)
        for name, value, choices in (("packing", self.packing, Packing), ("answers", self.answers, Sides)):
            if value not in get_args(choices):
                raise ValueError(f"{name} must be one of {get_args(choices)}; got {value!r}.")

    def __call__(self, examples: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        pairs = [self._tokenized(index, example) for index, example in enumerate(examples)]
        if not pairs:
            raise ValueError("The batch holds no pair; give the collator at least one example.")
        batch = self._batch(pairs)
        if self.processor is not None:
            order = batch["packed"].order() if "packed" in batch else range(len(pairs))
            batch |= self._pictures(self.processor, [pairs[index] for index in order], batch)
        return batch | _reference_logps(pairs) | pair_weights(pairs)

    def _batch(self, pairs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        """The tensors of tokenised pairs."""
        padding, aligned, chosen_only = padding_id(self.tokenizer), bool(self.aligned), self.answers == "chosen"
        if self.packing == "shared":
            return pack_pairs(list(map(_chosen_alone, pairs)) if chosen_only else pairs, padding, aligned=aligned)
        return pad_pairs(pairs, padding, aligned, chosen_only)

    def _pictures(
        self, processor: Processor, pairs: Sequence[Mapping[str, Any]], batch: Mapping[str, Any]
    ) -> dict[str, Tensor]:
        """What the model takes beside text: decoded here, in the workers of a data loader, once for both answers."""
        try:
            tensors = processor.tensors([read_images(pair.get("images", ()), processor.urls) for pair in pairs])
        except UnusablePair as unusable:
            raise ValueError(f"A pair of the batch cannot be used any more: {unusable}.") from unusable
        if "packed" in batch:
            return tensors
        if self.answers == "both":
            tensors = {name: torch.cat((value, value)) for name, value in tensors.items()}
        return tensors | processor.token_types(batch["input_ids"])

    def tokenized(self, example: Mapping[str, Any]) -> Mapping[str, Any]:
        """The pair as it goes into a batch. Raises `UnusablePair`."""
        if isinstance(example, Mapping) and "chosen_input_ids" in example:
            return self._checked(example)
        return self._tokenize(example, max_length=self.max_length, end=self.end, too_long=self.too_long)

    def _tokenize(self, example: Mapping[str, Any], **options: Any) -> TokenizedPair:
        return tokenize_pair(example, self.processor or self.tokenizer, **options)

    def _checked(self, pair: Mapping[str, Any]) -> Mapping[str, Any]:
        """A pair that came tokenised, perhaps by other code."""
        for side in SIDES:
            ids, labels = pair.get(f"{side}_input_ids"), pair.get(f"{side}_labels")
            if ids is None or labels is None:
                raise UnusablePair(f"it is tokenised but lacks {side}_input_ids or {side}_labels")
            if len(ids) != len(labels):
                raise UnusablePair(
                    f"its {side}_input_ids has {len(ids)} tokens but its {side}_labels has {len(labels)}"
                )
            if all(label == IGNORE_INDEX for label in labels[1:]):  # the first token of a sequence has no prediction
                raise UnusablePair(f"its {side} response is empty: every label is {IGNORE_INDEX}")
            if self.max_length is not None and len(ids) > self.max_length:
                raise UnusablePair(
                    f"its {side} side was tokenised to {len(ids)} tokens, more than max_length={self.max_length}"
                )
        return pair

    def show(self, examples: Sequence[Mapping[str, Any]], console: Console | None = None, whole: bool = False) -> None:
        """Print pairs as the model will see them: token by token, with what is trained on in colours (needs `rich`).

            PreferenceCollator(tokenizer, max_length=1024).show(dataset.select(range(3)))

        Args:
            examples: as the collator takes them. One that cannot be used is printed with the reason.
            console: a `rich.console.Console` of yours.
            whole: also all tokens of long prompts, of which else the middle is left out.
        """
        from rich.console import Console

        from .showing import legend, shown

        console = console or Console(highlight=False, markup=False)
        for index, example in enumerate(examples):
            console.rule(f"pair {index}", align="left")
            try:
                console.print(shown(self.tokenized(example), self.tokenizer, whole))
            except UnusablePair as unusable:
                console.print(f"It cannot be used: {unusable}.")
        console.rule("what the colours mean", align="left")
        console.print(legend())

    def _tokenized(self, index: int, example: Mapping[str, Any]) -> Mapping[str, Any]:
        try:
            return self.tokenized(example)
        except UnusablePair as unusable:
            raise ValueError(f"Pair {index} of the batch cannot be used: {unusable}.") from unusable


def _chosen_alone(pair: Mapping[str, Any]) -> dict[str, Any]:
    """The pair with nothing of its rejected side but the prompt that it shares."""
    prompt = prompt_length(pair["chosen_labels"])
    rejected = {"rejected_input_ids": pair["chosen_input_ids"][:prompt], "rejected_labels": [IGNORE_INDEX] * prompt}
    return {**pair, **rejected}


def _reference_logps(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What a reference model gave the answers, where every pair says it."""
    if not all(column in pair for column in REFERENCE for pair in pairs):
        return {}
    values = [float(pair[column]) for column in REFERENCE for pair in pairs]
    return {"reference_logps": torch.tensor(values, dtype=torch.float64)}


def pair_weights(pairs: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """What the pairs' losses are multiplied by, `pair_weights` (B,) float64, where any pair says it."""
    weights = [pair.get(WEIGHT) for pair in pairs]
    if all(weight is None for weight in weights):
        return {}
    values = [1.0 if weight is None else float(weight) for weight in weights]
    return {"pair_weights": torch.tensor(values, dtype=torch.float64)}


def pad_pairs(
    pairs: Sequence[Mapping[str, Any]], padding_id: int, aligned: bool = False, chosen_only: bool = False
) -> dict[str, Any]:
    """The padded batch of tokenised pairs, or of their chosen sides; `aligned`: as wide as an `aligned_width`."""
    sides = SIDES[:1] if chosen_only else SIDES
    ids = [pair[f"{side}_input_ids"] for side in sides for pair in pairs]
    labels = [pair[f"{side}_labels"] for side in sides for pair in pairs]
    batch = {**pad_ids(ids, padding_id, aligned), "labels": pad_rows(labels, IGNORE_INDEX, aligned)}
    return {**batch, "chosen_only": True} if chosen_only else batch


def pad_ids(ids: Sequence[Sequence[int]], padding_id: int, aligned: bool) -> dict[str, Tensor]:
    """`input_ids` and their `attention_mask`."""
    mask = pad_rows([[1] * len(row) for row in ids], 0, aligned)
    return {"input_ids": pad_rows(ids, padding_id, aligned), "attention_mask": mask}


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Any id will do: no mask and no label is derived from it."""
    return tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id


def pad_rows(rows: Sequence[Sequence[int]], value: int, aligned: bool) -> Tensor:
    """(rows, width) int64, padded on the right."""
    width = max(map(len, rows))
    width = aligned_width(width) if aligned else width
    padded = torch.full((len(rows), width), value, dtype=torch.int64)
    for row, ids in zip(padded, rows, strict=True):
        row[: len(ids)] = torch.as_tensor(ids, dtype=torch.int64)
    return padded
