"""The loss as one operator of a compiled graph: `torch.compile` sees shapes, not chunks.

The chunks of a schedule depend on how many rows there are, which a graph of fixed shapes cannot know. So one opaque
operator finds the rows, plans, and computes loss and gradients together (the loss is a scalar: its gradient waits for
the upstream gradient as a factor). What it returns has shapes that follow from those of its inputs. Inside, everything
is as in eager mode. Gradients are kept in their tensors' dtype, fp16's in fp32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..methods import METHODS, Method
from ..rows import Rows
from .autograd import Objective, gradient_dtype, loss_and_gradients
from .checks import check_pair_weight
from .head import Compute, Head, operand_dtype
from .objective import as_scalar, denominators
from .work import Limits, accumulation_dtype

NUM_OUTPUTS = 7  # loss and metrics; the gradients of hidden, weight and bias follow


# CUDA graphs cannot hold an operator that reads the number of rows on the host.
TAGS = (torch.Tag.cudagraph_unsafe,) if hasattr(torch.Tag, "cudagraph_unsafe") else ()


@torch.library.custom_op("orpo_kernels::orpo_loss", mutates_args=(), tags=TAGS)
def orpo_loss_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    position: Tensor,
    target: Tensor,
    sequence: Tensor,
    scored: Tensor,
    nll_weight: Tensor,
    num_pairs: int,
    padded: bool,
    pair_weight: Tensor | None,
    nll_denominator: Tensor | None,
    pair_denominator: Tensor | None,
    method: str,
    method_numbers: list[float],
    reference: Tensor | None,
    logit_scale: float,
    logit_softcap: float | None,
    schedule: str,
    memory_budget: int | None,
    backend: str,
    sparse_eps: float | None,
    limits: list[float] | None,
    dtype: torch.dtype,
    needs: list[bool],
) -> list[Tensor]:
    """Loss, metrics, and gradients (of no elements where not in `needs`); the method by its name and its `numbers`."""
    rows = Rows(position, target, sequence, scored, nll_weight, num_pairs, padded, pair_weight).live()
    head = Head(weight, bias, None, None, logit_scale, logit_softcap)
    head.check_values(hidden, rows.position, rows.target, "labels")
    check_pair_weight(rows.pair_weight)
    compute = Compute(schedule, memory_budget, backend, sparse_eps, Limits.of_numbers(limits))
    options = head.planned(hidden, len(rows), compute, rows.largest_pair, dtype, needs)
    counts = denominators(rows, nll_denominator, pair_denominator)
    of_method: dict[str, Any] = dict(zip(METHODS[method].numbers, method_numbers, strict=True))
    objective = Objective(METHODS[method](**of_method), counts, options.ops, reference=reference)
    outputs, grads = loss_and_gradients(hidden, weight, bias, rows, options, objective, needs)
    made = zip((hidden, weight, bias), (grads.hidden, grads.weight, grads.bias), strict=True)
    return [
        *(output.clone() for output in outputs),  # an operator's results share no memory
        *(hidden.new_empty(0) if t is None or grad is None else grad.to(gradient_dtype(t.dtype)) for t, grad in made),
    ]


@orpo_loss_op.register_fake
def _(hidden, weight, bias, position, target, sequence, scored, nll_weight, num_pairs, *options):
    number = hidden.new_empty((), dtype=accumulation_dtype(hidden.dtype))
    numbers = [number, torch.empty_like(number), torch.empty_like(number)]
    vectors = [number.new_empty(num_pairs) for _ in range(3)]
    valid = hidden.new_empty(num_pairs, dtype=torch.bool)
    grads = [
        torch.empty_like(t, dtype=gradient_dtype(t.dtype)) if t is not None and needed else hidden.new_empty(0)
        for t, needed in zip((hidden, weight, bias), options[-1], strict=True)
    ]
    return [*numbers, *vectors, valid, *grads]


def _setup_context(ctx: Any, inputs: tuple, output: list[Tensor]) -> None:
    hidden, weight, *_, needs = inputs
    ctx.needs, ctx.dtypes, ctx.num_inputs = needs, (hidden.dtype, weight.dtype, weight.dtype), len(inputs)
    ctx.save_for_backward(*output[NUM_OUTPUTS:])


def _backward(ctx: Any, upstream: list[Tensor]) -> tuple:
    grads = [
        (grad * upstream[0]).to(dtype) if needed else None
        for grad, dtype, needed in zip(ctx.saved_tensors, ctx.dtypes, ctx.needs, strict=True)
    ]
    return *grads, *[None] * (ctx.num_inputs - 3)


orpo_loss_op.register_autograd(_backward, setup_context=_setup_context)


def loss_in_a_graph(
    hidden: Tensor,
    head: Head,
    rows: Rows,
    method: Method,
    nll_denominator: int | Tensor | None,
    pair_denominator: int | Tensor | None,
    reference: Tensor | None,
    compute: Compute,
) -> tuple[Tensor, ...]:
    """Loss and metrics by the operator."""
    counts = [
        None if count is None else as_scalar(count, rows.position.device)
        for count in (nll_denominator, pair_denominator)
    ]
    loss, *rest = orpo_loss_op(
        hidden,
        head.weight,
        head.bias,
        rows.position,
        rows.target,
        rows.sequence,
        rows.scored,
        rows.nll_weight,
        rows.num_pairs,
        rows.padded,
        rows.pair_weight,
        *counts,
        method.name,
        [float(getattr(method, option)) for option in method.numbers],
        reference,
        head.logit_scale,
        head.logit_softcap,
        compute.schedule,
        compute.memory_budget,
        compute.backend,
        compute.sparse_eps,
        None if compute.limits is None else compute.limits.numbers,
        operand_dtype(hidden),
        head.needs_grad(hidden),
    )
    return loss, *(metric.detach() for metric in rest[: NUM_OUTPUTS - 1])
