"""Rows to the length-normalised log-probability of each sequence, and its share of the NLL.

One program a sequence, which takes its rows in their order: deterministic. Where the rows are known to be sorted by
sequence it walks over its own; else over all, in any order, and blocks without a row of the sequence cost reading their
numbers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ...engine.objective import SequenceSums
from ...rows import Rows
from .device_math import logsigmoid
from .launch import launch

BLOCK = 1024


VECTORS = ["LOG_ODDS", "SEQUENCE", "SCORED", "NLL_WEIGHT", "OFFSETS", "MEAN_LOGPS", "SCORED_ROWS", "NLL"]


@triton.jit(do_not_specialize=["R"], do_not_specialize_on_alignment=VECTORS)
def sequence_sums_kernel(
    LOG_ODDS,  # (R,) float64
    SEQUENCE,  # (R,) int64
    SCORED,  # (R,) bool
    NLL_WEIGHT,  # (R,) float64
    OFFSETS,  # (2B + 1,) int64 or None: where the rows of each sequence begin
    MEAN_LOGPS,  # (2B,) float64, out
    SCORED_ROWS,  # (2B,) float64, out
    NLL,  # (2B,) float64, out
    R,
    BLOCK: tl.constexpr,
):
    i_sequence = tl.program_id(0)
    begin, end = 0, R
    if OFFSETS is not None:
        begin, end = tl.load(OFFSETS + i_sequence), tl.load(OFFSETS + i_sequence + 1)
    logp_sum = tl.zeros((BLOCK,), tl.float64)
    count = tl.zeros((BLOCK,), tl.float64)
    nll = tl.zeros((BLOCK,), tl.float64)
    for start in range(begin, end, BLOCK):
        o_r = start + tl.arange(0, BLOCK)
        mine = tl.load(SEQUENCE + o_r, mask=o_r < end, other=-1) == i_sequence
        if tl.max(mine.to(tl.int32), 0) > 0:
            logp = logsigmoid(tl.load(LOG_ODDS + o_r, mask=mine, other=0.0))
            scored = tl.load(SCORED + o_r, mask=mine, other=0) != 0
            weight = tl.load(NLL_WEIGHT + o_r, mask=mine, other=0.0)
            logp_sum += tl.where(scored, logp, 0.0)
            count += scored.to(tl.float64)
            nll -= tl.where(weight != 0.0, weight * logp, 0.0)  # weight 0 wins over an infinite logp
    rows = tl.sum(count, 0)
    tl.store(MEAN_LOGPS + i_sequence, tl.sum(logp_sum, 0) / tl.maximum(rows, 1.0))
    tl.store(SCORED_ROWS + i_sequence, rows)
    tl.store(NLL + i_sequence, tl.sum(nll, 0))


def sequence_sums(token_log_odds: Tensor, rows: Rows) -> SequenceSums:
    """See `objective.sequence_sums`."""
    sequences = 2 * rows.num_pairs
    sums = SequenceSums(*torch.empty(3, sequences, dtype=torch.float64, device=token_log_odds.device))
    of_rows = token_log_odds, rows.sequence, rows.scored, rows.nll_weight, rows.known.offsets
    launch(sequence_sums_kernel, (sequences,), *of_rows, *sums, len(rows), BLOCK=BLOCK, num_warps=4)
    return sums
