"""Two GEMMs, for a frozen lm-head: u_t = residual_t @ weight needs no coefficient, so the forward pass takes it.

What is kept is u (R x H), as large as the hidden states of the rows; the backward pass only scales it.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from torch import Tensor

from ..gemm import matmul_into
from ..projection import Projection

if TYPE_CHECKING:
    from . import Gradients


def forward(p: Projection) -> tuple[Tensor, tuple[Tensor, ...]]:
    log_odds = p.empty_stats()
    u = p.weight.new_empty(p.num_rows, p.weight.shape[1], dtype=p.plan.gemm_dtype)
    weight, under_way = p.weight_slices(), []
    parts = 1 if p.shard is None else 2  # chunks that exist at a time
    buffers = itertools.cycle([p.logits_buffer(parts) for _ in range(parts)])
    chunks = p.row_chunks(parts)
    for rows, residual in p.residuals(chunks, lambda rows: next(buffers)[: rows.stop - rows.start], weight, log_odds):
        for columns, w in weight:
            matmul_into(u[rows], residual[:, columns], w, accumulate=columns.start > 0)
        under_way.append(p.sum_over_shards(u[rows]))  # while the next chunk's GEMMs run
    for pending in under_way:
        if pending is not None:
            pending.wait()
    return log_odds, (u,)


def backward(p: Projection, kept: tuple[Tensor, ...], coefficient: Tensor, grads: Gradients) -> None:
    (u,) = kept
    assert grads.hidden is not None
    p.add_hidden_gradient_(grads.hidden, u, -p.options.logit_scale * coefficient)
