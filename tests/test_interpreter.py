"""The interpreter that other tests rely on: its bfloat16 against torch, and planted faults that its checks find."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from orpo_kernels.ops import is_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not is_interpreted():
    pytest.skip("Triton compiles its kernels here", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError
from triton.tools.tensor_descriptor import TensorDescriptor

from tests import faulty_kernels
from tests.interpreter import correct_bf16, leave_bf16, to_bfloat16, to_float32

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

# Halfway between two neighbours above an even and above an odd one, just beside it, the largest finite value and what
# rounds to infinity, the smallest normal and subnormal values and half of those, zeros, infinities, NaN.
SPECIAL = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20, -(1 + 2**-8), 255.5, 3.3895e38, 3.3961e38]
SPECIAL += [3.4028e38, -3.4028e38, 2.0**-126, 2.0**-133, 2.0**-134, 3 * 2.0**-134, 1e-45, -1e-45, 0.0, -0.0]
SPECIAL += [float("inf"), float("-inf"), float("nan")]


@triton.jit
def cast_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, value.to(out.dtype.element_ty), mask=i < n)


@triton.jit
def dot_kernel(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tile = i[:, None] * BLOCK + i[None, :]
    accumulator = tl.load(out + tile)
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.load(b + tile).T, accumulator, input_precision="ieee"))


@triton.jit
def descriptor_kernel(descriptor, out, n, H: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = descriptor.load([tl.program_id(0) * BLOCK, 0]).to(tl.float32)
    tl.store(out + row, tl.sum(value, 1), mask=row < n)


@triton.jit
def elementwise_kernel(x, y, out, not_less, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n, other=0.0), tl.load(y + i, mask=i < n, other=0.0)
    tl.store(out + i, a + b, mask=i < n)
    tl.store(out + n + i, a - b, mask=i < n)
    tl.store(out + 2 * n + i, a * b, mask=i < n)
    tl.store(out + 3 * n + i, -a, mask=i < n)
    tl.store(out + 4 * n + i, tl.where(a < b, a, b), mask=i < n)
    tl.store(out + 5 * n + i, tl.maximum(a, b), mask=i < n)
    tl.store(out + 6 * n + i, tl.abs(a), mask=i < n)
    tl.store(not_less + i, (~(a < b)).to(tl.float32), mask=i < n)


@triton.jit
def sum_kernel(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK)), 0))


@triton.jit
def same_value_kernel(out):
    tl.store(out, 1.0)


@triton.jit
def atomic_kernel(out):
    tl.atomic_add(out, 1.0)


@triton.jit
def product_kernel(x, out, stride):
    row = tl.program_id(0) + 65536
    tl.store(out, tl.load(x + row * stride))


def floats() -> torch.Tensor:
    """The special values, and random bit patterns, which cover all magnitudes."""
    patterns = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int32).view(torch.float32)
    return torch.cat([torch.tensor(SPECIAL), patterns[patterns.isfinite()]])


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    out = torch.empty(len(x), dtype=dtype)
    cast_kernel[(1,)](x, out, len(x), BLOCK=triton.next_power_of_2(len(x)))
    return out


def assert_same(value: torch.Tensor, truth: torch.Tensor) -> None:
    """Equal bit for bit, any NaN for any NaN."""
    torch.testing.assert_close(value, truth, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(value.signbit() & ~value.isnan(), truth.signbit() & ~truth.isnan())


def test_to_bfloat16_is_the_nearest():
    values = floats()
    values = values[values.isfinite() & (values.abs() < 3.38e38)].double().numpy()
    rounded = to_float32(to_bfloat16(values)).astype(np.float64)
    # Every bfloat16 value, and whether its last bit is even.
    patterns = np.arange(2**16, dtype=np.uint16)
    patterns = patterns[np.isfinite(to_float32(patterns)) & (patterns != 0x8000)]
    patterns = patterns[np.argsort(to_float32(patterns))]
    grid, even = to_float32(patterns).astype(np.float64), patterns & 1 == 0
    above = np.clip(np.searchsorted(grid, values), 1, len(grid) - 1)
    down, up = values - grid[above - 1], grid[above] - values
    nearest = np.where((down < up) | ((down == up) & even[above - 1]), grid[above - 1], grid[above])
    np.testing.assert_array_equal(rounded, nearest)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_casts_to_bf16_and_back(dtype):
    other_nans = torch.tensor([0x7FFFFFFF, 0x7F800001, -1], dtype=torch.int32).view(torch.float32)
    x = torch.cat([floats(), other_nans]).to(dtype)
    assert_same(cast(x, torch.bfloat16), x.to(torch.bfloat16))
    y = x.to(torch.bfloat16)
    assert_same(cast(y, dtype), y.to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dot_is_that_of_the_values(dtype):
    a, b, out = torch.randn(16, 16).to(dtype), torch.randn(16, 16).to(dtype), torch.randn(16, 16)
    truth = out.double() + a.double() @ b.double().T
    dot_kernel[(1,)](a, b, out, BLOCK=16)
    torch.testing.assert_close(out.double(), truth, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_descriptor_loads(dtype):
    x, out = torch.randn(5, 16).to(dtype), torch.empty(5)
    descriptor_kernel[(3,)](TensorDescriptor.from_tensor(x, [2, 32]), out, 5, H=16, BLOCK=2)
    torch.testing.assert_close(out, x.float().sum(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_elementwise(dtype):
    x = floats().to(dtype)
    y = x[torch.randperm(len(x))]
    n, out, not_less = len(x), torch.empty(7, len(x), dtype=dtype), torch.empty(len(x))
    elementwise_kernel[(1,)](x, y, out, not_less, n, BLOCK=triton.next_power_of_2(n))
    assert_same(out, torch.stack([x + y, x - y, x * y, -x, torch.where(x < y, x, y), torch.fmax(x, y), x.abs()]))
    assert_same(not_less, (~(x < y)).float())


def test_a_sum_of_bf16_is_refused():
    with pytest.raises(InterpreterError, match="cast it to fp32 first"):
        sum_kernel[(1,)](torch.ones(4, dtype=torch.bfloat16), torch.empty(1, dtype=torch.bfloat16), BLOCK=4)
    out = torch.empty(1)
    sum_kernel[(1,)](torch.ones(4), out, BLOCK=4)
    assert out.item() == 4


def test_the_interpreter_needs_the_correction():
    """Fails once Triton's interpreter is right by itself: then `correct_bf16` may go."""
    x = torch.tensor([1 + 3 * 2**-8])
    a, out = torch.randn(16, 16).to(torch.bfloat16), torch.zeros(16, 16)
    leave_bf16()
    try:
        rounded = cast(x, torch.bfloat16)
        dot_kernel[(1,)](a, a, out, BLOCK=16)
    finally:
        correct_bf16()
    assert rounded.item() < x.bfloat16().item()
    assert (out - a.float() @ a.float().T).abs().max() > 1e6


