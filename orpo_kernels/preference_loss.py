"""The loss of any method (`methods.py`) from hidden states and the lm-head weight, without the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .call import Call
from .checks import check_denominators
from .head import Compute, Head
from .loss import groups_of
from .methods import Answers, Method
from .objective import segment_sum
from .parallel import NO_GROUPS
from .rows import Rows


class PreferenceOutput(NamedTuple):
    """What `preference_loss_from_rows` returns. Only `loss` is differentiable. fp32, float64 for float64 inputs.

    Attributes:
        loss: 0-d, alpha * nll_loss + the mean of the method's pair losses over the valid pairs, weighted by
            `rows.pair_weight`. What is of a pair, (B,), is as it is without weights.
        nll_loss: 0-d, nats; 0 where there is no NLL row. Weighted as well: a part of `loss`.
        chosen_logps: (B,) log-probability of the chosen answer in nats: per token if the method is length-averaged,
            else of the whole answer; 0 if it is empty.
        rejected_logps: (B,) the same of the rejected answer.
        chosen_rewards: (B,) beta times chosen_logps, for DPO beta times its difference to the reference's.
        rejected_rewards: (B,) the same of the rejected answer.
        preferred: (B,) bool, whether chosen_rewards is above rejected_rewards; with beta 0, whether it would be.
        log_odds: (B,) log odds ratio of chosen over rejected, of length-averaged log-probabilities for every method; 0
            for a pair that is not valid.
        valid_pairs: (B,) bool, False for a pair with an empty answer, which has no pair loss.
    """

    loss: Tensor
    nll_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    preferred: Tensor
    log_odds: Tensor
    valid_pairs: Tensor


def preference_loss_from_rows(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    method: Method,
    *,
    reference_logps: Tensor | None = None,
    bias: Tensor | None = None,
    low_rank: Tensor | None = None,
    nll_denominator: int | Tensor | None = None,
    pair_denominator: int | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    data_group: Any = None,
    vocab_group: Any = None,
    sequence_group: Any = None,
    **options: Any,
) -> PreferenceOutput:
    """The loss of `method` for any layout, by the kernels of `orpo_loss`; what that can, every method can.

    Args:
        hidden, weight, rows, bias, low_rank: as in `orpo_loss_from_rows`. A row's `nll_weight` is that of the method's
            NLL; the method's prompt_nll and nll_reduction are the business of whoever makes the rows.
        method: an instance of one of `orpo_kernels.methods`.
        reference_logps: (2B,) summed log-probabilities of the answers under the reference model, for DPO.
        nll_denominator, pair_denominator: as in `orpo_loss`: the whole batch's counts make accumulation exact.
        data_group, vocab_group, sequence_group: as in `orpo_loss_from_rows`.
        options: schedule, memory_budget, backend, sparse_eps, as in `orpo_loss`.

    Raises as `orpo_loss_from_rows`; `ValueError` for a method that needs reference_logps and has none, or of a wrong
    shape.
    """
    groups = groups_of(data_group, vocab_group, sequence_group)
    compute = Compute(**options)
    check_denominators(nll_denominator, pair_denominator)
    with groups.together(weight.device):
        head = Head.local(weight, bias, low_rank, logit_scale, logit_softcap, groups)
        reference = _checked_reference(reference_logps, method, rows)
        call = Call.prepared(hidden, rows, head, compute, groups)
    loss, nll_loss, _, chosen_logps, rejected_logps, log_odds, valid_pairs = call.loss(
        method, nll_denominator, pair_denominator, reference
    )
    gains = method.gains(torch.cat((chosen_logps, rejected_logps)).double(), reference).to(loss.dtype)
    chosen_gains, rejected_gains = gains.view(2, -1)
    return PreferenceOutput(
        loss=loss,
        nll_loss=nll_loss,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_rewards=method.beta * chosen_gains,
        rejected_rewards=method.beta * rejected_gains,
        preferred=chosen_gains > rejected_gains,
        log_odds=log_odds,
        valid_pairs=valid_pairs,
    )


@torch.compiler.disable(reason="computes as many rows as labels ask for, which no graph of fixed shapes can")
def row_logps(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    *,
    bias: Tensor | None = None,
    low_rank: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **options: Any,
) -> Tensor:
    """(R,) float64 log-probabilities of live rows, differentiable. Arguments as in `orpo_loss_from_rows`."""
    head = Head.local(weight, bias, low_rank, logit_scale, logit_softcap)
    call = Call.prepared(hidden, rows, head, Compute(**options), NO_GROUPS)
    assert call.options is not None
    return F.logsigmoid(head.token_log_odds(hidden, rows.position, rows.target, call.options))


def answers_of(logps: Tensor, rows: Rows) -> Answers:
    """The answers' sums of row log-probabilities (R,)."""
    sequences = 2 * rows.num_pairs
    tokens = segment_sum(rows.scored.double(), rows.sequence, sequences)
    return Answers(segment_sum(torch.where(rows.scored, logps, 0), rows.sequence, sequences), tokens)


def _checked_reference(reference_logps: Tensor | None, method: Method, rows: Rows) -> Tensor | None:
    """(2B,) float64, in the method's kind of score. What the method does not need is not looked at."""
    if not method.needs_reference or reference_logps is None:
        method.gains(rows.nll_weight.new_empty(0))  # says what it misses
        return None
    if reference_logps.shape != (2 * rows.num_pairs,):
        raise ValueError(
            f"reference_logps has shape {tuple(reference_logps.shape)}, but the batch has {rows.num_pairs} pairs: it "
            f"must be ({2 * rows.num_pairs},), the chosen answers first"
        )
    return reference_logps.to(rows.position.device, torch.float64)
