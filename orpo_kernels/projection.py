"""One call's matrix multiplications: rows of the hidden states against the lm-head, in chunks that are never whole.

`Projection` is what every schedule works on. It knows in which dtype a GEMM runs fast, casts operands chunk by chunk
where that is not their own, and counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .ops import select
from .planning import Plan, accumulation_dtype, plan


@dataclass(frozen=True)
class HeadOptions:
    """All of a call that is not a tensor: logits = cap(scale * (hidden @ weight.T + bias)), and how to run it.

    Attributes:
        logit_scale, logit_softcap: see `orpo_loss`.
        plan: schedule, chunk sizes and the dtype of the GEMMs.
        ops: the backend's row-wise operations.
    """

    logit_scale: float
    logit_softcap: float | None
    plan: Plan
    ops: ModuleType

    @classmethod
    def planned(
        cls,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        *,
        num_rows: int,
        logit_scale: float,
        logit_softcap: float | None,
        schedule: str,
        memory_budget: int | None,
        backend: str,
        largest_pair: Callable[[], int] | None = None,
    ) -> HeadOptions:
        """The options of a call on `num_rows` rows of `hidden`, planned from its tensors and from what needs grad."""
        device = hidden.device.type
        # The precision that autocast would give the lm-head; it leaves float64 alone.
        autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
        grad = torch.is_grad_enabled()
        call = plan(
            num_rows,
            hidden_size=weight.shape[1],
            vocab_size=weight.shape[0],
            dtype=torch.get_autocast_dtype(device) if autocast else hidden.dtype,
            weight_dtype=weight.dtype,
            device=hidden.device,
            needs_hidden=grad and hidden.requires_grad,
            needs_weight=grad and weight.requires_grad,
            needs_bias=grad and bias is not None and bias.requires_grad,
            softcap=logit_softcap is not None,
            schedule=schedule,
            memory_budget=memory_budget,
            largest_pair=largest_pair,
        )
        return cls(logit_scale, logit_softcap, call, select(backend, hidden.device))


@dataclass(frozen=True)
class Projection:
    """The lm-head applied to rows of the hidden states.

    Attributes:
        hidden: (N, H).
        weight: (V, H).
        bias: (V,) or None.
        position: (R,) int64, which hidden state a row takes.
        target: (R,) int64, which token it predicts.
        options: everything that is not a tensor.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    position: Tensor
    target: Tensor
    options: HeadOptions

    @property
    def plan(self) -> Plan:
        return self.options.plan

    @property
    def ops(self) -> ModuleType:
        return self.options.ops

    @property
    def num_rows(self) -> int:
        return self.position.shape[0]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def sum_dtype(self) -> torch.dtype:
        return accumulation_dtype(self.hidden.dtype)

    def row_chunks(self) -> Iterator[slice]:
        return even_chunks(self.num_rows, self.plan.row_chunk)

    def hidden_rows(self, rows: slice = slice(None)) -> Tensor:
        """(C, H) hidden states of these rows, in the GEMM's dtype."""
        return self.hidden[self.position[rows]].to(self.plan.gemm_dtype)

    def scaled_hidden(self, coefficient: Tensor) -> tuple[Tensor, Tensor | None]:
        """coefficient * hidden of all rows, (R, H) in the GEMM's dtype, and the factor it was divided by, if any.

        fp16 has no room for coefficients of 1 / tokens: they are divided by a power of two near the largest.
        """
        factor = None
        if self.plan.gemm_dtype == torch.float16 and self.num_rows:
            factor = torch.exp2(torch.frexp(coefficient.abs().amax()).exponent)
            coefficient = coefficient / factor
        x = self.hidden.new_empty(self.num_rows, self.hidden.shape[1], dtype=self.plan.gemm_dtype)
        for rows in self.row_chunks():
            x[rows] = self.hidden[self.position[rows]] * coefficient[rows, None]
        return x, factor

    def weight_slices(self) -> WeightSlices:
        return WeightSlices(self.weight, self.plan.gemm_dtype, self.plan.weight_slice)

    def logits_buffer(self) -> Tensor:
        """One chunk's logits, to be reused by every chunk: fresh pages for each would cost a tenth of the GEMM."""
        rows = min(self.plan.row_chunk, self.num_rows)
        return self.weight.new_empty(rows, self.vocab_size, dtype=self.plan.gemm_dtype)

    def logits(self, x: Tensor, weight: WeightSlices, out: Tensor) -> Tensor:
        """`x @ weight.T + bias` into `out` (C, V), before scale and soft-cap."""
        for columns, w in weight:
            self.slice_logits(x, w, columns, out[:, columns])
        return out

    def slice_logits(self, x: Tensor, w: Tensor, columns: slice, out: Tensor) -> Tensor:
        """The columns `columns` of the logits into `out` (C, S); `w` (S, H) are those rows of the weight."""
        if self.bias is None:
            return torch.mm(x, w.t(), out=out)
        return torch.addmm(self.bias[columns].to(x.dtype), x, w.t(), out=out)

    def residual_(self, logits: Tensor, rows: slice, want_residual: bool = True) -> tuple[Tensor, Tensor]:
        return self.ops.residual_(
            logits, self.target[rows], self.options.logit_scale, self.options.logit_softcap, want_residual
        )

    def residual_slice_(self, logits: Tensor, columns: slice, lse_others: Tensor) -> None:
        self.ops.residual_slice_(
            logits,
            self.target - columns.start,
            lse_others,
            self.options.logit_scale,
            self.options.logit_softcap,
        )

    def add_hidden_gradient_(self, grad: Tensor, u: Tensor, coefficient: Tensor) -> None:
        """`grad[position] += coefficient * u`: grad (N, H), u (R, H), coefficient (R,)."""
        for rows in self.row_chunks():
            self.ops.add_scaled_rows_(grad, self.position[rows], u[rows], coefficient[rows])

    def empty_stats(self) -> Tensor:
        return self.hidden.new_empty(self.num_rows, dtype=torch.float64)


class WeightSlices:
    """The weight in the GEMM's dtype: as it is, as one cast copy, or cast slice by slice where a copy is too large."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, slice_size: int):
        self.weight, self.dtype = weight, dtype
        vocab_size = weight.shape[0]
        if weight.dtype == dtype or slice_size >= vocab_size:
            self.weight, slice_size = weight.to(dtype), vocab_size
        self.columns = list(even_chunks(vocab_size, slice_size))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        return ((columns, self[columns]) for columns in self.columns)

    def __getitem__(self, columns: slice) -> Tensor:
        return self.weight[columns].to(self.dtype)


def even_chunks(total: int, largest: int) -> Iterator[slice]:
    """[0, total) in the fewest chunks of at most `largest`, of nearly equal size: no starved GEMM at the end."""
    count = -(-total // largest)
    bounds = [total * i // count for i in range(count + 1)] if count else []
    return map(slice, bounds[:-1], bounds[1:])


def matmul_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """`out = a @ b` or `out += a @ b`. On a GPU the product is not rounded before it joins a wider `out`."""
    if out.dtype == a.dtype:
        torch.addmm(out, a, b, out=out) if accumulate else torch.mm(a, b, out=out)
    elif a.is_cuda and out.dtype == torch.float32 and a.dtype != torch.float64:
        torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if accumulate else torch.mm(
            a, b, out_dtype=out.dtype, out=out
        )
    elif accumulate:
        out.add_(torch.mm(a, b))
    else:
        out.copy_(torch.mm(a, b))
