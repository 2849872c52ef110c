"""Fails where our time over that of the bare GEMMs is worse than the one kept for this kind of processor.

    python -m benchmarks.contest.regression             # exit status 1 if it is worse by more than the noise
    python -m benchmarks.contest.regression --update    # keep this machine's ratios

Ours and the bare matrix products on the rows that matter take turns on synthetic batches; what is compared is the
median of their ratio within a round, never a time. The noise is what the ratio does by itself: runs of the same code
are kept, and their spread, or `LEAST_NOISE` if that is more, is what a new run may be worse than the worst of them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from benchmarks.contest import turns
from benchmarks.contest.exact import exact
from benchmarks.contest.suite import default_dtypes
from benchmarks.contest.turns import FLOOR, Measurement, ratios
from benchmarks.contest.workloads import synthetic
from benchmarks.report.tables import Sheet
from orpo_kernels.app import machine

KEPT = Path(__file__).with_name("baselines.json")
LEAST_NOISE = 0.03  # of the ratio
RUNS, ROUNDS = 3, 11
Ratios = dict[str, float]  # by case


def cases() -> list[tuple[str, str]]:
    """dtype and head."""
    return [(dtype, head) for dtype in default_dtypes("cpu") for head in ("frozen", "trained")]


def measure(rounds: int, advance: Callable[[], None] = lambda: None) -> Ratios:
    """Our time over the bare GEMMs', of each case."""
    found = {}
    for dtype, head in cases():
        work = synthetic(pairs=2).cast(getattr(torch, dtype))
        by_name = {m.name: m for m in turns.measure(work, exact(work), head, [FLOOR, "ours"], rounds, lambda: None)}
        found[f"{dtype}, {head}"] = _ratio(by_name)
        advance()
    return found


def _ratio(by_name: dict[str, Measurement]) -> float:
    if failure := by_name["ours"].failure:
        raise RuntimeError(f"our loss is not fit to be timed: {failure}")
    return ratios(by_name["ours"], by_name[FLOOR])[1]


def limit(kept: Sequence[float]) -> float:
    """The most that a ratio may be."""
    return max(kept) + max(max(kept) - min(kept), LEAST_NOISE * statistics.median(kept))


def compare(now: Ratios, kept: dict[str, list[float]]) -> tuple[Sheet, list[str]]:
    """A table, and the cases that are worse."""
    rows, worse = [], []
    for case, ratio in now.items():
        if case not in kept:
            rows.append([case, f"{ratio:.3f}", "", "", "nothing kept"])
            continue
        most = limit(kept[case])
        worse += [case] if ratio > most else []
        says = "worse" if ratio > most else "as it was" if ratio >= min(kept[case]) else "better"
        rows.append([case, f"{ratio:.3f}", f"{min(kept[case]):.3f}-{max(kept[case]):.3f}", f"{most:.3f}", says])
    return Sheet("Ours over the bare GEMMs, forward + backward", ["case", "now", "kept", "at most", ""], rows), worse


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contest.regression",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--update", action="store_true", help=f"keep the ratios of {RUNS} runs")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"(default: {ROUNDS})")
    parser.add_argument("--threads", type=int, default=2, help="(default: 2)")
    parser.add_argument("--kept", type=Path, default=KEPT, help=f"(default: benchmarks/{KEPT.name})")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    console, here = Console(), f"{machine.kind()}, {options.threads} threads"
    baselines = json.loads(options.kept.read_text()) if options.kept.exists() else {}
    runs = RUNS if options.update else 1
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("ours and the bare GEMMs", total=runs * len(cases()))
        found = [measure(options.rounds, lambda: progress.advance(task)) for _ in range(runs)]
    if options.update:
        baselines[here] = {case: [round(run[case], 4) for run in found] for case in found[0]}
        options.kept.write_text(json.dumps(baselines, indent=1) + "\n")
        console.print(f"kept for {here} in {options.kept}", soft_wrap=True)
        return 0
    if here not in baselines:
        console.print(f"Nothing is kept for {here}: --update keeps what this machine shows.", soft_wrap=True)
        return 2
    sheet, worse = compare(found[0], baselines[here])
    console.print(here, sheet.rich())
    return 1 if worse else 0


if __name__ == "__main__":
    sys.exit(main())
