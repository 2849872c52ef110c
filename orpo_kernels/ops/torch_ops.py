"""The row-wise operations in eager PyTorch, for any device and dtype: the contract of every backend, and its mirror.

With the logits z of a row and its target y:

    lse_others = logsumexp_{j != y} z_j
    m          = z_y - lse_others                 the target's log-odds ("margin")
    residual_j = exp(z_j - lse_others)  j != y    = -dm/dz_j, the softmax over the *other* tokens
    residual_y = -1                               = -dm/dz_y

Splitting the target off is what keeps a confident row right: `z_y - logsumexp(z)` rounds to 0 from a gap of 16 on,
while m is good at any gap. The residual's entries lie in [-1, 1] and sum to zero whatever the gap, so it loses nothing
in a low-precision matrix; all that is small or large about a row is in the one number dloss/dm, kept in fp32.

The operations on rows and pairs (`label_rows`, `count_rows`, `sequence_sums`, `odds_ratio`) are those of `rows` and of
`objective` themselves.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..devices import statistics_dtype
from ..engine.gemm import WeightSlices, even_chunks, project, project_slice
from ..engine.objective import count_rows as count_rows
from ..engine.objective import odds_ratio, sequence_sums
from ..rows import label_rows as label_rows

ROWS_AT_A_TIME = 512  # of temporaries H wide


def project_log_odds(
    x: Tensor,
    weight: WeightSlices,
    bias: Tensor | None,
    target: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    buffer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The statistics of the logits of some rows.

    Args:
        x: (C, H) hidden states, in the dtype of the GEMM.
        weight: the (V, H) weight in that dtype.
        bias: (V,) or None.
        target: (C,) int64 in [0, V).
        buffer: (at least C, V) scratch for the logits; None where a kernel never holds them.

    Returns:
        m and lse_others, each (C,) float64, or fp32 on a device that has none (`statistics_dtype`).
    """
    logits = x.new_empty(x.shape[0], weight.vocab_size) if buffer is None else buffer[: x.shape[0]]
    project(x, weight, bias, logits)
    z, _ = _transform(logits, logit_scale, logit_softcap, False)
    log_odds, lse_others, _ = _statistics_(z, target[:, None])
    return log_odds, lse_others


def residual_(logits: Tensor, target: Tensor, logit_scale: float, logit_softcap: float | None) -> Tensor:
    """Turn a chunk of logits into its residual, in place.

    Args:
        logits: (C, V), the projection with its bias, before scale and soft-cap. Overwritten by -dm/dz times the
            soft-cap's derivative; the factor `logit_scale` is left to the caller.
        target: (C,) int64 in [0, V).

    Returns:
        m, (C,) float64.
    """
    index = target[:, None]
    z, slope = _transform(logits, logit_scale, logit_softcap, True)
    log_odds, _, total = _statistics_(z, index)
    z.mul_(total.reciprocal())
    _finish(z, index, z.new_full((), -1.0).expand_as(index), slope, logits)
    return log_odds


def project_residual(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    target: Tensor,
    lse_others: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    out: Tensor,
) -> None:
    """The columns [start, start + S) of the residual, from the statistics of the whole row.

    Args:
        x: (R, H) hidden states, in the dtype of the GEMM.
        w: (S, H) and bias: (S,) or None, these columns' share of the head.
        target: (R,) int64, the target minus `start`: in another slice where it is outside [0, S).
        lse_others: (R,) float64, as `project_log_odds` returned it.
        out: (R, S), written like `residual_` does.
    """
    project_slice(x, w, bias, out)
    recomputed_residual_(out, target, lse_others, logit_scale, logit_softcap)


def statistics(
    logits: Tensor, target: Tensor, logit_scale: float, logit_softcap: float | None
) -> tuple[Tensor, Tensor]:
    """m and lse_others of a chunk of logits (C, V), each (C,) float64; the logits are only read."""
    is_wide = logits.dtype in (torch.float32, torch.float64)  # a narrower dtype is copied in any case
    z, _ = _transform(logits.clone() if is_wide else logits, logit_scale, logit_softcap, False)
    log_odds, lse_others, _ = _statistics_(z, target[:, None])
    return log_odds, lse_others


def recomputed_residual_(
    logits: Tensor, target: Tensor, lse_others: Tensor, logit_scale: float, logit_softcap: float | None
) -> None:
    """`residual_`, of some columns of the vocabulary, from the statistics of the whole rows; see `project_residual`."""
    z, slope = _transform(logits, logit_scale, logit_softcap, True)
    z.sub_(lse_others[:, None].to(z.dtype)).exp_()
    index = target.clamp(0, z.shape[1] - 1)[:, None]
    is_here = ((target >= 0) & (target < z.shape[1]))[:, None]
    _finish(z, index, torch.where(is_here, -1.0, z.gather(1, index)), slope, logits)


