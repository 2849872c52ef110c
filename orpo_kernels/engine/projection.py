"""One call's matrix multiplications: rows of the hidden states against the lm-head, a chunk of logits at a time.

`Projection` is what every schedule works on. It knows in which dtype a GEMM runs fast, casts operands chunk by chunk
where that is not their own, and counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import ModuleType
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from ..devices import statistics_dtype
from .gemm import WeightSlices, even_chunks, project
from .work import accumulation_dtype

if TYPE_CHECKING:
    from .planning import Plan


@dataclass(frozen=True)
class HeadOptions:
    """All of a call that is not a tensor: logits = cap(scale * (hidden @ weight.T + bias)), and how to run it.

    Attributes:
        logit_scale, logit_softcap: see `orpo_loss`.
        plan: schedule, chunk sizes and the dtype of the GEMMs.
        ops: the backend's row-wise operations.
        unique_positions: no two rows take the same hidden state.
    """

    logit_scale: float
    logit_softcap: float | None
    plan: Plan
    ops: ModuleType
    unique_positions: bool = field(default=False, kw_only=True)

    def projection(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor, target: Tensor
    ) -> Projection:
        return Projection(hidden, weight, bias, position, target, self)


def no_wait() -> None:
    """What there is to wait for on one device."""


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

    Of a head that is sharded over several ranks, `parallel.sharded` overrides what differs.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    position: Tensor
    target: Tensor
    options: HeadOptions

    chunks_at_a_time: ClassVar[int] = 1  # they share the rows of the plan's chunk
    is_whole: ClassVar[bool] = True  # whether these are all columns of the logits

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
        return even_chunks(self.num_rows, self._chunk_rows)

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
        return self.weight.new_empty(min(self._chunk_rows, self.num_rows), self.vocab_size, dtype=self.plan.gemm_dtype)

    @property
    def _chunk_rows(self) -> int:
        return max(1, self.plan.row_chunk // self.chunks_at_a_time)

    def log_odds(self, rows: slice, weight: WeightSlices, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
        """m and lse_others (C,) of these rows. `buffer`: see `ops.torch_ops.project_log_odds`."""
        x, target = self.hidden_rows(rows), self.stand_in(self.target[rows])
        return self.ops.project_log_odds(x, weight, self.bias, target, *self.transform, buffer)

    def combined(self, log_odds: Tensor, lse_others: Tensor) -> tuple[Tensor, Tensor]:
        """m and lse_others (R,) over the whole vocabulary, from those that `log_odds` gave for every chunk."""
        return log_odds, lse_others

    def residuals(
        self,
        buffer_of: Callable[[slice], Tensor],
        weight: WeightSlices,
        log_odds: Tensor,
        lse_others: Tensor | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk of rows with its residual (C, V), in `buffer_of(rows)`; fills `log_odds` and `lse_others` (R,)."""
        for rows in self.row_chunks():
            residual = buffer_of(rows)
            project(self.hidden_rows(rows), weight, self.bias, residual)
            if lse_others is not None:
                lse_others[rows] = self._target_logit(residual, rows)
            log_odds[rows] = self.ops.residual_(residual, self.target[rows], *self.transform)
            if lse_others is not None:
                lse_others[rows] -= log_odds[rows]
            yield rows, residual

    def stand_in(self, target: Tensor) -> Tensor:
        """A column for each target (C,), for the operations that need one: its own where it is here."""
        return target

    def own_columns(self, target: Tensor) -> Tensor:
        """The column of each target (C,); V where it is not here."""
        return target

    def summed(self, u: Tensor) -> Callable[[], None]:
        """Start to sum `u`, residual @ weight, over all ranks that have columns; what is returned waits for it."""
        return no_wait

    def _target_logit(self, logits: Tensor, rows: slice) -> Tensor:
        """The logits of the targets (C,), as statistics, scaled and capped, of a chunk (C, V) that is neither."""
        logit = logits.gather(1, self.target[rows, None]).squeeze(1).to(self.sum_dtype)
        scale, cap = self.transform
        logit = logit * scale if cap is None else cap * torch.tanh(logit * scale / cap)
        return logit.to(statistics_dtype(logit.device))

    def weight_rows(self, columns: Tensor, workspace: Tensor) -> Tensor:
        """(A, H) rows of the weight, in the GEMM's dtype, in the first rows of `workspace`."""
        if self.weight.dtype == workspace.dtype:
            return torch.index_select(self.weight, 0, columns, out=workspace[: columns.shape[0]])
        rows = self.ops.gather_rows(self.weight, columns, None, workspace.dtype)
        return workspace[: columns.shape[0]].copy_(rows)

    def residual_slice(self, x: Tensor, w: Tensor, columns: slice, lse_others: Tensor, out: Tensor) -> None:
        """The columns `columns` of the residual of all rows into `out` (R, S); x (R, H), w (S, H)."""
        bias = None if self.bias is None else self.bias[columns]
        self.ops.project_residual(x, w, bias, self.target - columns.start, lse_others, *self.transform, out)

    def add_hidden_gradient_(self, grad: Tensor, u: Tensor, coefficient: Tensor) -> None:
        """`grad[position] += coefficient * u`: grad (N, H), u (R, H), coefficient (R,)."""
        self.ops.scatter_rows_(grad, self.position, u, coefficient, self.options.unique_positions)

    def sum_and_add_hidden_gradient_(self, grad: Tensor, u: Tensor, coefficient: Tensor) -> Callable[[], None]:
        """`summed`, and `add_hidden_gradient_` of it: done once what is returned has been called."""
        self.add_hidden_gradient_(grad, u, coefficient)
        return no_wait

    @property
    def transform(self) -> tuple[float, float | None]:
        return self.options.logit_scale, self.options.logit_softcap

    def empty_stats(self) -> Tensor:
        return self.hidden.new_empty(self.num_rows, dtype=statistics_dtype(self.hidden.device))


@dataclass
class Gradients:
    """Where a backward pass leaves its results; None is not wanted.

    hidden (N, H) and bias (V,) are accumulated into. weight (V, H) is written, or accumulated into if `accumulate`;
    it may have the last columns alone.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    accumulate: bool = False
