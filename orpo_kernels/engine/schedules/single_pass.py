"""Two GEMMs, for a frozen lm-head: u_t = residual_t @ weight needs no coefficient, so the forward pass takes it.

What is kept is u (R x H), as large as the hidden states of the rows; the backward pass only scales it.
"""

from __future__ import annotations

import itertools

from torch import Tensor

from ..gemm import matmul_into
from ..projection import Gradients, Projection
from ..work import Chunks, Memory, Work

NEEDS_NO_LOGITS = False
NOTE = "frozen head: all is done in the forward pass"


def forward(p: Projection) -> tuple[Tensor, tuple[Tensor, ...]]:
    log_odds = p.empty_stats()
    u = p.weight.new_empty(p.num_rows, p.weight.shape[1], dtype=p.plan.gemm_dtype)
    weight, under_way = p.weight_slices(), []
    buffers = itertools.cycle([p.logits_buffer() for _ in range(p.chunks_at_a_time)])
    for rows, residual in p.residuals(lambda rows: next(buffers)[: rows.stop - rows.start], weight, log_odds):
        for columns, w in weight:
            matmul_into(u[rows], residual[:, columns], w, accumulate=columns.start > 0)
        under_way.append(p.summed(u[rows]))  # while the next chunk's GEMMs run
    for wait in under_way:
        wait()
    return log_odds, (u,)


def backward(p: Projection, kept: tuple[Tensor, ...], coefficient: Tensor, grads: Gradients) -> None:
    (u,) = kept
    assert grads.hidden is not None
    p.add_hidden_gradient_(grads.hidden, u, -p.options.logit_scale * coefficient)


def gemms(work: Work) -> int:
    return 1 + work.needs_hidden


def memory(work: Work, chunks: Chunks, budget: int) -> Memory:
    held = work.statistics_bytes + work.hidden_rows_bytes
    return Memory(held, held + work.chunk_bytes(chunks), held)
