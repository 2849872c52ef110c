"""Per-token log-probabilities: the primitive for every other objective (SFT, DPO, SimPO, PPO, GRPO)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_targets
from .head import Compute, Head
from .parallel import Groups
from .planning import accumulation_dtype
from .projection import facts_of


@torch.compiler.disable(
    reason="token_logps computes as many rows as labels ask for, which no graph of fixed shapes can"
)
def token_logps(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    backend: str = "auto",
    sparse_eps: float | None = None,
    data_group: Any = None,
    vocab_group: Any = None,
    sequence_group: Any = None,
) -> Tensor:
    """log softmax(logits)[target] of every position, without the logits; differentiable, any upstream gradient.

    Two GEMMs where the lm-head is frozen, three or four where it is trained, one without gradient.

    Args:
        hidden: (..., H) last hidden states; fp16, bf16, fp32 or float64.
        weight: (V, H) lm-head weight; bias: (V,) or None.
        targets: (...) int64, the token each position predicts; `ignore_index` for none. Finding the positions with a
            target is a host synchronisation on a GPU.
        logit_scale, logit_softcap, schedule, memory_budget, backend, sparse_eps: as in `orpo_loss`.
        vocab_group: as in `orpo_loss`: the ranks hold `weight` and `bias` by rows, and the same hidden states, targets
            and upstream gradient.
        data_group, sequence_group: taken so that the arguments are those of `orpo_loss`. A position's log-probability
            needs no other position, so over these nothing is exchanged and nothing scaled.

    Returns:
        (...) log-probabilities in nats, 0 at `ignore_index`; fp32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError, RuntimeError: as `orpo_loss`.
    """
    groups = Groups.of(vocab_group=vocab_group)
    with groups.together(weight.device):
        head = Head.local(weight, bias, None, logit_scale, logit_softcap, groups)
        position, target = _targets_of(hidden, head, targets, ignore_index)
        options = head.planned(hidden, len(target), Compute(schedule, memory_budget, backend, sparse_eps))
    groups.agree(facts_of(head.weight, len(target), options), weight.device)
    target = target - head.shard.start if head.shard else target
    log_odds = head.token_log_odds(hidden.reshape(-1, hidden.shape[-1]), position, target, options)
    logps = F.logsigmoid(log_odds).to(accumulation_dtype(hidden.dtype))
    return logps.new_zeros(targets.numel()).index_put((position,), logps).view(targets.shape)


def _targets_of(hidden: Tensor, head: Head, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """The flat positions that have a target, and the targets, both (R,)."""
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, but hidden {tuple(hidden.shape)} "
            f"asks for {tuple(hidden.shape[:-1])}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets is {targets.dtype}, it must be torch.int64")
    head.check(hidden, targets, "targets")
    flat = targets.flatten()
    position = (flat != ignore_index).nonzero().squeeze(1)
    target = flat[position]
    check_targets("targets", target, head.vocab_size)
    return position, target
