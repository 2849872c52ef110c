"""The loss of any method (`methods.py`) from hidden states and the lm-head weight, without the logits."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_denominator, check_pair_weight
from .head import Head
from .loss import orpo_loss_from_rows
from .methods import ORPO, Answers, Method
from .objective import NO_GROUPS, denominators, reciprocal, segment_sum
from .planning import accumulation_dtype
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
    **options: Any,
) -> PreferenceOutput:
    """The loss of `method` for any layout, by the kernels of `orpo_loss`: ORPO is that loss itself.

    Args:
        hidden, weight, rows, bias, low_rank: as in `orpo_loss_from_rows`. A row's `nll_weight` is that of the method's
            NLL; the method's prompt_nll and nll_reduction are the business of whoever makes the rows.
        method: an instance of one of `orpo_kernels.methods`.
        reference_logps: (2B,) summed log-probabilities of the answers under the reference model, for DPO.
        nll_denominator, pair_denominator: as in `orpo_loss`: the whole batch's counts make accumulation exact.
        options: logit_scale, logit_softcap, schedule, memory_budget, backend, sparse_eps, as in `orpo_loss`.

    The GEMMs are those of `token_logps`: a trained head's residual is held as a whole or not at all (groups of pairs,
    which know each other's gradient, are ORPO's alone).

    Raises as `orpo_loss_from_rows`; `ValueError` for a method that needs reference_logps and has none, or of a wrong
    shape.
    """
    if isinstance(method, ORPO):
        out = orpo_loss_from_rows(
            hidden,
            weight,
            rows,
            bias=bias,
            low_rank=low_rank,
            beta=method.beta,
            alpha=method.alpha,
            nll_denominator=nll_denominator,
            pair_denominator=pair_denominator,
            **options,
        )
        return PreferenceOutput(
            loss=out.loss,
            nll_loss=out.nll_loss,
            chosen_logps=out.chosen_logps,
            rejected_logps=out.rejected_logps,
            chosen_rewards=method.beta * out.chosen_logps,
            rejected_rewards=method.beta * out.rejected_logps,
            preferred=out.chosen_logps > out.rejected_logps,
            log_odds=out.log_odds,
            valid_pairs=out.valid_pairs,
        )

    check_denominator("nll_denominator", nll_denominator)
    check_denominator("pair_denominator", pair_denominator)
    check_pair_weight(rows.pair_weight)
    rows = rows.live()
    reference = _checked_reference(reference_logps, method, rows)
    logps = row_logps(hidden, weight, rows, bias=bias, low_rank=low_rank, **options)
    answers = answers_of(logps, rows)
    counts = denominators(rows, nll_denominator, pair_denominator)

    nll_weight = rows.weighted_nll()
    nll_rows = torch.where(nll_weight != 0, -nll_weight * logps, 0)  # weight 0 wins over an infinite logp
    nll_loss = nll_rows.sum() * reciprocal(counts.nll)
    scores = method.scores(answers)
    pair_losses = torch.where(answers.valid_pairs, method.pair_losses(scores, reference), 0)
    if rows.pair_weight is not None:
        pair_losses = torch.where(rows.pair_weight != 0, rows.pair_weight * pair_losses, 0)
    loss = method.alpha * nll_loss + pair_losses.sum() * reciprocal(counts.pairs)

    dtype = accumulation_dtype(hidden.dtype)
    chosen_logps, rejected_logps = scores.detach().to(dtype).view(2, -1)
    gains = method.gains(scores.detach(), reference).to(dtype)
    chosen_gains, rejected_gains = gains.view(2, -1)
    return PreferenceOutput(
        loss=loss.to(dtype),
        nll_loss=nll_loss.detach().to(dtype),
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_rewards=method.beta * chosen_gains,
        rejected_rewards=method.beta * rejected_gains,
        preferred=chosen_gains > rejected_gains,
        log_odds=answers.log_odds.detach().to(dtype),
        valid_pairs=answers.valid_pairs,
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
    schedule: str = "auto",
    memory_budget: int | None = None,
    backend: str = "auto",
    sparse_eps: float | None = None,
) -> Tensor:
    """(R,) float64 log-probabilities of live rows, differentiable. Arguments as in `orpo_loss_from_rows`."""
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, it must be (N, H)")
    head = Head.local(weight, bias, low_rank, NO_GROUPS)
    head.check(hidden, rows.position, "rows")
    head.check_values(hidden, rows.position, rows.target, "labels")
    options = head.planned(
        hidden,
        len(rows),
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        schedule=schedule,
        memory_budget=memory_budget,
        backend=backend,
        sparse_eps=sparse_eps,
    )
    return F.logsigmoid(head.token_log_odds(hidden, rows.position, rows.target, options))


def answers_of(logps: Tensor, rows: Rows) -> Answers:
    """The answers' sums of row log-probabilities (R,)."""
    sequences = 2 * rows.num_pairs
    tokens = segment_sum(rows.scored.double(), rows.sequence, sequences)
    return Answers(segment_sum(torch.where(rows.scored, logps, 0), rows.sequence, sequences), tokens)


def _checked_reference(reference_logps: Tensor | None, method: Method, rows: Rows) -> Tensor | None:
    """(2B,) float64, in the method's kind of score. What the method does not need is not looked at."""
    if not method.needs_reference or reference_logps is None:
        return None  # the method says what it misses
    if reference_logps.shape != (2 * rows.num_pairs,):
        raise ValueError(
            f"reference_logps has shape {tuple(reference_logps.shape)}, but the batch has {rows.num_pairs} pairs: it "
            f"must be ({2 * rows.num_pairs},), the chosen answers first"
        )
    return reference_logps.to(rows.position.device, torch.float64)
