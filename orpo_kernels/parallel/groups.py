"""The loss on several processes: which numbers cross between them, and when.

Three kinds of groups, any of which may be combined, each as a dimension of a device mesh:

    data_group      ranks hold different pairs. The two counts that the means divide by are summed.
    sequence_group  ranks hold different positions of the same sequences. Of every sequence, rows and sums are summed.
    vocab_group     ranks hold different rows of the lm-head (Megatron's parallel head, arXiv 1909.08053), and the same
                    hidden states and labels. Of every row, two statistics are combined, and the gradient of its
                    hidden state (`sharded.py`).

**Averages.** DDP and FSDP average gradients over their ranks, so those of the data and sequence groups are made to be
averaged: the loss of a rank is its share of the whole batch's, times the number of ranks. Nothing is averaged over the
vocabulary group: each rank's gradient of the weight is that of its own rows, and that of the hidden states is complete.

**Failure.** A rank that raises before the first exchange says so in it, and all raise. A rank that dies in between
ends the others' next collective (at once with gloo, after the group's timeout with NCCL): they raise `PeerError`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

LEAST_SHARD = 2  # rows of the lm-head: with one, a rank that owns the target has no other column to compare it with


class PeerError(RuntimeError):
    """Another process of the group has failed, so that this one cannot go on."""


# --- groups --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Group:
    """A process group, by the name of the argument it came by."""

    name: str
    handle: Any  # torch.distributed.ProcessGroup
    size: int
    rank: int

    @classmethod
    def of(cls, name: str, group: Any) -> Group | None:
        """`group`: a ProcessGroup or a one-dimensional DeviceMesh; None, and a group of one rank, is no group."""
        if group is None:
            return None
        if hasattr(group, "get_group"):
            if group.ndim != 1:
                raise ValueError(
                    f"{name} is a DeviceMesh of {group.ndim} dimensions {group.mesh_dim_names}, it must have one: take "
                    'mesh["name of the dimension"]'
                )
            group = group.get_group()
        if not isinstance(group, dist.ProcessGroup):
            raise TypeError(f"{name} is a {type(group).__name__}, it must be a ProcessGroup or a 1-D DeviceMesh")
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"{name} does not contain this process, rank {dist.get_rank()}")
        size = dist.get_world_size(group)
        return cls(name, group, size, rank) if size > 1 else None

    def all_reduce(self, tensor: Tensor, what: str, op: Any = None) -> Pending:
        """Start to sum `tensor` in place (or to reduce it by `op`); what is returned has to be waited for."""
        with self.failing(what):
            work = dist.all_reduce(tensor, op or dist.ReduceOp.SUM, group=self.handle, async_op=True)
        return Pending(self, work, what)

    def gather_numbers(self, numbers: Sequence[int], device: torch.device, what: str) -> list[list[int]]:
        """Every rank's `numbers`, in rank order, on the host."""
        mine = torch.tensor(numbers, dtype=torch.int64, device=device)
        everyones = [torch.empty_like(mine) for _ in range(self.size)]
        with self.failing(what):
            dist.all_gather(everyones, mine, group=self.handle)
        return [theirs.tolist() for theirs in everyones]

    @contextmanager
    def failing(self, what: str) -> Iterator[None]:
        """Inside, an error of the communication becomes one that says what to look for."""
        try:
            yield
        except (RuntimeError, ValueError) as error:  # gloo's, NCCL's, and a timeout
            raise PeerError(
                f"rank {self.rank} of {self.size} of {self.name} lost the others while it exchanged {what}: another "
                f"process of the group has stopped or waits elsewhere; its own output has the first error ({error})"
            ) from error


@dataclass(frozen=True)
class Pending:
    """A collective under way."""

    group: Group
    work: Any
    what: str

    def wait(self) -> None:
        with self.group.failing(self.what):
            self.work.wait()


