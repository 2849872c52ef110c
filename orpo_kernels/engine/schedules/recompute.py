"""Four GEMMs, for a trained lm-head: keep two floats a row, and make the residual again in the backward pass.

The backward pass takes all rows times one slice of the vocabulary at a time, so that every slice of the weight's
gradient is finished at once and written in its own dtype: no V x H accumulator, no atomics. The hidden states'
gradient is summed over the slices in fp32.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gemm import COLUMN_MULTIPLE, even_chunks, matmul_into
from ..projection import Gradients, Projection
from ..work import Chunks, Memory, Work
from .evaluation import statistics
from .resident import bias_gradient, head_gradient

NEEDS_NO_LOGITS = True
NOTE = "holds two numbers a row"


def forward(p: Projection) -> tuple[Tensor, tuple[Tensor, ...]]:
    log_odds, lse_others = statistics(p)
    return log_odds, (lse_others,)


def backward(p: Projection, kept: tuple[Tensor, ...], coefficient: Tensor, grads: Gradients) -> None:
    (lse_others,) = kept
    coefficient = -p.options.logit_scale * coefficient
    x = p.hidden_rows()
    scaled = p.scaled_hidden(coefficient) if grads.weight is not None else None
    u = torch.zeros_like(x, dtype=p.sum_dtype) if grads.hidden is not None else None
    buffer = x.new_empty(p.num_rows * min(p.plan.vocab_slice, p.vocab_size))
    for columns in even_chunks(p.vocab_size, p.plan.vocab_slice, COLUMN_MULTIPLE):
        w = p.weight[columns].to(x.dtype)
        width = columns.stop - columns.start
        residual = buffer[: p.num_rows * width].view(p.num_rows, width)
        p.residual_slice(x, w, columns, lse_others, residual)
        if u is not None:
            matmul_into(u, residual, w, accumulate=True)
        if scaled is not None and grads.weight is not None:
            head_gradient(residual, scaled, grads.weight[columns], accumulate=False)
        if grads.bias is not None:
            grads.bias[columns] += bias_gradient(residual, coefficient)
    del x, buffer, scaled
    if u is not None and grads.hidden is not None:
        p.sum_and_add_hidden_gradient_(grads.hidden, u, coefficient)()


def gemms(work: Work) -> int:
    return 2 + work.needs_hidden + work.needs_weight


def memory(work: Work, chunks: Chunks, budget: int) -> Memory:
    held = work.statistics_bytes
    gathered = (1 + work.needs_weight) * work.hidden_rows_bytes  # the second time with their coefficients
    sums = work.needs_hidden * work.rows * work.hidden_size * max(4, work.gemm_dtype.itemsize)
    # Row-wise work and the products take turns on top of the residual.
    row_wise = chunks.vocab_slice * work.rows * (work.logit_bytes - work.gemm_dtype.itemsize)
    products = max(work.product_bytes, work.factor_bytes(chunks.vocab_slice))
    columns = chunks.vocab_slice * work.column_bytes + max(products - row_wise, 0)
    return Memory(held, held + work.chunk_bytes(chunks), held + columns + gathered + sums)
