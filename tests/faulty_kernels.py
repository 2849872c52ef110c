"""Kernels with a mistake each, to test the tools that are to find it. FAULT marks the line that they have to name."""

from __future__ import annotations

import inspect

import triton
import triton.language as tl


@triton.jit
def sound(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0) + 1, mask=i < n)


@triton.jit
def store_without_mask(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, value)  # FAULT


@triton.jit
def load_without_mask(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i)  # FAULT
    tl.store(out + i, value, mask=i < n)


@triton.jit
def load_before_the_start(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i - 1, mask=i < n, other=0.0)  # FAULT
    tl.store(out + i, value, mask=i < n)


@triton.jit
def two_programs_write_one_element(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    tl.store(out, total)  # FAULT


@triton.jit
def sum_over_programs(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    tl.store(out, tl.load(out) + total)  # FAULT


@triton.jit
def read_what_the_neighbour_writes(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i + 1, mask=i + 1 < n, other=0.0)
    tl.store(x + i, value, mask=i < n)  # FAULT


@triton.jit
def write_what_all_read(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x) + 1
    tl.store(out + i, value + tl.zeros((BLOCK,), tl.float32), mask=i < n)
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(x, value)  # FAULT


OUT_OF_BOUNDS = (store_without_mask, load_without_mask, load_before_the_start)
RACES = (two_programs_write_one_element, sum_over_programs, read_what_the_neighbour_writes, write_what_all_read)


def faulty_line(kernel) -> int:
    """The number in this file of the line of `kernel` that is marked."""
    lines, first = inspect.getsourcelines(kernel.fn)
    return first + next(i for i, line in enumerate(lines) if line.endswith("# FAULT\n"))
