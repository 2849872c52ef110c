"""`sparse_eps` on real hidden states, where there are some: SmolLM2 on LLMBar, beside the exact gradients."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.contest import turns, workloads
from benchmarks.contest.workloads import Workload
from benchmarks.gpu.cases import Case, Settings, Skip

SPARSE = "ours, sparse_eps"
VARIANTS: turns.Variants = {"ours": {}, SPARSE: {"sparse_eps": 2.0**-14}}
PAIRS = 16


def cases(settings: Settings) -> Iterator[Case]:
    for head in ("frozen", "trained"):
        yield Case(f"sparse_eps/{head}", functools.partial(measure, head, settings))


def measure(head: str, settings: Settings) -> dict[str, Any]:
    return turns.record(real(settings.device), head, [turns.FLOOR, *VARIANTS], settings.rounds, variants=VARIANTS)


@functools.lru_cache(maxsize=1)
def real(device: str) -> Workload:
    """
    Raises:
        Skip: the model or the pairs are not here.
    """
    if not workloads.have_real_data():
        raise Skip("no SmolLM2-135M or no LLMBar here: examples/smollm2.py and contest/workloads.py look for them")
    return workloads.llmbar(PAIRS).cast(torch.bfloat16).to(device)
