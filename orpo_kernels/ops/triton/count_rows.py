"""What the means of rows are divided by: one program that walks over all rows, in their order.

Deterministic and without atomics, for rows in any order. A sequence with a scored row is marked in memory of the
program's own, which several rows may do at once, with the same value; then the pairs of which both are marked count.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...rows import Rows
from .launch import launch

BLOCK = 2048


@triton.jit(
    do_not_specialize=["R", "num_pairs"],
    do_not_specialize_on_alignment=["SEQUENCE", "SCORED", "NLL_WEIGHT", "HAS_ROWS", "COUNTS"],
)
def count_rows_kernel(
    SEQUENCE,  # (R,) int64
    SCORED,  # (R,) bool
    NLL_WEIGHT,  # (R,) float64
    HAS_ROWS,  # (2B,) int32, workspace
    COUNTS,  # (2,) float64, out
    R,
    num_pairs,
    BLOCK: tl.constexpr,
):
    for start in range(0, 2 * num_pairs, BLOCK):
        o_s = start + tl.arange(0, BLOCK)
        tl.store(HAS_ROWS + o_s, tl.zeros((BLOCK,), tl.int32), mask=o_s < 2 * num_pairs)
    tl.debug_barrier()  # the program's threads see what others of them have written
    nll = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, R, BLOCK):
        o_r = start + tl.arange(0, BLOCK)
        m_r = o_r < R
        scored = tl.load(SCORED + o_r, mask=m_r, other=0) != 0
        sequence = tl.load(SEQUENCE + o_r, mask=m_r, other=0)
        is_one = (sequence >= 0) & (sequence < 2 * num_pairs)  # whatever people write into `Rows`
        tl.store(HAS_ROWS + sequence, tl.full((BLOCK,), 1, tl.int32), mask=scored & is_one)
        nll += tl.load(NLL_WEIGHT + o_r, mask=m_r, other=0.0)
    tl.debug_barrier()
    pairs = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, num_pairs, BLOCK):
        o_b = start + tl.arange(0, BLOCK)
        m_b = o_b < num_pairs
        has_chosen = tl.load(HAS_ROWS + o_b, mask=m_b, other=0)
        has_rejected = tl.load(HAS_ROWS + num_pairs + o_b, mask=m_b, other=0)
        pairs += has_chosen & has_rejected
    tl.store(COUNTS, tl.sum(nll, 0))
    tl.store(COUNTS + 1, tl.sum(pairs, 0).to(tl.float64))


def count_rows(rows: Rows) -> Tensor:
    """See `objective.count_rows`."""
    counts = rows.nll_weight.new_empty(2)
    has_rows = rows.sequence.new_empty(2 * rows.num_pairs, dtype=torch.int32)
    vectors = rows.sequence, rows.scored, rows.nll_weight, has_rows, counts
    launch(count_rows_kernel, (1,), *vectors, len(rows), rows.num_pairs, BLOCK=BLOCK, num_warps=8)
    return counts
