"""Rows: the positions whose next token is a target, as flat vectors.

A *row* is one (position, target) pair. Everything vocabulary-sized is computed for rows only, so padding, ignored
labels and the prompts of rejected answers cost nothing. Every layout (padded, packed, padding-free, shared prompt) and
every dialect of ORPO is a different way to fill in the same few fields.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .devices import moved, rows_device
from .ops import host_ops
from .parallel import Groups, summed

DTYPES = {  # of the vectors that have a number for each row
    "position": torch.int64,
    "target": torch.int64,
    "sequence": torch.int64,
    "scored": torch.bool,
    "nll_weight": torch.float64,
}


@dataclass(frozen=True)
class Known:
    """What the maker of rows knows of them, so that a device has neither to sort, nor to count, nor to be waited for.

    Attributes:
        counts: (2,) float64, what the two means divide by: the sum of `nll_weight`, and the number of pairs of which
            both answers have a scored row. None: not known.
        offsets: (2B + 1,) int64: the rows are in the order of their sequences, those of sequence s are
            [offsets[s], offsets[s + 1]). None: they are in any order, or nobody has looked.
        unique_positions: no position occurs twice. False: one may.
    """

    counts: Tensor | None = None
    offsets: Tensor | None = None
    unique_positions: bool = False

    def map(self, function: Callable[[Tensor], Tensor]) -> Known:
        """The same of rows whose vectors are `function` of theirs: on another device, say."""
        counts, offsets = (None if t is None else function(t) for t in (self.counts, self.offsets))
        return Known(counts, offsets, self.unique_positions)


@dataclass(frozen=True)
class Rows:
    """The rows of a batch of `num_pairs` preference pairs; vectors have shape (R,) and all live on one device.

    That is the hidden states', or the host where that one has no float64 (`devices.py`).

    Attributes:
        position: int64, index into the flattened hidden states (N, H). May repeat: the last hidden state of a shared
            prompt predicts both the first chosen and the first rejected token.
        target: int64, the token id to predict, in [0, V).
        sequence: int64, the sequence the row belongs to: chosen answer i is i, rejected answer i is `num_pairs + i`.
        scored: bool, whether the row counts in its sequence's length-averaged log-probability (the odds ratio).
        nll_weight: float64, the row's weight in the NLL, not yet normalised; 0 keeps it out.
        num_pairs: B.
        padded: whether there may be rows that count for nothing, neither scored nor weighted, with any target.
        pair_weight: (B,) float64, finite and at least 0, or None: what each pair's loss is multiplied by, its part of
            the NLL too. What the means are divided by is counted without it: a pair of weight 2 is summed twice and
            counted once. No gradient is made for it. `rows.weighted(pair_weight)` gives weights to rows of any origin.
        known: what `knowing` was told of the rows. `dataclasses.replace` forgets it, whatever it replaces.

    Raises:
        ValueError: vectors of different lengths, or not a weight for each pair.
        TypeError: a vector of another dtype or device; a pair_weight that requires grad.
    """

    position: Tensor
    target: Tensor
    sequence: Tensor
    scored: Tensor
    nll_weight: Tensor
    num_pairs: int
    padded: bool = False
    pair_weight: Tensor | None = None
    known: Known = field(default=Known(), init=False, compare=False)

    def __post_init__(self) -> None:
        for name, dtype in DTYPES.items():
            vector = getattr(self, name)
            if vector.dim() != 1 or vector.shape != self.position.shape:
                raise ValueError(
                    f"Rows.{name} has shape {tuple(vector.shape)}, but Rows.position has {tuple(self.position.shape)}: "
                    "all vectors of Rows are one-dimensional and equally long"
                )
            if vector.dtype != dtype:
                raise TypeError(f"Rows.{name} is {vector.dtype}, it must be {dtype}")
            if vector.device != self.position.device:
                raise TypeError(f"Rows.{name} is on {vector.device}, but Rows.position is on {self.position.device}")
        self._check_pair_weight()

    def _check_pair_weight(self) -> None:
        weight = self.pair_weight
        if weight is None:
            return
        if weight.shape != (self.num_pairs,):
            raise ValueError(
                f"pair_weight has shape {tuple(weight.shape)}, but the batch has {self.num_pairs} pairs: it must be "
                f"({self.num_pairs},), a weight for each pair"
            )
        if weight.dtype != torch.float64:
            raise TypeError(f"pair_weight is {weight.dtype}, it must be torch.float64: pass pair_weight.double()")
        if weight.device != self.position.device:
            raise TypeError(f"pair_weight is on {weight.device}, but the rows are on {self.position.device}")
        if weight.requires_grad:
            raise TypeError("pair_weight requires grad, but the loss makes no gradient for it: pass its detach()")

    def __len__(self) -> int:
        return self.position.shape[0]

    def knowing(self, **known: Any) -> Rows:
        """The same rows, with more in `known`: what is said is believed, only shapes and dtypes are looked at.

        Raises `ValueError` or `TypeError` for tensors that cannot be of these rows.
        """
        expected = {"counts": ((2,), torch.float64), "offsets": ((2 * self.num_pairs + 1,), torch.int64)}
        for name, (shape, dtype) in expected.items():
            tensor = known.get(name)
            if tensor is None:
                continue
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise ValueError(
                    f"Rows.known.{name} is {tuple(tensor.shape)} of {tensor.dtype}, but {self.num_pairs} pairs ask for "
                    f"{shape} of {dtype}"
                )
            if tensor.device != self.position.device:
                raise TypeError(f"Rows.known.{name} is on {tensor.device}, but the rows are on {self.position.device}")
        return copy.copy(self)._with(Known(**vars(self.known) | known))

    def _with(self, known: Known) -> Rows:
        object.__setattr__(self, "known", known)  # of rows that nobody else has yet
        return self

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Rows:
        """The same rows for another device. Built by a collator on the CPU they need no synchronisation on a GPU.

        For a device without float64 they stay on the host, or go there.
        """
        device = rows_device(torch.device(device))
        return self._moved(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Rows:
        """The same rows in page-locked memory, as a `DataLoader(pin_memory=True)` asks for."""
        return self._moved(lambda tensor: tensor.pin_memory())

    def select(self, index: Tensor) -> Rows:
        """The rows at `index` (int64 or bool), still numbered as pairs of the whole batch. Nothing is known of them."""
        vectors: dict[str, Any] = {name: getattr(self, name)[index] for name in DTYPES}
        return replace(self, **vectors)

    def by_sequence(self) -> Rows:
        """The rows in the order of their sequences, with the offsets. Nothing is read on the host."""
        if self.known.offsets is not None:
            return self
        counts, unique = self.known.counts, self.known.unique_positions
        rows = self.select(self.sequence.argsort(stable=True))
        return rows.knowing(offsets=rows._offsets(), counts=counts, unique_positions=unique)

    def _offsets(self) -> Tensor:
        """`Known.offsets` of rows that are in the order of their sequences."""
        every_sequence = torch.arange(2 * self.num_pairs + 1, device=self.sequence.device)
        return torch.searchsorted(self.sequence, every_sequence)

    def weighted(self, pair_weight: Tensor | None) -> Rows:
        """The same rows with weights of the pairs, (B,) float64, in place of those that they have.

        From a device without float64 they come in fp32.
        """
        if pair_weight is not None and (home := rows_device(pair_weight.device)) != pair_weight.device:
            pair_weight = moved(pair_weight, home, torch.float64)
        return self._keeping(pair_weight=pair_weight)

    def with_nll_weight(self, nll_weight: Tensor) -> Rows:
        """The same rows, weighing `nll_weight` (R,) float64 in the NLL. What they count is known no more."""
        return self._keeping(nll_weight=nll_weight).knowing(counts=None)

    def live(self) -> Rows:
        """Without the rows that count for nothing. Where there may be some, their number is read on the host."""
        if not self.padded:
            return self
        rows = self.select((self.scored | (self.nll_weight != 0)).nonzero().squeeze(1))
        return replace(rows, padded=False)

    @property
    def pair(self) -> Tensor:
        """(R,) int64, the pair that each row belongs to."""
        return self.sequence % max(self.num_pairs, 1)

    def weighted_nll(self) -> Tensor:
        """(R,) float64, `nll_weight` times the weight of the row's pair."""
        return self.nll_weight if self.pair_weight is None else self.nll_weight * self.pair_weight[self.pair]

    def pair_sizes(self) -> list[int]:
        """The number of rows of each pair. Reads them on the host."""
        return torch.bincount(self.pair, minlength=self.num_pairs).tolist()

    def largest_pair(self) -> int:
        return max(self.pair_sizes(), default=0)

    def _moved(self, move: Callable[[Tensor], Tensor]) -> Rows:
        everything: dict[str, Any] = {name: move(getattr(self, name)) for name in DTYPES}
        weight = None if self.pair_weight is None else move(self.pair_weight)
        return replace(self, **everything, pair_weight=weight)._with(self.known.map(move))

    def _keeping(self, **changes: Any) -> Rows:
        """With changes that leave true what is known."""
        return replace(self, **changes)._with(self.known)


