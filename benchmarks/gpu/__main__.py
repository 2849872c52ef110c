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
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.gpu.cases import QUICK_ROUNDS

NO_GPU = (
    "This needs a GPU that torch can use, NVIDIA's with a CUDA build or AMD's with a ROCm build, but "
    "torch.cuda.is_available() is False here."
)
NO_PACKAGE = "This needs {}: pip install {}"
SECONDS, QUICK_SECONDS = 480, 120
NAMES = ("kernels", "heads", "ways", "host", "step", "tests", "tiles", "sparse_eps")


def main(arguments: Sequence[str] | None = None) -> int:
    """0 where it ran, whatever it found; 2 where it could not, 130 where it was interrupted."""
    options = _parser().parse_args(arguments)
    if refusal := refused():
        print(refusal, file=sys.stderr)
        return 2
    options.seconds = options.seconds or (QUICK_SECONDS if options.quick else SECONDS)
    from benchmarks.gpu import run

    return run.command(options)


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
