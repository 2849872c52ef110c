"""Whether another tile is faster than the table's: those that differ from it in one thing (`kernels/autotune.py`)."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Settings, Skip
from benchmarks.kernels import autotune
from orpo_kernels.ops.triton import tiles
from orpo_kernels.ops.triton.launch import current_target
from orpo_kernels.ops.triton.tiles import MatmulTile

DTYPE = torch.bfloat16


def cases(settings: Settings) -> Iterator[Case]:
    if os.environ.get(tiles.TILES_FILE):  # it would be in the place of every tile that is tried
        raise Skip(f"{tiles.TILES_FILE} is set: unset it to have other tiles tried")
    for tile in neighbours():
        yield Case(f"tiles/{name_of(tile)}", partial(measure, tile, settings))


def neighbours() -> list[MatmulTile]:
    """Of autotune's candidates, those that differ from the table's in the product's sizes or in one number beside."""
    target = current_target()
    own = tiles.matmul_tile(DTYPE, target)
    return [tile for tile in autotune.candidates(DTYPE, target) if _differences(tile, own) == 1]


def _differences(a: MatmulTile, b: MatmulTile) -> int:
    other = ("depth", "warps", "stages", "tma", "persistent", "group")
    return ((a.rows, a.columns) != (b.rows, b.columns)) + sum(getattr(a, n) != getattr(b, n) for n in other)


def name_of(tile: MatmulTile) -> str:
    sizes = f"{tile.rows}x{tile.columns}x{tile.depth}, {tile.warps} warps, {tile.stages} stages"
    ways = [name for name, has in (("TMA", tile.tma), ("persistent", tile.persistent)) if has]
    return ", ".join([sizes, f"groups of {tile.group}", *ways])


def measure(tile: MatmulTile, settings: Settings) -> dict[str, Any]:
    """Seconds of both kernels with a product in this tile and in the table's, in turns.

    Raises:
        Skip: a tile that this GPU has no room for, or that gives other values.
    """
    target = current_target()
    own = tiles.matmul_tile(DTYPE, target)
    if fault := autotune.fault_of(tile, DTYPE, target, settings.device):
        raise Skip(fault)
    shape = settings.models[min(1, len(settings.models) - 1)]
    work = autotune.Work(2 * settings.pairs * settings.length, shape, DTYPE, settings.device)
    times = autotune.measure([own, tile], work, DTYPE, target, settings.rounds)
    ratio = statistics.median(b / a for a, b in zip(times[own], times[tile], strict=True))
    medians = {"table": statistics.median(times[own]), "tile": statistics.median(times[tile])}
    return {**medians, "ratio": ratio, "target": target.name, "fields": asdict(tile), "shape": shape.name}
