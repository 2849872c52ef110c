"""One GEMM: the token log-odds alone."""

from __future__ import annotations

from torch import Tensor

from ..projection import Projection
from ..work import Chunks, Memory, Work

NEEDS_NO_LOGITS = True
NOTE = "the loss alone, without gradient"


def forward(p: Projection) -> tuple[Tensor, tuple[Tensor, ...]]:
    log_odds, _ = statistics(p)
    return log_odds, ()


def gemms(work: Work) -> int:
    return 1


def memory(work: Work, chunks: Chunks, budget: int) -> Memory:
    return Memory(0, work.statistics_bytes + work.chunk_bytes(chunks), 0)


def statistics(p: Projection) -> tuple[Tensor, Tensor]:
    """m and lse_others of every row, (R,) each, one chunk of rows at a time."""
    log_odds, lse_others = p.empty_stats(), p.empty_stats()
    weight = p.weight_slices()
    buffer = None if p.plan.fused else p.logits_buffer()
    for rows in p.row_chunks():
        log_odds[rows], lse_others[rows] = p.log_odds(rows, weight, buffer)
    return p.combined(log_odds, lse_others)
