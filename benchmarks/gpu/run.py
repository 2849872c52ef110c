"""A run: every part in its share of the time, every case in the results at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.contest.turns import reason, release
from benchmarks.gpu import heads, host, kernels, right, sparse_eps, step, tiles, ways
from benchmarks.gpu.cases import Case, Settings, Skip
from benchmarks.report.results import Results

TIME_IS_OUT = "the time of this part is out"


@dataclass(frozen=True)
class Part:
    """Some cases, and the share of the run's time that they have; what they leave, the next ones have."""

    name: str
    share: float
    cases: Callable[[Settings], Iterator[Case]]


# What is asked for first comes first: an interrupted run has it.
PARTS = (
    Part("kernels", 0.08, kernels.cases),
    Part("heads", 0.34, heads.cases),
    Part("ways", 0.04, ways.cases),
    Part("host", 0.02, host.cases),
    Part("step", 0.17, step.cases),
    Part("tests", 0.24, right.cases),
    Part("tiles", 0.08, tiles.cases),
    Part("sparse_eps", 0.03, sparse_eps.cases),
)


def run(
    settings: Settings,
    results: Results,
    seconds: float,
    parts: Sequence[Part] = PARTS,
    show: Callable[[str, dict[str, Any]], None] = lambda key, record: None,
) -> None:
    """All cases of these parts that the results lack. What was skipped before is tried again.

    show: called before each case, with an empty record, and behind it.
    """
    begin, whole = time.monotonic(), sum(part.share for part in parts)
    until = 0.0
    for part in parts:
        until += part.share / whole * seconds
        for case in _cases(part, replace(settings, seconds=begin + until - time.monotonic())):
            if "skipped" in results.cases.get(case.key, {"skipped": ""}):
                show(case.key, {})
                is_over = time.monotonic() >= begin + until
                results.add(case.key, {"skipped": TIME_IS_OUT} if is_over else record_of(case))
                release(torch.device(settings.device))
                show(case.key, results.cases[case.key])


def _cases(part: Part, settings: Settings) -> Iterable[Case]:
    """Those of a part; one case that says why, where they cannot even be listed."""
    try:
        return list(part.cases(settings))
    except Exception as error:
        skipped = {"skipped": why(error)}
        return [Case(part.name, lambda: skipped)]


def record_of(case: Case) -> dict[str, Any]:
    """What it measured, or why there is nothing: whatever goes wrong, the others are still to be measured."""
    try:
        return case.run()
    except Exception as error:
        return {"skipped": why(error)}


def why(error: Exception) -> str:
    return str(error) if isinstance(error, Skip) else reason(error)
