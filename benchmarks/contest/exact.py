"""What float64 arithmetic gives on a workload's numbers, and how far a result is from it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.contest import peers
from benchmarks.contest.workloads import Workload

BETA = 0.1
LOGITS = 2**24  # float64 logits alive at once: 128 MiB, several times in autograd
COLUMNS = 8192  # of the weight that are made float64 at one time
LARGEST_GRADIENT = 2**26  # elements of a weight whose float64 gradient (512 MiB, and the weight's copy) is still made


@dataclass(frozen=True)
class Exact:
    """The loss, and its gradients in float64 as far as they were asked for and fit."""

    loss: float
    gradients: dict[str, Tensor]  # "hidden" (2B, T, H), "weight" (V, H)


def exact(work: Workload, hidden: bool = False, weight: bool = False) -> Exact:
    """Loss and gradients of the definition: plain log-softmax and autograd in float64, a few rows at a time.

    hidden, weight: which gradients; none for a weight of more than `LARGEST_GRADIENT` elements.
    """
    if not (hidden or weight) or work.weight.numel() > LARGEST_GRADIENT:
        return Exact(exact_loss(work), {})
    double = work.cast(torch.float64)
    leaves: dict[str, Any] = {
        "hidden": double.hidden.clone().requires_grad_(hidden),
        "weight": double.weight.clone().requires_grad_(weight),
    }
    loss = _loss(replace(double, **leaves))
    loss.backward()
    return Exact(loss.item(), {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None})


@torch.no_grad()
def exact_loss(work: Workload) -> float:
    """The loss alone: of the weight, a slice at a time is float64."""
    return _loss(work).item()


def _loss(work: Workload) -> Tensor:
    def chunk(states: Tensor, head: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        z = torch.cat([states.double() @ columns.double().t() for columns in head.split(COLUMNS)], dim=1)
        z = z if bias is None else z + bias.double()
        z = z if work.logit_softcap is None else work.logit_softcap * torch.tanh(z / work.logit_softcap)
        return z.log_softmax(-1).gather(1, target[:, None]).squeeze(1)

    def logps(states: Tensor, head: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        rows = max(1, LOGITS // len(head))
        chunks = zip(states.split(rows), target.split(rows), strict=True)
        return torch.cat([checkpoint(chunk, h, head, bias, t, use_reentrant=False) for h, t in chunks])

    return peers.Composed(logps)(work.hidden, work.weight, work.labels, work.nll_labels, BETA, bias=work.bias)


def relative_error(value: Tensor, truth: Tensor) -> float:
    """Frobenius norm of the difference over that of the truth, or of the value where the truth is 0."""
    norm = truth.double().norm().item()
    return (value.double() - truth.double()).norm().item() / norm if norm else value.double().norm().item()