def rows_from_labels(
    labels: Tensor,
    nll_labels: Tensor | None = None,
    *,
    shift: bool = False,
    ignore_index: int = -100,
    nll_reduction: str = "token",
    pair_weight: Tensor | None = None,
) -> Rows:
    """The rows of a padded batch. Reading which labels are valid is the one host synchronisation of the loss.

    Args:
        labels: (2B, T) int64, the scored targets, the B chosen sequences first; `ignore_index` elsewhere.
        nll_labels: (B, T) int64, the NLL targets of the chosen sequences; `labels[:B]` if None. Where a position has
            another NLL label than OR label it becomes two rows.
        shift: False if `labels[:, t]` is the target of position t, True if `labels[:, t + 1]` is.
        nll_reduction: "token": every NLL row weighs the same. "sequence": the mean over each sequence's rows first.
        pair_weight: (B,) float64, what each pair's loss is multiplied by; see `Rows`.

    Raises:
        ValueError: odd batch, shapes that do not fit together, unknown reduction.
        TypeError: labels that are not int64, weights that are not float64, or that are on different devices.
    """
    labels, nll_labels = checked_labels(labels, nll_labels, nll_reduction)
    rows = host_ops(labels).label_rows(labels, nll_labels, shift, ignore_index, nll_reduction == "sequence")
    return rows if pair_weight is None else rows.weighted(pair_weight)


