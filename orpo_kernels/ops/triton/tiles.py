"""How large the kernels' tiles are, by how many warps and in how many stages: a table with its reasons.

Pure functions of the dtype, the sizes and the target, so that they can be tested where there is no GPU. What an entry
compiles to is printed by `python -m benchmarks.kernels.compiled`; `python -m benchmarks.kernels.autotune` measures on a
GPU and writes a file of entries, which the environment variable ORPO_KERNELS_TILES puts in place of these.
"""

from __future__ import annotations

import functools
import json
import os
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from ...engine.work import COLUMNS_PER_SPLIT
from .launch import Target

TILES_FILE = "ORPO_KERNELS_TILES"  # the environment variable


@dataclass(frozen=True)
class MatmulTile:
    """A tile of `x @ w.T`: rows x columns of the product, `depth` of the hidden size at a time."""

    rows: int
    columns: int
    depth: int
    warps: int
    stages: int
    tma: bool = False  # operands through the tensor memory accelerator
    # A program a multiprocessor, which goes over several tiles. Statistics of each tile take memory, which is planned
    # for in 16 bits on the targets of `engine.work.COLUMNS_PER_TILE` alone, whatever a measured file asks for.
    persistent: bool = False
    group: int = 8  # row blocks that run side by side, and so share a tile of the weight while it is in the L2 cache

    def narrow(self, target: Target) -> MatmulTile:
        """For what needs registers beside the widest tiles' accumulators: a bias, a soft-cap, addresses."""
        return replace(self, columns=min(self.columns, NARROW_COLUMNS.get(target.name, 128)))


@dataclass(frozen=True)
class RowTile:
    """Columns of one row at a time."""

    columns: int
    warps: int


# The larger a tile, the less it reads for each product, and reading is what a GPU has least of: a tile of 128 x 128 in
# bf16 does 64 operations a byte, of 128 x 256 it does 85. So each entry is the largest tile whose code neither spills
# registers nor takes more shared memory than there is, with the stages that then fit. With eight warps a thread of a
# 128 x 256 tile holds 128 accumulators, half of the registers it may have; with four it would be all of them.
#
# fp32 operands are split into three tf32 products on NVIDIA ("tf32x3", as exact as fp32), into six of bf16 on RDNA, and
# multiplied as they are on CDNA. Where operands go through registers (mma.sync, wmma) their parts do as well: half the
# columns and half the depth.
_SM_80 = {  # 163 KiB of shared memory; 128 x 256 spills. 3 stages leave room for two blocks where registers do.
    torch.bfloat16: MatmulTile(128, 128, 64, warps=8, stages=3),
    torch.float32: MatmulTile(128, 64, 16, warps=8, stages=4),
}
_SM_89 = {  # 99 KiB; 128 x 256 spills
    torch.bfloat16: MatmulTile(128, 128, 64, warps=8, stages=3),
    torch.float32: MatmulTile(128, 64, 16, warps=8, stages=4),
}
_SM_90 = {  # 227 KiB. By TMA 128 x 256 fits, because it needs no registers for addresses; by cp.async it spills.
    # Persistent programs and groups of 16 were the fastest on an H100 (docs/gpu.md); elsewhere neither was measured.
    torch.bfloat16: MatmulTile(128, 256, 64, warps=8, stages=4, tma=True, persistent=True, group=16),
    torch.float32: MatmulTile(128, 128, 32, warps=8, stages=4, tma=True),
}
_SM_100 = {  # 227 KiB, and accumulators in tensor memory: 256 of its 512 columns. TMA as on sm_90.
    torch.bfloat16: MatmulTile(128, 256, 64, warps=8, stages=4, tma=True),
    torch.float32: MatmulTile(128, 128, 32, warps=8, stages=4, tma=True),
}
_SM_120 = {  # 99 KiB, mma.sync as on sm_89, whose addresses TMA saves: a sixth to a quarter of the registers
    torch.bfloat16: MatmulTile(128, 128, 64, warps=8, stages=3, tma=True),
    torch.float32: MatmulTile(128, 64, 16, warps=8, stages=4, tma=True),
}
_GFX_942 = {  # 64 KiB of LDS, wavefronts of 64: 64 accumulators a thread; 256 x 256 spills. 2 stages are AMD's default.
    torch.bfloat16: MatmulTile(128, 256, 64, warps=8, stages=2),
    torch.float32: MatmulTile(128, 128, 32, warps=8, stages=2),
}
_GFX_950 = {  # 160 KiB, loaded without registers between; 256 x 256 spills
    torch.bfloat16: MatmulTile(128, 256, 64, warps=8, stages=2),
    torch.float32: MatmulTile(128, 128, 32, warps=8, stages=2),
}
_GFX_1100 = {  # 64 KiB, wavefronts of 32, at most 256 registers
    torch.bfloat16: MatmulTile(128, 128, 64, warps=8, stages=2),
    torch.float32: MatmulTile(64, 64, 32, warps=8, stages=2),
}
_UNKNOWN = {  # what any GPU has room for: 48 KiB
    torch.bfloat16: MatmulTile(64, 64, 32, warps=4, stages=2),
    torch.float32: MatmulTile(64, 64, 32, warps=4, stages=2),
}
_INTERPRETER = {  # small, so that small matrices have several tiles
    torch.bfloat16: MatmulTile(16, 32, 16, warps=4, stages=1),
    torch.float32: MatmulTile(16, 32, 16, warps=4, stages=1),
}
MATMUL_TILES: dict[str, dict[torch.dtype, MatmulTile]] = {
    "interpreter": _INTERPRETER,
    "sm_80": _SM_80,
    "sm_86": _SM_89,  # the same shared memory and instructions
    "sm_89": _SM_89,
    "sm_90": _SM_90,
    "sm_100": _SM_100,
    "sm_103": _SM_100,
    "sm_120": _SM_120,
    "sm_121": _SM_120,
    "gfx942": _GFX_942,
    "gfx950": _GFX_950,
    "gfx1100": _GFX_1100,
}

