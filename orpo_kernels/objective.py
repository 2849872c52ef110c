"""The pair-level mathematics: token log-odds -> loss, metrics, and the gradient of every row. O(rows) work.

With m_t the log-odds of target t (`token_log_odds`), and s a sequence with scored rows T_s:

    logp_t  = logsigmoid(m_t)
    a_s     = mean of logp_t over T_s                       length-normalised log-probability
    zeta(a) = a - log(1 - exp(a))                           its log-odds
    d_i     = zeta(a_chosen) - zeta(a_rejected)
    OR      = 1/n sum_i -logsigmoid(d_i)                    n pairs                     (arXiv 2403.07691, eq. 7)
    NLL     = -sum_t u_t logp_t                             u_t the normalised NLL weights
    loss    = alpha * NLL + beta * OR

and by hand, with dlogp_t/dm_t = sigmoid(-m_t) and dzeta/da = 1 / (1 - exp(a)):

    dNLL/dm_t = -u_t sigmoid(-m_t)
    dOR/dm_t  = -+ 1/n * sigmoid(-d) * sigmoid(-m_t) / (1 - exp(a_s)) / |T_s|      - chosen, + rejected

The last fraction tends to 0/0 for a confident answer, yet sigmoid(-m_t) / (1 - exp(a_s)) <= |T_s| always: it is taken
in the logarithm, in float64, and nothing overflows. Only an a that rounds to 0 even there is bounded (LARGEST_LOGP).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .ops import segment_sum
from .rows import Rows

LARGEST_LOGP = -torch.finfo(torch.float64).tiny  # stands in for a log-probability that rounds to 0, where zeta is inf


class PairLoss(NamedTuple):
    """What one evaluation of the objective gives; float64, scalars 0-d, the rest as named."""

    loss: Tensor
    nll_loss: Tensor
    or_loss: Tensor
    chosen_logps: Tensor  # (B,)
    rejected_logps: Tensor  # (B,)
    log_odds: Tensor  # (B,) d_i, 0 where the pair is not valid
    valid_pairs: Tensor  # (B,) bool
    grad: Tensor  # (R,) dloss / d token_log_odds


class Denominators(NamedTuple):
    """What the two means are divided by, float64 scalars: the batch's own counts, or those of a larger batch."""

    nll: Tensor
    pairs: Tensor


def denominators(rows: Rows, nll: int | Tensor | None, pairs: int | Tensor | None) -> Denominators:
    """The given denominators, or the NLL weight and the number of valid pairs of these rows."""
    device = rows.position.device
    if nll is None:
        nll = rows.nll_weight.sum()
    if pairs is None:
        pairs = _valid_pairs(_scored_rows(rows), rows.num_pairs).sum(dtype=torch.float64)
    return Denominators(*(torch.as_tensor(d, dtype=torch.float64, device=device) for d in (nll, pairs)))


def pair_loss(token_log_odds: Tensor, rows: Rows, alpha: float, beta: float, counts: Denominators) -> PairLoss:
    """The loss of `rows` from their token log-odds (R,) float64; the rows may be those of a few whole pairs."""
    m = token_log_odds
    logps = F.logsigmoid(m)

    nll_weight = rows.nll_weight * _reciprocal(counts.nll)
    nll_loss = -_masked_dot(nll_weight, logps)

    scored_rows = _scored_rows(rows)
    valid = _valid_pairs(scored_rows, rows.num_pairs)
    total = segment_sum(torch.where(rows.scored, logps, 0), rows.sequence, 2 * rows.num_pairs)
    mean_logps = total / scored_rows.clamp(min=1)
    a = torch.where(valid.repeat(2), mean_logps, -1.0).clamp(max=LARGEST_LOGP)
    log1mexp = torch.log(-torch.expm1(a))
    chosen, rejected = (a - log1mexp).view(2, -1)
    d = chosen - rejected
    pair_weight = valid * _reciprocal(counts.pairs)
    or_loss = -(pair_weight * F.logsigmoid(d)).sum()

    # d OR / d a_s without the 1 / (1 - exp(a_s)), which joins sigmoid(-m_t) below
    log_share = F.logsigmoid(-d).repeat(2) - log1mexp
    sign = torch.cat((-pair_weight, pair_weight)) / scored_rows.clamp(min=1)
    log_token = F.logsigmoid(-m)
    or_grad = torch.where(rows.scored, sign[rows.sequence] * torch.exp(log_share[rows.sequence] + log_token), 0)
    grad = beta * or_grad - alpha * nll_weight * log_token.exp()

    chosen_logps, rejected_logps = mean_logps.view(2, -1)
    return PairLoss(alpha * nll_loss + beta * or_loss, nll_loss, or_loss, chosen_logps, rejected_logps, d, valid, grad)


def _scored_rows(rows: Rows) -> Tensor:
    return segment_sum(rows.scored.double(), rows.sequence, 2 * rows.num_pairs)


def _valid_pairs(scored_rows: Tensor, num_pairs: int) -> Tensor:
    """(B,) bool: both answers have a scored row."""
    return (scored_rows.view(2, num_pairs) > 0).all(0)


def _reciprocal(count: Tensor) -> Tensor:
    """1 / count, or 0 where there is nothing to average."""
    return torch.where(count > 0, 1 / count.clamp(min=torch.finfo(torch.float64).tiny), 0)


def _masked_dot(weight: Tensor, value: Tensor) -> Tensor:
    """sum of weight * value in which weight 0 wins over an infinite value."""
    return torch.where(weight != 0, weight * value, 0).sum()
