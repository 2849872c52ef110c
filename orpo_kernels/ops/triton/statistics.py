"""The statistics of a chunk of logits that exist, which are only read: the share of a rank in a sharded vocabulary.

One program a row: the online softmax of the *other* tokens (Milakov and Gimelshein, arXiv 1805.02867), in one pass,
every lane its own and joined once at the end.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .device_math import LOWEST, joined, online, transform
from .launch import current_target, launch_rows
from .tiles import pass_tile


@triton.jit(do_not_specialize_on_alignment=["TARGET", "LOG_ODDS", "LSE_OTHERS"])
def statistics_kernel(
    # data
    LOGITS,  # (C, V) fp32, fp16 or bf16
    TARGET,  # (C,) int64
    LOG_ODDS,  # (C,) float64, out
    LSE_OTHERS,  # (C,) float64, out
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
    z_target, _ = transform(tl.load(row + target).to(tl.float32), scale, softcap)
    tops = tl.full((BLOCK_V,), LOWEST, tl.float32)
    totals = tl.zeros((BLOCK_V,), tl.float32)
    for start in tl.range(0, V, BLOCK_V, num_stages=1):
        i_v = start + tl.arange(0, BLOCK_V)
        z, _t = transform(tl.load(row + i_v, mask=i_v < V, other=0.0).to(tl.float32), scale, softcap)
        tops, totals = online(tops, totals, tl.where((i_v == target) | (i_v >= V), LOWEST, z))
    top, total = joined(tops, totals)
    lse_others = top.to(tl.float64) + tl.log(total.to(tl.float64))
    tl.store(LOG_ODDS + i_row, z_target.to(tl.float64) - lse_others)
    tl.store(LSE_OTHERS + i_row, lse_others)


def statistics(
    logits: Tensor, target: Tensor, logit_scale: float, logit_softcap: float | None
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.statistics`. The rows of `logits` may lie apart, its columns not."""
    log_odds = logits.new_empty(logits.shape[0], dtype=torch.float64)
    lse_others = torch.empty_like(log_odds)
    tile = pass_tile(logits.shape[1], current_target())
    launch_rows(statistics_kernel, tile, logits, target, log_odds, lse_others, scale=logit_scale, softcap=logit_softcap)
    return log_odds, lse_others
