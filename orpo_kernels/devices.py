"""What differs between types of devices, and those without float64: Apple's GPUs (MPS) and Intel's Arc cards (XPU).

All that is computed of a number a row (labels to rows, sums over sequences, odds ratio) is computed in float64. Where a
device has none, it makes the numbers (`statistics_dtype`) and the host does the rest: rows are there, and so is what
belongs to them. Loss, metrics and gradients are on the device as anywhere else.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Kind:
    """A type of device.

    Attributes:
        backend: the best for its tensors, where it can be used.
        rows_backend: the best for what is done with a few numbers a row. A CPU whose is "triton" stands for a GPU.
        has_float64: False where none of its devices has.
        memory: bytes of each, to be asked for if None.
    """

    backend: str = "torch"
    rows_backend: str = "torch"
    has_float64: bool = True
    memory: int | None = None


# By `torch.device.type`; torch calls AMD's GPUs cuda as well. What stands for another device is entered here.
GPU_KIND = Kind("triton", "triton")
KINDS = {"cpu": Kind("native", "native"), "cuda": GPU_KIND, "xpu": GPU_KIND, "mps": Kind(has_float64=False)}


def kind_of(device: torch.device) -> Kind:
    return KINDS.get(device.type, Kind())


def is_host(device: torch.device) -> bool:
    """Whether to look at a number there is not to wait for it."""
    return device.type == "cpu" and kind_of(device).rows_backend != "triton"


def has_float64(device: torch.device) -> bool:
    if device.type == "xpu" and torch.xpu.is_available():
        return bool(torch.xpu.get_device_properties(device.index).has_fp64)
    return kind_of(device).has_float64


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
