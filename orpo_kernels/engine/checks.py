"""The checks of tensors that the public functions make. Errors name both sides and say what to do."""

from __future__ import annotations

import torch
from torch import Tensor

from ..devices import is_host
from ..ops import host_ops, is_readable

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Shapes, dtypes and devices of hidden (..., H), weight (V, H) and bias (V,)."""
    if hasattr(hidden, "device_mesh"):
        raise TypeError(
            "hidden is a DTensor, it must be a plain tensor: pass hidden.full_tensor() or hidden.to_local()"
        )
    if weight.dim() != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, it must be (V, H) as in nn.Linear")
    if hidden.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)} and weight {tuple(weight.shape)}: the last dimension of both "
            f"must be the hidden size, but they are {hidden.shape[-1]} and {weight.shape[1]}"
        )
    if weight.shape[0] == 0:
        raise ValueError("weight has no rows: the vocabulary is empty")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"bias has shape {tuple(bias.shape)}, but weight {tuple(weight.shape)} asks for ({weight.shape[0]},)"
        )
    for name, tensor in {"weight": weight, "bias": bias}.items():
        if tensor is None:
            continue
        check_same_device("hidden", hidden, name, tensor)
        if tensor.dtype not in FLOATS or hidden.dtype not in FLOATS:
            raise TypeError(
                f"hidden is {hidden.dtype} and {name} is {tensor.dtype}: both must be float16, bfloat16, float32 or "
                "float64; dequantise a quantized lm-head first"
            )
        if tensor.dtype != hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
            raise TypeError(
                f"hidden is {hidden.dtype}, but {name} is {tensor.dtype}: cast one of them, or use torch.autocast"
            )


def check_same_device(name: str, tensor: Tensor, other_name: str, other: Tensor) -> None:
    if tensor.device != other.device:
        raise TypeError(f"{name} is on {tensor.device}, but {other_name} is on {other.device}: move one of them")


def check_rows(name: str, position: Tensor, num_positions: int, target: Tensor, vocab_size: int) -> None:
    """Positions (R,) in [0, N), and targets (R,) in [0, V), which errors call `name`.

    Of tensors on a CPU a `ValueError` says here what they hold. A GPU looks at its own, so as not to be waited for: one
    that is outside stops it, and whatever waits for it next raises the `RuntimeError` of a device-side assertion.
    """
    if not target.numel() or not is_readable(target):
        return
    are_within = host_ops(target).are_within(position, num_positions, target, vocab_size)
    if not is_host(target.device):
        torch._assert_async(
            are_within,
            f"{name} holds a token id outside [0, {vocab_size}), the rows of the weight, or rows.position a position "
            f"outside [0, {num_positions}), those of hidden; the same call on a CPU says which",
        )
    elif not are_within:
        raise ValueError(_what_is_outside(name, position, num_positions, target, vocab_size))


def _what_is_outside(name: str, position: Tensor, num_positions: int, target: Tensor, vocab_size: int) -> str:
    low, high = target.aminmax()
    if low < 0 or high >= vocab_size:
        return (
            f"{name} holds token ids from {low} to {high}, but weight has {vocab_size} rows: ids must be in "
            f"[0, {vocab_size}), or ignore_index where there is no target"
        )
    low, high = position.aminmax()
    return f"rows.position runs from {low} to {high}, but hidden has {num_positions} positions"


def check_pair_weight(weight: Tensor | None) -> None:
    """Finite weights of at least 0. On a GPU the check is asynchronous."""
    if weight is None or not weight.numel() or not is_readable(weight):
        return
    are_valid = (weight >= 0) & (weight < torch.inf)
    if not is_host(weight.device):
        torch._assert_async(are_valid.all(), "pair_weight holds a weight that is negative or not finite")
    elif not are_valid.all():
        index = int(are_valid.logical_not().nonzero()[0])
        raise ValueError(
            f"pair_weight is {float(weight[index])} for pair {index}: weights must be finite and at least 0 (0 leaves "
            "the pair out)"
        )


def check_options(logit_scale: float, logit_softcap: float | None, sparse_eps: float | None = None) -> None:
    if not logit_scale > 0:
        raise ValueError(f"logit_scale is {logit_scale}, it must be positive")
    if logit_softcap is not None and not logit_softcap > 0:
        raise ValueError(f"logit_softcap is {logit_softcap}, it must be positive, or None for no soft-cap")
    if sparse_eps is not None and not 0 <= sparse_eps < 1:
        raise ValueError(f"sparse_eps is {sparse_eps}, it must be a probability in [0, 1), or None for exact gradients")


def check_denominators(nll: int | Tensor | None, pairs: int | Tensor | None) -> None:
    for name, denominator in (("nll_denominator", nll), ("pair_denominator", pairs)):
        if isinstance(denominator, Tensor):
            if denominator.numel() != 1:
                raise ValueError(f"{name} has shape {tuple(denominator.shape)}, it must be an int or a 0-d tensor")
        elif denominator is not None and not denominator > 0:
            raise ValueError(f"{name} is {denominator}, it must be positive, or None for the batch's own count")
