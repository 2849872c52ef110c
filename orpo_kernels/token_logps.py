"""Per-token log-probabilities: the primitive for every other objective (SFT, DPO, SimPO, PPO, GRPO)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .autograd import TokenLogOdds
from .checks import check_head, check_options, check_same_device, check_targets
from .planning import accumulation_dtype
from .projection import HeadOptions, needs_grad


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
) -> Tensor:
    """log softmax(logits)[target] of every position, without the logits; differentiable, any upstream gradient.

    Two GEMMs where the lm-head is frozen, three or four where it is trained, one without gradient.

    Args:
        hidden: (..., H) last hidden states; fp16, bf16, fp32 or float64.
        weight: (V, H) lm-head weight; bias: (V,) or None.
        targets: (...) int64, the token each position predicts; `ignore_index` for none. Finding the positions with a
            target is a host synchronisation on a GPU.
        logit_scale, logit_softcap, schedule, memory_budget, backend, sparse_eps: as in `orpo_loss`.

    Returns:
        (...) log-probabilities in nats, 0 at `ignore_index`; fp32, float64 for float64 inputs.

    Raises:
        ValueError, TypeError, RuntimeError: as `orpo_loss`.
    """
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(
            f"targets has shape {tuple(targets.shape)}, but hidden {tuple(hidden.shape)} "
            f"asks for {tuple(hidden.shape[:-1])}"
        )
    if targets.dtype != torch.int64:
        raise TypeError(f"targets is {targets.dtype}, it must be torch.int64")
    check_head(hidden, weight, bias)
    check_options(logit_scale, logit_softcap, sparse_eps)
    check_same_device("hidden", hidden, "targets", targets)
    flat = targets.flatten()
    position = (flat != ignore_index).nonzero().squeeze(1)
    target = flat[position]
    check_targets("targets", target, weight.shape[0])
    logps = logps_of(
        hidden.reshape(-1, hidden.shape[-1]),
        weight,
        position,
        target,
        bias=bias,
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        schedule=schedule,
        memory_budget=memory_budget,
        backend=backend,
        sparse_eps=sparse_eps,
    ).to(accumulation_dtype(hidden.dtype))
    return logps.new_zeros(flat.shape[0]).index_put((position,), logps).view(targets.shape)


def logps_of(
    hidden: Tensor,
    weight: Tensor,
    position: Tensor,
    target: Tensor,
    *,
    bias: Tensor | None = None,
    columns: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    schedule: str = "auto",
    memory_budget: int | None = None,
    backend: str = "auto",
    sparse_eps: float | None = None,
) -> Tensor:
    """(R,) float64: log softmax(logits)[target] at positions (R,) of hidden (N, H). Arguments have been checked.

    columns: (V, r), or None: the last columns of a frozen weight, which alone get a gradient (`TokenLogOdds`).
    """
    options = HeadOptions.planned(
        hidden,
        weight,
        bias,
        num_rows=target.shape[0],
        logit_scale=logit_scale,
        logit_softcap=logit_softcap,
        schedule=schedule,
        memory_budget=memory_budget,
        backend=backend,
        needs=needs_grad(hidden, weight if columns is None else columns, bias),
        sparse_eps=sparse_eps,
    )
    return F.logsigmoid(TokenLogOdds.apply(hidden, weight, bias, position, target, options, columns))
