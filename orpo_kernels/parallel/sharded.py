"""The lm-head over several ranks, each with some of its rows: `Projection`, and what crosses between them.

Rank k sees the logits z_j of its columns only. With l_k their logsumexp without the target y,

    M = max_k l_k,      lse_others = M + log sum_k exp(l_k - M),      m = z_y - lse_others

which is one all-reduce of N maxima and one of N sums together with N target logits, which only one rank has. The
residual exp(z_j - lse_others) of its own columns each rank then makes alone; dh is the sum over the ranks of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from ..engine.gemm import WeightSlices, project
from ..engine.projection import HeadOptions, Projection
from .groups import Pending, VocabShard


@dataclass(frozen=True)
class ShardedOptions(HeadOptions):
    """`HeadOptions`, and which rows of the whole lm-head the weight holds."""

    shard: VocabShard

    def projection(
        self, hidden: Tensor, weight: Tensor, bias: Tensor | None, position: Tensor, target: Tensor
    ) -> ShardedProjection:
        return ShardedProjection(hidden, weight, bias, position, target - self.shard.start, self)


@dataclass(frozen=True)
class ShardedProjection(Projection):
    """A rank's columns of the logits. Targets are minus the shard's start: outside [0, V_local) on another rank."""

    options: ShardedOptions

    chunks_at_a_time = 2  # one whose statistics travel, one in the GEMM
    is_whole = False

    @property
    def shard(self) -> VocabShard:
        return self.options.shard

    def combined(self, log_odds: Tensor, lse_others: Tensor) -> tuple[Tensor, Tensor]:
        return combine(self.shard, self.target, log_odds, lse_others).advance().result()

    def residuals(
        self,
        buffer_of: Callable[[slice], Tensor],
        weight: WeightSlices,
        log_odds: Tensor,
        lse_others: Tensor | None = None,
    ) -> Iterator[tuple[slice, Tensor]]:
        """A chunk comes one late: its statistics travel between the ranks while the GEMM of the next one runs."""

        def finished(rows: slice, logits: Tensor, combination: Combination) -> tuple[slice, Tensor]:
            log_odds[rows], lse = combination.result()
            self.ops.recomputed_residual_(logits, self.target[rows], lse, *self.transform)
            if lse_others is not None:
                lse_others[rows] = lse
            return rows, logits

        late: tuple[slice, Tensor, Combination] | None = None
        for rows in self.row_chunks():
            logits, target = buffer_of(rows), self.target[rows]
            project(self.hidden_rows(rows), weight, self.bias, logits)
            if late is not None:
                late = (*late[:2], late[2].advance())
            own = self.ops.statistics(logits, self.stand_in(target), *self.transform)
            combination = combine(self.shard, target, *own)
            if late is not None:
                yield finished(*late)
            late = rows, logits, combination
        if late is not None:
            yield finished(*late[:2], late[2].advance())

    def stand_in(self, target: Tensor) -> Tensor:
        """The nearest column where the target is elsewhere; `combine` takes it out again."""
        return target.clamp(0, self.shard.size - 1)

    def own_columns(self, target: Tensor) -> Tensor:
        return torch.where(self.shard.holds(target), target, self.vocab_size)

    def summed(self, u: Tensor) -> Callable[[], None]:
        return self.shard.group.all_reduce(u, "the gradient of the hidden states").wait

    def sum_and_add_hidden_gradient_(self, grad: Tensor, u: Tensor, coefficient: Tensor) -> Callable[[], None]:
        wait = self.summed(u)

        def finish() -> None:
            wait()
            self.add_hidden_gradient_(grad, u, coefficient)

        return finish


@dataclass(frozen=True)
class Combination:
    """The statistics of some rows on their way between the ranks, in two exchanges. See `combine`."""

    own: Tensor  # (C,) logsumexp over this rank's columns without the target
    top: Tensor  # (C,) the largest of all ranks'
    parts: Tensor  # (2, C) sums of exp(own - top), and the target's logit
    pending: Pending

    def advance(self) -> Combination:
        """The second exchange, once the first is through."""
        self.pending.wait()
        torch.exp(self.own - self.top, out=self.parts[0])
        pending = self.pending.group.all_reduce(self.parts, "statistics of the rows")
        return Combination(self.own, self.top, self.parts, pending)

    def result(self) -> tuple[Tensor, Tensor]:
        """m and lse_others over the whole vocabulary, (C,) float64."""
        self.pending.wait()
        lse_others = self.top + self.parts[0].log()
        return self.parts[1] - lse_others, lse_others


def combine(shard: VocabShard, target: Tensor, log_odds: Tensor, lse_others: Tensor) -> Combination:
    """Start to combine the statistics that a rank has of its columns.

    Args:
        target: (C,) int64, the target minus `shard.start`: on another rank where it is outside [0, shard.size).
        log_odds, lse_others: (C,) float64, with `stand_in(target)` in place of the target.
    """
    is_here = shard.holds(target)
    # Where the target is elsewhere, the column that stood in for it is one of the others.
    own = torch.where(is_here, lse_others, lse_others + torch.logaddexp(log_odds, torch.zeros_like(log_odds)))
    top = own.clone()
    parts = torch.stack((own, torch.where(is_here, log_odds + lse_others, 0)))
    return Combination(own, top, parts, shard.group.all_reduce(top, "largest logits", dist.ReduceOp.MAX))
