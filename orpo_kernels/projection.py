"""One call's matrix multiplications: rows of the hidden states against the lm-head, in chunks that are never whole.

`Projection` is what every schedule works on. It knows in which dtype a GEMM runs fast, casts operands chunk by chunk
where that is not their own, and counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from .gemm import WeightSlices, even_chunks, project
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
        sparse_eps: float | None = None,
        dtype: torch.dtype | None = None,
        needs: Sequence[bool] | None = None,
    ) -> HeadOptions:
        """The options of a call on `num_rows` rows of `hidden`, planned from its tensors and from what needs grad.

        dtype, needs: `operand_dtype` and `needs_grad` of the tensors, unless they were asked before.
        """
        dtype = dtype or operand_dtype(hidden)
        needs_hidden, needs_weight, needs_bias = needs or needs_grad(hidden, weight, bias)
        call = plan(
            num_rows,
            hidden_size=weight.shape[1],
            vocab_size=weight.shape[0],
            dtype=dtype,
            weight_dtype=weight.dtype,
            device=hidden.device,
            needs_hidden=needs_hidden,
            needs_weight=needs_weight,
            needs_bias=needs_bias,
            softcap=logit_softcap is not None,
            schedule=schedule,
            memory_budget=memory_budget,
            backend=backend,
            largest_pair=largest_pair,
            sparse_eps=sparse_eps,
        )
        return cls(logit_scale, logit_softcap, call, select(backend, hidden.device, dtype))


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the lm-head's product: autocast's (which leaves float64 alone), or the tensors' own."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


def needs_grad(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> list[bool]:
    """Which of the three the backward pass is to be made for."""
    return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, bias)]


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
        return self.ops.gather_rows(self.hidden, self.position[rows], None, self.plan.gemm_dtype)

    def scaled_hidden(self, coefficient: Tensor) -> tuple[Tensor, Tensor | None]:
        """coefficient * hidden of all rows, (R, H) in the GEMM's dtype, and the factor it was divided by, if any.

        fp16 has no room for coefficients of 1 / tokens: they are divided by a power of two near the largest.
        """
        factor = None
        if self.plan.gemm_dtype == torch.float16 and self.num_rows:
            factor = torch.exp2(torch.frexp(coefficient.abs().amax()).exponent)
            coefficient = coefficient / factor
        return self.ops.gather_rows(self.hidden, self.position, coefficient, self.plan.gemm_dtype), factor

    def weight_slices(self) -> WeightSlices:
        return WeightSlices(self.weight, self.plan.gemm_dtype, self.plan.weight_slice)

    def logits_buffer(self) -> Tensor:
        """One chunk's logits, to be reused by every chunk: fresh pages for each would cost a tenth of the GEMM."""
        rows = min(self.plan.row_chunk, self.num_rows)
        return self.weight.new_empty(rows, self.vocab_size, dtype=self.plan.gemm_dtype)

    def log_odds(self, rows: slice, weight: WeightSlices, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
        """m and lse_others (C,) of these rows. `buffer`: see `ops.torch_ops.project_log_odds`."""
        x = self.hidden_rows(rows)
        return self.ops.project_log_odds(x, weight, self.bias, self.target[rows], *self._transform, buffer)

    def residual(self, rows: slice, weight: WeightSlices, out: Tensor) -> Tensor:
        """The residual of these rows into `out` (C, V), through their logits. Returns m (C,)."""
        project(self.hidden_rows(rows), weight, self.bias, out)
        return self.ops.residual_(out, self.target[rows], *self._transform)

    def residual_and_target_logit(self, rows: slice, weight: WeightSlices, out: Tensor) -> tuple[Tensor, Tensor]:
        """`residual`, and the logits of the targets (C,) float64, from which m leads to lse_others."""
        project(self.hidden_rows(rows), weight, self.bias, out)
        index = self.target[rows, None]
        logit = self._transformed(out.gather(1, index).squeeze(1).to(self.sum_dtype))
        return self.ops.residual_(out, self.target[rows], *self._transform), logit.double()

    def weight_rows(self, columns: Tensor, workspace: Tensor) -> Tensor:
        """(A, H) rows of the weight, in the GEMM's dtype, in the first rows of `workspace`."""
        if self.weight.dtype == workspace.dtype:
            return torch.index_select(self.weight, 0, columns, out=workspace[: columns.shape[0]])
        rows = self.ops.gather_rows(self.weight, columns, None, workspace.dtype)
        return workspace[: columns.shape[0]].copy_(rows)

    def residual_slice(self, x: Tensor, w: Tensor, columns: slice, lse_others: Tensor, out: Tensor) -> None:
        """The columns `columns` of the residual of all rows into `out` (R, S); x (R, H), w (S, H)."""
        bias = None if self.bias is None else self.bias[columns]
        self.ops.project_residual(x, w, bias, self.target - columns.start, lse_others, *self._transform, out)

    def add_hidden_gradient_(self, grad: Tensor, u: Tensor, coefficient: Tensor) -> None:
        """`grad[position] += coefficient * u`: grad (N, H), u (R, H), coefficient (R,)."""
        self.ops.scatter_rows_(grad, self.position, u, coefficient)

    @property
    def _transform(self) -> tuple[float, float | None]:
        return self.options.logit_scale, self.options.logit_softcap

    def _transformed(self, logits: Tensor) -> Tensor:
        scale, cap = self._transform
        return logits * scale if cap is None else cap * torch.tanh(logits * scale / cap)

    def empty_stats(self) -> Tensor:
        return self.hidden.new_empty(self.num_rows, dtype=torch.float64)
