"""A pool of gloo processes, started once for a module of tests, that run functions together.

    with Ranks(4) as ranks:
        results = ranks.run(function, arguments...)     # function(...) on every rank; their results, in rank order

`function` has to be importable. It finds the groups of `topology()`: the whole world, pairs of ranks, a 2 x 2 mesh.
"""

from __future__ import annotations

import datetime
import os
import tempfile
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

TIMEOUT = 60  # seconds until a collective gives up; in a test that passes, none does


@dataclass(frozen=True)
class Topology:
    """What a rank of the pool may pass as a group."""

    world: Any
    pair: Any  # ranks 0 and 1, or 2 and 3
    mesh: Any  # ("outer", "inner"), 2 x 2; None for an odd number of ranks


_topology: Topology | None = None


def topology() -> Topology:
    assert _topology is not None
    return _topology


class RankError(AssertionError):
    """A function failed on some rank; holds every rank's traceback."""


class Ranks:
    def __init__(self, size: int, timeout: float = TIMEOUT):
        self.size, self.timeout = size, timeout

    def __enter__(self) -> Ranks:
        # Processes are forked off one that has imported what takes seconds, and has no thread yet.
        context = mp.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed", "orpo_kernels.loss", "tests.batches", "tests.training"])
        self._folder = tempfile.TemporaryDirectory()
        self._pipes, self._processes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(rank, self.size, f"file://{self._folder.name}/store", self.timeout, theirs),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
        return self

    def __exit__(self, *_: Any) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()  # they have nothing to leave behind
            process.join()
        self._folder.cleanup()

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """`function(*arguments)` on every rank. Raises `RankError` where one fails."""
        for pipe in self._pipes:
            pipe.send((function, arguments))
        results = [_received(pipe) for pipe in self._pipes]
        if failed := [f"rank {rank}: {text}" for rank, (ok, text) in enumerate(results) if not ok]:
            raise RankError("\n".join(failed))
        return [result for _, result in results]


def _received(pipe: Connection) -> tuple[bool, Any]:
    try:
        return pipe.recv()
    except EOFError:
        return False, "the process has died"


def _serve(rank: int, size: int, store: str, seconds: float, pipe: Connection) -> None:
    global _topology
    torch.set_num_threads(1)
    # A tensor in a message travels as its bytes, not as a handle of shared memory.
    mp.set_sharing_strategy("file_system")
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size))
    patient, timeout = datetime.timedelta(seconds=TIMEOUT), datetime.timedelta(seconds=seconds)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=size, timeout=patient)
    world = dist.new_group(list(range(size)), timeout=timeout)
    pairs = [dist.new_group([i, i + 1], timeout=timeout) for i in range(0, size - 1, 2)]
    mesh = init_device_mesh("cpu", (size // 2, 2), mesh_dim_names=("outer", "inner")) if size % 2 == 0 else None
    _topology = Topology(world, pairs[rank // 2] if rank // 2 < len(pairs) else None, mesh)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            break
        try:
            pipe.send((True, function(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
    dist.destroy_process_group()