@dataclass(frozen=True)
class Groups:
    """The groups of one call; None where there is none, or no other rank in it."""

    data: Group | None = None
    vocab: Group | None = None
    sequence: Group | None = None

    @classmethod
    def of(cls, data_group: Any = None, vocab_group: Any = None, sequence_group: Any = None) -> Groups:
        """
        Raises:
            TypeError: not a ProcessGroup or DeviceMesh.
            ValueError: a mesh of more than one dimension, or a group without this process.
        """
        return cls(
            Group.of("data_group", data_group),
            Group.of("vocab_group", vocab_group),
            Group.of("sequence_group", sequence_group),
        )

    def __bool__(self) -> bool:
        return any((self.data, self.vocab, self.sequence))

    @property
    def replicas(self) -> int:
        """Ranks of the data group: the share of a rank in a mean over the batch is multiplied by it."""
        return self.data.size if self.data else 1

    def together(self, device: torch.device) -> AbstractContextManager[None]:
        """Inside, an error of one rank becomes an error on every rank.

        Nothing is asked of a group on whose device that would mean to wait for its work (a data group of GPUs).
        """
        return self._failing_together(device) if self else nullcontext()

    @contextmanager
    def _failing_together(self, device: torch.device) -> Iterator[None]:
        error: Exception | None = None
        try:
            yield
        except PeerError:
            raise  # there is nobody to tell
        except Exception as own:
            error = own
        for group in (self.vocab, self.sequence, self.data):
            if group is None or (group is self.data and device.type != "cpu"):
                continue
            failed = int(error is not None)  # the next group hears of it too
            flags = [flag for (flag,) in group.gather_numbers([failed], device, "whether all inputs are in order")]
            if any(flags) and error is None:
                ranks = ", ".join(str(rank) for rank, flag in enumerate(flags) if flag)
                error = PeerError(f"rank {ranks} of {group.name} refused its inputs; its own output says why")
        if error is not None:
            raise error

    def agree(self, facts: dict[str, int], device: torch.device) -> None:
        """Raise ValueError where ranks that work on the same rows or sequences differ in what must be the same."""
        for group, names in ((self.vocab, facts), (self.sequence, ("num_pairs",))):
            if group is None:
                continue
            everyones = group.gather_numbers([facts[name] for name in names], device, "the sizes of the batch")
            for name, values in zip(names, zip(*everyones, strict=True), strict=True):
                if len(set(values)) > 1:
                    raise ValueError(
                        f"{name} differs between the ranks of {group.name}, which is not possible: {values}"
                    )


NO_GROUPS = Groups()


# --- data and sequence groups --------------------------------------------------------------------------------------


def summed(tensor: Tensor, groups: Sequence[Group | None], what: str) -> Tensor:
    """`tensor`, summed in place over each of the groups."""
    for group in groups:
        if group is not None:
            group.all_reduce(tensor, what).wait()
    return tensor


# --- vocabulary group ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class VocabShard:
    """The rows [start, start + size) of the lm-head, which this rank holds; `largest` is any rank's most."""

    group: Group
    start: int
    size: int
    largest: int
    vocab_size: int

    @classmethod
    def of(cls, group: Group, weight: Tensor) -> VocabShard:
        """Where the rows of `weight` (V_local, H) are among those of all ranks.

        Raises:
            ValueError: a shard of fewer than two rows.
        """
        size, device = weight.shape[0] if weight.dim() else 0, weight.device
        sizes = [size for (size,) in group.gather_numbers([size], device, "the sizes of the lm-head's shards")]
        if min(sizes) < LEAST_SHARD:
            raise ValueError(
                f"the ranks of vocab_group hold {sizes} rows of the lm-head, each must have at least {LEAST_SHARD}"
            )
        return cls(group, sum(sizes[: group.rank]), size, max(sizes), sum(sizes))

    def holds(self, target: Tensor) -> Tensor:
        """Which targets (C,), minus `start`, are among this rank's columns."""
        return (target >= 0) & (target < self.size)


# --- lm-heads that an engine has sharded ---------------------------------------------------------------------------


def local_head(tensor: Tensor | None, vocab: Group | None) -> Tensor | None:
    """A DTensor (FSDP2, tensor parallelism) as the plain tensor to multiply by; any other as it is.

    Sharded over the vocabulary group it stays this rank's rows. Over any other mesh dimension it is gathered, once, and
    its gradient is averaged and scattered as FSDP does. (`DTensor.full_tensor()` takes every rank's gradient for the
    complete one, and keeps a slice of it.)
    """
    if tensor is None or not hasattr(tensor, "device_mesh"):
        return tensor
    from torch.distributed.tensor import Partial, Placement, Replicate

    mesh: Any = tensor.device_mesh
    ours = [vocab is not None and mesh.get_group(i).group_name == vocab.handle.group_name for i in range(mesh.ndim)]
    if vocab is not None and not any(ours):
        raise ValueError(f"the lm-head is a DTensor on the mesh {mesh}, which has no dimension that is vocab_group")
    placements: list[Placement] = [p if own else Replicate() for p, own in zip(tensor.placements, ours, strict=True)]  # type: ignore[attr-defined]
    if vocab is not None and not placements[ours.index(True)].is_shard(0):
        raise ValueError(f"the lm-head has placements {tensor.placements}, it must be Shard(0) over vocab_group")  # type: ignore[attr-defined]
    gradients = [p if own else Partial("avg") for p, own in zip(placements, ours, strict=True)]
    gathered: Any = tensor.redistribute(placements=placements)  # type: ignore[attr-defined]
    return gathered.to_local(grad_placements=gradients)
