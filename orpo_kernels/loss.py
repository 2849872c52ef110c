"""The ORPO loss from hidden states and the lm-head weight, without the logits."""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .autograd import GroupedLoss, PairLossFunction, TokenLogOdds
from .checks import (
    check_denominator,
    check_head,
    check_options,
    check_positions,
    check_same_device,
    check_targets,
)
from .graph import loss_in_a_graph
from .objective import denominators
from .planning import accumulation_dtype
from .projection import HeadOptions, needs_grad
from .rows import Rows, padded_rows


class ORPOOutput(NamedTuple):
    """What `orpo_loss` returns. Only `loss` is differentiable. fp32, float64 for float64 inputs.

    Attributes:
        loss: 0-d, alpha * nll_loss + beta * or_loss.
        nll_loss: 0-d, nats; 0 where there is no NLL row.
        or_loss: 0-d, the mean of -logsigmoid(log_odds) over the valid pairs; 0 where there is none.
        chosen_logps: (B,) length-averaged log-probability of the chosen answer, nats per token; 0 if it is empty.
        rejected_logps: (B,) the same of the rejected answer.
        log_odds: (B,) log odds ratio of chosen over rejected; 0 for a pair that is not valid.
        valid_pairs: (B,) bool, False for a pair with an empty answer, which leaves the odds-ratio term.
    """

    loss: Tensor
    nll_loss: Tensor
    or_loss: Tensor
    chosen_logps: Tensor
    rejected_logps: Tensor
    log_odds: Tensor
    valid_pairs: Tensor


def orpo_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    nll_labels: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 1.0,
    nll_reduction: str = "token",
    nll_denominator: int | Tensor | None = None,
    pair_denominator: int | Tensor | None = None,
    ignore_index: int = -100,
    shift: bool = False,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    backend: str = "auto",
    sparse_eps: float | None = None,
) -> ORPOOutput:
    """ORPO: NLL of the chosen answers plus beta times -logsigmoid of the log odds ratio (arXiv 2403.07691).

    Args:
        hidden: (2B, T, H) last hidden states, the B chosen sequences first; fp16, bf16, fp32 or float64.
        weight: (V, H) lm-head weight in the same dtype; under autocast the dtypes may differ.
        labels: (2B, T) int64, the scored (odds-ratio) targets: the response's token ids, `ignore_index` elsewhere.
        bias: (V,) lm-head bias.
        nll_labels: (B, T) int64, the chosen sequences' NLL targets; `labels[:B]` by default.
        beta: weight of the odds ratio, the paper's lambda.
        alpha: weight of the NLL.
        nll_reduction: "token", the mean over all NLL rows, or "sequence", the mean over each sequence first.
        nll_denominator: what the NLL's sum is divided by instead of this batch's own count of NLL rows ("token") or
            of chosen sequences with an NLL row ("sequence"). With the count of the whole batch, the micro-batches of
            gradient accumulation or of several devices add up to exactly the whole batch's loss and gradient.
        pair_denominator: the same for the odds ratio: the number of pairs with two non-empty answers.
        ignore_index: the label that is no target.
        shift: False if `labels[:, t]` is the target of `hidden[:, t]`; True for unshifted labels, where it is
            `labels[:, t + 1]`. The hidden states are not copied.
        logit_scale: logits = logit_scale * (hidden @ weight.T + bias)  (Cohere; Granite: 1 / logits_scaling).
        logit_softcap: c, logits = c * tanh(logits / c)  (Gemma 2).
        schedule: "auto", "single_pass", "resident" or "recompute"; see `plan`.
        memory_budget: bytes for the loss beside its inputs and the gradients; by default a sixteenth of the memory.
        backend: "auto", "torch", "native" or "triton".
        sparse_eps: None for exact gradients. A probability, 2**-14 say: the backward pass leaves out the tokens whose
            probability nowhere in a block of rows exceeds it, and puts the tail's mean in their place. The loss itself
            stays exact. What it saves and costs is in `docs/sparse.md`; `measured_sparsity` prints it for your data.

    Raises:
        ValueError: shapes that do not fit, an odd batch, a label outside [0, V), a schedule that cannot serve.
        TypeError: dtypes or devices that do not fit.
        RuntimeError: a backend that is not available; a second derivative.
    """
    if hidden.dim() != 3:
        raise ValueError(
            f"hidden has shape {tuple(hidden.shape)}, it must be (2B, T, H); see orpo_loss_from_rows for flat"
        )
    if labels.shape != hidden.shape[:2]:
        raise ValueError(
            f"labels has shape {tuple(labels.shape)}, but hidden {tuple(hidden.shape)} "
            f"asks for {tuple(hidden.shape[:2])}"
        )
    check_same_device("hidden", hidden, "labels", labels)
    return orpo_loss_from_rows(
        hidden.flatten(0, 1),
        weight,
        padded_rows(labels, nll_labels, shift, ignore_index, nll_reduction),
        bias=bias,
        beta=beta,
        alpha=alpha,
        nll_denominator=nll_denominator,
        pair_denominator=pair_denominator,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        schedule=schedule,
        memory_budget=memory_budget,
        backend=backend,
        sparse_eps=sparse_eps,
    )


