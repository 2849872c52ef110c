"""A chunk of logits becomes its softmax residual, in place.

One program a row. The first pass over the row takes the largest and the sum of the *other* tokens' logits (online
softmax, Milakov and Gimelshein, arXiv 1805.02867): every lane its own, joined once at the end of the row, so that no
tile waits for a reduction over the program. The second writes

    residual_j = exp(z_j - lse_others) * slope_j,   residual_y = -slope_y,   slope the soft-cap's derivative

A row of one tile stays in registers: one read and one write. Of a longer one the second pass finds in the L2 cache what
the other running programs have left there of it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_math import LOWEST, joined, online, transform
from .launch import current_target, launch_rows
from .tiles import pass_tile, row_tile


@triton.jit(do_not_specialize_on_alignment=["TARGET", "LOG_ODDS"])
def residual_kernel(
    # data
    LOGITS,  # (C, V) fp32, fp16 or bf16, in and out
    TARGET,  # (C,) int64
    LOG_ODDS,  # (C,) float64, out
    # shapes and strides
    V,
    stride_logits,
    # constants
    scale,
    softcap,  # or None
    ONE_TILE: tl.constexpr,  # the row fits one tile
    BLOCK_V: tl.constexpr,
):
    i_row = tl.program_id(0).to(tl.int64)
    row = LOGITS + i_row * stride_logits
    target = tl.load(TARGET + i_row)
    o_v = tl.arange(0, BLOCK_V)
    z_target, _ = transform(tl.load(row + target).to(tl.float32), scale, softcap)

    if ONE_TILE:
        z, t = transform(tl.load(row + o_v, mask=o_v < V, other=0.0).to(tl.float32), scale, softcap)
        others = tl.where((o_v == target) | (o_v >= V), LOWEST, z)
        top = tl.max(others, 0)
        e = tl.exp(others - top)
        total = tl.sum(e, 0)
        residual = tl.where(o_v == target, -1.0, e * (1.0 / total))
        if softcap is not None:
            residual *= 1.0 - t * t
        tl.store(row + o_v, residual.to(LOGITS.dtype.element_ty), mask=o_v < V)
    else:
        tops = tl.full((BLOCK_V,), LOWEST, tl.float32)
        totals = tl.zeros((BLOCK_V,), tl.float32)
        for start in tl.range(0, V, BLOCK_V, num_stages=1):
            i_v = start + o_v
            z = tl.load(row + i_v, mask=i_v < V, other=0.0, eviction_policy="evict_last").to(tl.float32)
            z, t = transform(z, scale, softcap)
            tops, totals = online(tops, totals, tl.where((i_v == target) | (i_v >= V), LOWEST, z))
        top, total = joined(tops, totals)
        share = 1.0 / total
        for start in tl.range(0, V, BLOCK_V, num_stages=1):
            i_v = start + o_v
            z = tl.load(row + i_v, mask=i_v < V, other=0.0, eviction_policy="evict_first").to(tl.float32)
            z, t = transform(z, scale, softcap)
            residual = tl.where(i_v == target, -1.0, tl.exp(z - top) * share)
            if softcap is not None:
                residual *= 1.0 - t * t
            tl.store(row + i_v, residual.to(LOGITS.dtype.element_ty), mask=i_v < V)

    # In float64: rounding m = 67.3 to fp32 alone moves the loss of a confident row by 4e-6.
    lse_others = top.to(tl.float64) + tl.log(total.to(tl.float64))
    tl.store(LOG_ODDS + i_row, z_target.to(tl.float64) - lse_others)


def residual_(logits: Tensor, target: Tensor, logit_scale: float, logit_softcap: float | None) -> Tensor:
    """See `torch_ops.residual_`. The rows of `logits` may lie apart, its columns not."""
    vocab_size, gpu = logits.shape[1], current_target()
    log_odds = logits.new_empty(logits.shape[0], dtype=torch.float64)
    tile = row_tile(vocab_size, logits.dtype, gpu)
    is_one = vocab_size <= tile.columns
    tile = tile if is_one else pass_tile(vocab_size, gpu)
    launch_rows(
        residual_kernel, tile, logits, target, log_odds, scale=logit_scale, softcap=logit_softcap, ONE_TILE=is_one
    )
    return log_odds
