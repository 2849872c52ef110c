"""The fastest tile of the kernels with a matrix product, measured on this machine's GPU.

    python -m benchmarks.kernels.autotune                                 # writes tiles.json
    ORPO_KERNELS_TILES=tiles.json python train.py                 # and this uses it

Every candidate first has to give the values of the eager mirror on the same inputs; one that does not, or that asks for
more than the GPU has, is named and left out. Then they take turns, one call each of `project_log_odds` and
`project_residual` per round, in a new order every round. The entry of a file that exists already is replaced, its other
entries are kept.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.report.tables import Sheet
from benchmarks.shapes import SHAPES, ModelShape, named
from benchmarks.timing import device_seconds, in_turns
from orpo_kernels.engine.gemm import WeightSlices
from orpo_kernels.ops import torch_ops
from orpo_kernels.ops import triton as triton_ops
from orpo_kernels.ops.triton import tiles
from orpo_kernels.ops.triton.launch import Target, current_target
from orpo_kernels.ops.triton.tiles import MatmulTile

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TOLERANCE = {torch.bfloat16: 2e-2, torch.float32: 1e-4}
CHECKED = (300, 500, 192)  # rows, columns and hidden size of the comparison with the mirror: no multiples of a tile
GROUPS = (4, 8, 16)
NO_GPU = "This needs a GPU that torch and Triton can use, but torch.cuda.is_available() is False here."


def candidates(dtype: torch.dtype, target: Target) -> list[MatmulTile]:
    """Tiles that a GPU may have room for, the table's own first."""
    scale = dtype.itemsize // 2
    sizes = itertools.product(((128, 128), (128, 256), (256, 128), (64, 128), (128, 64)), (32, 64), (4, 8), (2, 3, 4))
    ways = (False, True) if target.name in ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121") else (False,)
    own = tiles.matmul_tile(dtype, target)
    found = [
        replace(own, rows=rows, columns=columns, depth=depth // scale, warps=warps, stages=stages, tma=tma)
        for ((rows, columns), depth, warps, stages), tma in itertools.product(sizes, ways)
    ]
    order = [replace(own, persistent=not own.persistent), *(replace(own, group=group) for group in GROUPS)]
    return list(dict.fromkeys([own, *order, *found]))


def using(tile: MatmulTile, dtype: torch.dtype, target: Target) -> AbstractContextManager:
    """Inside, the chooser has this tile."""
    entries = {**tiles.MATMUL_TILES.get(target.name, {}), dtype: tile}
    return mock.patch.dict(tiles.MATMUL_TILES, {target.name: entries})


class Work:
    """`project_log_odds` and `project_residual` on random inputs."""

    def __init__(self, rows: int, shape: ModelShape, dtype: torch.dtype, device: str) -> None:
        self.x, self.w, self.target = shape.tensors(rows, dtype, device)
        self.columns = slice(0, min(8192, shape.vocab_size))  # of `project_residual`, as the recompute schedule has it
        self.out = self.x.new_empty(rows, self.columns.stop)

    def run(self, ops: object) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-odds (R,) and the residual's first columns, of one backend."""
        weight = WeightSlices(self.w, self.w.dtype, self.w.shape[0])
        m, lse = ops.project_log_odds(self.x, weight, None, self.target, 1.0, None, None)  # type: ignore[attr-defined]
        head = (self.x, self.w[self.columns], None, self.target, lse, 1.0, None, self.out)
        ops.project_residual(*head)  # type: ignore[attr-defined]
        return m, self.out


def fault_of(tile: MatmulTile, dtype: torch.dtype, target: Target, device: str) -> str | None:
    """Why a tile cannot be used; None where it gives the mirror's values."""
    rows, columns, hidden_size = CHECKED
    work = Work(rows, ModelShape("check", hidden_size, columns), dtype, device)
    expected = [value.double().clone() for value in work.run(torch_ops)]
    try:
        with using(tile, dtype, target):
            values = [value.double() for value in work.run(triton_ops)]
    except Exception as error:  # whatever the compiler or the driver refuses, the others are still to be measured
        return f"{type(error).__name__}: {error}".partition("\n")[0]
    errors = [((v - e).norm() / e.norm()).item() for v, e in zip(values, expected, strict=True)]
    return None if max(errors) <= TOLERANCE[dtype] else f"wrong by {max(errors):.1e}"


def measure(
    choices: list[MatmulTile], work: Work, dtype: torch.dtype, target: Target, rounds: int
) -> dict[MatmulTile, list[float]]:
    """Seconds of every round; one more round comes first, and is not counted."""

    def seconds(tile: MatmulTile) -> float:
        with using(tile, dtype, target):
            return device_seconds(lambda: work.run(triton_ops), work.x.device)

    return in_turns(choices, rounds, seconds, warm_up=1)


def write(path: Path, target: Target, dtype: str, tile: MatmulTile) -> None:
    content = json.loads(path.read_text()) if path.exists() else {}
    content.setdefault(target.name, {})[dtype] = asdict(tile)
    path.write_text(json.dumps(content, indent=1) + "\n")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=list(DTYPES), help="(default: bfloat16, also for fp16)")
    parser.add_argument("--shape", type=named, default=SHAPES["Llama-3.2-1B"], help="a model, or HxV")
    parser.add_argument("--rows", type=int, default=8192, help="(default: 8192)")
    parser.add_argument("--rounds", type=int, default=11, help="(default: 11)")
    parser.add_argument("--output", type=Path, default=Path("tiles.json"), help="(default: tiles.json)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    os.environ.pop(tiles.TILES_FILE, None)  # what is measured is what is asked for here
    console, dtype, target = Console(), DTYPES[options.dtype], current_target()

    choices = []
    for tile in track(candidates(dtype, target), "checking"):
        fault = fault_of(tile, dtype, target, "cuda")
        choices += [] if fault else [tile]
        if fault:
            console.print(f"left out: {tile}: {fault}", highlight=False)
    if not choices:
        print("no tile gives the mirror's values: the kernels do not work on this GPU", file=sys.stderr)
        return 1
    with console.status("measuring"):
        times = measure(choices, Work(options.rows, options.shape, dtype, "cuda"), dtype, target, options.rounds)
    ranked = sorted(choices, key=lambda tile: statistics.median(times[tile]))
    rows = [
        [str(tile), f"{1e3 * statistics.median(times[tile]):.3f}", f"{1e3 * min(times[tile]):.3f}"]
        for tile in ranked[:10]
    ]
    title = f"{target.name}, {options.dtype}, {options.shape}"
    console.print(Sheet(title, ("tile", "ms, median", "ms, best"), rows).rich())
    write(options.output, target, options.dtype, ranked[0])
    console.print(f"wrote {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
