"""A run: every part in its share of the time, every case in the results at once."""

from __future__ import annotations

import argparse
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console

from benchmarks.contest.turns import reason, release
from benchmarks.gpu import heads, host, kernels, page, right, sparse_eps, step, tiles, ways
from benchmarks.gpu.cases import QUICK_ROUNDS, Case, Settings, Skip
from benchmarks.report.docs import machine_line
from benchmarks.report.results import Results, read

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


def command(options: argparse.Namespace) -> int:
    """`python -m benchmarks.gpu` where there is a GPU: 0 where it ran, 2 or 130 where results do not fit, or Ctrl-C."""
    settings = Settings(rounds=QUICK_ROUNDS) if options.quick else Settings()
    path = options.output / "results.json"
    if not options.resume:
        path.unlink(missing_ok=True)
    try:
        results = Results(options.output, {"rounds": settings.rounds})
    except ValueError as error:
        print(str(error).replace("start anew with --fresh", "start anew without --resume"), file=sys.stderr)
        return 2
    warnings.filterwarnings("ignore")  # peers warn about their own deprecations; a wrong loss is caught
    console = Console(width=max(Console().width, 130))
    try:
        with console.status("") as status:

            def show(key: str, record: dict[str, Any]) -> None:
                status.update(key)
                if "skipped" in record:
                    console.print(f"[dim]{key}: left out: {record['skipped']}", highlight=False)

            run(settings, results, options.seconds, [part for part in PARTS if part.name in options.only], show)
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on from what {path} has", file=sys.stderr)
        return 130
    for sheet in page.sheets(results.cases):
        console.print(sheet.rich())
    console.print(f"{machine_line(results.machine)}\nEvery number: {path}", soft_wrap=True, highlight=False)
    if options.write_docs:
        for written in [*page.write(read(path)), *ways.write(read(path))]:
            print(f"wrote {written}")
    return 0


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
