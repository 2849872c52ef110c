"""The contest of heads (`contest/turns.py`) at the shapes of models: time and memory of ours and of the peers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch

from benchmarks.contest import peers, turns, workloads
from benchmarks.contest.exact import Exact, exact
from benchmarks.contest.workloads import Workload
from benchmarks.gpu.cases import Case, Settings, Skip
from benchmarks.shapes import ModelShape

SHARES = {"100%": 1.0, "40%": 0.4}
PEERS = ("plain", "TRL-composed", "Liger", "CCE", "Unsloth")
RECOMPUTE = "ours, recompute"
OURS: turns.Variants = {"ours": {}, RECOMPUTE: {"schedule": "recompute"}}


def cases(settings: Settings) -> Iterator[Case]:
    """All rows first, then two fifths of them."""
    for share in SHARES:
        for shape in settings.models:
            for head in turns.HEADS:
                key = f"heads/{shape.name}/{share}/{head}"
                yield Case(key, functools.partial(measure, shape, share, head, settings))


def measure(shape: ModelShape, share: str, head: str, settings: Settings) -> dict[str, Any]:
    """Everybody on one head in bf16, as `turns.record` has it; a peer that is not installed is named in it."""
    try:
        work, truth = inputs(shape, share, settings.device, settings.pairs, settings.length)
        ours = list(OURS) if head == "trained" else ["ours"]
        names = [turns.FLOOR, *ours, *(name for name in PEERS if serves(name, shape))]
        return turns.record(work, head, names, settings.rounds, variants=OURS, truth=truth)
    except torch.OutOfMemoryError as error:
        raise Skip("out of memory: the inputs do not fit") from error


def serves(name: str, shape: ModelShape) -> bool:
    """Whether a peer computes this head at all; one that is not installed stays, and is named."""
    peer = peers.PEERS[name]
    return (peer.softcap or shape.logit_softcap is None) and (peer.bias or not shape.bias)


@functools.lru_cache(maxsize=1)
def inputs(shape: ModelShape, share: str, device: str, pairs: int, length: int) -> tuple[Workload, Exact]:
    """A batch in bf16, and float64's loss of it."""
    work = workloads.of_model(shape, pairs=pairs, length=length, share=SHARES[share], device=device)
    work = replace(work, name=f"{shape.name}, {share} of the rows").cast(torch.bfloat16)
    return work, exact(work)
