"""What `plan` decides by: the sizes of a call, what requires grad, and the limits of what may exist at one time."""

from __future__ import annotations

import functools
import os
from dataclasses import astuple, dataclass, replace
from typing import NamedTuple

import torch

from ..devices import kind_of

STARVED_ROWS = 256  # of a chunk: with fewer, two GEMMs through the library cost more than three inside kernels
COLUMNS_PER_SPLIT = 4096  # of the vocabulary, whose statistics a fused forward pass takes apart: 12 bytes a row
# The same by kinds of GPU whose programs are persistent in 16 bits: the columns of a tile (ops/triton/tiles.py).
COLUMNS_PER_TILE = {"sm_90": 256}
GEMM_DTYPES = (None, torch.float16, torch.bfloat16, torch.float32, torch.float64)  # by number, for a graph
FACTOR_SLICE = 8192  # rows of dW that exist in fp32 at one time, where it is summed there


@dataclass(frozen=True)
class Limits:
    """How much of a call exists at one time.

    Chunks of logits are large enough that a GEMM runs at full speed, and small enough that nothing else notices them.
    The defaults are a GPU's; `Limits.of` knows those of a CPU.

    CPU: forward + backward over GEMMs on all rows at once, two cores, fp32, head frozen: 1.16 with 512 rows a chunk,
    1.13 with 1024, 1.4 with 128 (H = 576, V = 49152); 1.12, 1.05 and 1.5 (H = 1024, V = 32768). Memory binds before
    that at larger V. In bf16 the fresh pages of a chunk weigh more, its products less: 1.08 with 512, 1.13 with 1024,
    yet 1.12 and 1.10 where the weight is trained and its residual, which has to be held, is where the logits were.

    GPU: published measurements ask for 1k to 4k rows, which kernels that work in place can afford (2 bytes a bf16
    logit), while eager row-wise work (6 bytes) has to keep to the peak memory that we promise. Where chunks were timed
    on a kind of GPU, what was measured takes the place of these (`speeds.py`), unless limits are given.

    Attributes:
        chunk_rows: rows of a chunk of logits.
        narrow_chunk_rows: the same in 16 bits, where the residual is not held.
        chunk_bytes: bytes of a chunk of logits.
        least_rows: rows that a chunk gets on a GPU, where the budget has room for them and the kernels work in place.
        fused_rows: rows of a chunk that has no logits, only its hidden states and partial statistics.
        tiled_rows: the same where every tile leaves statistics of its own, a sixteenth as wide.
        least_columns: columns of a slice of the vocabulary; a narrower one starves the GEMM.
        block_rows: rows that share their active columns in the sparse schedule: fewer rows have fewer of them, but
            gather more often.
        sparse_columns: rows of dW that the sparse schedule sums at one time, going over them several times: they stay
            in a CPU's cache.
        dense_share: the share of active columns from which on a chunk of the sparse schedule goes dense.
        gemm_dtype: the dtype of the matrix products; None: the one that is fast on the device (`gemm_dtype`).
    """

    chunk_rows: int = 4096
    narrow_chunk_rows: int = 4096
    chunk_bytes: int = 256 * 2**20
    least_rows: int = 1024
    fused_rows: int = 16384
    tiled_rows: int = 4096
    least_columns: int = 512
    block_rows: int = 256
    sparse_columns: int = 4096
    dense_share: float = 0.5
    gemm_dtype: torch.dtype | None = None

    @classmethod
    def of(cls, on_cpu: bool) -> Limits:
        return cls(chunk_rows=1024, narrow_chunk_rows=512, chunk_bytes=192 * 2**20) if on_cpu else cls()

    @property
    def numbers(self) -> list[float]:
        """As an operator of a graph takes them."""
        *numbers, dtype = astuple(self)
        return [*map(float, numbers), float(GEMM_DTYPES.index(dtype))]

    @classmethod
    def of_numbers(cls, numbers: list[float] | None) -> Limits | None:
        if numbers is None:
            return None
        *counts, dense_share, dtype = numbers
        return replace(cls(*map(int, counts)), dense_share=dense_share, gemm_dtype=GEMM_DTYPES[int(dtype)])  # type: ignore[arg-type]


class Chunks(NamedTuple):
    """How a call is cut up; see `Plan`."""

    row_chunk: int
    vocab_slice: int
    weight_slice: int
    group_rows: int | None
    fused: bool


class Memory(NamedTuple):
    """Bytes beside inputs and returned gradients; see `Plan`."""

    held_bytes: int
    forward_bytes: int
    backward_bytes: int


