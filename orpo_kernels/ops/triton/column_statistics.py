"""What the columns of a residual hold, the largest entry and the sum, each row by its weight: of the sparse schedule.

A program has a few columns of all rows and walks over the rows, several at a time; both numbers stay in registers, in
fp32, and rows that lie side by side are joined once, at the end. One read of the block and no partial sums between
programs: no atomics, the same bits every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK_B = 16  # rows at a time: enough loads under way to keep the memory busy
BLOCK_V = 128  # columns: 256 bytes of a 16-bit row, and a thousand programs for 128 thousand tokens


@triton.jit(do_not_specialize=["B"], do_not_specialize_on_alignment=["ROW_WEIGHT"])
def column_statistics_kernel(
    # data
    RESIDUAL,  # (B, V) fp32, fp16 or bf16
    ROW_WEIGHT,  # (B,) fp32
    PEAK,  # (V,) fp32, out
    MASS,  # (V,) fp32, out
    # shapes and strides
    B,
    V,
    stride_residual,
    # constants
    BLOCK_B: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    peak = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    mass = tl.zeros((BLOCK_B, BLOCK_V), tl.float32)
    for start in range(0, B, BLOCK_B):
        o_b = start + tl.arange(0, BLOCK_B)
        weight = tl.load(ROW_WEIGHT + o_b, mask=o_b < B, other=0.0)
        rows = RESIDUAL + o_b.to(tl.int64)[:, None] * stride_residual
        entries = tl.load(rows + o_v[None, :], mask=(o_b < B)[:, None] & (o_v < V)[None, :], other=0.0)
        entries = entries.to(tl.float32) * weight[:, None]
        peak = tl.maximum(peak, entries)  # a NaN shows in the sum alone
        mass += entries
    tl.store(PEAK + o_v, tl.max(peak, 0), mask=o_v < V)
    tl.store(MASS + o_v, tl.sum(mass, 0), mask=o_v < V)


def column_statistics(residual: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `torch_ops.column_statistics`. The rows of `residual` may lie apart, its columns not."""
    rows, vocab_size = residual.shape
    peak = row_weight.new_empty(vocab_size)
    mass = torch.empty_like(peak)
    vectors, sizes = (row_weight, peak, mass), (rows, vocab_size, residual.stride(0))
    blocks = {"BLOCK_B": BLOCK_B, "BLOCK_V": BLOCK_V, "num_warps": 4}
    launch(column_statistics_kernel, (triton.cdiv(vocab_size, BLOCK_V),), residual, *vectors, *sizes, **blocks)
    return peak, mass
