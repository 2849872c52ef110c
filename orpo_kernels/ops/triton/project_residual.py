"""A slice of the vocabulary's columns of the residual, made again from the statistics of the whole rows.

    residual_j = exp(z_j - lse_others) * slope_j,   residual_y = -slope_y

A program makes one tile: the logits are the accumulator of a matrix product, and the residual is what leaves the chip.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from .device_math import transform
from .launch import current_target, launch
from .tile_matmul import logits_tile, row_block_and_column_block
from .tiles import constants, operands, tile_of


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
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    i_block, i_column = row_block_and_column_block(tl.cdiv(R, BLOCK_R), tl.cdiv(S, BLOCK_V), GROUP)
    i_r, i_v = i_block * BLOCK_R, i_column * BLOCK_V
    z = logits_tile(
        X, W, BIAS, i_r, i_v, R, S, H, stride_x, stride_w,
        EVEN_H, TMA, PRECISION, BLOCK_R, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    z, t = transform(z, scale, softcap)
    o_r = i_r + tl.arange(0, BLOCK_R)
    o_v = i_v + tl.arange(0, BLOCK_V)
    m_r = o_r < R
    lse_others = tl.load(LSE_OTHERS + o_r, mask=m_r, other=0.0).to(tl.float32)
    target = tl.load(TARGET + o_r, mask=m_r, other=-1).to(tl.int32)
    residual = tl.where(o_v[None, :] == target[:, None], -1.0, tl.exp(z - lse_others[:, None]))
    if softcap is not None:
        residual *= 1.0 - t * t
    out = OUT + o_r.to(tl.int64)[:, None] * stride_out + o_v[None, :]
    tl.store(out, residual.to(OUT.dtype.element_ty), mask=m_r[:, None] & (o_v < S)[None, :])


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
        (-(-rows // tile.rows) * -(-w.shape[0] // tile.columns),),
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
