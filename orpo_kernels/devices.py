"""Devices without float64: Apple's GPUs (MPS) and Intel's Arc cards (XPU).

All that is computed of a number a row (labels to rows, sums over sequences, odds ratio) is computed in float64. Where a
device has none, it makes the numbers (`statistics_dtype`) and the host does the rest: rows are there, and so is what
belongs to them. Loss, metrics and gradients are on the device as anywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

WITHOUT_FLOAT64 = ("mps",)  # and some of the XPUs, which say so


def has_float64(device: torch.device) -> bool:
    return device.type not in WITHOUT_FLOAT64 and (device.type != "xpu" or _xpu_has_float64(device.index))


def _xpu_has_float64(index: int | None) -> bool:
    return not torch.xpu.is_available() or bool(torch.xpu.get_device_properties(index).has_fp64)


def rows_device(device: torch.device) -> torch.device:
    """Where the rows of hidden states on `device` are."""
    return device if has_float64(device) else torch.device("cpu")


def statistics_dtype(device: torch.device) -> torch.dtype:
    """Of the numbers that are made for each row on `device`."""
    return torch.float64 if has_float64(device) else torch.float32


def moved(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    """`tensor` on `device` in `dtype`, which one of the two devices may not have: it is cast where both dtypes are.

    A GPU with float64 is not waited for to be copied to; every other copy is waited for.
    """
    if not has_float64(tensor.device):
        return tensor.to(device).to(dtype)
    if not has_float64(device):
        return tensor.to(dtype).to(device)
    return tensor.to(device, dtype, non_blocking=device.type != "cpu")
