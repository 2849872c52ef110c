"""The torch.autograd.Functions: of token log-odds, of a loss, and of a loss by groups of pairs.

    hidden, weight, bias --TokenLogOdds--> m (R,) --PreferenceLoss--> loss

All that is vocabulary-sized is in the first, whose gradient is residual GEMMs (`schedules`). The second runs the first,
and is all that knows about pairs: its gradient is a vector that its forward pass has already computed (`Method.loss`).
`GroupedLoss` does so for a group of pairs at a time inside its forward pass, where the residual of all rows is too
large to be kept until the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..devices import moved
from ..methods import Method
from ..parallel import Group
from ..rows import Rows
from .gemm import even_chunks
from .objective import Denominators, PairLoss
from .projection import Gradients, HeadOptions
from .schedules import TABLE
from .work import FACTOR_SLICE, accumulation_dtype


class TokenLogOdds(torch.autograd.Function):
    """(hidden (N, H), weight (V, H), bias (V,) or None, position (R,), target (R,), options) -> m (R,), as statistics.

    A last input `columns` (V, r), or None, stands for the last r columns of a frozen weight that holds its values: the
    gradient is made for them alone.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        position: Tensor,
        target: Tensor,
        options: HeadOptions,
        columns: Tensor | None,
    ) -> Tensor:
        p = options.projection(hidden, weight, bias, position, target)
        with no_autocast(hidden):
            log_odds, kept = TABLE[options.plan.schedule].forward(p)
        ctx.options = options
        ctx.trained_columns = weight.shape[1] if columns is None else columns.shape[1]
        ctx.hidden_shape, ctx.hidden_dtype = hidden.shape, hidden.dtype
        # With a frozen head, a single pass has taken all it needs from the hidden states: u is kept instead of them.
        keeps_hidden = options.plan.needs_head or options.plan.schedule == "recompute"
        ctx.save_for_backward(hidden if keeps_hidden else None, weight, bias, position, target, *kept)
        return log_odds

    @staticmethod
    def backward(ctx: Any, coefficient: Tensor) -> tuple:
        refuse_second_derivative()
        hidden, weight, bias, position, target, *kept = ctx.saved_tensors
        needs_hidden, needs_weight, needs_bias, *_, needs_columns = ctx.needs_input_grad[:7]
        trained = weight.shape[0], ctx.trained_columns
        grads = Gradients(
            hidden=weight.new_zeros(ctx.hidden_shape, dtype=ctx.hidden_dtype) if needs_hidden else None,
            weight=weight.new_empty(trained) if needs_weight or needs_columns else None,
            bias=torch.zeros_like(bias, dtype=accumulation_dtype(bias.dtype)) if needs_bias else None,
        )
        if hidden is None:
            hidden = grads.hidden  # not read, only asked for its dtype
        p = ctx.options.projection(hidden, weight, bias, position, target)
        with no_autocast(weight):
            TABLE[p.plan.schedule].backward(p, tuple(kept), coefficient.to(p.sum_dtype), grads)
        of_weight, of_columns = (None, grads.weight) if needs_columns else (grads.weight, None)
        of_bias = None if grads.bias is None else grads.bias.to(weight.dtype)
        return grads.hidden, of_weight, of_bias, None, None, None, of_columns


@dataclass(frozen=True)
class Objective:
    """What the log-odds of a call's rows are for: a method, and what it needs beside them.

    Attributes:
        method: whose `loss` it is.
        counts: what the means are divided by.
        ops: the backend.
        sequence_group, reference: see `Method.loss`.
    """

    method: Method
    counts: Denominators
    ops: ModuleType
    sequence_group: Group | None = None
    reference: Tensor | None = None

    def __call__(self, token_log_odds: Tensor, rows: Rows) -> PairLoss:
        """In float64 where the rows are; what comes of it is where the token log-odds are."""
        device, home = token_log_odds.device, rows.position.device
        log_odds = token_log_odds if device == home else moved(token_log_odds, home, torch.float64)
        loss = self.method.loss(log_odds, rows, self.counts, self.ops, self.sequence_group, self.reference)
        return loss if device == home else loss.to(device)


