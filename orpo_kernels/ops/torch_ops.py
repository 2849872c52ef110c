"""The row-wise operations in eager PyTorch, for any device and dtype.

With the logits z of a row and its target y:

    lse_others = logsumexp_{j != y} z_j
    m          = z_y - lse_others                 the target's log-odds ("margin")
    residual_j = exp(z_j - lse_others)  j != y    = -dm/dz_j, the softmax over the *other* tokens
    residual_y = -1                               = -dm/dz_y

Splitting the target off is what keeps a confident row right: `z_y - logsumexp(z)` rounds to 0 from a gap of 16 on,
while m is good at any gap. The residual's entries lie in [-1, 1] and sum to zero whatever the gap, so it loses nothing
in a low-precision matrix; all that is small or large about a row is in the one number dloss/dm, kept in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor


def residual_(
    logits: Tensor,
    target: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    want_residual: bool = True,
) -> tuple[Tensor, Tensor]:
    """Turn a chunk of logits into its residual, in place.

    Args:
        logits: (C, V), the projection with its bias, before scale and soft-cap. Overwritten: by -dm/dz times the
            soft-cap's derivative if `want_residual` (the factor `logit_scale` is left to the caller), by anything
            otherwise.
        target: (C,) int64 in [0, V).

    Returns:
        m and lse_others, each (C,) float64.
    """
    z, slope = _transform(logits, logit_scale, logit_softcap, want_residual)
    index = target[:, None]
    target_logit = z.gather(1, index)
    # The lowest finite number rather than -inf: where no other token is possible, lse_others is this number and the
    # target's log-odds are huge, but nothing is NaN.
    z.scatter_(1, index, torch.finfo(z.dtype).min)
    top = z.amax(1, keepdim=True)
    # Not torch.softmax, which is one pass instead of four: on a CPU its plain running sum is ten times less exact.
    z.sub_(top).exp_()
    total = z.sum(1, keepdim=True)
    # Two numbers a row, in float64: rounding m = 67.3 to fp32 alone moves the loss of a confident row by 4e-6.
    lse_others = top.double() + total.double().log()
    if want_residual:
        z.mul_(total.reciprocal())
        _finish(z, index, z.new_tensor(-1.0).expand_as(index), slope, logits)
    return (target_logit - lse_others).squeeze(1), lse_others.squeeze(1)


def residual_slice_(
    logits: Tensor, target: Tensor, lse_others: Tensor, logit_scale: float, logit_softcap: float | None
) -> None:
    """The columns [start, start + S) of the residual, in place, from the statistics of the whole row.

    Args:
        logits: (C, S), these columns of the projection with its bias. Overwritten like `residual_` does.
        target: (C,) int64, the target minus `start`: in another slice where it is outside [0, S).
        lse_others: (C,) float64, as `residual_` returned it.
    """
    z, slope = _transform(logits, logit_scale, logit_softcap, True)
    z.sub_(lse_others[:, None].to(z.dtype)).exp_()
    index = target.clamp(0, z.shape[1] - 1)[:, None]
    is_here = ((target >= 0) & (target < z.shape[1]))[:, None]
    _finish(z, index, torch.where(is_here, -1.0, z.gather(1, index)), slope, logits)


def add_scaled_rows_(out: Tensor, position: Tensor, rows: Tensor, coefficient: Tensor) -> None:
    """`out[position] += coefficient * rows`, deterministic also where a position repeats.

    out (N, H), position (C,) int64, rows (C, H), coefficient (C,).
    """
    values = (rows * coefficient[:, None]).to(out.dtype)
    if out.is_cuda:
        out.index_put_((position,), values, accumulate=True)  # sorts; index_add_ would use atomics
    else:
        out.index_add_(0, position, values)


def segment_sum(values: Tensor, segment: Tensor, num_segments: int) -> Tensor:
    """(num_segments,) sums of `values` (R,) by `segment` (R,) int64, deterministic."""
    sums = values.new_zeros(num_segments)
    if sums.is_cuda:
        return sums.index_put_((segment,), values, accumulate=True)
    return sums.index_add_(0, segment, values)


def _transform(
    logits: Tensor, logit_scale: float, logit_softcap: float | None, want_slope: bool
) -> tuple[Tensor, Tensor | None]:
    """Scaled and capped logits in fp32 or float64 (in `logits` itself where it has that dtype), and the cap's slope."""
    z = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
    if logit_scale != 1.0:
        z.mul_(logit_scale)
    if logit_softcap is None:
        return z, None
    z.div_(logit_softcap).tanh_()
    slope = 1 - z * z if want_slope else None
    return z.mul_(logit_softcap), slope


def _finish(z: Tensor, index: Tensor, target_value: Tensor, slope: Tensor | None, logits: Tensor) -> None:
    """Put the target's entry and the soft-cap's slope into the residual, and the residual into `logits`."""
    z.scatter_(1, index, target_value)
    if slope is not None:
        z.mul_(slope)
    if z is not logits:
        logits.copy_(z)