def column_statistics(residual: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """What the columns of a residual hold, from which the sparse schedule knows those that it can do without.

    Args:
        residual: (B, V) as `residual_` leaves it.
        row_weight: (B,) fp32 (float64 with a residual in float64), what an entry of the row is worth; at least 0.

    Returns:
        The largest entry times its row's weight, at least 0, and the sum of all: (V,) each, dtype of `row_weight`.
        The entries of targets are -1: they do not show in the first, and the second is of no use where they are.
    """
    entries = residual * row_weight[:, None]
    return entries.amax(0).clamp_(min=0), entries.sum(0)


def gather_columns(residual: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """(B, A) columns at `columns` (A,) int64 of a residual (B, V), in its dtype, and their row sums (B,) float64."""
    entries = residual[:, columns]
    return entries, entries.sum(1, dtype=statistics_dtype(residual.device))


def gather_rows(hidden: Tensor, position: Tensor, coefficient: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`coefficient * hidden[position]` in `dtype`: hidden (N, H), position (R,) int64, coefficient (R,) or None."""
    if coefficient is None:
        return hidden[position].to(dtype)
    out = hidden.new_empty(position.shape[0], hidden.shape[1], dtype=dtype)
    for rows in even_chunks(position.shape[0], ROWS_AT_A_TIME):
        out[rows] = hidden[position[rows]] * coefficient[rows, None]
    return out


def scatter_rows_(out: Tensor, position: Tensor, rows: Tensor, coefficient: Tensor, unique: bool = False) -> None:
    """`out[position] += coefficient * rows`, deterministic also where a position repeats.

    out (N, H), position (R,) int64, rows (R, H), coefficient (R,). unique: no position repeats, and nothing is sorted.
    """
    for some in even_chunks(position.shape[0], ROWS_AT_A_TIME):
        values = (rows[some] * coefficient[some, None]).to(out.dtype)
        if out.is_cuda and not unique:
            out.index_put_((position[some],), values, accumulate=True)  # sorts; index_add_ would use atomics
        else:
            out.index_add_(0, position[some], values)


def are_within(position: Tensor, num_positions: int, target: Tensor, vocab_size: int) -> Tensor:
    """0-d bool on their device: whether position (R,) is in [0, num_positions) and target (R,) in [0, vocab_size)."""
    are_positions = (position >= 0) & (position < num_positions)
    return (are_positions & (target >= 0) & (target < vocab_size)).all()


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


def _statistics_(z: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """m, lse_others and the others' sum (C, 1) of the logits z; z becomes exp(z - the largest of the others)."""
    target_logit = z.gather(1, index)
    # The lowest finite number rather than -inf: where no other token is possible, lse_others is this number and the
    # target's log-odds are huge, but nothing is NaN.
    z.scatter_(1, index, torch.finfo(z.dtype).min)
    top = z.amax(1, keepdim=True)
    # Not torch.softmax, which is one pass instead of four: on a CPU its plain running sum is ten times less exact.
    z.sub_(top).exp_()
    total = z.sum(1, keepdim=True)
    # Two numbers a row, in float64: rounding m = 67.3 to fp32 alone moves the loss of a confident row by 4e-6.
    wide = statistics_dtype(z.device)
    log_total = total.to(wide).log()
    lse_others = top.to(wide) + log_total
    # In fp32 large logits are to cancel before anything is added to them.
    log_odds = target_logit - lse_others if wide == torch.float64 else target_logit - top - log_total
    return log_odds.squeeze(1), lse_others.squeeze(1), total


def _finish(z: Tensor, index: Tensor, target_value: Tensor, slope: Tensor | None, logits: Tensor) -> None:
    """Put the target's entry and the soft-cap's slope into the residual, and the residual into `logits`."""
    z.scatter_(1, index, target_value)
    if slope is not None:
        z.mul_(slope)
    if z is not logits:
        logits.copy_(z)


# What a backend has; beside it `host_ops` finds `label_rows`, `count_rows` and `are_within` here.
__all__ = [
    "column_statistics",
    "gather_columns",
    "gather_rows",
    "odds_ratio",
    "project_log_odds",
    "project_residual",
    "recomputed_residual_",
    "residual_",
    "scatter_rows_",
    "sequence_sums",
    "statistics",
]
