"""What the host takes: a call at a tiny size from an idle device, beside plain torch's, and how much it launches."""

from __future__ import annotations

import collections
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.contest import workloads
from benchmarks.contest.turns import HEADS, Contest, Contestant
from benchmarks.gpu.cases import Case, Settings
from benchmarks.timing import medians, synchronize, wall_seconds

CALLS = 5  # as many rounds as elsewhere, times this: a call takes a millisecond or two


def cases(settings: Settings) -> Iterator[Case]:
    for head in HEADS:
        yield Case(f"host/{head}", partial(measure, head, settings))


def measure(head: str, settings: Settings) -> dict[str, Any]:
    """Wall seconds of ours and plain's, by the medians, and the device operations of one call of ours."""
    device = torch.device(settings.device)
    work = workloads.synthetic(4, 32, 64, 1000, 0.7, device=device).cast(torch.bfloat16)
    contest = Contest(work, head)
    calls = {name: partial(_call, contest, contest.contestant(name)) for name in ("ours", "plain")}
    found = medians(calls, CALLS * settings.rounds, partial(wall_seconds, device=device))
    operations = device_operations(calls["ours"], device)
    return {
        **found,
        "ratio": found["ours"] / found["plain"],
        "operations": sum(operations.values()) if operations is not None else None,
        "by_name": operations,
    }


def _call(contest: Contest, contestant: Contestant) -> None:
    """As `Contest.run`, without its marks: those wait."""
    contest.clear()
    with torch.set_grad_enabled(contest.head != "evaluation"):
        result = contestant.forward()
        if contest.head != "evaluation":
            contestant.backward(result)


def device_operations(call: Any, device: torch.device) -> dict[str, int] | None:
    """How often each kernel, copy and fill runs in one call, by the profiler; None where there is no GPU."""
    if device.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as recorded:
        call()
        synchronize(device)
    names = (event.name[:80] for event in recorded.events() if "CUDA" in str(event.device_type))
    return dict(collections.Counter(names).most_common())
