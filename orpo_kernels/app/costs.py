"""What head and loss cost, ours under every schedule and everyone else's: GEMMs, FLOP and bytes, from shapes alone.

A GEMM of the head is 2 * rows * V * H FLOP. Bytes are the most that is allocated at one time beside the hidden states
and the weight, the gradients of both included. Ours are `planning`'s. A peer's formula says which tensors its code
holds when it holds most; `benchmarks.contest.memory` runs the code itself and counts, and the tests compare the two,
ours as on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..engine.planning import Plan, planned
from ..engine.schedules import TABLE, resident
from ..engine.work import Work


@dataclass(frozen=True)
class Case:
    """Head, batch and dtype. `sequences` is 2B, `length` T; `rows` of the positions matter."""

    hidden_size: int
    vocab_size: int
    sequences: int
    length: int
    rows: int
    dtype: torch.dtype = torch.bfloat16
    trained: bool = True
    bias: bool = False
    softcap: bool = False

    @property
    def positions(self) -> int:
        return self.sequences * self.length

    @property
    def largest_pair(self) -> int:
        """The most rows that a pair may have."""
        return min(self.rows, 2 * self.length)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize

    @property
    def hidden_bytes(self) -> int:
        """The hidden states of all positions, and their gradient."""
        return self.positions * self.hidden_size * self.itemsize

    @property
    def weight_bytes(self) -> int:
        return self.vocab_size * self.hidden_size * self.itemsize

    @property
    def gradient_bytes(self) -> int:
        return self.hidden_bytes + (self.weight_bytes if self.trained else 0)

    def logits(self, positions: int, itemsize: int | None = None) -> int:
        """Bytes of so many rows of logits."""
        return positions * self.vocab_size * (itemsize or self.itemsize)


@dataclass(frozen=True)
class Cost:
    """One way to compute the loss: forward and backward, or (`evaluation`) forward alone.

    Attributes:
        name: whose.
        gemms: vocabulary-sized products over the rows that it projects.
        flops: what they cost.
        bytes: the peak beside hidden states and weight.
        note: what to know about it.
        plan: of our own.
    """

    name: str
    gemms: int
    flops: int
    bytes: int
    note: str
    plan: Plan | None = None


# --- ours ----------------------------------------------------------------------------------------------------------


def ours(case: Case, budget: int, target: str | None = None) -> list[Cost]:
    """Our schedules on a GPU that has our kernels, the recommended one first: what "auto" takes under the budget.

    target: the GPU's kind, by whose times a forward pass is chosen where there are some.
    """
    names = ["resident", "recompute"] if case.trained else ["single_pass", "recompute"]
    chosen = _our_cost(case, "auto", budget, target)
    assert chosen.plan is not None
    others = [_our_cost(case, name, budget, target) for name in names if name != chosen.plan.schedule]
    return [chosen, *others, _our_cost(case, "auto", budget, target, gradient=False)]


def _our_cost(case: Case, schedule: str, budget: int, target: str | None, gradient: bool = True) -> Cost:
    work = Work(
        rows=case.rows,
        hidden_size=case.hidden_size,
        vocab_size=case.vocab_size,
        dtype=case.dtype,
        weight_dtype=case.dtype,
        device=torch.device("cuda"),
        backend="triton",
        needs_hidden=gradient,
        needs_weight=gradient and case.trained,
        needs_bias=gradient and case.trained and case.bias,
        softcap=case.softcap,
        sparse_eps=None,
        target=target,
    )
    plan = planned(work, schedule, budget, budget_given=False, largest_pair=case.largest_pair)
    gradients = case.gradient_bytes if gradient else 0
    peak = max(plan.forward_bytes, plan.backward_bytes + gradients)
    note = TABLE[plan.schedule].NOTE
    if plan.group_rows:
        note = resident.NOTE_BY_GROUPS
        peak += 4 * (case.positions - case.rows) * case.hidden_size  # dh is summed in fp32, padding and all
    return Cost(f"ours, {plan.schedule}", plan.gemms, plan.flops, peak, note, plan)


# --- peers ---------------------------------------------------------------------------------------------------------


def plain(case: Case, logit_bytes: int) -> int:
    """Three tensors as large as the logits: the log-softmax, its gradient, and the gradient of the logits."""
    return 3 * case.logits(case.positions, logit_bytes)


def trl_trainer(case: Case) -> int:
    """`ORPOTrainer` projects one position more of each sequence; a trained head keeps a padded copy of the rest."""
    positions = case.positions + case.sequences
    padded = positions * case.hidden_size * case.itemsize if case.trained else 0
    return 3 * case.logits(positions) + padded


def liger(case: Case) -> int:
    """A pair at a time, four fp32 tensors of its logits; a trained head's gradient is a sum of each pair's."""
    pair = case.logits(2 * case.length, 4)
    in_the_pair = 4 * pair + case.hidden_bytes
    if not case.trained:
        return in_the_pair
    pair_hidden = 2 * case.length * case.hidden_size * case.itemsize
    adding_up = 2 * pair + case.logits(2 * case.length) + 2 * case.weight_bytes + case.hidden_bytes + pair_hidden
    return max(in_the_pair + case.weight_bytes, adding_up)


TRL_TILE = (4096, 32768)  # rows and columns of the tiles of TRL 1.16's ChunkedLogProbFunction


def trl_chunked(case: Case) -> int:
    """A tile of logits in place, and gradients in fp32 that are cast at the end: read from its source for a GPU.

    (Its torch path, which can be counted on a CPU, holds more: `trl_chunked_torch`.)
    """
    return _trl_chunked(case, of_a_logit=case.itemsize, of_a_hidden=0)


def trl_chunked_torch(case: Case) -> int:
    """In bf16."""
    return _trl_chunked(case, of_a_logit=30, of_a_hidden=8)


def _trl_chunked(case: Case, of_a_logit: int, of_a_hidden: int) -> int:
    """Gathered rows and sums of gradients in fp32; on top of them the tile, and later what the sums are cast to."""
    rows, columns = min(case.rows, TRL_TILE[0]), min(case.vocab_size, TRL_TILE[1])
    tile = rows * (columns * of_a_logit + case.hidden_size * of_a_hidden)
    summed = case.rows + (case.vocab_size if case.trained else 0)
    cast = summed * case.hidden_size * case.itemsize
    return case.rows * case.hidden_size * case.itemsize + 4 * summed * case.hidden_size + max(tile, cast)


def cut_cross_entropy(case: Case) -> int:
    """No logits at all: the rows that matter, gathered, and the gradients."""
    return case.rows * case.hidden_size * case.itemsize + case.gradient_bytes


@dataclass(frozen=True)
class Peer:
    """Somebody else's loss: the GEMMs with a frozen and with a trained head, and which positions they project."""

    name: str
    gemms: tuple[int, int]
    every_position: bool
    bytes: Callable[[Case], int]
    note: str

    def cost(self, case: Case) -> Cost:
        gemms = self.gemms[case.trained]
        rows = case.positions if self.every_position else case.rows
        flops = gemms * 2 * rows * case.vocab_size * case.hidden_size
        return Cost(self.name, gemms, flops, self.bytes(case), self.note)


PEERS = (
    Peer("plain PyTorch", (2, 3), True, lambda case: plain(case, case.itemsize), "three copies of the logits"),
    Peer("plain PyTorch, fp32 log-softmax", (2, 3), True, lambda case: plain(case, 4), "the usual upcast"),
    Peer("TRL ORPOTrainer", (2, 3), True, trl_trainer, "full logits"),
    Peer("Liger ORPO", (2, 3), True, liger, "pair by pair; grows with the length"),
    Peer("ORPO on TRL's chunked logps", (3, 4), False, trl_chunked, "tiles; recomputes them"),
    Peer("ORPO on Cut Cross Entropy", (3, 4), False, cut_cross_entropy, "on chip; filters small gradients"),
)


def peers(case: Case) -> list[Cost]:
    return [peer.cost(case) for peer in PEERS]


# --- the model around it -------------------------------------------------------------------------------------------


def training_state_bytes(parameters: int, trained: int, dtype: torch.dtype) -> int:
    """Weights, gradients and AdamW's two moments (in the weights' dtype, as torch keeps them)."""
    return dtype.itemsize * (parameters + 3 * trained)
