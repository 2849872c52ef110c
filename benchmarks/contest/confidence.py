"""Confident answers: logit gaps between the target and its rivals, where log-probabilities round to zero.

The logits are exact in every dtype: the lm-head is the identity, so that the hidden states are the logits. Everyone is
compared with float64 arithmetic on the same logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest import peers
from benchmarks.contest.exact import BETA, relative_error
from orpo_kernels import reference

VOCABULARY, PAIRS = 16, 2
GAPS = (1, 2, 3, 4, *range(5, 31), 40, 50, 60, 67, 70, 80)
SIDES = {"chosen": slice(0, PAIRS), "rejected": slice(PAIRS, None), "both": slice(None)}
BROKEN = 0.1  # an error of more than this, or anything that is not finite


def confident(gap: float, side: str, rivals: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (= logits), weight and labels of ragged answers whose targets on `side` lead by `gap`.

    The other side's lead by 0 to 2. Against "one" rival, at logit 0, the gap is the target's log-odds (all other tokens
    are at -64); "many" are between -2 and 0. All are multiples of 1/64 that bf16 holds.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2 * PAIRS, 4)
    labels = torch.randint(VOCABULARY, shape, generator=generator)
    logits = torch.full((*shape, VOCABULARY), -64.0)
    if rivals == "many":
        logits = -torch.randint(128, logits.shape, generator=generator) / 64
    leads = torch.randint(64, shape, generator=generator) / 32
    leads[SIDES[side]] = gap
    logits.scatter_(-1, (labels[..., None] + 3) % VOCABULARY, 0.0)
    logits.scatter_(-1, labels[..., None], leads[..., None])
    lengths = torch.tensor([4, 2, 3, 1])
    labels = torch.where(torch.arange(4) < lengths[:, None], labels, peers.IGNORE)
    return logits.to(dtype), torch.eye(VOCABULARY, dtype=dtype), labels


def results(
    loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The loss, and the gradients of chosen hidden states, rejected ones (either may be tiny) and the weight."""
    frozen = options.get("schedule") == "single_pass"
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    value = loss(hidden, weight, labels, labels[:PAIRS], BETA, **options)
    value.backward()
    assert hidden.grad is not None
    found = {"loss": value.detach(), "chosen": hidden.grad[:PAIRS], "rejected": hidden.grad[PAIRS:]}
    return found if weight.grad is None else found | {"weight": weight.grad}


def exact_results(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """float64 arithmetic on the same logits."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor, beta: float) -> Tensor:
        return reference.orpo_loss(hidden, weight, labels, nll_labels=nll_labels, beta=beta).loss

    return results(loss, hidden.double(), weight.double(), labels)


def worst_error(found: dict[str, Tensor], truth: dict[str, Tensor]) -> float:
    """Of the loss and of every gradient, relative; infinite if anything is not finite."""
    if not all(value.isfinite().all() for value in found.values()):
        return math.inf
    return max(relative_error(found[name], true) for name, true in truth.items())


def errors_by_gap(loss: Callable[..., Tensor], dtype: torch.dtype, side: str) -> list[float]:
    """`worst_error` at each of `GAPS`, against one rival."""
    errors = []
    for gap in GAPS:
        inputs = confident(gap, side, "one", dtype)
        errors.append(worst_error(results(loss, *inputs), exact_results(*inputs)))
    return errors


def first_broken(errors: list[float]) -> int | None:
    """The smallest of `GAPS` at which the error is more than `BROKEN`; None: never."""
    return next((gap for gap, error in zip(GAPS, errors, strict=True) if not error <= BROKEN), None)
