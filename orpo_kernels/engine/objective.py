"""The pair-level mathematics: token log-odds -> loss, metrics, and the gradient of every row. O(rows) work.

With m_t the log-odds of target t (`token_log_odds`), and s a sequence with scored rows T_s:

    logp_t  = logsigmoid(m_t)
    a_s     = mean of logp_t over T_s                       length-normalised log-probability
    zeta(a) = a - log(1 - exp(a))                           its log-odds
    d_i     = zeta(a_chosen) - zeta(a_rejected)
    OR      = 1/n sum_i -logsigmoid(d_i)                    n pairs                     (arXiv 2403.07691, eq. 7)
    NLL     = -sum_t u_t logp_t                             u_t the normalised NLL weights
    loss    = alpha * NLL + beta * OR

With weights w_i of the pairs, the terms of a pair in both sums are multiplied by its w_i: those of OR, and its u_t. The
denominators are counted without them.

and by hand, with dlogp_t/dm_t = sigmoid(-m_t) and dzeta/da = 1 / (1 - exp(a)):

    dNLL/dm_t = -u_t sigmoid(-m_t)
    dOR/dm_t  = -+ 1/n * sigmoid(-d) * sigmoid(-m_t) / (1 - exp(a_s)) / |T_s|      - chosen, + rejected

The last fraction tends to 0/0 for a confident answer, yet sigmoid(-m_t) / (1 - exp(a_s)) <= |T_s| always: it is taken
in the logarithm, in float64, and nothing overflows. Only an a that rounds to 0 even there is bounded (LARGEST_LOGP).
"""

from __future__ import annotations

from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..devices import moved, statistics_dtype
from ..ops import host_ops
from ..parallel import NO_GROUPS, Group, Groups, summed
from ..rows import Rows

LARGEST_LOGP = -torch.finfo(torch.float64).tiny  # stands in for a log-probability that rounds to 0, where zeta is inf


class SequenceSums(NamedTuple):
    """What the pair-level mathematics needs of every sequence; float64."""

    mean_logps: Tensor  # (2B,) a_s, 0 for a sequence without a scored row
    scored_rows: Tensor  # (2B,) |T_s|
    nll: Tensor  # (2B,) sum of -nll_weight * logp over the sequence's rows, not normalised


class PairLoss(NamedTuple):
    """What one evaluation of the objective gives. B pairs, R rows."""

    # (3 + 3B,) float64, side by side: loss, NLL, OR (or another method's pair loss); of the pairs the log-probabilities
    # of the chosen and of the rejected answers, and the log-odds d_i.
    numbers: Tensor
    valid_pairs: Tensor  # (B,) bool
    grad: Tensor  # (R,) float64, dloss / d token_log_odds

    @classmethod
    def empty(cls, token_log_odds: Tensor, rows: Rows) -> PairLoss:
        """For a kernel to write into."""
        numbers = token_log_odds.new_empty(3 + 3 * rows.num_pairs)
        return cls(numbers, numbers.new_empty(rows.num_pairs, dtype=torch.bool), torch.empty_like(token_log_odds))

    def to(self, device: torch.device) -> PairLoss:
        """The same on the device that the token log-odds came from, in the dtype that it has."""
        dtype = statistics_dtype(device)
        return PairLoss(
            moved(self.numbers, device, dtype), self.valid_pairs.to(device), moved(self.grad, device, dtype)
        )


class Denominators(NamedTuple):
    """What the two means are divided by, float64 scalars: the batch's own counts, or those of a larger batch."""

    nll: Tensor
    pairs: Tensor


def denominators(
    rows: Rows, nll: int | Tensor | None, pairs: int | Tensor | None, groups: Groups = NO_GROUPS
) -> Denominators:
    """The given denominators, or the NLL weight and the number of valid pairs of these rows and of the groups' ranks.

    Both are divided by the number of ranks that hold other pairs: their losses and gradients will be averaged.
    """
    given = [None if count is None else as_scalar(count, rows.position.device) for count in (nll, pairs)]
    own = counts_of(rows, groups).unbind() if nll is None or pairs is None else given
    counts: list[Any] = [mine if count is None else count for mine, count in zip(own, given, strict=True)]
    return Denominators(*(counts if groups.replicas == 1 else [count / groups.replicas for count in counts]))


def counts_of(rows: Rows, groups: Groups = NO_GROUPS) -> Tensor:
    """(2,) float64: the NLL weight and the number of valid pairs, of the groups' ranks together."""
    if groups.sequence is not None:
        scored_rows = summed(_scored_rows(rows), [groups.sequence], "the number of rows of every sequence")
        counts = _counts(rows, scored_rows)
        summed(counts[:1], [groups.sequence], "the number of NLL rows")
    elif rows.known.counts is None:
        counts = host_ops(rows.position).count_rows(rows)
    else:
        counts = rows.known.counts
    if groups.data is None:
        return counts
    return summed(counts.clone(), [groups.data], "the numbers of NLL rows and pairs")


def count_rows(rows: Rows) -> Tensor:
    """(2,) float64: the sum of the rows' NLL weights, and the number of pairs of which both answers are scored."""
    return _counts(rows, _scored_rows(rows))


def _counts(rows: Rows, scored_rows: Tensor) -> Tensor:
    return torch.stack((rows.nll_weight.sum(), _valid_pairs(scored_rows).sum(dtype=torch.float64)))


def _scored_rows(rows: Rows) -> Tensor:
    """(2B,) float64, the number of every sequence's scored rows."""
    return segment_sum(rows.scored.double(), rows)


