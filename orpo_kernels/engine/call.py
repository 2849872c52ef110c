"""One call, read downward: check, plan, the log-odds of every row, the loss of a method."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..devices import moved, statistics_dtype
from ..methods import Method
from ..output import PreferenceOutput
from ..parallel import Groups
from ..rows import Rows, averaged_over_sequences
from .autograd import GroupedLoss, Objective, PreferenceLoss, loss_and_gradients
from .checks import check_denominators, check_options, check_pair_weight
from .graph import loss_in_a_graph
from .head import Compute, Head
from .objective import denominators
from .projection import HeadOptions


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
        options = replace(options, unique_positions=rows.known.unique_positions)
        return cls(hidden, rows, head, compute, groups, options)

    def loss(
        self,
        method: Method,
        nll_denominator: int | Tensor | None,
        pair_denominator: int | Tensor | None,
        reference: Tensor | None = None,
        average_sequences: bool = False,
    ) -> PreferenceOutput:
        """The loss of a method, and its metrics.

        reference: (2B,) float64, the reference's scores, where the method needs them.
        average_sequences: whether the NLL is the mean over each sequence first, whose rows other ranks have as well.
        """
        check_denominators(nll_denominator, pair_denominator)
        counts = nll_denominator, pair_denominator
        if self.options is None:
            outputs = loss_in_a_graph(self.hidden, self.head, self.rows, method, *counts, reference, self.compute)
        else:
            outputs = self._loss(self.options, method, *counts, reference, average_sequences)
        return with_rewards(method, reference, *outputs)

    def _loss(
        self,
        options: HeadOptions,
        method: Method,
        nll_denominator: int | Tensor | None,
        pair_denominator: int | Tensor | None,
        reference: Tensor | None,
        average_sequences: bool,
    ) -> tuple[Tensor, ...]:
        hidden, head, rows, groups = self.hidden, self.head, self.rows, self.groups
        head.agree(groups, len(rows), options, rows.num_pairs)
        if average_sequences:
            rows = averaged_over_sequences(rows, groups)
        counts = denominators(rows, nll_denominator, pair_denominator, groups)
        objective = Objective(method, counts, options.ops, groups.sequence, reference)
        operands = hidden, head.weight, head.bias, rows, options, objective
        if options.plan.schedule == "evaluation":
            return loss_and_gradients(*operands, needs=(False, False, False))[0]
        if options.plan.group_rows:
            return GroupedLoss.apply(*operands)
        return PreferenceLoss.apply(*head.operands(hidden, rows.position, rows.target, options), rows, objective)


def with_rewards(
    method: Method,
    reference: Tensor | None,
    loss: Tensor,
    nll_loss: Tensor,
    pair_loss: Tensor,
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    log_odds: Tensor,
    valid_pairs: Tensor,
) -> PreferenceOutput:
    """A method's loss and metrics with the rewards that it gives."""
    chosen_gains, rejected_gains = chosen_logps, rejected_logps
    if reference is not None:
        of_reference = moved(reference, loss.device, statistics_dtype(loss.device)).view(2, -1)
        chosen_gains = method.gains(chosen_logps, of_reference[0]).to(loss.dtype)
        rejected_gains = method.gains(rejected_logps, of_reference[1]).to(loss.dtype)
    return PreferenceOutput(
        loss=loss,
        nll_loss=nll_loss,
        pair_loss=pair_loss,
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        log_odds=log_odds,
        valid_pairs=valid_pairs,
        chosen_rewards=chosen_gains * method.beta,
        rejected_rewards=rejected_gains * method.beta,
        preferred=chosen_gains > rejected_gains,
    )
