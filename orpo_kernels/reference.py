"""The definition, in plain PyTorch: whole logits, autograd, any dtype. In float64 it is the oracle of every test.

It shares no code with the fused loss. Only the log-probability is written with care, as logsigmoid of the target's
log-odds over all other tokens, so that it is right at every confidence.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .output import PreferenceOutput
from .rows import Rows


def token_log_odds(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
) -> Tensor:
    """(...) z_y - logsumexp over the other tokens, for hidden (..., H) and target (...)."""
    logits = logit_scale * F.linear(hidden, weight, bias)
    if logit_softcap is not None:
        logits = logit_softcap * torch.tanh(logits / logit_softcap)
    is_target = F.one_hot(target, weight.shape[0]).bool()
    others = logits.masked_fill(is_target, -torch.inf).logsumexp(-1)
    return logits.gather(-1, target[..., None]).squeeze(-1) - others


def orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    nll_labels: Tensor | None = None,
    pair_weight: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 1.0,
    nll_reduction: str = "token",
    nll_denominator: int | Tensor | None = None,
    pair_denominator: int | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **schedule_options: object,
) -> PreferenceOutput:
    """`orpo_kernels.orpo_loss` by definition; the options that only say how to compute it are ignored."""
    pairs = labels.shape[0] // 2
    nll_labels = labels[:pairs] if nll_labels is None else nll_labels
    if shift:
        hidden, labels, nll_labels = hidden[:, :-1], labels[:, 1:], nll_labels[:, 1:]

    def masked_logps(hidden: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        mask = labels != ignore_index
        odds = token_log_odds(hidden, weight, torch.where(mask, labels, 0), bias, logit_scale, logit_softcap)
        return torch.where(mask, F.logsigmoid(odds), 0), mask

    logps, scored = masked_logps(hidden, labels)
    nll_logps, wants_nll = masked_logps(hidden[:pairs], nll_labels)
    if nll_reduction == "sequence":
        nll_logps = nll_logps / wants_nll.sum(1, keepdim=True).clamp(min=1)
        wants_nll = wants_nll.any(1)
    weights = _pair_weights(pair_weight, pairs, logps)
    nll_total = -(weights[:, None] * nll_logps).sum()
    nll_loss = nll_total / (wants_nll.sum() if nll_denominator is None else nll_denominator)
    if nll_denominator is None and not wants_nll.any():
        nll_loss = logps.sum() * 0
    means = logps.sum(1) / scored.sum(1).clamp(min=1)
    return _odds_ratio(means, scored.any(1), nll_loss, weights, alpha, beta, pair_denominator)


def orpo_loss_from_rows(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    *,
    bias: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 1.0,
    nll_denominator: int | Tensor | None = None,
    pair_denominator: int | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    **schedule_options: object,
) -> PreferenceOutput:
    """`orpo_kernels.orpo_loss_from_rows` by definition."""
    logps = F.logsigmoid(token_log_odds(hidden[rows.position], weight, rows.target, bias, logit_scale, logit_softcap))
    nll_weight = rows.nll_weight.to(logps.dtype)
    total = nll_weight.sum() if nll_denominator is None else nll_denominator
    weights = _pair_weights(rows.pair_weight, rows.num_pairs, logps)
    nll_loss = -(weights.repeat(2)[rows.sequence] * nll_weight * logps).sum() / (total if total > 0 else 1)
    belongs = F.one_hot(rows.sequence, 2 * rows.num_pairs).T * rows.scored  # (2B, R)
    means = (belongs * logps).sum(1) / belongs.sum(1).clamp(min=1)
    return _odds_ratio(means, belongs.sum(1) > 0, nll_loss, weights, alpha, beta, pair_denominator)


def _pair_weights(pair_weight: Tensor | None, pairs: int, logps: Tensor) -> Tensor:
    """(B,) what each pair's terms of both sums are multiplied by; ones if nothing is given."""
    return logps.new_ones(pairs) if pair_weight is None else pair_weight.to(logps.dtype)


def _odds_ratio(
    means: Tensor,
    answered: Tensor,
    nll_loss: Tensor,
    weights: Tensor,
    alpha: float,
    beta: float,
    pair_denominator: int | Tensor | None,
) -> PreferenceOutput:
    """The loss from each sequence's mean log-probability (2B,) and whether it has one (2B,)."""
    valid = answered.view(2, -1).all(0)
    a = torch.where(valid.repeat(2), means, -1.0)
    zeta = a - torch.log(-torch.expm1(a))
    log_odds = zeta[: len(valid)] - zeta[len(valid) :]
    count = valid.sum() if pair_denominator is None else pair_denominator
    or_loss = (-F.logsigmoid(log_odds) * valid * weights).sum() / (count if count > 0 else 1)
    chosen_logps, rejected_logps = means.detach().view(2, -1)
    return PreferenceOutput(
        loss=alpha * nll_loss + beta * or_loss,
        nll_loss=nll_loss.detach(),
        pair_loss=or_loss.detach(),
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        log_odds=log_odds.detach(),
        valid_pairs=valid,
        chosen_rewards=beta * chosen_logps,
        rejected_rewards=beta * rejected_logps,
        preferred=chosen_logps > rejected_logps,
    )
