"""Which rows the loss of a batch runs over: made of its labels once, on the host, where the batch itself is made."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..devices import has_float64, rows_device
from ..engine.objective import counts_of
from ..methods import Method
from ..rows import Rows, padded_rows, rows_from_labels
from .packing import IGNORE_INDEX, PackedPairs

_OF_THE_ROWS = ("input_ids", "attention_mask", "labels", "decoder_input_ids", "packed", "chosen_only")


@dataclass(frozen=True)
class RowsCollator:
    """A collator of the caller's whose batches come with their rows, made in the processes of the data loader.

    Attributes:
        collator: makes batches as a `PreferenceCollator` does. Those of which no rows can be made are left as they are.
        method, ignore_index, media_tokens: what `with_rows` takes.
        device: where the batches go: for one without float64 their numbers are fp32 already.
    """

    collator: Callable[[Sequence[Any]], Any]
    method: Method
    ignore_index: int = IGNORE_INDEX
    device: torch.device | None = None
    media_tokens: tuple[int, ...] = ()

    def __call__(self, examples: Sequence[Any]) -> Any:
        batch = self.collator(examples)
        is_whole = isinstance(batch, Mapping) and "input_ids" in batch and ("labels" in batch or "packed" in batch)
        batch = with_rows(batch, self.method, self.ignore_index, self.media_tokens) if is_whole else batch
        return batch if self.device is None else narrowed(batch, self.device)


def narrowed(batch: Any, device: torch.device) -> Any:
    """A batch that the device can take: if that has no float64, with numbers in fp32. Its rows stay on the host."""
    if has_float64(device) or not isinstance(batch, Mapping):
        return batch
    return {
        name: value.float() if isinstance(value, Tensor) and value.dtype == torch.float64 else value
        for name, value in batch.items()
    }


def batch_on(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """The batch of a collator on a device."""
    return {name: value.to(device) for name, value in narrowed(batch, device).items()}


def with_rows(
    batch: Mapping[str, Any],
    method: Method,
    ignore_index: int = IGNORE_INDEX,
    media_tokens: tuple[int, ...] = (),
) -> dict[str, Any]:
    """The batch with the method's `rows` in place of its labels; as it is where it has rows.

    media_tokens: the ids that stand for pictures (`media.media_tokens`), which are no targets.

    Raises as `causal_lm_preference_loss` for what is missing, and for tensors that do not fit together.
    """
    if "rows" in batch:
        return dict(batch)
    rows = batch_rows(
        **{name: batch[name] for name in _OF_THE_ROWS if name in batch},
        prompt_nll=method.prompt_nll,
        nll_reduction=method.nll_reduction,
        ignore_index=ignore_index,
        media_tokens=media_tokens,
    )
    rest = {name: value for name, value in batch.items() if name != "labels"}
    return rest | {"rows": _looked_at(rows) if rows.position.device.type == "cpu" else rows}


def _looked_at(rows: Rows) -> Rows:
    """Live rows on the host with all that a device may want to know of them."""
    rows = rows.by_sequence()
    unique = rows.known.unique_positions or len(rows.position.unique()) == len(rows)
    return rows.knowing(counts=counts_of(rows), unique_positions=unique)


def batch_rows(
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    decoder_input_ids: Tensor | None = None,
    packed: PackedPairs | None = None,
    rows: Rows | None = None,
    pair_weights: Tensor | None = None,
    prompt_nll: bool = True,
    nll_reduction: str = "token",
    chosen_only: bool = False,
    ignore_index: int = IGNORE_INDEX,
    media_tokens: tuple[int, ...] = (),
) -> Rows:
    """What the loss of a batch runs over, where the rows of its input_ids are, as in `causal_lm_preference_loss`.

    `rows` and `packed` are taken as they are. Of labels on a GPU the host reads how many rows they make: before the
    body, and not behind all that the body does.
    """
    if packed is not None:
        _check_packed(input_ids, attention_mask, labels, packed)
        if decoder_input_ids is not None:
            raise TypeError(
                "decoder_input_ids and packed cannot both be given: an encoder-decoder model packs nothing."
            )
    if rows is not None:
        if not isinstance(rows, Rows):
            raise TypeError(f"rows must be Rows, but is a {type(rows).__name__}.")
        if labels is not None:
            raise TypeError(
                "labels and rows cannot both be given: rows are what was made of the labels; leave one out."
            )
        rows = rows.to(input_ids.device)
        rows = rows if torch.compiler.is_compiling() else rows.live()
        return rows if pair_weights is None else rows.weighted(pair_weights)
    if packed is not None:
        packed = packed.to(rows_device(input_ids.device))
        return packed.rows(prompt_nll, nll_reduction, media_tokens).weighted(pair_weights)
    if labels is None:
        raise TypeError("labels are missing; a batch has labels and an attention_mask, or `packed`, or `rows`.")
    if decoder_input_ids is not None:  # each label is predicted where it stands, and the NLL has no others
        _check_encoder_decoder_batch(input_ids, attention_mask, labels, decoder_input_ids, chosen_only)
        scored, nll = labels, None
    else:
        _check_batch(input_ids, attention_mask, labels, chosen_only)
        scored, nll = (
            _predictable(ids, attention_mask, ignore_index, media_tokens)
            for ids in (labels, input_ids if prompt_nll else labels)
        )
    pairs = labels.shape[0] if chosen_only else labels.shape[0] // 2
    if chosen_only:
        scored = torch.cat((scored, torch.full_like(scored, ignore_index)))  # empty answers, which no position has
    make = padded_rows if torch.compiler.is_compiling() else rows_from_labels
    return make(
        scored,
        None if nll is None else nll[:pairs],
        shift=decoder_input_ids is None,
        ignore_index=ignore_index,
        nll_reduction=nll_reduction,
        pair_weight=pair_weights,
    )


def _predictable(
    targets: Tensor, attention_mask: Tensor | None, ignore_index: int, media_tokens: tuple[int, ...]
) -> Tensor:
    """The targets that are tokens of text and come after a token. (Behind padding on the left, the first does not.)"""
    for token in media_tokens:
        targets = targets.masked_fill(targets == token, ignore_index)
    if attention_mask is None:
        return targets
    is_token = attention_mask == 1
    after_token = torch.nn.functional.pad(is_token[:, :-1], (1, 0))
    return targets.masked_fill(~(is_token & after_token), ignore_index)


def _check_packed(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor | None, packed: PackedPairs) -> None:
    if not isinstance(packed, PackedPairs):
        raise TypeError(f"packed must be PackedPairs, but is a {type(packed).__name__}.")
    for name, tensor in (("attention_mask", attention_mask), ("labels", labels)):
        if tensor is not None:
            raise TypeError(f"{name} and packed cannot both be given: a packed batch has its own.")
    if input_ids.shape != packed.segments.shape:
        raise ValueError(
            f"input_ids and packed must be of one shape (R, T), but are {tuple(input_ids.shape)} and "
            f"{tuple(packed.segments.shape)}."
        )


def _check_batch(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, chosen_only: bool) -> None:
    _check_tensors("(2B, T)", input_ids=input_ids, labels=labels, attention_mask=attention_mask)
    if input_ids.shape[0] % 2 and not chosen_only:
        raise ValueError(
            f"A batch is B chosen sequences, then B rejected ones, but input_ids has an odd {input_ids.shape[0]}."
        )


def _check_encoder_decoder_batch(
    input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor, decoder_input_ids: Tensor, chosen_only: bool
) -> None:
    _check_tensors("(B, S)", input_ids=input_ids, attention_mask=attention_mask)
    _check_tensors("(2B, T)", labels=labels, decoder_input_ids=decoder_input_ids)
    answers = 1 if chosen_only else 2
    if labels.shape[0] != answers * input_ids.shape[0]:
        raise ValueError(
            f"labels has {labels.shape[0]} answers and input_ids {input_ids.shape[0]} prompts, but an encoder-decoder "
            f"model takes {answers} for each prompt, which it reads once; give input_ids (B, S) and labels "
            f"({'B' if chosen_only else '2B'}, T)."
        )
    if labels.device != input_ids.device:
        raise ValueError(f"input_ids is on {input_ids.device} but labels on {labels.device}; move them together.")


def _check_tensors(shape: str, attention_mask: Tensor | None = None, **ids: Tensor) -> None:
    """Ids are int64 and, like the mask, of the shape and on the device of the first of them."""
    tensors = ids if attention_mask is None else {**ids, "attention_mask": attention_mask}
    first, expected = next(iter(ids.items()))
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, but is a {type(tensor).__name__}.")
        if tensor.ndim != 2 or tensor.shape != expected.shape:
            raise ValueError(
                f"{first} and {name} must be of one shape {shape}, but are {tuple(expected.shape)} and "
                f"{tuple(tensor.shape)}."
            )
        if tensor.device != expected.device:
            raise ValueError(f"{first} is on {expected.device} but {name} on {tensor.device}; move them together.")
        if name != "attention_mask" and tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, but is {tensor.dtype}.")
    if attention_mask is not None and attention_mask.is_floating_point():
        raise TypeError(f"attention_mask must be integer or bool, 1 on tokens, but is {attention_mask.dtype}.")
