"""The ORPO loss of any decoder-only Hugging Face model, straight from its last hidden states."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import ORPOOutput, orpo_loss
from .body import last_hidden_states, unwrap
from .lm_head import resolve_lm_head
from .probe import match_dtype, verify_lm_head

_FROM_THE_MODEL = ("hidden", "weight", "bias", "logit_scale", "logit_softcap")
_FROM_THE_BATCH = ("nll_labels", "shift")


def causal_lm_orpo_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor,
    *,
    prompt_nll: bool = True,
    **options: Any,
) -> ORPOOutput:
    """ORPO loss of one concatenated batch, without its logits.

    Args:
        model: a `transformers` causal LM, or a `peft` model around one (adapters in the body, or `modules_to_save` on
            the head). Its body is called as its own forward calls it; no forward is copied or patched. The first call
            also runs the model's own forward on a few tokens, to check that its head is what it seems (`probe.py`).
        input_ids: (2B, T) int64, the B chosen sequences first, then the rejected ones in the same order.
        attention_mask: (2B, T) int or bool, 1 on tokens and 0 on padding, on either side; None if there is no padding.
            With padding on the left, a model with absolute positions (GPT-2) counts the padding, as its own
            forward does; pad on the right.
        labels: (2B, T) int64, unshifted: the response's ids, `ignore_index` on prompt and padding.
        prompt_nll: whether the NLL of the chosen side covers its prompt as well (TRL) or only its response (the paper).
        options: anything else that `orpo_loss` takes: beta, alpha, nll_reduction, nll_denominator, pair_denominator,
            ignore_index, schedule, memory_budget, backend.

    Returns:
        `ORPOOutput`. `loss` is differentiable with respect to whatever of the model requires grad.

    Raises `TypeError` or `ValueError`, naming what was given and what is needed, for inputs that do not fit together,
    for an option that is not the caller's to give, and for a model that cannot be served (`body.py`, `lm_head.py`,
    `probe.py`).
    """
    _check_options(options)
    _check_batch(input_ids, attention_mask, labels)
    inner = unwrap(model)
    head = resolve_lm_head(inner)
    verify_lm_head(model, inner, head, input_ids)

    ignore_index = options.get("ignore_index", -100)
    nll_source = input_ids if prompt_nll else labels
    hidden = last_hidden_states(inner, input_ids, attention_mask)
    return orpo_loss(
        match_dtype(hidden, head.weight),
        head.weight,
        _predictable(labels, attention_mask, ignore_index),
        nll_labels=_predictable(nll_source, attention_mask, ignore_index)[: labels.shape[0] // 2],
        shift=True,
        bias=head.bias,
        logit_scale=head.logit_scale,
        logit_softcap=head.logit_softcap,
        **options,
    )


def _predictable(targets: Tensor, attention_mask: Tensor | None, ignore_index: int) -> Tensor:
    """The targets that are tokens and come after a token. (Behind padding on the left, the first token does not.)"""
    if attention_mask is None:
        return targets
    is_token = attention_mask == 1
    after_token = torch.nn.functional.pad(is_token[:, :-1], (1, 0))
    return targets.masked_fill(~(is_token & after_token), ignore_index)


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name in _FROM_THE_MODEL:
            raise TypeError(
                f"{name} is read from the model and cannot be passed; call orpo_kernels.orpo_loss to set it."
            )
        if name in _FROM_THE_BATCH:
            raise TypeError(f"{name} is made from the batch (see prompt_nll); call orpo_kernels.orpo_loss to set it.")


def _check_batch(input_ids: Tensor, attention_mask: Tensor | None, labels: Tensor) -> None:
    tensors = {"input_ids": input_ids, "labels": labels}
    if attention_mask is not None:
        tensors["attention_mask"] = attention_mask
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a tensor, but is a {type(tensor).__name__}.")
        if tensor.ndim != 2 or tensor.shape != input_ids.shape:
            raise ValueError(
                f"input_ids and {name} must be of one shape (2B, T), but are {tuple(input_ids.shape)} and "
                f"{tuple(tensor.shape)}."
            )
        if tensor.device != input_ids.device:
            raise ValueError(f"input_ids is on {input_ids.device} but {name} on {tensor.device}; move them together.")
        if name != "attention_mask" and tensor.dtype != torch.int64:
            raise TypeError(f"{name} must be int64, but is {tensor.dtype}.")
    if attention_mask is not None and attention_mask.is_floating_point():
        raise TypeError(f"attention_mask must be integer or bool, 1 on tokens, but is {attention_mask.dtype}.")
    if input_ids.shape[0] % 2:
        raise ValueError(
            f"A batch is B chosen sequences, then B rejected ones, but input_ids has an odd {input_ids.shape[0]}."
        )
