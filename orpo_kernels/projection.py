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

from .checks import check_options
from .gemm import WeightSlices, even_chunks, project
from .ops import select
from .parallel import Combination, Pending, VocabShard, combine, nearest
from .planning import Plan, accumulation_dtype, plan


@dataclass(frozen=True)
class HeadOptions:
    """All of a call that is not a tensor: logits = cap(scale * (hidden @ weight.T + bias)), and how to run it.

    Attributes:
        logit_scale, logit_softcap: see `orpo_loss`.
        plan: schedule, chunk sizes and the dtype of the GEMMs.
        ops: the backend's row-wise operations.
        shard: which rows of the whole lm-head the weight holds, where other ranks hold the rest; else None.
    """

    logit_scale: float
    logit_softcap: float | None
    plan: Plan
    ops: ModuleType
    shard: VocabShard | None = None

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
        shard: VocabShard | None = None,
    ) -> HeadOptions:
        """The options of a call on `num_rows` rows of `hidden`, planned from its tensors and from what needs grad.

        dtype, needs: `operand_dtype` and `needs_grad` of the tensors, unless they were asked before.
        shard: all ranks plan for the largest shard, and so take the same chunks.

        Raises `ValueError` for options that make no sense, and as `plan`.
        """
        check_options(logit_scale, logit_softcap, sparse_eps)
        dtype = dtype or operand_dtype(hidden)
        needs_hidden, needs_weight, needs_bias = needs or needs_grad(hidden, weight, bias)
        call = plan(
            num_rows,
            hidden_size=weight.shape[1],
            vocab_size=shard.largest if shard else weight.shape[0],
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
            sharded=shard is not None,
        )
        return cls(logit_scale, logit_softcap, call, select(backend, hidden.device, dtype), shard)


def facts_of(weight: Tensor, num_rows: int, options: HeadOptions) -> dict[str, int]:
    """What has to be the same on all ranks that hold the same rows: else they would wait for each other for ever."""
    plan = options.plan
    return {
        "the number of rows": num_rows,
        "the hidden size": weight.shape[1],
        "the number of GEMMs, by the schedule and what requires grad,": plan.gemms,
        "whether hidden states (2) and head (1) require grad": 2 * plan.needs_hidden + plan.needs_head,
        "the number of rows of a chunk": plan.row_chunk,
        "the number of rows of a group of pairs": plan.group_rows or 0,
    }


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
        target: (R,) int64, which token it predicts; minus the shard's start, where the lm-head is sharded.
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

    @property
    def shard(self) -> VocabShard | None:
        return self.options.shard

    def row_chunks(self, parts: int = 1) -> Iterator[slice]:
        """Chunks of rows of which `parts` together are as large as the plan allows."""
        return even_chunks(self.num_rows, max(1, self.plan.row_chunk // parts))

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

    def logits_buffer(self, parts: int = 1) -> Tensor:
        """One chunk's logits, to be reused by every chunk: fresh pages for each would cost a tenth of the GEMM."""
        rows = min(max(1, self.plan.row_chunk // parts), self.num_rows)
        return self.weight.new_empty(rows, self.vocab_size, dtype=self.plan.gemm_dtype)

    def log_odds(self, rows: slice, weight: WeightSlices, buffer: Tensor | None) -> tuple[Tensor, Tensor]:
        """m and lse_others (C,) of these rows. `buffer`: see `ops.torch_ops.project_log_odds`.

        Of a shard's columns alone, with the nearest in place of a target that is elsewhere; see `combined`.
        """
        x, target = self.hidden_rows(rows), self.target[rows]
        if self.shard is not None:
            target = nearest(target, self.shard.size)
        return self.ops.project_log_odds(x, weight, self.bias, target, *self._transform, buffer)

    def combined(self, log_odds: Tensor, lse_others: Tensor) -> tuple[Tensor, Tensor]:
        """m and lse_others (R,) over the whole vocabulary, from those that `log_odds` gave for every chunk."""
        if self.shard is None:
            return log_odds, lse_others
        return combine(self.shard, self.target, log_odds, lse_others).advance().result()

    def residuals(
        self,
        chunks: Iterator[slice],
        buffer_of: Callable[[slice], Tensor],
        weight: WeightSlices,
        log_odds: Tensor,
        lse_others: Tensor | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """Each chunk of rows with its residual (C, V), in `buffer_of(rows)`; fills `log_odds` and `lse_others` (R,).

        Of a shard, a chunk comes one late: its statistics travel between the ranks while the GEMM of the next one runs.
        """
        if self.shard is None:
            for rows in chunks:
                residual = buffer_of(rows)
                project(self.hidden_rows(rows), weight, self.bias, residual)
                if lse_others is not None:
                    lse_others[rows] = self._target_logit(residual, rows)
                log_odds[rows] = self.ops.residual_(residual, self.target[rows], *self._transform)
                if lse_others is not None:
                    lse_others[rows] -= log_odds[rows]
                yield rows, residual
            return

        def finished(rows: slice, logits: Tensor, combination: Combination) -> tuple[slice, Tensor]:
            log_odds[rows], lse = combination.result()
            self.ops.recomputed_residual_(logits, self.target[rows], lse, *self._transform)
            if lse_others is not None:
                lse_others[rows] = lse
            return rows, logits

        late: tuple[slice, Tensor, Combination] | None = None
        for rows in chunks:
            logits, target = buffer_of(rows), self.target[rows]
            project(self.hidden_rows(rows), weight, self.bias, logits)
            if late is not None:
                late = (*late[:2], late[2].advance())
            own = self.ops.statistics(logits, nearest(target, self.shard.size), *self._transform)
            combination = combine(self.shard, target, *own)
            if late is not None:
                yield finished(*late)
            late = rows, logits, combination
        if late is not None:
            yield finished(*late[:2], late[2].advance())

    def sum_over_shards(self, u: Tensor) -> Pending | None:
        """Start to sum `u`, this shard's share of residual @ weight, over the ranks; None where there are no others."""
        if self.shard is None:
            return None
        return self.shard.group.all_reduce(u, "the gradient of the hidden states")

    def _target_logit(self, logits: Tensor, rows: slice) -> Tensor:
        """The logits of the targets (C,) float64, scaled and capped, of a chunk (C, V) that is neither."""
        logit = logits.gather(1, self.target[rows, None]).squeeze(1).to(self.sum_dtype)
        scale, cap = self._transform
        return (logit * scale if cap is None else cap * torch.tanh(logit * scale / cap)).double()

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

    def empty_stats(self) -> Tensor:
        return self.hidden.new_empty(self.num_rows, dtype=torch.float64)
