"""What the loss cost: head + loss, forward and backward, ours beside the plain one on the same hidden states."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.contest.memory import peak_bytes
from benchmarks.contest.peers import plain
from benchmarks.timing import in_turns, wall_seconds
from orpo_kernels import orpo_loss
from orpo_kernels.transformers import PreferenceCollator

from .data import Fact

ROUNDS = 7


@dataclass(frozen=True)
class Cost:
    """One side: median seconds, and the most bytes allocated at once (inputs not counted, gradients counted)."""

    name: str
    seconds: float
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Comparison:
    """Both sides, what they ran on, and the bytes of the gradients, which both of them return."""

    ours: Cost
    plain: Cost
    gradient_bytes: int
    positions: int
    rows: int
    vocabulary: int


def compare(model: Any, collator: PreferenceCollator, facts: Sequence[Fact], beta: float) -> Comparison:
    """Measure both on one batch. They take turns, so that a slow moment of the machine hits both."""
    batch = collator([fact.chat for fact in facts])
    hidden, weight = _inputs(model, batch)
    labels = pad(batch["labels"][:, 1:], (0, 1), value=-100)  # row t is the target of hidden state t
    nll_labels = labels[: len(facts)]
    sides: dict[str, Callable[[], Tensor]] = {
        "orpo_kernels": lambda: orpo_loss(hidden, weight, labels, nll_labels=nll_labels, beta=beta).loss,
        "plain (all logits, log_softmax)": lambda: plain(hidden, weight, labels, nll_labels, beta),
    }
    wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]

    def both_ways(name: str) -> float:
        value = sides[name]()
        torch.autograd.grad(value, wanted)
        return value.item()

    def extra_bytes(name: str) -> int:
        measured = peak_bytes(lambda: torch.autograd.grad(sides[name](), wanted), [hidden, weight])
        return measured.peak - measured.baseline

    times = in_turns(sides, ROUNDS, lambda name: wall_seconds(lambda: both_ways(name), hidden.device))
    ours, theirs = (Cost(name, statistics.median(times[name]), extra_bytes(name), both_ways(name)) for name in sides)
    gradient_bytes = sum(tensor.nbytes for tensor in wanted)
    return Comparison(ours, theirs, gradient_bytes, labels.numel(), int((labels != -100).sum()), len(weight))


def _inputs(model: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Last hidden states and lm-head weight as leaves that require grad as they do in training."""
    model.eval()
    with torch.no_grad():
        states = model.base_model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    head = model.get_output_embeddings().weight
    return states.requires_grad_(), head.detach().requires_grad_(head.requires_grad)
