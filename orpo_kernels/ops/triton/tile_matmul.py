"""What the two kernels with a matrix product share: which tile a program takes, and the tile's product."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def row_block_and_column_block(i_tile, num_row_blocks, num_column_blocks, GROUP: tl.constexpr):
    """Tiles in groups of GROUP row blocks, all column blocks of a group before the next: operands stay in L2."""
    group = i_tile // (GROUP * num_column_blocks)
    first = group * GROUP
    size = tl.minimum(num_row_blocks - first, GROUP)
    within = i_tile - group * (GROUP * num_column_blocks)
    return first + within % size, within // size


@triton.jit
def logits_tile(
    X,  # (R, H), a pointer, or its tensor descriptor in tiles (BLOCK_R, BLOCK_H)
    W,  # (S, H), a pointer, or its tensor descriptor in tiles (BLOCK_V, BLOCK_H)
    BIAS,  # (S,) or None
    i_block,  # of BLOCK_R rows
    i_column,  # block of BLOCK_V columns
    R,
    S,
    H,
    stride_x,
    stride_w,
    EVEN_H: tl.constexpr,
    TMA: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """fp32 (BLOCK_R, BLOCK_V) tile of `X @ W.T + BIAS`; anything beyond R and S, which the caller masks."""
    o_h = tl.arange(0, BLOCK_H)
    # Rows and columns beyond the end read the last one again: no mask on the operands.
    o_r = tl.minimum(i_block * BLOCK_R + tl.arange(0, BLOCK_R), R - 1).to(tl.int64)
    o_v = tl.minimum(i_column * BLOCK_V + tl.arange(0, BLOCK_V), S - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    for i_block_h in range(tl.cdiv(H, BLOCK_H)):
        i_h = i_block_h * BLOCK_H
        if TMA:  # first row and column by blocks: as numbers of their own they cost the widest tile's registers
            x = X.load([i_block * BLOCK_R, i_h])
            w = W.load([i_column * BLOCK_V, i_h])
        elif EVEN_H:
            x = tl.load(X + o_r[:, None] * stride_x + (i_h + o_h)[None, :])
            w = tl.load(W + o_v[:, None] * stride_w + (i_h + o_h)[None, :])
        else:
            m_h = (i_h + o_h < H)[None, :]
            x = tl.load(X + o_r[:, None] * stride_x + (i_h + o_h)[None, :], mask=m_h, other=0.0)
            w = tl.load(W + o_v[:, None] * stride_w + (i_h + o_h)[None, :], mask=m_h, other=0.0)
        acc = tl.dot(x, w.T, acc, input_precision=PRECISION)
    if BIAS is not None:
        o_bias = i_column * BLOCK_V + tl.arange(0, BLOCK_V)  # consecutive, unlike `o_v`: one address, not one a column
        acc += tl.load(BIAS + o_bias, mask=o_bias < S, other=0.0).to(tl.float32)[None, :]
    return acc
