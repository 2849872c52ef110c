"""Rows, each times its coefficient, added to the positions they belong to.

The coefficient is dloss/dm with the upstream gradient in it, a tensor that the host never reads. Where positions may
repeat, rows are sorted by position first (a stable sort by the library); the first row of a position adds up all of
them in their order, and is the only one to write there: deterministic, without atomics, however often it repeats.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK_H = 1024


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["POSITION", "ORDER", "COEFFICIENT"])
def scatter_rows_kernel(
    OUT,  # (N, H), in and out
    POSITION,  # (R,) int64, sorted
    ORDER,  # (R,) int64, the row that each of them belongs to
    ROWS,  # (R, H)
    COEFFICIENT,  # (R,)
    R,
    H,
    stride_out,
    stride_rows,
    BLOCK_H: tl.constexpr,
):
    i_first = tl.program_id(0)
    position = tl.load(POSITION + i_first)
    if tl.load(POSITION + i_first - 1, mask=i_first > 0, other=-1) == position:
        return
    i_end = i_first + 1
    while tl.load(POSITION + i_end, mask=i_end < R, other=-1) == position:
        i_end += 1
    for start in range(0, H, BLOCK_H):
        o_h = start + tl.arange(0, BLOCK_H)
        out = OUT + position * stride_out + o_h
        total = tl.load(out, mask=o_h < H, other=0.0).to(tl.float32)
        for i_sorted in range(i_first, i_end):
            i_row = tl.load(ORDER + i_sorted)
            values = tl.load(ROWS + i_row * stride_rows + o_h, mask=o_h < H, other=0.0).to(tl.float32)
            total += values * tl.load(COEFFICIENT + i_row).to(tl.float32)
        tl.store(out, total.to(OUT.dtype.element_ty), mask=o_h < H)


def scatter_rows_(out: Tensor, position: Tensor, rows: Tensor, coefficient: Tensor, unique: bool = False) -> None:
    """See `torch_ops.scatter_rows_`."""
    if unique:  # in any order each of them is the first row of its position, and the last
        ordered, order = position, torch.arange(position.shape[0], device=position.device)
    else:
        ordered, order = position.sort(stable=True)
    tensors = out, ordered, order, rows, coefficient
    sizes = len(position), out.shape[1], out.stride(0), rows.stride(0)
    launch(scatter_rows_kernel, (len(position),), *tensors, *sizes, BLOCK_H=BLOCK_H, num_warps=4)
