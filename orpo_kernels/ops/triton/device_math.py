"""Arithmetic that several kernels share. Only what Triton's language has itself: no library calls, on any target."""

from __future__ import annotations

import triton
import triton.language as tl

# The lowest finite fp32: the logit of a token that is out of the question.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def tanh(x):
    """tanh of fp32, to a few units in the last place (Cephes' tanhf: near 0 a polynomial, as (1 - e) would cancel)."""
    x2 = x * x
    p = (((-5.70498872745e-3 * x2 + 2.06390887954e-2) * x2 - 5.37397155531e-2) * x2 + 1.33314422036e-1) * x2
    e = tl.exp(-2.0 * tl.abs(x))
    ratio = (1.0 - e) / (1.0 + e)
    return tl.where(x2 < 0.390625, x + x * x2 * (p - 3.33332819422e-1), tl.where(x < 0, -ratio, ratio))


@triton.jit
def transform(z, scale, softcap):
    """Scaled and capped logits in fp32, and tanh(scale * z / softcap), from which the cap's slope is 1 - tanh^2.

    A scale or a cap of None is none.
    """
    if scale is not None:
        z = z * scale
    t = z
    if softcap is not None:
        t = tanh(z / softcap)
        z = softcap * t
    return z, t


@triton.jit
def online(top, total, z):
    """A log-sum-exp of one more logit in every lane: the largest so far, and the sum of exponentials below it."""
    new_top = tl.maximum(top, z)
    return new_top, total * tl.exp(top - new_top) + tl.exp(z - new_top)


@triton.jit
def joined(top, total):
    """The lanes' largest logits and sums as one of each."""
    of_all = tl.max(top, 0)
    return of_all, tl.sum(total * tl.exp(top - of_all), 0)


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, without the rounding of 1 + x (Higham, Accuracy and Stability, problem 1.5)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def one_minus_exp(x):
    """1 - exp(x) for x < 0, without cancellation (Higham, section 1.14.1)."""
    u = tl.exp(x)
    nearly = (u == 1.0) | (u == 0.0)
    ratio = (1.0 - u) * x / tl.log(tl.where(nearly, 0.5, u))
    return tl.where(u == 1.0, -x, tl.where(u == 0.0, 1.0, ratio))


@triton.jit
def logsigmoid(x):
    return tl.minimum(x, 0.0) - log1p(tl.exp(-tl.abs(x)))
