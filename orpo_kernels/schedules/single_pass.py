"""Two GEMMs, for a frozen lm-head: u_t = residual_t @ weight needs no coefficient, so the forward pass takes it.

What is kept is u (R x H), as large as the hidden states of the rows; the backward pass only scales it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from ..gemm import matmul_into
from ..projection import Projection

if TYPE_CHECKING:
    from . import Gradients


def forward(p: Projection) -> tuple[Tensor, tuple[Tensor, ...]]:
    log_odds = p.empty_stats()
    u = p.weight.new_empty(p.num_rows, p.weight.shape[1], dtype=p.plan.gemm_dtype)
    weight, buffer = p.weight_slices(), p.logits_buffer()
    for rows in p.row_chunks():
        residual = buffer[: rows.stop - rows.start]
        log_odds[rows] = p.residual(rows, weight, residual)
        for columns, w in weight:
            matmul_into(u[rows], residual[:, columns], w, accumulate=columns.start > 0)
    return log_odds, (u,)


def backward(p: Projection, kept: tuple[Tensor, ...], coefficient: Tensor, grads: Gradients) -> None:
    (u,) = kept
    assert grads.hidden is not None
    p.add_hidden_gradient_(grads.hidden, u, -p.options.logit_scale * coefficient)