class PreferenceLoss(torch.autograd.Function):
    """(what `TokenLogOdds` takes, rows, objective) -> loss and the metrics of `PairLoss`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, *others: Any) -> tuple[Tensor, ...]:
        *operands, rows, objective = others
        loss = objective(TokenLogOdds.forward(ctx, hidden, *operands), rows)
        ctx.coefficient = loss.grad
        return of_one_gradient(ctx, outputs_of(loss.numbers, loss.valid_pairs, accumulation_dtype(hidden.dtype)))

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple:
        if upstream is None:
            return (None,) * len(ctx.needs_input_grad)
        return *TokenLogOdds.backward(ctx, ctx.coefficient * upstream), None, None


class GroupedLoss(torch.autograd.Function):
    """Both of the above for a group of pairs at a time: (hidden, weight, bias, rows, options, ...) -> loss, metrics.

    Gradients are made in the forward pass, in fp32 because they do not know the upstream gradient yet.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        rows: Rows,
        options: HeadOptions,
        objective: Objective,
    ) -> tuple[Tensor, ...]:
        needs = ctx.needs_input_grad[:3]
        outputs, grads = loss_and_gradients(hidden, weight, bias, rows, options, objective, needs)
        ctx.dtypes = (hidden.dtype, weight.dtype, weight.dtype)
        ctx.save_for_backward(grads.hidden, grads.weight, grads.bias)
        return of_one_gradient(ctx, outputs)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor | None, *_: Tensor | None) -> tuple:
        refuse_second_derivative()
        grads = (
            None if grad is None or upstream is None else _scaled(grad, upstream, dtype)
            for grad, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        )
        return *grads, None, None, None


def loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    rows: Rows,
    options: HeadOptions,
    objective: Objective,
    needs: Sequence[bool],
) -> tuple[tuple[Tensor, ...], Gradients]:
    """Loss, metrics and, for an upstream gradient of 1, the gradients of those of (hidden, weight, bias) in `needs`.

    Gradients are in fp32 where several groups of pairs add up, or where the dtype is too narrow to be scaled later.
    """
    groups = groups_of_pairs(rows, options.plan.group_rows) if options.plan.group_rows else [rows]

    def zeros(tensor: Tensor | None, needed: bool, is_sum: bool) -> Tensor | None:
        if tensor is None or not needed:
            return None
        return torch.zeros_like(tensor, dtype=(accumulation_dtype if is_sum else gradient_dtype)(tensor.dtype))

    needs_hidden, needs_weight, needs_bias = needs
    grads = Gradients(
        hidden=zeros(hidden, needs_hidden, len(groups) > 1),
        weight=zeros(weight, needs_weight, len(groups) > 1),
        bias=zeros(bias, needs_bias, True),
        accumulate=len(groups) > 1,
    )
    losses = []
    with torch.no_grad(), no_autocast(hidden):
        for group in groups:
            on_device = (vector.to(hidden.device) for vector in (group.position, group.target))
            p = options.projection(hidden, weight, bias, *on_device)
            schedule = TABLE[p.plan.schedule]
            log_odds, kept = schedule.forward(p)
            loss = objective(log_odds, group)
            if any(needs):
                schedule.backward(p, kept, loss.grad.to(p.sum_dtype), grads)
            losses.append(loss)
            del kept
    # A pair's metrics come from its own group and are 0 in every other.
    numbers = torch.stack([loss.numbers for loss in losses]).sum(0) if len(losses) > 1 else losses[0].numbers
    valid = torch.stack([loss.valid_pairs for loss in losses]).any(0) if len(losses) > 1 else losses[0].valid_pairs
    return outputs_of(numbers, valid, accumulation_dtype(hidden.dtype)), grads


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which a gradient can wait for the upstream gradient: fp16 has no room for coefficients of 1 / tokens."""
    return torch.float32 if dtype == torch.float16 else dtype


def groups_of_pairs(rows: Rows, largest: int) -> list[Rows]:
    """Groups of whole pairs with at most `largest` rows each. Reads the rows on the host."""
    order = rows.pair.argsort(stable=True)
    counts, count = [], 0
    for size in rows.pair_sizes():
        if count and count + size > largest:
            counts.append(count)
            count = 0
        count += size
    return [rows.select(index) for index in order.split([*counts, count])]


def outputs_of(numbers: Tensor, valid_pairs: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What a Function returns: the loss and the metrics of `PairLoss` one by one, numbers in `dtype`."""
    numbers = numbers.to(dtype)
    loss, nll_loss, pair_loss = numbers[:3].unbind()
    # The loss is nobody's view: people divide it in place.
    return loss.clone(), nll_loss, pair_loss, *numbers[3:].view(3, -1).unbind(), valid_pairs


def of_one_gradient(ctx: Any, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The outputs, of which the first alone is differentiable."""
    ctx.mark_non_differentiable(*outputs[1:])
    ctx.set_materialize_grads(False)  # a tensor of zeros for each of the metrics
    return outputs


def refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            "orpo_kernels has no second derivative: its backward pass is written by hand and cannot be recorded. "
            "Call backward without create_graph=True, or use orpo_kernels.reference, which is plain PyTorch"
        )


def no_autocast(hidden: Tensor) -> AbstractContextManager:
    """Inside, every dtype is the plan's choice."""
    device = hidden.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def _scaled(grad: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """grad * upstream in `dtype`, a slice at a time: the weight's is not to exist in fp32 once more."""
    scaled = torch.empty_like(grad, dtype=dtype)
    for rows in even_chunks(grad.shape[0], FACTOR_SLICE):
        torch.mul(grad[rows], upstream, out=scaled[rows])
    return scaled
