"""Which schedule, in chunks of what size: decided from shapes, what requires grad, and a memory budget.

One GEMM here is 2 * R * V * H FLOP over the R rows that matter. The schedules (`orpo_kernels.schedules`):

    evaluation    1 GEMM   nothing requires grad
    single_pass   2 GEMMs  weight and bias frozen: residual @ weight in the forward pass, nothing V-wide is kept
    resident      3 GEMMs  keeps the residual (R x V) for the weight's gradient; by groups of pairs where the whole
                           does not fit, which costs a V x H accumulator in fp32
    recompute     4 GEMMs  keeps a few floats per row; the backward pass walks the vocabulary in slices
    sparse        1 GEMM and a share of the others: opt-in, by `sparse_eps`; not exact
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .ops import resolve

SCHEDULES = ("auto", "single_pass", "resident", "recompute")

# Chunks of logits: large enough that a GEMM runs at full speed, small enough that nothing else notices them.
# CPU: forward + backward over GEMMs on all rows at once, two cores, fp32, head frozen: 1.16 with 512 rows a chunk, 1.13
# with 1024, 1.4 with 128 (H = 576, V = 49152); 1.12, 1.05 and 1.5 (H = 1024, V = 32768). Memory binds before that at
# larger V. In bf16 the fresh pages of a chunk weigh more, its products less: 1.08 with 512, 1.13 with 1024,
# yet 1.12 and 1.10 where the weight is trained and its residual, which has to be held, is where the logits were.
# GPU: not measured by us. Published measurements ask for 1k to 4k rows, which kernels that work in place can afford
# (2 bytes a bf16 logit), while eager row-wise work (6 bytes) has to keep to the peak memory that we promise.
CHUNK_ROWS = {"cpu": 1024, "other": 4096}
NARROW_CHUNK_ROWS = 512  # on a CPU in 16 bits, where the residual is not held
CHUNK_BYTES = {"cpu": 192 * 2**20, "other": 256 * 2**20}
LEAST_ROWS = 1024  # of a chunk on a GPU, where the budget has room for them and the kernels work in place
STARVED_ROWS = 256  # of a chunk: with fewer, two GEMMs through the library cost more than three inside kernels
FUSED_ROWS = 16384  # of a chunk that has no logits, only its hidden states and partial statistics
COLUMNS_PER_SPLIT = 4096  # of the vocabulary, whose statistics a fused forward pass takes apart: 12 bytes a row
FACTOR_SLICE = 8192  # rows of dW that exist in fp32 at one time, where it is summed there
SPARSE_SLICE = 4096  # the same in the sparse schedule, which goes over them several times: they stay in a CPU's cache
SPARSE_BLOCK_ROWS = 256  # that share their active columns: fewer rows have fewer of them, but gather more often
DENSE_SHARE = 0.5  # of active columns, from which on a chunk of the sparse schedule goes dense
MIN_SLICE = 512  # columns; a narrower slice of the vocabulary starves the GEMM


@dataclass(frozen=True)
class Plan:
    """How one call runs.

    Attributes:
        schedule: "evaluation", "single_pass", "resident", "recompute" or "sparse".
        gemm_dtype: the dtype the GEMMs run in.
        row_chunk: rows whose logits exist at one time.
        vocab_slice: columns of the vocabulary that the recompute schedule's backward pass takes at one time.
        weight_slice: rows of the weight cast to `gemm_dtype` at one time, where it has another dtype.
        group_rows: resident by groups of pairs: rows of the residual held at one time; None where all are held.
        fused: whether the forward pass takes its statistics without logits, inside a kernel.
        needs_hidden, needs_head: whether hidden states, and weight or bias, get a gradient.
        sparse_eps: the probability up to which the sparse schedule leaves out; None for the others.
        gemms: vocabulary-sized matrix multiplications of forward and backward, of the sparse schedule those that are
            always whole.
        flops: what they cost.
        held_bytes: what stays allocated from the forward to the backward pass, inputs and outputs not counted.
        forward_bytes, backward_bytes: the most that is allocated at one time in each pass, what is held included;
            inputs and returned gradients, which exist in the backward pass alone, are not counted. Of the sparse
            schedule, whose need depends on the data, the most that it may be.
        budget: the memory budget the choice was made under, bytes.
        reason: why this schedule.
    """

    schedule: str
    gemm_dtype: torch.dtype
    row_chunk: int
    vocab_slice: int
    weight_slice: int
    group_rows: int | None
    fused: bool
    needs_hidden: bool
    needs_head: bool
    sparse_eps: float | None
    gemms: int
    flops: int
    held_bytes: int
    forward_bytes: int
    backward_bytes: int
    budget: int
    reason: str

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at one time beside the inputs and the returned gradients."""
        return max(self.forward_bytes, self.backward_bytes)

    def explain(self) -> str:
        """The choice in a sentence, with the bytes it will hold."""
        by_groups = f" by groups of at most {self.group_rows} rows" if self.group_rows else ""
        is_sparse = self.sparse_eps is not None
        more = f" and a share of {self.needs_hidden + self.needs_head} more" if is_sparse else ""
        return (
            f"{self.schedule}{by_groups}, {self.gemms} GEMM{'s' if self.gemms > 1 else ''}{more} "
            f"({self.flops / 1e12:.3g} TFLOP in {str(self.gemm_dtype).removeprefix('torch.')}"
            f"{', the forward pass inside a kernel' if self.fused else ''}): {self.reason}. "
            f"Holds {'at most ' if is_sparse else ''}{format_bytes(self.held_bytes)} until the backward pass and "
            f"{format_bytes(self.peak_bytes)} at most (budget {format_bytes(self.budget)})."
        )


