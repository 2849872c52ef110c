"""One call, read downward: check, plan, the log-odds of every row, the loss of a method."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .autograd import GroupedLoss, Objective, PairLossFunction
from .checks import check_options, check_pair_weight
from .graph import loss_in_a_graph
from .head import Compute, Head
from .methods import Method
from .objective import denominators
from .parallel import Groups
from .planning import accumulation_dtype
from .projection import HeadOptions, facts_of
from .rows import Rows, averaged_over_sequences


@dataclass(frozen=True)
class Call:
    """Hidden states, rows and head that fit together, and how they are computed.

    Attributes:
        hidden: (N, H).
        rows: those that count for something.
        options: the plan; None inside a graph, whose operator plans by itself.
    """

    hidden: Tensor
    rows: Rows
    head: Head
    compute: Compute
    groups: Groups
    options: HeadOptions | None

    @classmethod
    def prepared(cls, hidden: Tensor, rows: Rows, head: Head, compute: Compute, groups: Groups) -> Call:
        """Check everything, and plan. Where ranks work together this is inside `Groups.together`."""
        if hidden.dim() != 2:
            raise ValueError(f"hidden has shape {tuple(hidden.shape)}, it must be (N, H); see orpo_loss for (2B, T, H)")
        head.check(hidden, rows.position, "rows")
        if torch.compiler.is_compiling():
            check_options(head.logit_scale, head.logit_softcap, compute.sparse_eps)
            return cls(hidden, rows, head, compute, groups, None)
        rows = rows.live()
        head.check_values(hidden, rows.position, rows.target, "labels")
        check_pair_weight(rows.pair_weight)
        options = head.planned(hidden, len(rows), compute, rows.largest_pair)
        # Groups of pairs would accumulate the gradient of the whole weight, and other ranks have other groups.
        if options.plan.group_rows and (head.columns is not None or groups.sequence is not None):
            options = head.planned(hidden, len(rows), replace(compute, schedule="recompute"))
        return cls(hidden, rows, head, compute, groups, options)

    def loss(
        self,
        method: Method,
        nll_denominator: int | Tensor | None,
        pair_denominator: int | Tensor | None,
        reference: Tensor | None = None,
        average_sequences: bool = False,
    ) -> tuple[Tensor, ...]:
        """The loss, and the metrics of `PairLoss` one by one.

        reference: (2B,) float64, the reference's scores, where the method needs them.
        average_sequences: whether the NLL is the mean over each sequence first, whose rows other ranks have as well.
        """
        counts = nll_denominator, pair_denominator
        if self.options is None:
            return loss_in_a_graph(self.hidden, self.head, self.rows, method, *counts, reference, self.compute)
        hidden, head, rows, groups, options = self.hidden, self.head, self.rows, self.groups, self.options
        groups.agree({"num_pairs": rows.num_pairs, **facts_of(head.weight, len(rows), options)}, head.weight.device)
        if average_sequences:
            rows = averaged_over_sequences(rows, groups)
        objective = Objective(method, denominators(rows, *counts, groups), options.ops, groups.sequence, reference)
        rows = rows.of_shard(options.shard)
        if options.plan.group_rows:
            return GroupedLoss.apply(hidden, head.weight, head.bias, rows, options, objective)
        token_log_odds = head.token_log_odds(hidden, rows.position, rows.target, options)
        return PairLossFunction.apply(token_log_odds, rows, objective, accumulation_dtype(hidden.dtype))
