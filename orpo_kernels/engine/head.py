"""The lm-head of one call, as this process holds it: what every loss here begins with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..devices import rows_device
from ..ops import select
from ..parallel import NO_GROUPS, Groups, VocabShard, local_head
from ..parallel.sharded import ShardedOptions
from .autograd import TokenLogOdds
from .checks import check_head, check_options, check_rows, check_same_device
from .planning import plan
from .projection import HeadOptions
from .work import Limits


@dataclass(frozen=True)
class Compute:
    """How to compute; see `orpo_loss`."""

    schedule: str = "auto"
    memory_budget: int | None = None
    backend: str = "auto"
    sparse_eps: float | None = None
    limits: Limits | None = None


@dataclass(frozen=True)
class Head:
    """What rows of hidden states are multiplied by, and what becomes of the logits.

    Attributes:
        weight: (V, H), of a shard its rows alone; with the columns of `low_rank` behind its own, if there are any.
        bias: (V,) or None.
        columns: (V, r) those of `low_rank` again, where they alone are to get a gradient; else None.
        shard: which rows of the whole lm-head these are, where other ranks hold the rest; else None.
        logit_scale, logit_softcap: see `orpo_loss`.
    """

    weight: Tensor
    bias: Tensor | None
    columns: Tensor | None
    shard: VocabShard | None
    logit_scale: float
    logit_softcap: float | None

    @classmethod
    def local(
        cls,
        weight: Tensor,
        bias: Tensor | None = None,
        low_rank: Tensor | None = None,
        logit_scale: float = 1.0,
        logit_softcap: float | None = None,
        groups: Groups = NO_GROUPS,
    ) -> Head:
        """The head of a call's arguments. The ranks exchange here: before anything that one of them may refuse."""
        local, bias, columns = (local_head(tensor, groups.vocab) for tensor in (weight, bias, low_rank))
        assert local is not None
        shard = VocabShard.of(groups.vocab, local) if groups.vocab is not None else None
        if columns is not None:
            local, columns = _extended(local, columns)
        return cls(local, bias, columns, shard, logit_scale, logit_softcap)

    @property
    def vocab_size(self) -> int:
        """Of the whole lm-head."""
        return self.shard.vocab_size if self.shard else self.weight.shape[0]

    def check(self, hidden: Tensor, position: Tensor, name: str) -> None:
        """What shapes, dtypes and devices tell. `name` is what errors call the rows' tensors."""
        check_head(hidden, self.weight, self.bias)
        if position.device != rows_device(hidden.device):
            check_same_device("hidden", hidden, name, position)

    def check_values(self, hidden: Tensor, position: Tensor, target: Tensor, name: str) -> None:
        """hidden (N, H), position and target (R,). `name` is what errors call the targets."""
        check_rows(name, position, hidden.shape[0], target, self.vocab_size)

    def planned(
        self,
        hidden: Tensor,
        num_rows: int,
        compute: Compute,
        largest_pair: Callable[[], int] | None = None,
        dtype: torch.dtype | None = None,
        needs: Sequence[bool] | None = None,
    ) -> HeadOptions:
        """How so many rows of `hidden` are computed; all ranks plan for the largest shard, and so take the same chunks.

        dtype, needs: `operand_dtype` and `needs_grad` of the tensors, unless they were asked before.

        Raises `ValueError` for options that make no sense, and as `plan`.
        """
        check_options(self.logit_scale, self.logit_softcap, compute.sparse_eps)
        dtype = dtype or operand_dtype(hidden)
        needs_hidden, needs_weight, needs_bias = needs or self.needs_grad(hidden)
        chosen = plan(
            num_rows,
            hidden_size=self.weight.shape[1],
            vocab_size=self.shard.largest if self.shard else self.weight.shape[0],
            dtype=dtype,
            weight_dtype=self.weight.dtype,
            device=hidden.device,
            needs_hidden=needs_hidden,
            needs_weight=needs_weight,
            needs_bias=needs_bias,
            softcap=self.logit_softcap is not None,
            largest_pair=largest_pair,
            sharded=self.shard is not None,
            **vars(compute),
        )
        ops = select(compute.backend, hidden.device, dtype)
        if self.shard is not None:
            return ShardedOptions(self.logit_scale, self.logit_softcap, chosen, ops, self.shard)
        return HeadOptions(self.logit_scale, self.logit_softcap, chosen, ops)

    def needs_grad(self, hidden: Tensor) -> list[bool]:
        """Whether hidden states, weight and bias get a gradient."""
        weight = self.weight if self.columns is None else self.columns
        return [torch.is_grad_enabled() and t is not None and t.requires_grad for t in (hidden, weight, self.bias)]

    def agree(self, groups: Groups, num_rows: int, options: HeadOptions, num_pairs: int = 0) -> None:
        """Refuse what differs between ranks that hold the same rows: they would wait for each other for ever."""
        if not groups:
            return
        plan = options.plan
        facts = {
            "num_pairs": num_pairs,
            "the number of rows": num_rows,
            "the hidden size": self.weight.shape[1],
            "the number of GEMMs, by the schedule and what requires grad,": plan.gemms,
            "whether hidden states (2) and head (1) require grad": 2 * plan.needs_hidden + plan.needs_head,
            "the number of rows of a chunk": plan.row_chunk,
            "the number of rows of a group of pairs": plan.group_rows or 0,
        }
        groups.agree(facts, self.weight.device)

    def token_log_odds(self, hidden: Tensor, position: Tensor, target: Tensor, options: HeadOptions) -> Tensor:
        """(R,) log-odds of the targets, as statistics, differentiable."""
        return TokenLogOdds.apply(*self.operands(hidden, position, target, options))

    def operands(self, hidden: Tensor, position: Tensor, target: Tensor, options: HeadOptions) -> tuple[Any, ...]:
        """What `TokenLogOdds` takes."""
        on_device = (vector.to(hidden.device) for vector in (position, target))
        return hidden, self.weight, self.bias, *on_device, options, self.columns


def operand_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of the lm-head's product: autocast's (which leaves float64 alone), or the tensors' own."""
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device) and hidden.dtype != torch.float64
    return torch.get_autocast_dtype(device) if autocast else hidden.dtype


def _extended(weight: Tensor, low_rank: Tensor) -> tuple[Tensor, Tensor | None]:
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
