"""Three GEMMs, for a trained lm-head: the residual (R x V) is kept until the coefficients are known."""

from __future__ import annotations

import torch
from torch import Tensor

from ..gemm import even_chunks, matmul_into
from ..projection import Gradients, Projection
from ..work import FACTOR_SLICE, Chunks, Memory, Work

NEEDS_NO_LOGITS = False
NOTE = "holds the residual, rows x V"
NOTE_BY_GROUPS = "holds the residual of some pairs, and dW in fp32"


def forward(p: Projection) -> tuple[Tensor, tuple[Tensor, ...]]:
    log_odds = p.empty_stats()
    residual = p.weight.new_empty(p.num_rows, p.vocab_size, dtype=p.plan.gemm_dtype)
    for _ in p.residuals(lambda rows: residual[rows], p.weight_slices(), log_odds):
        pass
    return log_odds, (residual,)


def backward(p: Projection, kept: tuple[Tensor, ...], coefficient: Tensor, grads: Gradients) -> None:
    (residual,) = kept
    coefficient = -p.options.logit_scale * coefficient
    finish = None
    if grads.hidden is not None:
        u = residual.new_empty(p.num_rows, p.weight.shape[1])
        for columns, w in p.weight_slices():
            matmul_into(u, residual[:, columns], w, accumulate=columns.start > 0)
        # Several ranks sum it up while the GEMM of the weight's gradient runs.
        finish = p.sum_and_add_hidden_gradient_(grads.hidden, u, coefficient)
        del u
    if grads.weight is not None:
        head_gradient(residual, p.scaled_hidden(coefficient), grads.weight, grads.accumulate)
    if grads.bias is not None:
        grads.bias.add_(bias_gradient(residual, coefficient))
    if finish is not None:
        finish()


def head_gradient(residual: Tensor, scaled: tuple[Tensor, Tensor | None], out: Tensor, accumulate: bool) -> None:
    """dW = residual.T @ (coefficient * hidden) into `out`, rows of the weight's gradient; see `scaled_hidden`.

    `out` may be as narrow as the last columns of the weight: all others are frozen.
    """
    x, factor = scaled
    x = x[:, x.shape[1] - out.shape[1] :]
    if factor is None:
        matmul_into(out, residual.t(), x, accumulate)
        return
    buffer = out.new_empty(min(FACTOR_SLICE, out.shape[0]), out.shape[1], dtype=torch.float32)
    for rows in even_chunks(out.shape[0], FACTOR_SLICE):
        product = buffer[: rows.stop - rows.start]
        matmul_into(product, residual[:, rows].t(), x)
        product.mul_(factor)
        out[rows].add_(product) if accumulate else out[rows].copy_(product)


def bias_gradient(residual: Tensor, coefficient: Tensor) -> Tensor:
    """(V,) column sums of coefficient * residual."""
    return residual.t().mv(coefficient.to(residual.dtype))


def gemms(work: Work) -> int:
    return 1 + work.needs_hidden + work.needs_weight


def memory(work: Work, chunks: Chunks, budget: int) -> Memory:
    # The residual is the logits' own buffer: of a chunk only what the row-wise work adds is on top of it.
    row = work.vocab_size * work.gemm_dtype.itemsize
    chunk = work.chunk_bytes(chunks) - chunks.row_chunk * row
    # The gradient of the hidden states, then that of the weight; a shard's first one travels meanwhile.
    factor = work.factor_bytes(work.vocab_size)
    if chunks.group_rows is None:
        held = work.statistics_bytes + work.residual_bytes
        return Memory(held, held + chunk, held + (1 + work.sharded) * work.hidden_rows_bytes + factor)
    held = work.statistics_bytes + work.accumulator_bytes + 4 * work.rows * work.hidden_size
    rows = min(chunks.group_rows, work.rows)
    return Memory(held, held + rows * row + max(rows * work.weight_row_bytes + factor, chunk), held)