def label_rows(labels: Tensor, nll_labels: Tensor | None, shift: bool, ignore_index: int, per_sequence: bool) -> Rows:
    """The rows of labels that are in order, by sequence: those of its labels, then those of the NLL's other targets."""
    rows = padded_rows(labels, nll_labels, shift, ignore_index, "sequence" if per_sequence else "token").live()
    return rows.knowing(offsets=rows._offsets(), unique_positions=nll_labels is None)


def padded_rows(
    labels: Tensor,
    nll_labels: Tensor | None = None,
    shift: bool = False,
    ignore_index: int = -100,
    nll_reduction: str = "token",
    pair_weight: Tensor | None = None,
) -> Rows:
    """`rows_from_labels` before the rows that count for nothing are dropped: as many as labels, whatever they hold."""
    labels, nll_labels = checked_labels(labels, nll_labels, nll_reduction)
    pairs, length = labels.shape[0] // 2, labels.shape[1]
    own_nll = nll_labels is not None
    nll_labels = nll_labels if nll_labels is not None else labels[:pairs]
    if shift:
        labels, nll_labels = labels[:, 1:], nll_labels[:, 1:]

    scored = labels != ignore_index
    nll_target = torch.nn.functional.pad(nll_labels, (0, 0, 0, pairs), value=ignore_index)
    wants_nll = nll_target != ignore_index
    target = torch.where(scored, labels, nll_target)
    same_row = wants_nll & (target == nll_target)
    sequence = torch.arange(2 * pairs, device=labels.device)[:, None].expand_as(labels)
    position = sequence * length + torch.arange(labels.shape[1], device=labels.device)
    # Plane 0 holds the OR rows (with the NLL of the same target), plane 1 NLL rows with a target of their own.
    planes = [(position, target, sequence, scored, same_row)]
    if own_nll:
        planes.append((position, nll_target, sequence, torch.zeros_like(scored), wants_nll & ~same_row))
    position, target, sequence, scored, is_nll = (
        torch.stack(vectors, 1).flatten() for vectors in zip(*planes, strict=True)
    )
    weight = nll_weight(is_nll, sequence, 2 * pairs, nll_reduction)
    return Rows(position, target, sequence, scored, weight, pairs, padded=True).weighted(pair_weight)


