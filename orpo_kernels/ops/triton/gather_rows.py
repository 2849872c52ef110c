"""The hidden states of the rows that matter, scaled and cast on their way into one matrix."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK_H = 1024


@triton.jit(do_not_specialize_on_alignment=["POSITION", "COEFFICIENT"])
def gather_rows_kernel(
    HIDDEN,  # (N, H)
    POSITION,  # (R,) int64
    COEFFICIENT,  # (R,) or None
    OUT,  # (R, H), out
    H,
    stride_hidden,
    stride_out,
    BLOCK_H: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    source = HIDDEN + tl.load(POSITION + i_row) * stride_hidden
    for start in range(0, H, BLOCK_H):
        o_h = start + tl.arange(0, BLOCK_H)
        values = tl.load(source + o_h, mask=o_h < H, other=0.0)
        if COEFFICIENT is not None:
            values = values.to(tl.float32) * tl.load(COEFFICIENT + i_row).to(tl.float32)
        tl.store(OUT + i_row * stride_out + o_h, values.to(OUT.dtype.element_ty), mask=o_h < H)


def gather_rows(hidden: Tensor, position: Tensor, coefficient: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `torch_ops.gather_rows`."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    out = hidden.new_empty(position.shape[0], hidden.shape[1], dtype=dtype)
    sizes = hidden.shape[1], hidden.stride(0), out.stride(0)
    tensors = hidden, position, coefficient, out
    launch(gather_rows_kernel, (out.shape[0],), *tensors, *sizes, BLOCK_H=BLOCK_H, num_warps=4)
    return out
