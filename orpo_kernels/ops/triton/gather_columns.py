"""Some columns of a residual, side by side, and the sum of each row of them: of the sparse schedule.

One program a row, which takes the columns in their order: sums in fp32 within a tile, in float64 from there on, the
same bits every time. How many columns there are is new in every block and known to no compiled kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK_A = 4096  # columns at a time: a block has about as many rows as a GPU has processors, so that each is kept busy


@triton.jit(do_not_specialize=["A"], do_not_specialize_on_alignment=["RESIDUAL"])
def gather_columns_kernel(
    # data
    RESIDUAL,  # (B, V) fp32, fp16 or bf16
    COLUMNS,  # (A,) int64
    OUT,  # (B, A), out
    SUMS,  # (B,) float64, out
    # shapes and strides
    A,
    stride_residual,
    # constants
    BLOCK_A: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    row = RESIDUAL + i_row * stride_residual
    out = OUT + i_row * A
    total = tl.zeros((), tl.float64)
    for start in range(0, A, BLOCK_A):
        o_a = start + tl.arange(0, BLOCK_A)
        columns = tl.load(COLUMNS + o_a, mask=o_a < A, other=0)
        entries = tl.load(row + columns, mask=o_a < A, other=0.0)
        tl.store(out + o_a, entries, mask=o_a < A)
        total += tl.sum(entries.to(tl.float32), 0).to(tl.float64)
    tl.store(SUMS + i_row, total)


def gather_columns(residual: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """See `torch_ops.gather_columns`. The rows of `residual` may lie apart, its columns not."""
    rows, count = residual.shape[0], columns.shape[0]
    entries = residual.new_empty(rows, count)
    sums = residual.new_empty(rows, dtype=torch.float64)
    tensors = residual, columns, entries, sums
    launch(gather_columns_kernel, (rows,), *tensors, count, residual.stride(0), BLOCK_A=BLOCK_A, num_warps=16)
    return entries, sums
