"""What one GPU shows in eight minutes: whether the kernels are right, how fast they are, and what misses its goal.

    python -m benchmarks.gpu                    # everything, at most about eight minutes; `make gpu`
    python -m benchmarks.gpu --quick            # two minutes: what comes first of every part
    python -m benchmarks.gpu --only heads host  # these parts alone, with all of the time
    python -m benchmarks.gpu --resume           # goes on where a run was interrupted, or where time was out
    python -m benchmarks.gpu --write-docs       # and writes docs/gpu.md, the README's figures and the planner's table

    kernels     every kernel beside the library's product, or beside a copy of as many bytes
    heads       time and memory of ours and the peers on the heads of five models
    ways        which way of a forward pass is the fastest: inside a kernel, or by chunks of 1024 to 8192 rows
    host        what a call takes on the host, and how much it launches
    step        a whole training step of a model of Llama-3.2-1B's shape, padded and shared, and TRL's
    tests       tests/gpu, several at a time
    tiles       whether another tile is faster
    sparse_eps  on real hidden states, if they are here

Every part has a share of the time, and what it leaves the next ones have. Nothing is downloaded; what is missing is
named. Every measurement is in --output at once.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.gpu.run import Part

NO_GPU = (
    "This needs a GPU that torch can use, NVIDIA's with a CUDA build or AMD's with a ROCm build, but "
    "torch.cuda.is_available() is False here."
)
NO_PACKAGE = "This needs {}: pip install {}"
SECONDS, QUICK_SECONDS, QUICK_ROUNDS = 480, 120, 3
NAMES = ("kernels", "heads", "ways", "host", "step", "tests", "tiles", "sparse_eps")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where it ran, whatever it found; 2 where it could not, 130 where it was interrupted."""
    options = _parser().parse_args(arguments)
    if refusal := refused():
        print(refusal, file=sys.stderr)
        return 2
    from benchmarks.gpu import page, ways
    from benchmarks.gpu.cases import Settings
    from benchmarks.gpu.run import PARTS
    from benchmarks.report.results import Results, read

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
    seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    try:
        measure([part for part in PARTS if part.name in options.only], settings, results, seconds)
    except KeyboardInterrupt:
        print(f"interrupted; --resume goes on from what {path} has", file=sys.stderr)
        return 130
    if options.write_docs:
        for written in [*page.write(read(path)), *ways.write(read(path))]:
            print(f"wrote {written}")
    return 0


def measure(parts: Sequence[Part], settings: Any, results: Any, seconds: float) -> None:
    """Run them, with a line for each case as it ends, and print all tables."""
    from rich.console import Console

    from benchmarks.gpu import page
    from benchmarks.gpu.run import run
    from benchmarks.report.docs import machine_line

    console = Console(width=max(Console().width, 130))
    with console.status("") as status:

        def show(key: str, record: dict[str, Any]) -> None:
            status.update(key)
            if "skipped" in record:
                console.print(f"[dim]{key}: left out: {record['skipped']}", highlight=False)

        run(settings, results, seconds, parts, show)
    for sheet in page.sheets(results.cases):
        console.print(sheet.rich())
    console.print(f"{machine_line(results.machine)}\nEvery number: {results.path}", soft_wrap=True, highlight=False)


def refused() -> str | None:
    """Why it cannot run here; None where it can."""
    if importlib.util.find_spec("rich") is None:
        return NO_PACKAGE.format("rich", "rich")
    if not torch.cuda.is_available():
        return NO_GPU
    if importlib.util.find_spec("triton") is None:
        return NO_PACKAGE.format("triton, for the kernels", "triton")
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help=f"{QUICK_SECONDS} s and {QUICK_ROUNDS} rounds")
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, metavar="PART", help=", ".join(NAMES))
    parser.add_argument("--seconds", type=float, help=f"of all parts together (default: {SECONDS}, quick: less)")
    parser.add_argument("--resume", action="store_true", help="go on with what --output has")
    parser.add_argument(
        "--write-docs",
        action="store_true",
        help="write docs/gpu.md, the README's figures and the planner's table of times",
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder (default: runs/gpu)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