@dataclass(frozen=True)
class Work:
    """The sizes of a call and what requires grad."""

    rows: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    weight_dtype: torch.dtype
    device: torch.device
    backend: str
    needs_hidden: bool
    needs_weight: bool
    needs_bias: bool
    softcap: bool
    sparse_eps: float | None
    sharded: bool = False
    given_limits: Limits | None = None
    target: str | None = None  # the kind of GPU, "sm_90" or "gfx942"; None where it is not known
    tf32: bool = False  # whether a GPU may round the operands of products in fp32

    @property
    def needs_head(self) -> bool:
        return self.needs_weight or self.needs_bias

    @functools.cached_property
    def gemm_dtype(self) -> torch.dtype:
        return self.limits.gemm_dtype or gemm_dtype(self.dtype, self.device, self.backend)

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU does the work. Where Triton's kernels are given CPU tensors it stands for a GPU."""
        return self.device.type == "cpu" and self.backend != "triton"

    @functools.cached_property
    def limits(self) -> Limits:
        return self.given_limits or Limits.of(self.on_cpu)

    @property
    def in_place(self) -> bool:
        """Whether row-wise work needs no memory of its own."""
        return self.backend in ("native", "triton")

    @property
    def has_fused_products(self) -> bool:
        """Whether statistics and recomputed residuals come out of the kernel that makes the logits."""
        return self.backend == "triton"

    @property
    def residual_bytes(self) -> int:
        return self.rows * self.vocab_size * self.gemm_dtype.itemsize

    @property
    def accumulator_bytes(self) -> int:
        """A weight gradient in fp32, which groups of pairs have to be summed in."""
        return self.vocab_size * self.hidden_size * max(4, self.gemm_dtype.itemsize) if self.needs_weight else 0

    @property
    def casts(self) -> bool:
        """Whether the weight has another dtype than the GEMMs."""
        return self.weight_dtype != self.gemm_dtype

    @property
    def weight_row_bytes(self) -> int:
        """H numbers in the GEMM's dtype."""
        return self.hidden_size * self.gemm_dtype.itemsize

    @property
    def logit_bytes(self) -> int:
        """A logit in its chunk. Eager row-wise work is done in fp32, and a soft-cap keeps its slope."""
        itemsize = self.gemm_dtype.itemsize
        if self.in_place:
            return itemsize
        wide = max(4, itemsize)
        return itemsize + (wide if itemsize < 4 else 0) + (2 * wide if self.softcap else 0)

    @property
    def chunk_row_bytes(self) -> int:
        """A row of a chunk: its logits, and on top of them its hidden states, and later what row-wise work adds."""
        logits = self.vocab_size * self.gemm_dtype.itemsize
        return logits + max(self.vocab_size * self.logit_bytes - logits, self.weight_row_bytes)

    @property
    def product_bytes(self) -> int:
        """A product of 16-bit operands before it joins its sum in fp32, which only GPUs add up as they multiply."""
        is_apart = self.device.type == "cpu" and self.gemm_dtype.itemsize < 4 and self.needs_hidden
        return self.rows * self.weight_row_bytes if is_apart else 0

    def factor_bytes(self, columns: int) -> int:
        """Of so many rows of dW those that exist in fp32 at one time, to be multiplied before they are fp16."""
        is_apart = self.needs_weight and self.gemm_dtype == torch.float16
        return min(FACTOR_SLICE, columns) * self.hidden_size * 4 if is_apart else 0

    @property
    def columns_apart(self) -> int:
        """Of the vocabulary, whose statistics a fused forward pass takes apart: a split's, or a tile's."""
        tile = COLUMNS_PER_TILE.get(self.target or "")
        is_tiled = tile and self.gemm_dtype.itemsize == 2 and not (self.softcap or self.casts or self.vocab_size % tile)
        return tile if tile and is_tiled else COLUMNS_PER_SPLIT

    @property
    def fused_rows(self) -> int:
        """The most rows of a chunk without logits."""
        return self.limits.fused_rows if self.columns_apart == COLUMNS_PER_SPLIT else self.limits.tiled_rows

    @property
    def fused_row_bytes(self) -> int:
        """A row of a chunk without logits: its hidden states, and its statistics part by part of the vocabulary."""
        return self.weight_row_bytes + 12 * -(-self.vocab_size // self.columns_apart)

    @property
    def column_bytes(self) -> int:
        """A column of the residual, and where operands are cast also its row of the weight and of the gradient."""
        return max(self.rows, 1) * self.logit_bytes + self.casts * 2 * self.weight_row_bytes

    def chunk_bytes(self, chunks: Chunks) -> int:
        """A chunk of rows, and the slice of the weight that is cast for it."""
        row = self.fused_row_bytes if chunks.fused else self.chunk_row_bytes
        return chunks.row_chunk * row + self.casts * chunks.weight_slice * self.weight_row_bytes

    @property
    def statistics_bytes(self) -> int:
        """Two float64 numbers a row."""
        return 16 * self.rows

    @property
    def hidden_rows_bytes(self) -> int:
        """The hidden states of all rows, or their gradients."""
        return self.rows * self.weight_row_bytes


def gemm_dtype(dtype: torch.dtype, device: torch.device, backend: str = "torch") -> torch.dtype:
    """The dtype in which a GEMM of `dtype` operands runs fast on `device`.

    A CPU without matrix instructions for a 16-bit dtype emulates it, 10 to 100 times slower than fp32. Casting the
    operands to fp32, a chunk at a time, is then faster and more accurate as well. (Not where the CPU emulates a GPU.)
    """
    if device.type != "cpu" or backend == "triton" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    if dtype == torch.float16:
        return dtype if torch.cpu._is_amx_fp16_supported() else torch.float32
    return dtype if torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported() else torch.float32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and per-row statistics: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@functools.cache
def target_of(device: torch.device) -> str | None:
    """The kind of GPU, as its maker calls it ("sm_90", "gfx942"); None for another device, or one that is not here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return properties.gcnArchName.partition(":")[0]
    return f"sm_{properties.major}{properties.minor}"


def default_budget(device: torch.device) -> int:
    """A sixteenth of the device's memory, bytes."""
    return (kind_of(device).memory or _memory(device)) // 16


@functools.cache
def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def format_bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
