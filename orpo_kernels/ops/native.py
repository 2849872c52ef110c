"""The operations of `torch_ops` as C++ kernels (`native/`), for fp32, bf16 and fp16 tensors on a CPU.

Matrix products are the library's; what stands between them is one pass over the logits, in place and without memory of
its own but a row a thread. On as many threads as torch itself uses, and the same bits on any number of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils.dlpack import to_dlpack

from .. import _native
from ..engine.gemm import WeightSlices, project, project_slice
from ..engine.objective import Denominators, PairLoss, SequenceSums
from ..rows import Rows


def call(function: Any, *arguments: Any) -> Any:
    """`function(*arguments)`, which writes into some of them; nothing for tensors without data.

    A tensor is given as its memory in a DLPack capsule, ten times cheaper to make than by `__dlpack__`; a vector with
    its numbers side by side (those that are written are made so).
    """
    given = []
    for argument in arguments:
        if isinstance(argument, Tensor):
            if isinstance(argument, FakeTensor):
                return None
            argument = to_dlpack(argument.contiguous() if argument.dim() == 1 else argument)
        given.append(argument)
    return function(*given)


def project_log_odds(
    x: Tensor,
    weight: WeightSlices,
    bias: Tensor | None,
    target: Tensor,
    logit_scale: float,
    logit_softcap: float | None,
    buffer: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.project_log_odds`."""
    logits = x.new_empty(x.shape[0], weight.vocab_size) if buffer is None else buffer[: x.shape[0]]
    project(x, weight, bias, logits)
    return statistics(logits, target, logit_scale, logit_softcap)


def statistics(
    logits: Tensor, target: Tensor, logit_scale: float, logit_softcap: float | None
) -> tuple[Tensor, Tensor]:
    """See `torch_ops.statistics`. The rows of `logits` may lie apart, its columns not."""
    log_odds = logits.new_empty(logits.shape[0], dtype=torch.float64)
    lse_others = torch.empty_like(log_odds)
    threads = torch.get_num_threads()
    call(_native.statistics, logits, target, log_odds, lse_others, logit_scale, logit_softcap, threads)
    return log_odds, lse_others


def residual_(logits: Tensor, target: Tensor, logit_scale: float, logit_softcap: float | None) -> Tensor:
    """See `torch_ops.residual_`. The rows of `logits` may lie apart, its columns not."""
    log_odds = logits.new_empty(logits.shape[0], dtype=torch.float64)
    call(_native.residual_, logits, target, log_odds, logit_scale, logit_softcap, torch.get_num_threads())
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
    """See `torch_ops.project_residual`."""
    project_slice(x, w, bias, out)
    recomputed_residual_(out, target, lse_others, logit_scale, logit_softcap)


def recomputed_residual_(
    logits: Tensor, target: Tensor, lse_others: Tensor, logit_scale: float, logit_softcap: float | None
) -> None:
    """See `torch_ops.recomputed_residual_`. The rows of `logits` may lie apart, its columns not."""
    threads = torch.get_num_threads()
    call(_native.recomputed_residual_, logits, target, lse_others, logit_scale, logit_softcap, threads)


def column_statistics(residual: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """See `torch_ops.column_statistics`."""
    peak = row_weight.new_empty(residual.shape[1])
    mass = torch.empty_like(peak)
    call(_native.column_statistics, residual, row_weight, peak, mass, torch.get_num_threads())
    return peak, mass


def gather_columns(residual: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """See `torch_ops.gather_columns`."""
    entries = residual.new_empty(residual.shape[0], columns.shape[0])
    sums = residual.new_empty(residual.shape[0], dtype=torch.float64)
    call(_native.gather_columns, residual, columns, entries, sums, torch.get_num_threads())
    return entries, sums


def gather_rows(hidden: Tensor, position: Tensor, coefficient: Tensor | None, dtype: torch.dtype) -> Tensor:
    """See `torch_ops.gather_rows`."""
    hidden = hidden if hidden.stride(1) == 1 else hidden.contiguous()
    out = hidden.new_empty(position.shape[0], hidden.shape[1], dtype=dtype)
    coefficient = None if coefficient is None else coefficient.float()
    call(_native.gather_rows, hidden, position, coefficient, out, torch.get_num_threads())
    return out


def scatter_rows_(out: Tensor, position: Tensor, rows: Tensor, coefficient: Tensor, unique: bool = False) -> None:
    """See `torch_ops.scatter_rows_`."""
    call(_native.scatter_rows_, out, position, rows, coefficient.float(), torch.get_num_threads())


def sequence_sums(token_log_odds: Tensor, rows: Rows) -> SequenceSums:
    """See `objective.sequence_sums`."""
    sums = token_log_odds.new_empty(6 * rows.num_pairs)
    call(_native.sequence_sums, token_log_odds, rows.sequence, rows.scored, rows.nll_weight, sums)
    return SequenceSums(*sums.view(3, -1).unbind())


def odds_ratio(
    token_log_odds: Tensor, rows: Rows, sums: SequenceSums | None, alpha: float, beta: float, counts: Denominators
) -> PairLoss:
    """See `objective.odds_ratio`."""
    loss = PairLoss.empty(token_log_odds, rows)
    of_rows = (token_log_odds, rows.sequence, rows.scored, rows.nll_weight)
    joined = None if sums is None else torch.cat(sums)
    call(_native.odds_ratio, *of_rows, joined, rows.pair_weight, float(alpha), float(beta), *counts, *loss)
    return loss


def label_rows(labels: Tensor, nll_labels: Tensor | None, shift: bool, ignore_index: int, per_sequence: bool) -> Rows:
    """See `rows.label_rows`. What the rows count is known here."""
    labels = labels.contiguous()
    nll_labels = None if nll_labels is None else nll_labels.contiguous()
    most = labels.numel() + (0 if nll_labels is None else nll_labels.numel())
    integers, scored = labels.new_empty(3 * most), labels.new_empty(most, dtype=torch.bool)
    nll_weight, counts = (labels.new_empty(size, dtype=torch.float64) for size in (most, 2))
    offsets = labels.new_empty(labels.shape[0] + 1)
    out = (integers, scored, nll_weight, offsets, counts)
    count, unique = call(_native.label_rows, labels, nll_labels, shift, ignore_index, per_sequence, *out)
    position, target, sequence = integers.view(3, most)[:, :count].unbind()
    rows = Rows(position, target, sequence, scored[:count], nll_weight[:count], labels.shape[0] // 2)
    return rows.knowing(counts=counts, offsets=offsets, unique_positions=unique)


def count_rows(rows: Rows) -> Tensor:
    """See `objective.count_rows`."""
    counts = rows.nll_weight.new_empty(2)
    call(_native.count_rows, rows.sequence, rows.scored, rows.nll_weight, rows.num_pairs, counts)
    return counts


def are_within(position: Tensor, num_positions: int, target: Tensor, vocab_size: int) -> bool:
    """See `torch_ops.are_within`."""
    return call(_native.are_within, position, num_positions, target, vocab_size)