@dataclass(frozen=True)
class Work:
    """The sizes of a call and what requires grad: the question that `plan` answers."""

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

    @property
    def needs_head(self) -> bool:
        return self.needs_weight or self.needs_bias

    @functools.cached_property
    def gemm_dtype(self) -> torch.dtype:
        return gemm_dtype(self.dtype, self.device, self.backend)

    @property
    def on_cpu(self) -> bool:
        """Whether a CPU does the work. Where Triton's kernels are given CPU tensors it stands for a GPU."""
        return self.device.type == "cpu" and self.backend != "triton"

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
    def fused_row_bytes(self) -> int:
        """A row of a chunk without logits: its hidden states, and its statistics split by split."""
        return self.weight_row_bytes + 12 * -(-self.vocab_size // COLUMNS_PER_SPLIT)

    @property
    def column_bytes(self) -> int:
        """A column of the residual, and where operands are cast also its row of the weight and of the gradient."""
        return max(self.rows, 1) * self.logit_bytes + self.casts * 2 * self.weight_row_bytes


def plan(
    rows: int,
    hidden_size: int,
    vocab_size: int,
    *,
    dtype: torch.dtype = torch.float32,
    weight_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    needs_hidden: bool = True,
    needs_weight: bool = True,
    needs_bias: bool = False,
    softcap: bool = False,
    schedule: str = "auto",
    memory_budget: int | None = None,
    backend: str = "auto",
    largest_pair: Callable[[], int] | None = None,
    sparse_eps: float | None = None,
    sharded: bool = False,
) -> Plan:
    """Choose a schedule and its chunk sizes.

    Args:
        rows: R, the rows that matter.
        hidden_size: H.
        vocab_size: V.
        dtype: what the GEMMs' operands are to be, the autocast dtype under autocast.
        weight_dtype: the lm-head's dtype if it is another.
        needs_hidden, needs_weight, needs_bias: what requires grad.
        softcap: whether the logits are soft-capped.
        schedule: "auto", or the one to use.
        memory_budget: bytes that the loss may allocate beside its inputs and the gradients it returns; by default a
            sixteenth of the device's memory. Chunks are made to fit it as far as they go.
        backend: "auto", "torch", "native" or "triton", as in `orpo_loss`.
        largest_pair: gives the number of rows of the largest pair, asked only where it decides. Without it a residual
            that does not fit as a whole is not split into groups of pairs.
        sparse_eps: as in `orpo_loss`.
        sharded: whether the lm-head is one rank's share of it (`vocab_group`).

    Raises:
        ValueError: an unknown schedule, or one that cannot serve, with the reason.
        RuntimeError: a backend that cannot be used on the device.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule is {schedule!r}, it must be one of {', '.join(map(repr, SCHEDULES))}")
    if memory_budget is not None and memory_budget <= 0:
        raise ValueError(f"memory_budget is {memory_budget}, it must be a positive number of bytes")
    device = torch.device(device)
    work = Work(
        rows=rows,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        dtype=dtype,
        weight_dtype=weight_dtype or dtype,
        device=device,
        backend=resolve(backend, device, dtype),
        needs_hidden=needs_hidden,
        needs_weight=needs_weight,
        needs_bias=needs_bias,
        softcap=softcap,
        sparse_eps=sparse_eps,
        sharded=sharded,
    )
    budget = memory_budget or default_budget(device)
    return planned(work, schedule, budget, memory_budget is not None, largest_pair)


def planned(
    work: Work,
    schedule: str,
    budget: int,
    budget_given: bool = True,
    largest_pair: Callable[[], int] | None = None,
) -> Plan:
    """`plan` for work on any device, whether it is here or not."""
    name, reason, group_rows = _choose(work, schedule, budget, budget_given, largest_pair)
    return _sized(work, name, reason, group_rows, budget)


def _choose(
    work: Work, schedule: str, budget: int, budget_given: bool, largest_pair: Callable[[], int] | None
) -> tuple[str, str, int | None]:
    """The schedule, why, and the rows of a group (None: one group of everything)."""
    if work.sparse_eps is not None:
        _check_sparse(work, schedule)
    if not (work.needs_hidden or work.needs_head):
        return "evaluation", "nothing requires grad", None
    if work.sparse_eps is not None:
        return "sparse", f"asked for by sparse_eps={work.sparse_eps:.3g}", None
    trained = " and ".join(["weight"] * work.needs_weight + ["bias"] * work.needs_bias)
    if schedule == "single_pass" and trained:
        raise ValueError(
            f'schedule="single_pass" needs a frozen lm-head, but its {trained} requires grad: that gradient needs '
            'every row\'s dloss/dlogp before the residual is gone; use "resident" or "recompute"'
        )
    if schedule == "recompute":
        return "recompute", "asked for", None
    starved = work.rows > STARVED_ROWS and _most_bytes(budget) < STARVED_ROWS * work.vocab_size * work.logit_bytes
    if schedule == "auto" and not trained and work.has_fused_products and starved:
        return "recompute", f"the budget has no room for the logits of {STARVED_ROWS} rows", None
    if schedule == "single_pass" or (schedule == "auto" and not trained):
        return "single_pass", "asked for" if schedule == "single_pass" else "the lm-head is frozen", None

    whole = format_bytes(work.residual_bytes)
    if work.residual_bytes <= budget:
        return "resident", f"the residual of all rows ({whole}) fits the budget", None
    why_not = f"the residual of all rows ({whole}) does not fit the budget"
    group_rows = (budget - work.accumulator_bytes) // (work.vocab_size * work.gemm_dtype.itemsize)
    if largest_pair is not None:
        if group_rows > 0 and group_rows >= largest_pair():
            return "resident", f"{why_not}, but groups of pairs do", group_rows
        why_not += (
            f", nor does the largest pair's beside a weight gradient in fp32 ({format_bytes(work.accumulator_bytes)})"
        )
    if schedule == "resident" and budget_given:
        raise ValueError(
            f'schedule="resident" cannot serve: {why_not} ({format_bytes(budget)}); raise memory_budget or '
            'use "recompute"'
        )
    if schedule == "resident":
        return "resident", f"asked for, though {why_not}", None
    return "recompute", why_not, None


def _check_sparse(work: Work, schedule: str) -> None:
    if schedule != "auto":
        raise ValueError(
            f"sparse_eps={work.sparse_eps:.3g} is a schedule of its own, but schedule is {schedule!r}: leave one of "
            'them out (schedule="auto", sparse_eps=None)'
        )


def _sized(work: Work, name: str, reason: str, group_rows: int | None, budget: int) -> Plan:
    """Chunk sizes, and what they add up to."""
    kind = "cpu" if work.on_cpu else "other"
    most_bytes = _most_bytes(budget)
    chunk_bytes = min(CHUNK_BYTES[kind], most_bytes)
    if work.casts:
        chunk_bytes = max(1, chunk_bytes * 2 // 3)  # a cast slice of the weight has the rest
    recomputes = name == "recompute"
    fused = work.has_fused_products and (recomputes or name == "evaluation")
    if fused:
        row_chunk = min(FUSED_ROWS, _fit(most_bytes, work.fused_row_bytes))
    else:
        most_rows = CHUNK_ROWS[kind]
        if work.on_cpu and work.gemm_dtype.itemsize < 4 and name != "resident":
            most_rows = min(most_rows, NARROW_CHUNK_ROWS)
        row_chunk = min(most_rows, _fit(chunk_bytes, work.vocab_size * work.logit_bytes))
        if work.has_fused_products:
            row_chunk = max(row_chunk, min(LEAST_ROWS, _fit(most_bytes, work.vocab_size * work.logit_bytes)))
    row_chunk = -(-work.rows // max(1, -(-work.rows // row_chunk))) or 1  # as even_chunks takes them
    vocab_slice = min(work.vocab_size, max(MIN_SLICE, _fit(chunk_bytes, work.column_bytes)))
    weight_slice = work.vocab_size
    if work.casts and work.vocab_size * work.weight_row_bytes > chunk_bytes:
        weight_slice = max(MIN_SLICE, _fit(chunk_bytes // 2, work.weight_row_bytes))
    gemms = 1 if name == "sparse" else 1 + recomputes + work.needs_hidden + work.needs_weight
    if name == "sparse":
        held, forward, backward = _sparse_memory(work, budget, row_chunk, weight_slice)
    else:
        held, forward, backward = _memory(work, name, group_rows, fused, row_chunk, vocab_slice, weight_slice)
    return Plan(
        schedule=name,
        gemm_dtype=work.gemm_dtype,
        row_chunk=row_chunk,
        vocab_slice=vocab_slice,
        weight_slice=weight_slice,
        group_rows=group_rows,
        fused=fused,
        needs_hidden=work.needs_hidden,
        needs_head=work.needs_head,
        sparse_eps=work.sparse_eps if name == "sparse" else None,
        gemms=gemms,
        flops=gemms * 2 * work.rows * work.vocab_size * work.hidden_size,
        held_bytes=held,
        forward_bytes=forward,
        backward_bytes=backward,
        budget=budget,
        reason=reason,
    )


def _memory(
    work: Work, name: str, group_rows: int | None, fused: bool, row_chunk: int, vocab_slice: int, weight_slice: int
) -> tuple[int, int, int]:
    """Bytes held until the backward pass, and the most at one time in each pass."""
    statistics = 16 * work.rows
    row_bytes = work.fused_row_bytes if fused else work.chunk_row_bytes
    chunk = row_chunk * row_bytes + work.casts * weight_slice * work.weight_row_bytes
    hidden_rows = work.rows * work.weight_row_bytes
    if name == "evaluation":
        return 0, statistics + chunk, 0
    if name == "single_pass":
        held = statistics + hidden_rows
        return held, held + chunk, held
    if name == "recompute":
        gathered = (1 + work.needs_weight) * hidden_rows  # the second time with their coefficients
        sums = work.needs_hidden * work.rows * work.hidden_size * max(4, work.gemm_dtype.itemsize)
        # Row-wise work and the products take turns on top of the residual.
        row_wise = vocab_slice * work.rows * (work.logit_bytes - work.gemm_dtype.itemsize)
        products = max(work.product_bytes, work.factor_bytes(vocab_slice))
        columns = vocab_slice * work.column_bytes + max(products - row_wise, 0)
        return statistics, statistics + chunk, statistics + columns + gathered + sums
    # The residual is the logits' own buffer: of a chunk only what the row-wise work adds is on top of it.
    chunk -= row_chunk * work.vocab_size * work.gemm_dtype.itemsize
    # The gradient of the hidden states, then that of the weight; a shard's first one travels meanwhile.
    factor = work.factor_bytes(work.vocab_size)
    gathered = (1 + work.sharded) * hidden_rows + factor
    if group_rows is None:
        residual = statistics + work.residual_bytes
        return residual, residual + chunk, residual + gathered
    held = statistics + work.accumulator_bytes + 4 * work.rows * work.hidden_size
    rows = min(group_rows, work.rows)
    group = rows * (work.vocab_size * work.gemm_dtype.itemsize + work.weight_row_bytes) + factor
    return held, held + max(group, rows * work.vocab_size * work.gemm_dtype.itemsize + chunk), held


def _sparse_memory(work: Work, budget: int, row_chunk: int, weight_slice: int) -> tuple[int, int, int]:
    """The same of the sparse schedule, at the most: half of the columns active, or dense chunks up to the budget."""
    itemsize, wide = work.gemm_dtype.itemsize, max(4, work.gemm_dtype.itemsize)
    chunk_rows, columns = min(row_chunk, work.rows), int(DENSE_SHARE * work.vocab_size)
    blocks_of_chunk = -(-chunk_rows // SPARSE_BLOCK_ROWS)
    blocks = blocks_of_chunk * -(-work.rows // max(row_chunk, 1))
    profiles, indices = blocks * work.vocab_size * wide, 8 * columns
    # Dense chunks are kept where the budget has room for them, sparse ones, half of the columns at most, always.
    dense = min(work.residual_bytes, budget)
    residual = dense + int(DENSE_SHARE * (work.residual_bytes - dense))
    of_head = residual + profiles + blocks * indices if work.needs_head else 0
    held = 24 * work.rows + work.needs_hidden * work.rows * work.weight_row_bytes + of_head

    # Of each column of a block: whether it is active, a byte and its copy, and the how manieth it is, four.
    logits = (chunk_rows * work.logit_bytes + 6 * blocks_of_chunk) * work.vocab_size
    logits += work.casts * weight_slice * work.weight_row_bytes
    of_chunk = 0 if work.needs_head else profiles + blocks_of_chunk * indices + chunk_rows * columns * itemsize
    row_wise = 0 if work.in_place else min(SPARSE_BLOCK_ROWS, chunk_rows) * work.vocab_size * wide
    of_block = max(columns * work.weight_row_bytes, row_wise, profiles)
    forward = held + logits + of_chunk + of_block
    if not work.needs_head:
        return held, forward, held
    columns = min(SPARSE_SLICE, work.vocab_size)
    of_slice = columns * (work.hidden_size * (2 * wide + itemsize) + chunk_rows * work.logit_bytes)
    backward = held + profiles + 2 * work.rows * work.weight_row_bytes + of_slice + 8 * work.vocab_size
    return held, forward, backward


def gemm_dtype(dtype: torch.dtype, device: torch.device, backend: str = "torch") -> torch.dtype:
    """The dtype in which a GEMM of `dtype` operands runs fast on `device`.

    A CPU without matrix instructions for a 16-bit dtype emulates it, 10 to 100 times slower than fp32. Casting the
    operands to fp32, a chunk at a time, is then faster and more accurate as well. (Not where the CPU emulates a GPU.)
    """
    if device.type != "cpu" or backend == "triton" or dtype not in (torch.bfloat16, torch.float16):
        return dtype
    has = _cpu_has_amx_fp16 if dtype == torch.float16 else _cpu_has_bf16
    return dtype if has() else torch.float32


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and per-row statistics: fp32, or float64 for float64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _cpu_has_bf16() -> bool:
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def _cpu_has_amx_fp16() -> bool:
    return torch.cpu._is_amx_fp16_supported()


def default_budget(device: torch.device) -> int:
    """A sixteenth of the device's memory, bytes."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 16
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 16


def _most_bytes(budget: int) -> int:
    """Of a chunk."""
    return max(budget // 4, 1)


def _fit(room: int, size: int) -> int:
    """How many things of `size` bytes go into `room`, at least one."""
    return max(1, room // max(size, 1))


def format_bytes(size: float) -> str:
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:.4g} {unit}"
        size /= 1024
    return f"{size:.4g} GiB"
