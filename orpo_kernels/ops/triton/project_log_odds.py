"""Hidden states and weight to the target's log-odds; the logits never exist.

A program takes a block of rows and a split of the vocabulary, tile by tile: the logits of a tile are the accumulator of
a matrix product, and join an online log-sum-exp *of the others* (the target's own logit is set aside). Splits leave
three numbers a row, which a second kernel joins in a fixed order and in float64: no atomics, no locks, the same bits
every time.

    split s:  top_s = max_{j in s, j != y} z_j,   total_s = sum_{j in s, j != y} exp(z_j - top_s),   z_y if y is in s
    joined:   lse_others = top + log(sum_s total_s exp(top_s - top)),   m = z_y - lse_others

Where the target's tiles are persistent, a split is one tile, and as many programs as there are multiprocessors go over
several: the loops over tiles and over the hidden size are one, so that the next tile's operands are under way while a
tile's statistics are taken. More partial statistics exist then (`Work.columns_apart`), and beside the widest tile no
register is left for a mask of columns, a bias, a scale or a soft-cap.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...engine.gemm import WeightSlices, project
from .device_math import LOWEST, transform
from .launch import current_target, launch
from .statistics import statistics
from .tile_matmul import logits_tile, row_block_and_column_block
from .tiles import constants, operands, programs, tile_of, vocabulary_splits

BLOCK_REDUCE = 64  # rows of a program that joins splits


@triton.jit
def tile_statistics(
    X, W, BIAS, TARGET, i_block, i_column, R, S, H, stride_x, stride_w, scale, softcap,
    EVEN_S: tl.constexpr, EVEN_H: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """top, total and the target's logit of one tile, (BLOCK_R,) each."""
    z = logits_tile(
        X, W, BIAS, i_block, i_column, R, S, H, stride_x, stride_w,
        EVEN_H, TMA, PRECISION, BLOCK_R, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    z, _ = transform(z, scale, softcap)
    o_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    o_v = i_column * BLOCK_V + tl.arange(0, BLOCK_V)
    # Behind the product, which leaves no registers for it.
    target = tl.load(TARGET + o_r, mask=o_r < R, other=-1).to(tl.int32)
    if not EVEN_S:
        target = tl.where(target < S, target, -1)  # not a column beyond the slice's end, which a tile may have
    is_target = o_v[None, :] == target[:, None]
    target_logit = tl.sum(tl.where(is_target, z, 0.0), 1)
    # One mask for the target and for columns beyond S: a second costs the registers that a large tile needs.
    others = tl.where(is_target if EVEN_S else is_target | (o_v >= S)[None, :], LOWEST, z)
    top = tl.max(others, 1)
    if BIAS is not None:
        top = tl.maximum(top, LOWEST)  # of -inf alone, by which a bias takes tokens out, it would be -inf: inf - inf
    return top, tl.sum(tl.exp(others - top[:, None]), 1), target_logit


@triton.jit(
    do_not_specialize=["R", "tiles_per_split", "num_splits"],
    do_not_specialize_on_alignment=["BIAS", "TARGET", "TOP", "TOTAL", "TARGET_LOGIT"],
)
def split_statistics_kernel(
    # data
    X,  # (R, H)
    W,  # (S, H)
    BIAS,  # (S,) or None
    TARGET,  # (R,) int64, in another slice of the weight where it is outside [0, S)
    TOP,  # (splits, R) fp32, out
    TOTAL,  # (splits, R) fp32, out
    TARGET_LOGIT,  # (splits, R) fp32, out; 0 in all splits but the target's
    # shapes and strides
    R,
    S,
    H,
    stride_x,
    stride_w,
    tiles_per_split,
    num_splits,
    # constants
    scale,  # None for 1
    softcap,  # or None
    EVEN_H: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,  # a split is one tile, and whole
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row_blocks = tl.cdiv(R, BLOCK_R)
    if PERSISTENT:
        for i_tile in tl.range(tl.program_id(0), row_blocks * num_splits, tl.num_programs(0), flatten=True):
            i_block, i_split = row_block_and_column_block(i_tile, row_blocks, num_splits, GROUP)
            top, total, target_logit = tile_statistics(
                X, W, BIAS, TARGET, i_block, i_split, R, S, H, stride_x, stride_w, scale, softcap,
                True, EVEN_H, TMA, PRECISION, BLOCK_R, BLOCK_V, BLOCK_H,
            )  # fmt: skip
            o_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
            m_r = o_r < R
            o_out = i_split.to(tl.int64) * R + o_r
            tl.store(TOP + o_out, top, mask=m_r)
            tl.store(TOTAL + o_out, total, mask=m_r)
            tl.store(TARGET_LOGIT + o_out, target_logit, mask=m_r)
    else:
        i_block, i_split = row_block_and_column_block(tl.program_id(0), row_blocks, num_splits, GROUP)
        o_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
        m_r = o_r < R
        top = tl.full((BLOCK_R,), LOWEST, tl.float32)
        total = tl.zeros((BLOCK_R,), tl.float32)
        target_logit = tl.zeros((BLOCK_R,), tl.float32)
        last_tile = tl.minimum((i_split + 1) * tiles_per_split, tl.cdiv(S, BLOCK_V))
        for i_tile in range(i_split * tiles_per_split, last_tile):
            of_tile, total_of_tile, target_logit_of_tile = tile_statistics(
                X, W, BIAS, TARGET, i_block, i_tile, R, S, H, stride_x, stride_w, scale, softcap,
                False, EVEN_H, TMA, PRECISION, BLOCK_R, BLOCK_V, BLOCK_H,
            )  # fmt: skip
            new_top = tl.maximum(top, of_tile)
            total = total * tl.exp(top - new_top) + total_of_tile * tl.exp(of_tile - new_top)
            target_logit += target_logit_of_tile
            top = new_top
        o_out = i_split.to(tl.int64) * R + o_r
        tl.store(TOP + o_out, top, mask=m_r)
        tl.store(TOTAL + o_out, total, mask=m_r)
        tl.store(TARGET_LOGIT + o_out, target_logit, mask=m_r)


@triton.jit(
    do_not_specialize=["R", "num_splits"],
    do_not_specialize_on_alignment=["TOP", "TOTAL", "TARGET_LOGIT", "LOG_ODDS", "LSE_OTHERS"],
)
def join_splits_kernel(
    TOP,  # (splits, R) fp32
    TOTAL,  # (splits, R) fp32
    TARGET_LOGIT,  # (splits, R) fp32
    LOG_ODDS,  # (R,) float64, out
    LSE_OTHERS,  # (R,) float64, out
    R,
    num_splits,
    BLOCK_R: tl.constexpr,
):
    o_r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < R
    top = tl.full((BLOCK_R,), LOWEST, tl.float32)
    o_in = o_r
    for _ in range(num_splits):
        top = tl.maximum(top, tl.load(TOP + o_in, mask=m_r, other=LOWEST))
        o_in += R
    total = tl.zeros((BLOCK_R,), tl.float64)
    target_logit = tl.zeros((BLOCK_R,), tl.float32)
    o_in = o_r
    for _ in range(num_splits):
        share = tl.exp(tl.load(TOP + o_in, mask=m_r, other=LOWEST) - top)
        total += (tl.load(TOTAL + o_in, mask=m_r, other=1.0) * share).to(tl.float64)
        target_logit += tl.load(TARGET_LOGIT + o_in, mask=m_r, other=0.0)
        o_in += R
    lse_others = top.to(tl.float64) + tl.log(total)
    tl.store(LOG_ODDS + o_r, target_logit.to(tl.float64) - lse_others, mask=m_r)
    tl.store(LSE_OTHERS + o_r, lse_others, mask=m_r)


def project_log_odds(
    x: Tensor,
    weight: WeightSlices,
    bias: Tensor | None,
    target: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    buffer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.project_log_odds`. With a `buffer` through the library's product; without one no logits exist."""
    if buffer is not None:
        return statistics(project(x, weight, bias, buffer[: len(x)]), target, logit_scale, logit_softcap)
    rows, hidden_size = x.shape
    gpu = current_target()
    # Odd ends of the vocabulary cost registers, like a bias or a soft-cap.
    is_plain = bias is None and logit_softcap is None and weight.vocab_size % 16 == 0
    partials = []
    for columns, w in weight:
        w = w.contiguous()
        tile = tile_of(x, w, is_plain, gpu)
        if weight.is_cast or not is_plain or logit_scale != 1 or w.shape[0] % tile.columns:
            tile = replace(tile, persistent=False)
        splits, tiles_per_split = vocabulary_splits(rows, w.shape[0], tile, gpu)
        partials.append(x.new_empty(3, splits, rows, dtype=torch.float32))
        launch(
            split_statistics_kernel,
            (programs(-(-rows // tile.rows) * splits, tile, gpu),),
            *operands(x, w, tile),
            None if bias is None else bias[columns],
            target - columns.start if columns.start else target,
            *partials[-1],
            rows,
            w.shape[0],
            hidden_size,
            x.stride(0),
            w.stride(0),
            tiles_per_split,
            splits,
            None if tile.persistent else logit_scale,
            logit_softcap,
            **constants(tile, x, gpu),
        )
    return _joined(partials[0] if len(partials) == 1 else torch.cat(partials, 1))


def _joined(partial: Tensor) -> tuple[Tensor, Tensor]:
    """m and lse_others, (R,) float64 each, of the splits' statistics (3, splits, R)."""
    _, splits, rows = partial.shape
    log_odds, lse_others = partial.new_empty(2, rows, dtype=torch.float64)
    launch(
        join_splits_kernel,
        (-(-rows // BLOCK_REDUCE),),
        *(*partial, log_odds, lse_others, rows, splits),
        BLOCK_R=BLOCK_REDUCE,
        num_warps=2,
    )
    return log_odds, lse_others