def orpo_loss_from_rows(
    hidden: Tensor,
    weight: Tensor,
    rows: Rows,
    *,
    bias: Tensor | None = None,
    low_rank: Tensor | None = None,
    beta: float = 0.1,
    alpha: float = 1.0,
    nll_denominator: int | Tensor | None = None,
    pair_denominator: int | Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    backend: str = "auto",
    sparse_eps: float | None = None,
) -> ORPOOutput:
    """`orpo_loss` for any layout: packed, padding-free, or with a shared prompt.

    Args:
        hidden: (N, H) last hidden states of all positions.
        rows: which positions predict which targets, in which sequence; see `Rows`, `rows_from_labels` and `dialects`.
        low_rank: (V, r), more columns of the weight in any dtype: LoRA's B, where hidden (N, H + r) goes on with what B
            multiplies. The weight is copied. If it is frozen, these columns alone get a gradient and alone cost one.
        nll_denominator: instead of the sum of `rows.nll_weight`.

    All else is as in `orpo_loss`. Nothing is read back from a GPU here, except each pair's number of rows where a
    trained lm-head's residual exceeds the budget as a whole while its fp32 gradient does not.
    """
    if hidden.dim() != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, it must be (N, H); see orpo_loss for (2B, T, H)")
    columns = None
    if low_rank is not None:
        weight, columns = extended(weight, low_rank)
    check_head(hidden, weight, bias)
    check_options(logit_scale, logit_softcap, sparse_eps)
    check_denominator("nll_denominator", nll_denominator)
    check_denominator("pair_denominator", pair_denominator)
    check_same_device("hidden", hidden, "rows", rows.position)
    if torch.compiler.is_compiling():
        head = (logit_scale, logit_softcap, schedule, memory_budget, backend, sparse_eps)
        counts = (nll_denominator, pair_denominator)
        return ORPOOutput(*loss_in_a_graph(hidden, weight, bias, rows, *counts, alpha, beta, *head))
    rows = rows.live()
    check_targets("labels", rows.target, weight.shape[0])
    check_positions(rows.position, hidden.shape[0])
    plan_with = partial(
        HeadOptions.planned,
        hidden,
        weight,
        bias,
        num_rows=len(rows),
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        memory_budget=memory_budget,
        backend=backend,
        largest_pair=rows.largest_pair,
        sparse_eps=sparse_eps,
        needs=needs_grad(hidden, weight if columns is None else columns, bias),
    )
    options = plan_with(schedule=schedule)
    if options.plan.group_rows and columns is not None:  # groups would accumulate the gradient of the whole weight
        options = plan_with(schedule="recompute")
    counts = denominators(rows, nll_denominator, pair_denominator)
    if options.plan.group_rows:
        outputs = GroupedLoss.apply(hidden, weight, bias, rows, options, alpha, beta, counts)
    else:
        token_log_odds = TokenLogOdds.apply(hidden, weight, bias, rows.position, rows.target, options, columns)
        outputs = PairLossFunction.apply(
            token_log_odds, rows, alpha, beta, counts, options.ops, accumulation_dtype(hidden.dtype)
        )
    return ORPOOutput(*outputs)


def extended(weight: Tensor, low_rank: Tensor) -> tuple[Tensor, Tensor | None]:
    """The weight with the columns of `low_rank`, and those again if they alone are to get a gradient."""
    if low_rank.dim() != 2 or low_rank.shape[0] != weight.shape[0]:
        raise ValueError(
            f"low_rank has shape {tuple(low_rank.shape)}, but weight {tuple(weight.shape)} asks for "
            f"({weight.shape[0]}, r)"
        )
    check_same_device("weight", weight, "low_rank", low_rank)
    columns = low_rank.to(weight.dtype)
    extended = torch.cat((weight, columns), dim=1)
    if weight.requires_grad or torch.compiler.is_compiling():
        return extended, None
    return extended.detach(), columns


class ORPOLoss(nn.Module):
    """`orpo_loss` as a module: the options are given once, the tensors at each call.

    >>> loss_function = ORPOLoss(beta=0.1, shift=True)
    >>> loss_function(hidden, model.lm_head.weight, labels).loss.backward()
    """

    def __init__(
        self,
        *,
        beta: float = 0.1,
        alpha: float = 1.0,
        nll_reduction: str = "token",
        ignore_index: int = -100,
        shift: bool = False,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        schedule: str = "auto",
        memory_budget: int | None = None,
        backend: str = "auto",
        sparse_eps: float | None = None,
    ):
        super().__init__()
        check_options(logit_scale, logit_softcap, sparse_eps)
        self.beta = beta
        self.alpha = alpha
        self.nll_reduction = nll_reduction
        self.ignore_index = ignore_index
        self.shift = shift
        self.logit_scale = logit_scale
        self.logit_softcap = logit_softcap
        self.schedule = schedule
        self.memory_budget = memory_budget
        self.backend = backend
        self.sparse_eps = sparse_eps

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        *,
        bias: Tensor | None = None,
        nll_labels: Tensor | None = None,
        nll_denominator: int | Tensor | None = None,
        pair_denominator: int | Tensor | None = None,
    ) -> ORPOOutput:
        """See `orpo_loss`."""
        return orpo_loss(
            hidden,
            weight,
            labels,
            bias=bias,
            nll_labels=nll_labels,
            nll_denominator=nll_denominator,
            pair_denominator=pair_denominator,
            **self._options(),
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    def _options(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name in OPTIONS}


OPTIONS = frozenset(inspect.signature(ORPOLoss).parameters)