NARROW_COLUMNS = {"gfx1100": 64}  # what fits beside a soft-cap's arithmetic; 128 elsewhere


def matmul_tile(dtype: torch.dtype, target: Target) -> MatmulTile:
    """The tile of a product of `dtype` matrices; fp16 has bf16's."""
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    measured = tiles_of_file(os.environ.get(TILES_FILE)).get(target.name, {})
    return measured.get(dtype) or MATMUL_TILES.get(target.name, _UNKNOWN)[dtype]


def row_tile(vocab_size: int, dtype: torch.dtype, target: Target) -> RowTile:
    """A whole row where it fits the registers of 1024 threads beside its arithmetic; else as much of it as does."""
    if target.backend == "interpreter":
        return RowTile(32, warps=4)
    warps = 16 if target.name.startswith("gfx9") else 32  # wavefronts of 64
    row = 1 << (vocab_size - 1).bit_length()
    if target.backend == "hip" and row <= 32768:  # more than 64 registers a thread, which NVIDIA has not
        return RowTile(row, warps)
    return RowTile(min(row, 32768 // dtype.itemsize), warps)


PASS_COLUMNS = {"sm_80": 2048}  # where 4096 spill; elsewhere they do not


def pass_tile(vocab_size: int, target: Target) -> RowTile:
    """Columns at a time of a pass over a row that is no one tile: few numbers a thread, several rows a processor.

    Measured on an H100 (docs/gpu.md): 2060 GB/s of the residual's read and write, 1330 with one row of 1024 threads.
    """
    if target.backend == "interpreter":
        return RowTile(32, warps=4)
    columns = PASS_COLUMNS.get(target.name, 4096)
    return RowTile(min(1 << (vocab_size - 1).bit_length(), columns), warps=8)


def vocabulary_splits(rows: int, vocab_size: int, tile: MatmulTile, target: Target) -> tuple[int, int]:
    """(splits, column tiles of each): enough programs for two waves, no split without a column.

    Persistent programs have as many tiles as there are, and a split for each.
    """
    row_blocks = -(-rows // tile.rows)
    tiles = -(-vocab_size // tile.columns)
    if tile.persistent:
        return tiles, 1
    wanted = max(-(-vocab_size // COLUMNS_PER_SPLIT), -(-2 * target.processors // row_blocks))
    tiles_per_split = -(-tiles // min(wanted, tiles))
    return -(-tiles // tiles_per_split), tiles_per_split


def programs(tiles: int, tile: MatmulTile, target: Target) -> int:
    """How many take `tiles` tiles: one each, or as many as run at one time."""
    return min(tiles, target.processors) if tile.persistent else tiles


def dot_precision(dtype: torch.dtype, target: Target) -> str:
    """How `tl.dot` multiplies fp32 operands: by the precision that torch is set to for its own matrix products."""
    if dtype != torch.float32 or target.backend == "interpreter":
        return "ieee"
    exact = torch.get_float32_matmul_precision() == "highest"
    if target.backend == "cuda" and isinstance(target.arch, int) and target.arch < 80:
        return "ieee"  # no tf32
    if target.backend == "hip":
        # CDNA has fp32 matrix instructions; RDNA has none, six bf16 products are as exact.
        return "ieee" if str(target.arch).startswith("gfx9") else "bf16x6"
    return "tf32x3" if exact else "tf32"


def tile_of(x: Tensor, w: Tensor, is_plain: bool, target: Target) -> MatmulTile:
    """The tile of `x @ w.T`; `is_plain` unless its epilogue needs registers of its own.

    The tensor memory accelerator wants rows, and such that begin at 16 bytes. Without it, addresses take the widest
    tile's room.
    """
    tile = matmul_tile(x.dtype, target)
    if tile.tma and not all(map(_suits_tma, (x, w))):
        tile, is_plain = replace(tile, tma=False, persistent=False), False
    return tile if is_plain else tile.narrow(target)


def _suits_tma(matrix: Tensor) -> bool:
    is_aligned = matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
    return is_aligned and matrix.shape[0] > 0


def operands(x: Tensor, w: Tensor, tile: MatmulTile) -> tuple[Any, Any]:
    """x and w as the kernels take them: pointers, or tensor descriptors for the tensor memory accelerator."""
    if not tile.tma:
        return x, w
    return (
        TensorDescriptor.from_tensor(x, [tile.rows, tile.depth]),
        TensorDescriptor.from_tensor(w, [tile.columns, tile.depth]),
    )


def constants(tile: MatmulTile, x: Tensor, target: Target) -> dict[str, Any]:
    """The compile-time constants of a kernel that multiplies x (R, H) in these tiles, and how it is launched."""
    return {
        "EVEN_H": x.shape[1] % tile.depth == 0,
        "TMA": tile.tma,
        "PRECISION": dot_precision(x.dtype, target),
        "GROUP": tile.group,
        "PERSISTENT": tile.persistent,
        "BLOCK_R": tile.rows,
        "BLOCK_V": tile.columns,
        "BLOCK_H": tile.depth,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }


# ---------------------------------------------------------------------------------------------------------------------
# Measured tiles: {"sm_90": {"bfloat16": {"rows": 128, "columns": 256, "depth": 64, "warps": 8, "stages": 4, ...}}}
# ---------------------------------------------------------------------------------------------------------------------

FILE_DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@functools.lru_cache
def tiles_of_file(path: str | None) -> dict[str, dict[torch.dtype, MatmulTile]]:
    """By target and dtype, what the file says; nothing for None.

    Raises:
        ValueError: a file that is not as above, with what is wrong.
    """
    if not path:
        return {}
    try:
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or not all(isinstance(entries, dict) for entries in content.values()):
            raise ValueError('it must be {target: {dtype: {"rows": ..., "columns": ..., ...}}}')
        return {
            target: {_dtype_of(name): _checked(f"{target}, {name}", entry) for name, entry in entries.items()}
            for target, entries in content.items()
        }
    except (OSError, ValueError) as error:
        raise ValueError(f"{TILES_FILE}={path}: {error}") from error


def _dtype_of(name: str) -> torch.dtype:
    if name not in FILE_DTYPES:
        raise ValueError(f"dtype is {name!r}, it must be one of {', '.join(FILE_DTYPES)} (fp16 has bf16's)")
    return FILE_DTYPES[name]


def _checked(where: str, entry: Any) -> MatmulTile:
    names = {field.name for field in fields(MatmulTile)}
    needed = names - {"tma", "persistent", "group"}
    if not isinstance(entry, dict) or not needed <= set(entry) <= names:
        optional = ", ".join(sorted(names - needed))
        raise ValueError(f"{where}: {entry!r} must have {', '.join(sorted(needed))}, and may have {optional}")
    for name in sorted(set(entry) & set(LIMITS)):
        least, most = LIMITS[name]
        value = entry[name]
        is_power_of_two = isinstance(value, int) and value > 0 and value & (value - 1) == 0
        if name != "stages" and not is_power_of_two:
            raise ValueError(f"{where}: {name} is {value!r}, it must be a power of two")
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise ValueError(f"{where}: {name} is {value!r}, it must be a whole number from {least} to {most}")
    for name in ("tma", "persistent"):
        if not isinstance(entry.get(name, False), bool):
            raise ValueError(f"{where}: {name} is {entry[name]!r}, it must be true or false")
    return MatmulTile(**entry)


LIMITS = {
    "rows": (16, 512),
    "columns": (16, 512),
    "depth": (16, 256),
    "warps": (1, 32),
    "stages": (1, 8),
    "group": (1, 64),
}