def as_scalar(count: int | Tensor, device: torch.device) -> Tensor:
    """0-d float64 on `device`. A number is written there by a kernel: copying it would wait for a GPU."""
    if isinstance(count, Tensor):
        return moved(count, device, torch.float64).reshape(())
    return torch.full((), count, dtype=torch.float64, device=device)


def odds_ratio_loss(
    token_log_odds: Tensor,
    rows: Rows,
    alpha: float,
    beta: float,
    counts: Denominators,
    ops: ModuleType,
    sequence_group: Group | None = None,
) -> PairLoss:
    """The loss of `rows` from their token log-odds (R,) float64; the rows may be those of a few whole pairs.

    rows: what the NLL's rows weigh is multiplied by the weights of their pairs here, that is, for both operations.
    ops: the backend; `sequence_sums` and `odds_ratio` below are the eager ones.
    sequence_group: its ranks hold the sequences' other rows; they all get the same loss, and as many times the gradient
        of their own rows as there are ranks.
    """
    if rows.pair_weight is not None:
        rows = rows.with_nll_weight(rows.weighted_nll())
    if sequence_group is None:
        return ops.odds_ratio(token_log_odds, rows, None, alpha, beta, counts)
    sums = summed_over_ranks(ops.sequence_sums(token_log_odds, rows), sequence_group)
    loss = ops.odds_ratio(token_log_odds, rows, sums, alpha, beta, counts)
    return loss._replace(grad=loss.grad * sequence_group.size)


def summed_over_ranks(sums: SequenceSums, group: Group) -> SequenceSums:
    """The sums of the whole sequences from those of every rank's part of them."""
    mean_logps, scored_rows, nll = sums
    everyones = torch.stack((mean_logps * scored_rows, scored_rows, nll))
    total, scored_rows, nll = summed(everyones, [group], "the sums of the sequences")
    return SequenceSums(total / scored_rows.clamp(min=1), scored_rows, nll)


def sequence_sums(token_log_odds: Tensor, rows: Rows) -> SequenceSums:
    """Masked averages and sums over the rows of each sequence, deterministic."""
    logps, scored_rows = F.logsigmoid(token_log_odds), _scored_rows(rows)
    total = segment_sum(torch.where(rows.scored, logps, 0), rows)
    # Weight 0 wins over an infinite log-probability.
    nll = torch.where(rows.nll_weight != 0, -rows.nll_weight * logps, 0)
    return SequenceSums(total / scored_rows.clamp(min=1), scored_rows, segment_sum(nll, rows))


def odds_ratio(
    token_log_odds: Tensor, rows: Rows, sums: SequenceSums | None, alpha: float, beta: float, counts: Denominators
) -> PairLoss:
    """Loss, metrics and the gradient of every row. `rows.nll_weight` holds its pair's weight already.

    sums: those of the whole sequences; None: these rows are whole sequences.
    """
    mean_logps, scored_rows, nll = sums or sequence_sums(token_log_odds, rows)
    nll_share, pair_share = reciprocal(counts.nll), reciprocal(counts.pairs)
    nll_loss = nll.sum() * nll_share

    valid = _valid_pairs(scored_rows)
    a = torch.where(valid.repeat(2), mean_logps, -1.0).clamp(max=LARGEST_LOGP)
    log1mexp = torch.log(-torch.expm1(a))
    chosen, rejected = (a - log1mexp).view(2, -1)
    d = chosen - rejected
    pair_weight = valid * pair_share
    if rows.pair_weight is not None:
        pair_weight = pair_weight * rows.pair_weight
    or_loss = torch.where(pair_weight != 0, -pair_weight * F.logsigmoid(d), 0).sum()  # weight 0 wins here too

    # d OR / d a_s without the 1 / (1 - exp(a_s)), which joins sigmoid(-m_t) below
    log_share = F.logsigmoid(-d).repeat(2) - log1mexp
    share = (torch.cat((-pair_weight, pair_weight)) / scored_rows.clamp(min=1))[rows.sequence]
    log_token = F.logsigmoid(-token_log_odds)
    or_grad = torch.where(rows.scored & (share != 0), share * torch.exp(log_share[rows.sequence] + log_token), 0)
    grad = beta * or_grad - alpha * nll_share * rows.nll_weight * log_token.exp()

    loss = alpha * nll_loss + beta * or_loss
    return PairLoss(torch.cat((torch.stack((loss, nll_loss, or_loss)), mean_logps, d)), valid, grad)


def segment_sum(values: Tensor, rows: Rows) -> Tensor:
    """(2B,) sums of `values` (R,) float64 over the rows of each sequence, deterministic."""
    if rows.known.offsets is not None:
        return torch.segment_reduce(values, "sum", offsets=rows.known.offsets)
    sums = values.new_zeros(2 * rows.num_pairs)
    if sums.is_cuda:
        return sums.index_put_((rows.sequence,), values, accumulate=True)  # sorts; index_add_ would use atomics
    return sums.index_add_(0, rows.sequence, values)


def _valid_pairs(scored_rows: Tensor) -> Tensor:
    """(B,) bool: both answers have a scored row."""
    return (scored_rows.view(2, -1) > 0).all(0)


def reciprocal(count: Tensor) -> Tensor:
    """1 / count, or 0 where there is nothing to average."""
    return torch.where(count > 0, 1 / count.clamp(min=torch.finfo(torch.float64).tiny), 0)
