"""The odds-ratio loss and the gradient of every row in one launch, in float64.

The formulas are those of `objective`. A program takes a block of rows and works out the pair of each of them again (a
few numbers), so that no program waits for another; the first program also sums the loss and writes the metrics.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...engine.objective import Denominators, PairLoss, SequenceSums
from ...rows import Rows
from .device_math import logsigmoid, one_minus_exp
from .launch import launch
from .sequence_sums import sequence_sums

BLOCK = 128
LARGEST_LOGP = tl.constexpr(-2.2250738585072014e-308)  # `objective.LARGEST_LOGP`


@triton.jit
def reciprocal(COUNT):
    """1 / count, or 0 where there is nothing to average."""
    count = tl.load(COUNT)
    return tl.where(count > 0.0, 1.0 / tl.where(count > 0.0, count, 1.0), 0.0)


@triton.jit
def pair_terms(MEAN_LOGPS, SCORED_ROWS, i_pair, mask, num_pairs):
    """Of the pairs at `i_pair`: whether both answers have a scored row, d, and log(1 - exp(a)) of both."""
    rows_chosen = tl.load(SCORED_ROWS + i_pair, mask=mask, other=0.0)
    rows_rejected = tl.load(SCORED_ROWS + num_pairs + i_pair, mask=mask, other=0.0)
    valid = (rows_chosen > 0.0) & (rows_rejected > 0.0)
    a_chosen = tl.load(MEAN_LOGPS + i_pair, mask=mask, other=0.0)
    a_rejected = tl.load(MEAN_LOGPS + num_pairs + i_pair, mask=mask, other=0.0)
    a_chosen = tl.where(valid, tl.where(a_chosen > LARGEST_LOGP, LARGEST_LOGP, a_chosen), -1.0)
    a_rejected = tl.where(valid, tl.where(a_rejected > LARGEST_LOGP, LARGEST_LOGP, a_rejected), -1.0)
    log1mexp_chosen, log1mexp_rejected = tl.log(one_minus_exp(a_chosen)), tl.log(one_minus_exp(a_rejected))
    d = (a_chosen - log1mexp_chosen) - (a_rejected - log1mexp_rejected)
    return valid, d, log1mexp_chosen, log1mexp_rejected


@triton.jit
def weights_of_pairs(PAIR_WEIGHT, i_pair, valid, mask):
    """What the odds-ratio terms of the pairs at `i_pair` count: their weights, 0 for a pair that is not valid."""
    weight = valid.to(tl.float64)
    if PAIR_WEIGHT is not None:
        weight = tl.where(valid, tl.load(PAIR_WEIGHT + i_pair, mask=mask, other=0.0), 0.0)
    return weight


VECTORS = [
    "LOG_ODDS",
    "SEQUENCE",
    "SCORED",
    "NLL_WEIGHT",
    "PAIR_WEIGHT",
    "MEAN_LOGPS",
    "SCORED_ROWS",
    "NLL",
    "NLL_COUNT",
    "PAIR_COUNT",
]


@triton.jit(do_not_specialize=["R", "num_pairs"], do_not_specialize_on_alignment=VECTORS)
def odds_ratio_kernel(
    # data
    LOG_ODDS,  # (R,) float64, of tokens
    SEQUENCE,  # (R,) int64
    SCORED,  # (R,) bool
    NLL_WEIGHT,  # (R,) float64, times the pair's weight
    PAIR_WEIGHT,  # (B,) float64 or None
    MEAN_LOGPS,  # (2B,) float64
    SCORED_ROWS,  # (2B,) float64
    NLL,  # (2B,) float64
    NLL_COUNT,  # () float64, what the NLL is divided by
    PAIR_COUNT,  # () float64, what the odds-ratio term is divided by
    NUMBERS,  # (3 + 3B,) float64, out: loss, NLL, OR; chosen and rejected log-probabilities, log-odds
    VALID,  # (B,) bool, out
    GRAD,  # (R,) float64, out
    # shapes
    R,
    num_pairs,
    # constants; unannotated, a compiled kernel would round them to fp32
    alpha: tl.float64,
    beta: tl.float64,
    BLOCK: tl.constexpr,
):
    i_block = tl.program_id(0)
    nll_share, pair_share = reciprocal(NLL_COUNT), reciprocal(PAIR_COUNT)

    o_r = i_block * BLOCK + tl.arange(0, BLOCK)
    m_r = o_r < R
    sequence = tl.load(SEQUENCE + o_r, mask=m_r, other=0)
    is_rejected = sequence >= num_pairs
    i_pair = tl.where(is_rejected, sequence - num_pairs, sequence)
    valid, d, log1mexp_chosen, log1mexp_rejected = pair_terms(MEAN_LOGPS, SCORED_ROWS, i_pair, m_r, num_pairs)
    pair_weight = weights_of_pairs(PAIR_WEIGHT, i_pair, valid, m_r) * pair_share
    m = tl.load(LOG_ODDS + o_r, mask=m_r, other=0.0)
    scored = tl.load(SCORED + o_r, mask=m_r, other=0) != 0
    rows = tl.load(SCORED_ROWS + sequence, mask=m_r, other=1.0)
    log_token = logsigmoid(-m)
    log_share = logsigmoid(-d) - tl.where(is_rejected, log1mexp_rejected, log1mexp_chosen)
    share = tl.where(is_rejected, pair_weight, -pair_weight) / tl.maximum(rows, 1.0)
    or_grad = tl.where(scored & (pair_weight != 0.0), share * tl.exp(log_share + log_token), 0.0)
    nll_weight = tl.load(NLL_WEIGHT + o_r, mask=m_r, other=0.0) * nll_share
    tl.store(GRAD + o_r, beta * or_grad - alpha * nll_weight * tl.exp(log_token), mask=m_r)

    if i_block == 0:
        or_sum = tl.zeros((BLOCK,), tl.float64)
        nll_sum = tl.zeros((BLOCK,), tl.float64)
        for start in range(0, num_pairs, BLOCK):
            o_b = start + tl.arange(0, BLOCK)
            m_b = o_b < num_pairs
            pair_valid, pair_d, _, _ = pair_terms(MEAN_LOGPS, SCORED_ROWS, o_b, m_b, num_pairs)
            weight = weights_of_pairs(PAIR_WEIGHT, o_b, pair_valid, m_b)
            or_sum -= tl.where(weight != 0.0, weight * logsigmoid(pair_d), 0.0)  # weight 0 wins over an infinite d
            nll_sum += tl.load(NLL + o_b, mask=m_b, other=0.0)
            nll_sum += tl.load(NLL + num_pairs + o_b, mask=m_b, other=0.0)
            a_chosen = tl.load(MEAN_LOGPS + o_b, mask=m_b, other=0.0)
            a_rejected = tl.load(MEAN_LOGPS + num_pairs + o_b, mask=m_b, other=0.0)
            tl.store(NUMBERS + 3 + o_b, a_chosen, mask=m_b)
            tl.store(NUMBERS + 3 + num_pairs + o_b, a_rejected, mask=m_b)
            tl.store(NUMBERS + 3 + 2 * num_pairs + o_b, pair_d, mask=m_b)
            tl.store(VALID + o_b, pair_valid, mask=m_b)
        nll_loss = tl.sum(nll_sum, 0) * nll_share
        or_loss = tl.sum(or_sum, 0) * pair_share
        tl.store(NUMBERS, alpha * nll_loss + beta * or_loss)
        tl.store(NUMBERS + 1, nll_loss)
        tl.store(NUMBERS + 2, or_loss)


def odds_ratio(
    token_log_odds: Tensor, rows: Rows, sums: SequenceSums | None, alpha: float, beta: float, counts: Denominators
) -> PairLoss:
    """See `objective.odds_ratio`."""
    loss = PairLoss.empty(token_log_odds, rows)
    of_rows = token_log_odds, rows.sequence, rows.scored, rows.nll_weight, rows.pair_weight
    sums = sums or sequence_sums(token_log_odds, rows)
    numbers = len(rows), rows.num_pairs, float(alpha), float(beta)
    grid = (max(1, -(-len(rows) // BLOCK)),)
    launch(odds_ratio_kernel, grid, *of_rows, *sums, *counts, *loss, *numbers, BLOCK=BLOCK, num_warps=4)
    return loss
