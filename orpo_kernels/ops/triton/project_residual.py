"""A slice of the vocabulary's columns of the residual, made again from the statistics of the whole rows.

    residual_j = exp(z_j - lse_others) * slope_j,   residual_y = -slope_y

Of a tile the logits are the accumulator of a matrix product, and the residual is what leaves the chip. A program makes
one tile; or, where the target's tiles are persistent, there are as many programs as multiprocessors, and the loops over
tiles and over the hidden size are one: the next tile's operands are under way while a tile's residual leaves.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_math import transform
from .launch import current_target, launch
from .tile_matmul import logits_tile, row_block_and_column_block
from .tiles import constants, operands, programs, tile_of


@triton.jit
def residual_tile(
    X, W, BIAS, TARGET, LSE_OTHERS, OUT, i_block, i_column, R, S, H, stride_x, stride_w, stride_out, scale, softcap,
    EVEN_H: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """One tile of the residual; see `project_residual_kernel`."""
    z = logits_tile(
        X, W, BIAS, i_block, i_column, R, S, H, stride_x, stride_w,
        EVEN_H, TMA, PRECISION, BLOCK_R, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    z, t = transform(z, scale, softcap)
    o_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    o_v = i_column * BLOCK_V + tl.arange(0, BLOCK_V)
    m_r = o_r < R
    lse_others = tl.load(LSE_OTHERS + o_r, mask=m_r, other=0.0).to(tl.float32)
    target = tl.load(TARGET + o_r, mask=m_r, other=-1).to(tl.int32)
    residual = tl.where(o_v[None, :] == target[:, None], -1.0, tl.exp(z - lse_others[:, None]))
    if softcap is not None:
        residual *= 1.0 - t * t
    out = OUT + o_r.to(tl.int64)[:, None] * stride_out + o_v[None, :]
    tl.store(out, residual.to(OUT.dtype.element_ty), mask=m_r[:, None] & (o_v < S)[None, :])


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=["BIAS", "TARGET", "LSE_OTHERS"])
def project_residual_kernel(
    # data
    X,  # (R, H)
    W,  # (S, H)
    BIAS,  # (S,) or None
    TARGET,  # (R,) int64, in another slice where it is outside [0, S)
    LSE_OTHERS,  # (R,) float64
    OUT,  # (R, S), out
    # shapes and strides
    R,
    S,
    H,
    stride_x,
    stride_w,
    stride_out,
    # constants
    scale,
    softcap,  # or None
    EVEN_H: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    PERSISTENT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row_blocks, column_blocks = tl.cdiv(R, BLOCK_R), tl.cdiv(S, BLOCK_V)
    if PERSISTENT:
        for i_tile in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
            i_block, i_column = row_block_and_column_block(i_tile, row_blocks, column_blocks, GROUP)
            residual_tile(
                X, W, BIAS, TARGET, LSE_OTHERS, OUT, i_block, i_column,
                R, S, H, stride_x, stride_w, stride_out, scale, softcap,
                EVEN_H, TMA, PRECISION, BLOCK_R, BLOCK_V, BLOCK_H,
            )  # fmt: skip
    else:  # a loop would cost registers, and on some targets the second block of a multiprocessor
        i_block, i_column = row_block_and_column_block(tl.program_id(0), row_blocks, column_blocks, GROUP)
        residual_tile(
            X, W, BIAS, TARGET, LSE_OTHERS, OUT, i_block, i_column,
            R, S, H, stride_x, stride_w, stride_out, scale, softcap,
            EVEN_H, TMA, PRECISION, BLOCK_R, BLOCK_V, BLOCK_H,
        )  # fmt: skip


def project_residual(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse_others: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    out: Tensor,
) -> None:
    """See `torch_ops.project_residual`."""
    rows, hidden_size = x.shape
    gpu = current_target()
    w = w.contiguous()
    tile = tile_of(x, w, bias is None and logit_softcap is None, gpu)
    launch(
        project_residual_kernel,
        (programs(-(-rows // tile.rows) * -(-w.shape[0] // tile.columns), tile, gpu),),
        *operands(x, w, tile),
        bias,
        target,
        lse_others,
        out,
        rows,
        w.shape[0],
        hidden_size,
        x.stride(0),
        w.stride(0),
        out.stride(0),
        logit_scale,
        logit_softcap,
        **constants(tile, x, gpu),
    )
