"""A chunk of logits becomes its residual, in place, from the statistics of the whole rows: of a sharded vocabulary.

    residual_j = exp(z_j - lse_others) * slope_j,   residual_y = -slope_y where the target is among these columns

One program a row: one read and one write.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_math import transform
from .launch import current_target, launch_rows
from .tiles import row_tile


@triton.jit(do_not_specialize_on_alignment=["TARGET", "LSE_OTHERS"])
def recomputed_residual_kernel(
    # data
    LOGITS,  # (C, V) fp32, fp16 or bf16, in and out
    TARGET,  # (C,) int64, on another rank where it is outside [0, V)
    LSE_OTHERS,  # (C,) float64
    # shapes and strides
    V,
    stride_logits,
    # constants
    scale,
    softcap,  # or None
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    row = LOGITS + i_row * stride_logits
    target = tl.load(TARGET + i_row)
    # In two parts: an lse_others of 1000 that is rounded to fp32 is off by 3e-5, and so would be every entry.
    lse_others = tl.load(LSE_OTHERS + i_row)
    high = lse_others.to(tl.float32)
    low = (lse_others - high.to(tl.float64)).to(tl.float32)
    for start in range(0, V, BLOCK_V):
        i_v = start + tl.arange(0, BLOCK_V)
        z, t = transform(tl.load(row + i_v, mask=i_v < V, other=0.0).to(tl.float32), scale, softcap)
        residual = tl.where(i_v == target, -1.0, tl.exp(z - high - low))
        if softcap is not None:
            residual *= 1.0 - t * t
        tl.store(row + i_v, residual.to(LOGITS.dtype.element_ty), mask=i_v < V)


def recomputed_residual_(
    logits: Tensor, target: Tensor, lse_others: Tensor, logit_scale: float, logit_softcap: float | None
) -> None:
    """See `torch_ops.recomputed_residual_`. The rows of `logits` may lie apart, its columns not."""
    tile = row_tile(logits.shape[1], logits.dtype, current_target())
    launch_rows(recomputed_residual_kernel, tile, logits, target, lse_others, scale=logit_scale, softcap=logit_softcap)
