"""The interpreter that other tests rely on: its bfloat16 is torch's, and an offset that wraps around raises."""

from __future__ import annotations

import pytest
import torch

from orpo_kernels.ops import is_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not is_interpreted():
    pytest.skip("Triton compiles its kernels here", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from tests.interpreter import correct_bf16, leave_bf16

pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

# Halfway between two neighbours above an even and above an odd one, just beside it, the largest finite value and what
# rounds to infinity, the smallest normal and subnormal values and half of those, zeros, infinities, NaN.
SPECIAL = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, 1 + 2**-8 - 2**-20, -(1 + 2**-8), 255.5, 3.3895e38, 3.3961e38]
SPECIAL += [3.4028e38, -3.4028e38, 2.0**-126, 2.0**-133, 2.0**-134, 3 * 2.0**-134, 1e-45, -1e-45, 0.0, -0.0]
SPECIAL += [float("inf"), float("-inf"), float("nan")]


@triton.jit
def elementwise_kernel(x, y, out, narrow, not_less, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n, other=0.0), tl.load(y + i, mask=i < n, other=0.0)
    tl.store(narrow + i, a.to(narrow.dtype.element_ty), mask=i < n)
    tl.store(out + i, a + b, mask=i < n)
    tl.store(out + n + i, a - b, mask=i < n)
    tl.store(out + 2 * n + i, a * b, mask=i < n)
    tl.store(out + 3 * n + i, -a, mask=i < n)
    tl.store(out + 4 * n + i, tl.where(a < b, a, b), mask=i < n)
    tl.store(out + 5 * n + i, tl.maximum(a, b), mask=i < n)
    tl.store(out + 6 * n + i, tl.abs(a), mask=i < n)
    tl.store(not_less + i, (~(a < b)).to(tl.float32), mask=i < n)


@triton.jit
def dot_kernel(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tile = i[:, None] * BLOCK + i[None, :]
    accumulator = tl.load(out + tile)
    tl.store(out + tile, tl.dot(tl.load(a + tile), tl.load(b + tile).T, accumulator, input_precision="ieee"))


@triton.jit
def product_kernel(x, out, stride):
    row = tl.program_id(0) + 65536
    tl.store(out, tl.load(x + row * stride))


def assert_same(value: torch.Tensor, truth: torch.Tensor) -> None:
    """Equal bit for bit, any NaN for any NaN."""
    torch.testing.assert_close(value, truth, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(value.signbit() & ~value.isnan(), truth.signbit() & ~truth.isnan())


@pytest.mark.parametrize(
    ("dtype", "other"),
    [(torch.float32, torch.bfloat16), (torch.float16, torch.bfloat16), (torch.bfloat16, torch.float32)],
)
def test_casts_and_arithmetic_are_torchs(dtype, other):
    """Of the special values, and of random bit patterns, which cover all magnitudes."""
    patterns = torch.randint(-(2**31), 2**31, (4096,), dtype=torch.int32).view(torch.float32)
    x = torch.cat([torch.tensor(SPECIAL), patterns[patterns.isfinite()]]).to(dtype)
    y = x[torch.randperm(len(x))]
    n, out = len(x), torch.empty(7, len(x), dtype=dtype)
    narrow, not_less = torch.empty(n, dtype=other), torch.empty(n)
    elementwise_kernel[(1,)](x, y, out, narrow, not_less, n, BLOCK=triton.next_power_of_2(n))
    assert_same(narrow, x.to(other))
    assert_same(out, torch.stack([x + y, x - y, x * y, -x, torch.where(x < y, x, y), torch.fmax(x, y), x.abs()]))
    assert_same(not_less, (~(x < y)).float())


def test_a_dot_is_that_of_the_values_and_the_interpreters_own_is_not():
    """Fails once Triton's interpreter is right by itself: then `correct_bf16` may go."""
    a, b = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16()
    truth = a.double() @ b.double().T
    ours, theirs = torch.zeros(16, 16), torch.zeros(16, 16)
    dot_kernel[(1,)](a, b, ours, BLOCK=16)
    leave_bf16()
    try:
        dot_kernel[(1,)](a, b, theirs, BLOCK=16)
    finally:
        correct_bf16()
    torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=1e-5)
    assert (theirs - truth).abs().max() > 1e6


def test_overflow_is_found():
    x, out = torch.rand(4), torch.empty(1)
    with pytest.raises(InterpreterError, match="int32 overflow detected for operation mul"):
        product_kernel[(1,)](x, out, 65536)  # 2^32, which wraps around to a valid 0
