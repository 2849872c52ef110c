"""Which schedule, in chunks of what size: decided from shapes, what requires grad, and a memory budget.

One GEMM here is 2 * R * V * H FLOP over the R rows that matter. The schedules (`orpo_kernels.engine.schedules`):

    evaluation    1 GEMM   nothing requires grad
    single_pass   2 GEMMs  weight and bias frozen: residual @ weight in the forward pass, nothing V-wide is kept
    resident      3 GEMMs  keeps the residual (R x V) for the weight's gradient; by groups of pairs where the whole
                           does not fit, which costs a V x H accumulator in fp32
    recompute     4 GEMMs  keeps a few floats per row; the backward pass walks the vocabulary in slices
    sparse        1 GEMM and a share of the others: opt-in, by `sparse_eps`; not exact
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from ..ops import resolve
from . import schedules, speeds
from .work import STARVED_ROWS, Chunks, Limits, Work, default_budget, format_bytes, target_of

SCHEDULES = ("auto", "single_pass", "resident", "recompute")


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
        timed: the times by which its forward pass was chosen, or why there are none; None where there was no choice.
        limits: what the chunk sizes come from.
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
    timed: str | None
    limits: Limits

    @property
    def peak_bytes(self) -> int:
        """The most that is allocated at one time beside the inputs and the returned gradients."""
        return max(self.forward_bytes, self.backward_bytes)

    def explain(self) -> str:
        """The choice in a sentence, with the bytes it will hold."""
        by_groups = f" by groups of at most {self.group_rows} rows" if self.group_rows else ""
        is_sparse = self.sparse_eps is not None
        forward = "inside a kernel" if self.fused else f"in chunks of {self.row_chunk} rows"
        timed = f"; {self.timed}" if self.timed else ""
        forward = f", the forward pass {forward}{timed}" if self.fused or timed else ""
        more = f" and a share of {self.needs_hidden + self.needs_head} more" if is_sparse else ""
        return (
            f"{self.schedule}{by_groups}, {self.gemms} GEMM{'s' if self.gemms > 1 else ''}{more} "
            f"({self.flops / 1e12:.3g} TFLOP in {str(self.gemm_dtype).removeprefix('torch.')}"
            f"{forward}): {self.reason}. "
            f"Holds {'at most ' if is_sparse else ''}{format_bytes(self.held_bytes)} until the backward pass and "
            f"{format_bytes(self.peak_bytes)} at most (budget {format_bytes(self.budget)})."
        )


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
    limits: Limits | None = None,
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
        limits: as in `orpo_loss`.

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
        given_limits=limits,
        target=target_of(device),
        tf32=torch.get_float32_matmul_precision() != "highest",
    )
    budget = memory_budget or default_budget(device)
    largest = largest_pair() if largest_pair is not None and _groups_of_pairs_fit(work, schedule, budget) else None
    return planned(work, schedule, budget, memory_budget is not None, largest)


@functools.lru_cache(maxsize=1024)  # a loop asks for the same few, and choosing takes as long as a small product
def planned(work: Work, schedule: str, budget: int, budget_given: bool = True, largest_pair: int | None = None) -> Plan:
    """`plan` for work on any device, whether it is here or not; largest_pair: rows, None where it is not known."""
    name, reason, group_rows = _choose(work, schedule, budget, budget_given, largest_pair)
    chosen = schedules.TABLE[name]
    choice = _choice(work, chosen, budget)
    chunks = _chunks(work, chosen, group_rows, budget, choice)
    gemms = chosen.gemms(work)
    return Plan(
        **chunks._asdict(),
        **chosen.memory(work, chunks, budget)._asdict(),
        schedule=name,
        gemm_dtype=work.gemm_dtype,
        needs_hidden=work.needs_hidden,
        needs_head=work.needs_head,
        sparse_eps=work.sparse_eps if name == "sparse" else None,
        gemms=gemms,
        flops=gemms * 2 * work.rows * work.vocab_size * work.hidden_size,
        budget=budget,
        reason=reason,
        timed=choice.why,
        limits=work.limits,
    )


@functools.lru_cache(maxsize=1024)
def _groups_of_pairs_fit(work: Work, schedule: str, budget: int) -> bool:
    """Whether a residual that is to be kept fits by groups of pairs at the most: where the largest pair decides."""
    is_kept = schedule in ("auto", "resident") and (work.needs_head or (schedule == "resident" and work.needs_hidden))
    return is_kept and work.sparse_eps is None and work.residual_bytes > budget and _group_rows(work, budget) > 0


def _group_rows(work: Work, budget: int) -> int:
    """The rows whose residual fits beside a weight gradient in fp32."""
    return (budget - work.accumulator_bytes) // (work.vocab_size * work.gemm_dtype.itemsize)


def _choose(
    work: Work, schedule: str, budget: int, budget_given: bool, largest_pair: int | None
) -> tuple[str, str, int | None]:
    """The schedule, why, and the rows of a group (None: one group of everything)."""
    if work.sparse_eps is not None and schedule != "auto":
        raise ValueError(
            f"sparse_eps={work.sparse_eps:.3g} is a schedule of its own, but schedule is {schedule!r}: leave one of "
            'them out (schedule="auto", sparse_eps=None)'
        )
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
    group_rows = _group_rows(work, budget)
    if largest_pair is not None and group_rows >= largest_pair:
        return "resident", f"{why_not}, but groups of pairs do", group_rows
    if largest_pair is not None or group_rows <= 0:
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


def _choice(work: Work, schedule: ModuleType, budget: int) -> speeds.Choice:
    """The way of the forward pass, where there are several that were timed.

    Recompute in 16 bits has one: its backward pass makes the logits anew inside a kernel, in fp32, where probabilities
    by the statistics of rounded ones would not sum up to 1.
    """
    if schedule is schedules.single_pass:
        timed = "single_pass"
    elif schedule is schedules.evaluation or (schedule is schedules.recompute and work.gemm_dtype.itemsize >= 4):
        timed = "evaluation"
    else:
        return speeds.Choice()
    return speeds.choose(work, timed, _most_bytes(budget) // work.chunk_row_bytes)


def _chunks(work: Work, schedule: ModuleType, group_rows: int | None, budget: int, choice: speeds.Choice) -> Chunks:
    """As large as limits and budget allow, or as was the fastest."""
    limits, most_bytes = work.limits, _most_bytes(budget)
    chunk_bytes = min(limits.chunk_bytes, most_bytes)
    if work.casts:
        chunk_bytes = max(1, chunk_bytes * 2 // 3)  # a cast slice of the weight has the rest
    fused = schedule.NEEDS_NO_LOGITS and work.has_fused_products and choice.way in (None, speeds.KERNEL)
    if fused:
        rows = min(work.fused_rows, _fit(most_bytes, work.fused_row_bytes))
    else:
        rows = choice.rows or _rows(work, schedule, chunk_bytes, most_bytes)
    rows = -(-work.rows // max(1, -(-work.rows // rows))) or 1  # as even_chunks takes them
    vocab_slice = min(work.vocab_size, max(limits.least_columns, _fit(chunk_bytes, work.column_bytes)))
    weight_slice = work.vocab_size
    if work.casts and work.vocab_size * work.weight_row_bytes > chunk_bytes:
        weight_slice = max(limits.least_columns, _fit(chunk_bytes // 2, work.weight_row_bytes))
    return Chunks(rows, vocab_slice, weight_slice, group_rows, fused)


def _rows(work: Work, schedule: ModuleType, chunk_bytes: int, most_bytes: int) -> int:
    """Of a chunk of logits, where nothing was timed."""
    limits, row_bytes = work.limits, work.vocab_size * work.logit_bytes
    most_rows = limits.chunk_rows
    if work.gemm_dtype.itemsize < 4 and schedule is not schedules.resident:
        most_rows = min(most_rows, limits.narrow_chunk_rows)
    rows = min(most_rows, _fit(chunk_bytes, row_bytes))
    if work.has_fused_products:
        rows = max(rows, min(limits.least_rows, _fit(most_bytes, row_bytes)))
    return rows


def _most_bytes(budget: int) -> int:
    """Of a chunk."""
    return max(budget // 4, 1)


def _fit(room: int, size: int) -> int:
    """How many things of `size` bytes go into `room`, at least one."""
    return max(1, room // max(size, 1))