def nll_weight(is_nll: Tensor, sequence: Tensor, num_sequences: int, reduction: str) -> Tensor:
    """(R,) float64: 1 for every NLL row, divided by its sequence's number of them for the "sequence" reduction."""
    check_reduction(reduction)
    weight = is_nll.double()
    if reduction == "token":
        return weight
    rows = weight.new_zeros(num_sequences).index_add_(0, sequence, weight)
    return weight / rows.clamp(min=1)[sequence]


def averaged_over_sequences(rows: Rows, groups: Groups) -> Rows:
    """The "sequence" reduction of rows of which every one of the NLL weighs 1, where other ranks hold others."""
    sums = rows.nll_weight.new_zeros(2 * rows.num_pairs).index_add_(0, rows.sequence, rows.nll_weight)
    summed(sums, [groups.sequence], "the number of NLL rows of every sequence")
    return rows.with_nll_weight(rows.nll_weight / sums.clamp(min=1)[rows.sequence])


def checked_labels(labels: Tensor, nll_labels: Tensor | None, nll_reduction: str) -> tuple[Tensor, Tensor | None]:
    """The labels, on the device where their rows are made. Raises `ValueError` or `TypeError` for bad ones."""
    check_reduction(nll_reduction)
    if labels.dim() != 2:
        raise ValueError(f"labels has shape {tuple(labels.shape)}, it must be (2B, T): chosen sequences, then rejected")
    if labels.shape[0] % 2:
        raise ValueError(
            f"labels has {labels.shape[0]} sequences, an odd number: the first half is chosen, the second half rejected"
        )
    if labels.dtype != torch.int64:
        raise TypeError(f"labels is {labels.dtype}, it must be torch.int64")
    device = rows_device(labels.device)
    if nll_labels is None:
        return labels.to(device), None
    expected = (labels.shape[0] // 2, labels.shape[1])
    if nll_labels.shape != expected:
        raise ValueError(
            f"nll_labels has shape {tuple(nll_labels.shape)}, but labels {tuple(labels.shape)} asks for {expected}: "
            "one row of NLL targets for each chosen sequence"
        )
    if nll_labels.dtype != torch.int64:
        raise TypeError(f"nll_labels is {nll_labels.dtype}, it must be torch.int64")
    if nll_labels.device != labels.device:
        raise TypeError(f"nll_labels is on {nll_labels.device}, but labels is on {labels.device}")
    return labels.to(device), nll_labels.to(device)


def check_reduction(nll_reduction: str) -> None:
    if nll_reduction not in ("token", "sequence"):
        raise ValueError(f'nll_reduction is {nll_reduction!r}, it must be "token" or "sequence"')