def launch(kernel) -> None:
    # The tensor in between is part of a larger storage, which does not hide what leaves it.
    kernel[(3,)](torch.rand(30)[10:20], torch.zeros(30)[10:20], 10, BLOCK=4)


def test_a_sound_kernel_passes():
    launch(faulty_kernels.sound)
    x = torch.zeros(10)
    faulty_kernels.sound[(3,)](x, x, 10, BLOCK=4)  # in place
    assert x.eq(1).all()


@pytest.mark.parametrize("kernel", faulty_kernels.OUT_OF_BOUNDS, ids=lambda kernel: kernel.__name__)
def test_out_of_bounds_is_found(kernel):
    where = f"out of bounds: .* at faulty_kernels.py:{faulty_kernels.faulty_line(kernel)}: "
    with pytest.raises(InterpreterError, match=where):
        launch(kernel)


@pytest.mark.parametrize("kernel", faulty_kernels.RACES, ids=lambda kernel: kernel.__name__)
def test_races_are_found(kernel):
    with pytest.raises(InterpreterError, match=f"race: .* at faulty_kernels.py:{faulty_kernels.faulty_line(kernel)}: "):
        launch(kernel)


def test_two_programs_that_write_the_same_are_a_race():
    with pytest.raises(InterpreterError, match="race: program 1 writes what program 0 writes, element 0 of out"):
        same_value_kernel[(2,)](torch.zeros(1))


def test_atomics_are_refused():
    with pytest.raises(InterpreterError, match="race: an atomic operation"):
        atomic_kernel[(1,)](torch.zeros(1))


def test_overflow_is_found():
    x, out = torch.rand(4), torch.empty(1)
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation mul"):
        product_kernel[(1,)](x, out, 65536)  # 2^32, which wraps around to a valid 0
