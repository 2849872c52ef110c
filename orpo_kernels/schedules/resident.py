"""Three GEMMs, for a trained lm-head: the residual (R x V) is kept until the coefficients are known."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..gemm import even_chunks, matmul_into
from ..planning import FACTOR_SLICE
from ..projection import Projection

if TYPE_CHECKING:
    from . import Gradients


def forward(p: Projection) -> tuple[Tensor, tuple[Tensor, ...]]:
    log_odds = p.empty_stats()
    residual = p.weight.new_empty(p.num_rows, p.vocab_size, dtype=p.plan.gemm_dtype)
    for _ in p.residuals(p.row_chunks(), lambda rows: residual[rows], p.weight_slices(), log_odds):
        pass
    return log_odds, (residual,)


def backward(p: Projection, kept: tuple[Tensor, ...], coefficient: Tensor, grads: Gradients) -> None:
    (residual,) = kept
    coefficient = -p.options.logit_scale * coefficient
    under_way = None
    if grads.hidden is not None:
        u = residual.new_empty(p.num_rows, p.weight.shape[1])
        for columns, w in p.weight_slices():
            matmul_into(u, residual[:, columns], w, accumulate=columns.start > 0)
        under_way = p.sum_over_shards(u)  # while the GEMM of the weight's gradient runs
        if under_way is None:
            p.add_hidden_gradient_(grads.hidden, u, coefficient)
            del u
    if grads.weight is not None:
        head_gradient(residual, p.scaled_hidden(coefficient), grads.weight, grads.accumulate)
    if grads.bias is not None:
        grads.bias.add_(bias_gradient(residual, coefficient))
    if under_way is not None and grads.hidden is not None:
        under_way.wait()
        p.add_hidden_gradient_(grads.hidden, u, coefficient)


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
