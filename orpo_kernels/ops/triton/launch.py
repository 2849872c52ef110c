"""Where every kernel is launched, and on what.

A kernel is compiled anew for another alignment of a pointer, and for a number that is 1 or divisible by 16. Vectors of
a number a row are cut anywhere, and the number of rows is never the same: kernels leave both out of it
(`do_not_specialize`, `do_not_specialize_on_alignment`), so that a training run compiles in its first step alone.
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .. import is_interpreted


class Target(NamedTuple):
    """A GPU's kind: ("cuda", 90) is sm_90, ("hip", "gfx942") an AMD architecture; and its multiprocessors."""

    backend: str
    arch: int | str
    processors: int = 132

    @property
    def name(self) -> str:
        """As its maker calls it: "sm_90", "gfx942"."""
        if self.backend == "cuda":
            return f"sm_{self.arch}"
        return str(self.arch).partition(":")[0] if self.backend == "hip" else self.backend


INTERPRETER = Target("interpreter", 0, 1)


def current_target() -> Target:
    """The GPU that kernels are compiled for."""
    if is_interpreted():
        return INTERPRETER
    driver = triton.runtime.driver.active
    return _target(driver, driver.get_current_device())


@functools.cache
def _target(driver: Any, device: int) -> Target:
    """Asked once: a driver takes a millisecond to tell a device's properties."""
    gpu = driver.get_current_target()
    properties = driver.utils.get_device_properties(device)
    return Target(gpu.backend, gpu.arch, properties["multiprocessor_count"])


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` on the device of the first tensor; an empty grid is nothing to do."""
    if 0 in grid:
        return
    # Kernels read vectors with stride 1; those that are written are made here, and have it.
    arguments = tuple(a.contiguous() if isinstance(a, Tensor) and a.dim() == 1 else a for a in arguments)
    device = next(argument.device for argument in arguments if isinstance(argument, Tensor))
    # Triton launches on the current device, whatever the tensors are on.
    is_elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if is_elsewhere else contextlib.nullcontext():
        kernel[grid](*arguments, **constants, enable_fp_fusion=True)


def launch_rows(kernel: Any, tile: Any, logits: Tensor, *vectors: Tensor, **constants: Any) -> None:
    """`launch` with a program for each row of the logits (C, V), `tile.columns` of it at a time."""
    sizes = logits.shape[1], logits.stride(0)
    constants |= {"BLOCK_V": tile.columns, "num_warps": tile.warps}
    launch(kernel, (len(logits),), logits, *vectors, *sizes, **constants)
