"""A sketch of `project_log_odds` to be measured beside it: persistent programs, one partial for every tile.

As many programs as multiprocessors go over the tiles of the whole product; the loop over tiles and the loop over the
hidden size are one (`flatten`), so that the next tile's operands are under way while a tile's statistics are taken. In
isolation it took 1.09 of cuBLAS's time on one H100 where the kernel took 1.25 (docs/gpu.md); in a call of its own the
kernel was as near. It keeps 12 bytes a row for every 256 columns instead of for every 4096, 49 MB at Llama-3-8B's size
and 8192 rows; and it has no room for a mask of columns: at a vocabulary that is no multiple of the tile, the widest one
spills (44 bytes on sm_90, by Triton 3.9). The kernel's own loop over the tiles of a split, flattened like this, spills
568 bytes there. It becomes the kernel if `python -m benchmarks.gpu --only kernels` says, in turns, that it is worth
that.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from orpo_kernels.ops.triton.device_math import LOWEST
from orpo_kernels.ops.triton.launch import launch
from orpo_kernels.ops.triton.tiles import MatmulTile

GROUP_ROWS = 16  # row blocks that run side by side


@triton.jit
def persistent_statistics_kernel(
    X,  # (R, H), a tensor descriptor
    W,  # (V, H), a tensor descriptor
    TARGET,  # (R,) int64
    TOP,  # (column tiles, R) fp32, out
    TOTAL,  # the same
    TARGET_LOGIT,  # the same; 0 in all tiles but the target's
    R,
    V,
    H,
    EVEN_V: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    row_blocks, column_blocks = tl.cdiv(R, BLOCK_R), tl.cdiv(V, BLOCK_V)
    for i_tile in tl.range(tl.program_id(0), row_blocks * column_blocks, tl.num_programs(0), flatten=True):
        group = i_tile // (GROUP * column_blocks)
        size = tl.minimum(row_blocks - group * GROUP, GROUP)
        within = i_tile - group * GROUP * column_blocks
        i_block, i_column = group * GROUP + within % size, within // size
        z = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
        for i_h in range(tl.cdiv(H, BLOCK_H)):
            x = X.load([i_block * BLOCK_R, i_h * BLOCK_H])
            w = W.load([i_column * BLOCK_V, i_h * BLOCK_H])
            z = tl.dot(x, w.T, z)
        o_r = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
        o_v = i_column * BLOCK_V + tl.arange(0, BLOCK_V)
        target = tl.load(TARGET + o_r, mask=o_r < R, other=-1).to(tl.int32)
        is_target = o_v[None, :] == target[:, None]
        target_logit = tl.sum(tl.where(is_target, z, 0.0), 1)
        z = tl.where(is_target, LOWEST, z)
        others = z if EVEN_V else tl.where((o_v >= V)[None, :], LOWEST, z)
        top = tl.max(others, 1)
        total = tl.sum(tl.exp(others - top[:, None]), 1)
        o_out = i_column.to(tl.int64) * R + o_r
        tl.store(TOP + o_out, top, mask=o_r < R)
        tl.store(TOTAL + o_out, total, mask=o_r < R)
        tl.store(TARGET_LOGIT + o_out, target_logit, mask=o_r < R)


def log_odds(x: Tensor, w: Tensor, target: Tensor, tile: MatmulTile, processors: int) -> tuple[Tensor, Tensor]:
    """m and lse_others, (R,) float64 each, of `x @ w.T` without bias, scale or soft-cap; x and w suit TMA."""
    rows, columns = -(-len(x) // tile.rows), -(-len(w) // tile.columns)
    top, total, target_logit = x.new_empty(3, columns, len(x), dtype=torch.float32)
    launch(
        persistent_statistics_kernel,
        (min(processors, rows * columns),),
        TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(w, [tile.columns, tile.depth]),
        target,
        top,
        total,
        target_logit,
        len(x),
        len(w),
        x.shape[1],
        EVEN_V=len(w) % tile.columns == 0,
        GROUP=GROUP_ROWS,
        BLOCK_R=tile.rows,
        BLOCK_V=tile.columns,
        BLOCK_H=tile.depth,
        num_warps=tile.warps,
        num_stages=tile.stages,
    )
    of_all = top.amax(0)
    total = (total * (top - of_all).exp()).sum(0, dtype=torch.float64)
    lse_others = of_all.double() + total.log()
    return target_logit.sum(0).double() - lse_others, lse_others
