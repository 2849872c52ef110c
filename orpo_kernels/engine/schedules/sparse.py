"""One GEMM and a share of the others: the backward pass of the columns that matter, and of the rest its tail (opt-in).

A trained language model gives nearly all of its probability to few tokens. With eps, and p_tj the probability of token
j at row t, a column is *active* for a block of rows if one of their p_tj exceeds eps, or if it is one of their targets.
The block's residual r (see `ops.torch_ops`) keeps its active columns and, for all others, what Cut Cross Entropy (arXiv
2411.09009) drops, it keeps the tail: how much was left out of each row, spread as the block spreads it on average,

    r_tj ~ amount_t * profile_j                 profile_j = sum_t p_tj / (the largest of them), 0 where j is active

so that each row sums to zero as before, and

    residual @ W        ~ entries @ W[active] + amount * (profile @ W)
    (c residual).T @ h  ~ scattered entries.T @ (c h), + profile * (amount @ (c h))

The forward pass takes the first, which needs no coefficient c; for a trained lm-head it keeps the entries. The profiles
of all blocks are one small product with the weight. A chunk with a block whose active columns are too many to be worth
it goes dense as a whole: exact, its residual kept like in `resident`, or made again like in `recompute` once what is
kept has used up the budget.

How many columns are active is the size of products, which the host has to know: it reads the numbers of a chunk's
blocks, once (`counted`), and nothing else. A size fixed beforehand would have to be `dense_share` for nothing to be cut
off, four times what is active in a trained model.

What is dropped is at most eps in each p_tj. Of a confident row, where all p_tj but the target's are small, it is at
most eps / LEAST_WEIGHT of the residual itself: its coefficient may be large (a confident rejected answer).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ...sparsity import record_block
from ..gemm import COLUMN_MULTIPLE, WeightSlices, even_chunks, matmul_into, matmul_long
from ..projection import Gradients, Projection
from ..work import Chunks, Memory, Work
from .resident import bias_gradient

NEEDS_NO_LOGITS = False
NOTE = "holds the residual's active columns, and the mean of the others"
LEAST_WEIGHT = 2.0**-4  # of a row, beside the probability of the others


class Block(NamedTuple):
    """The residual of some rows, B of them.

    Attributes:
        columns: (A,) int64, ascending, the active ones; None: all, and no tail.
        bounds: (S + 1,) int32 on the host, how many of them come before each slice of the vocabulary and in all.
        entries: (B, A) or (B, V), the residual there; None: to be made again, from
        lse_others: (B,) float64, or None.
        amount: (B,) and profile: (V,), the tail, or None.
    """

    columns: Tensor | None = None
    bounds: Tensor | None = None
    entries: Tensor | None = None
    lse_others: Tensor | None = None
    amount: Tensor | None = None
    profile: Tensor | None = None

    @property
    def num_rows(self) -> int:
        return next(t.shape[0] for t in (self.entries, self.lse_others, self.amount) if t is not None)

    def without_residual(self) -> Block:
        """What a frozen lm-head still needs of it once its product is taken: the tail."""
        return self if self.columns is None else self._replace(columns=None, bounds=None, entries=None)


def forward(p: Projection) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    log_odds = p.empty_stats()
    u = p.weight.new_empty(p.num_rows, p.weight.shape[1], dtype=p.plan.gemm_dtype) if p.plan.needs_hidden else None
    weight, lse_others = p.weight_slices(), p.empty_stats()
    # The active rows of the weight, block after block in the same memory: fresh pages would cost more than the copy.
    workspace = p.weight.new_empty(
        int(p.plan.limits.dense_share * p.vocab_size), p.weight.shape[1], dtype=p.plan.gemm_dtype
    )
    spare: list[Tensor] = []
    in_use: list[Tensor] = []

    def buffer_of(rows: slice) -> Tensor:
        in_use.append(spare.pop() if spare else p.logits_buffer())
        return in_use[-1][: rows.stop - rows.start]

    blocks: list[Block] = []
    room = p.plan.budget if p.plan.needs_head else 0
    for rows, residual in p.residuals(buffer_of, weight, log_odds, lse_others):
        buffer = in_use.pop(0)
        chunk = sparse_blocks(p, rows, residual, log_odds[rows])
        if chunk is None:
            record_block(1.0, torch.zeros_like(log_odds[rows]))
            is_kept = residual.nbytes <= room
            chunk = [Block(entries=residual) if is_kept else Block(lse_others=lse_others[rows].clone())]
        if u is not None:
            multiply(p, chunk, residual, weight, workspace, out=u[rows])
        if chunk[0].entries is not residual:
            spare.append(buffer)
        if not p.plan.needs_head:
            chunk = [block.without_residual() for block in chunk]
        room -= sum(block.entries.nbytes for block in chunk if block.entries is not None)
        blocks += chunk
    if u is not None:
        add_tails_(u, list(zip(blocks, row_slices(blocks), strict=True)), p, weight)
        p.summed(u)()
    if not p.plan.needs_head:
        return log_odds, (u,)
    return log_odds, (u, *(tensor for block in blocks for tensor in block))


def multiply(
    p: Projection, chunk: list[Block], residual: Tensor, weight: WeightSlices, workspace: Tensor, out: Tensor
) -> None:
    """residual @ weight of a chunk into `out` (C, H), yet without the tails."""
    for block, rows in zip(chunk, row_slices(chunk), strict=True):
        if block.columns is not None and block.entries is not None:
            torch.mm(block.entries, p.weight_rows(block.columns, workspace), out=out[rows])
        else:
            for columns, w in weight:
                matmul_into(out[rows], residual[rows, columns], w, accumulate=columns.start > 0)


def backward(p: Projection, kept: tuple[Tensor | None, ...], coefficient: Tensor, grads: Gradients) -> None:
    u, *tensors = kept
    size = len(Block._fields)
    blocks = [Block(*tensors[i : i + size]) for i in range(0, len(tensors), size)]
    coefficient = -p.options.logit_scale * coefficient
    if grads.hidden is not None:
        assert u is not None
        p.add_hidden_gradient_(grads.hidden, u, coefficient)
    if grads.weight is not None or grads.bias is not None:
        head_gradients(p, blocks, coefficient, grads)


def sparse_blocks(p: Projection, rows: slice, residual: Tensor, log_odds: Tensor) -> list[Block] | None:
    """The blocks of a chunk, or None where one of them has too many active columns; residual (C, V)."""
    weight = torch.sigmoid(-log_odds).clamp(min=LEAST_WEIGHT).to(p.sum_dtype)
    parts = list(even_chunks(residual.shape[0], p.plan.limits.block_rows))
    found, masses = [], []
    for part in parts:
        peak, mass = p.ops.column_statistics(residual[part], weight[part])
        active = has_target(p, p.target[rows][part]) | ~(peak <= p.plan.sparse_eps) | mass.isnan()
        found.append(active)
        masses.append(mass.masked_fill_(active, 0))
    places = located(torch.stack(found), vocabulary_slices(p))
    if max(columns.shape[0] for columns, _ in places) > p.plan.limits.dense_share * p.vocab_size:
        return None
    return [
        block_of(p, residual[part], log_odds[part], *place, mass)
        for part, place, mass in zip(parts, places, masses, strict=True)
    ]


def has_target(p: Projection, target: Tensor) -> Tensor:
    """(V,) whether a column is the target (B,) of a row, which may be on another rank."""
    found = target.new_zeros(p.vocab_size + 1, dtype=torch.bool)
    return found.index_fill_(0, p.own_columns(target), True)[:-1]


def located(active: Tensor, slices: list[slice]) -> list[tuple[Tensor, Tensor]]:
    """The `columns` and `bounds` of K blocks; active (K, V) bool."""
    ranks = active.cumsum(1, dtype=torch.int32)
    bounds = counted(ranks, slices)
    counts = [of_block.tolist()[-1] for of_block in bounds]
    # The k-th active column is the first of rank k: `nonzero` would have the host wait for every block once more.
    every_rank = torch.arange(1, max(counts) + 1, dtype=ranks.dtype, device=ranks.device)
    columns = [torch.searchsorted(rank, every_rank[:count]) for rank, count in zip(ranks, counts, strict=True)]
    return list(zip(columns, bounds, strict=True))


def counted(ranks: Tensor, slices: list[slice]) -> tuple[Tensor, ...]:
    """The `bounds` of K blocks, on the host, which waits for its device here; ranks (K, V) int32."""
    return F.pad(torch.stack([ranks[:, columns.stop - 1] for columns in slices], 1), (1, 0)).cpu().unbind()


def vocabulary_slices(p: Projection) -> list[slice]:
    """What the gradient of the weight is taken in."""
    return list(even_chunks(p.vocab_size, p.plan.limits.sparse_columns, COLUMN_MULTIPLE))


def block_of(p: Projection, residual: Tensor, log_odds: Tensor, columns: Tensor, bounds: Tensor, mass: Tensor) -> Block:
    """The active columns of a residual (B, V), and its tail, spread as `mass` (V,) is, which becomes its profile."""
    entries, sums = p.ops.gather_columns(residual, columns)
    # What an exact row sums to is 0, but of a shard, and where a soft-cap has put its slopes into the residual.
    sums_to_zero = p.options.logit_softcap is None and p.is_whole
    total = 0.0 if sums_to_zero else residual.sum(1, dtype=sums.dtype)
    dropped = total - sums
    # (Entries rounded to 16 bits may add up to a little more than their row.)
    record_block(columns.shape[0] / p.vocab_size, dropped.clamp(min=0) * torch.sigmoid(-log_odds))
    profile = mass.div_(mass.amax().clamp(min=torch.finfo(mass.dtype).tiny))
    # Summed twice side by side: torch shares a sum to a single number among threads, whose count would change its bits.
    whole = profile.expand(2, -1).sum(1)[0].clamp(min=1)  # 1 at least, where anything was dropped at all
    amount = dropped.to(mass.dtype) / whole
    return Block(columns=columns, bounds=bounds, entries=entries, amount=amount, profile=profile)


def add_tails_(u: Tensor, places: list[tuple[Block, slice]], p: Projection, weight: WeightSlices) -> None:
    """u (R, H) += amount * (profile @ weight) of every block: all of them in one product."""
    tails = Tails.of(places, p)
    profiles = tails.profiles.to(u.dtype)
    mean_rows = u.new_zeros(len(profiles), u.shape[1])
    for columns, w in weight:
        mean_rows += matmul_long(profiles[:, columns], w)
    for rows, amount, mean_row in zip(tails.rows, tails.amounts, mean_rows, strict=True):
        u[rows].addcmul_(amount[:, None].to(u.dtype), mean_row)


def head_gradients(p: Projection, blocks: list[Block], coefficient: Tensor, grads: Gradients) -> None:
    """The gradients of weight and bias, a slice of the vocabulary at a time."""
    places = list(zip(blocks, row_slices(blocks), strict=True))
    tails = Tails.of(places, p)
    if grads.bias is not None:
        grads.bias[:, None].addmm_(tails.profiles.t(), tails.row_sums(coefficient[:, None]))
    weight = None if grads.weight is None else WeightSum(p, tails, coefficient, grads.weight)
    for i_slice, columns in enumerate(vocabulary_slices(p)):
        if weight is not None:
            weight.begin(columns, tails.profiles[:, columns].t())
        for block, rows in places:
            index, residual = residual_within(p, block, rows, columns, i_slice)
            if grads.bias is not None:
                bias = bias_gradient(residual, coefficient[rows])[:, None]
                add_rows_(p, grads.bias[columns, None], index, bias)
            if weight is not None:
                weight.add(index, residual, rows)
        if weight is not None:
            weight.finish()


class WeightSum:
    """The gradient of the weight, summed in fp32 and written once: a slice's tails, its blocks, its end."""

    def __init__(self, p: Projection, tails: Tails, coefficient: Tensor, out: Tensor) -> None:
        self.p, self.out = p, out
        x, self.factor = p.scaled_hidden(coefficient)
        self.x = x[:, x.shape[1] - out.shape[1] :]  # all other columns of the weight are frozen
        self.tail_states = tails.row_sums(self.x)
        self.workspace: Tensor | None = None  # one for all slices: fresh pages would cost more than the sums
        if out.dtype != p.sum_dtype:
            self.workspace = out.new_empty(min(p.plan.limits.sparse_columns, len(out)), out.shape[1], dtype=p.sum_dtype)

    def begin(self, columns: slice, profiles: Tensor) -> None:
        self.slice = self.out[columns]
        self.total = self.slice if self.workspace is None else self.workspace[: len(self.slice)]
        self.is_empty = profiles.shape[1] == 0
        if not self.is_empty:
            torch.mm(profiles, self.tail_states, out=self.total)

    def add(self, index: Tensor | None, residual: Tensor, rows: slice) -> None:
        if index is None:
            matmul_into(self.total, residual.t(), self.x[rows], accumulate=not self.is_empty)
        else:  # of a block with a tail
            add_rows_(self.p, self.total, index, residual.t() @ self.x[rows])
        self.is_empty = False

    def finish(self) -> None:
        if self.is_empty:
            self.total.zero_()
        if self.factor is not None:
            self.total.mul_(self.factor)
        if self.workspace is not None:
            self.slice.copy_(self.total)


class Tails(NamedTuple):
    """Those of K blocks: rows (K), amounts (K) of (B,), and profiles (K, V)."""

    rows: list[slice]
    amounts: list[Tensor]
    profiles: Tensor

    @classmethod
    def of(cls, places: list[tuple[Block, slice]], p: Projection) -> Tails:
        sparse = [(block, rows) for block, rows in places if block.profile is not None]
        profiles = [block.profile for block, _ in sparse if block.profile is not None]
        return cls(
            [rows for _, rows in sparse],
            [block.amount for block, _ in sparse if block.amount is not None],
            torch.stack(profiles) if profiles else p.weight.new_empty(0, p.vocab_size, dtype=p.sum_dtype),
        )

    def row_sums(self, x: Tensor) -> Tensor:
        """(K, ...) amount @ x (R, ...) of each block, in the dtype of the amounts."""
        sums = self.profiles.new_empty(len(self.rows), x.shape[1])
        for i, (rows, amount) in enumerate(zip(self.rows, self.amounts, strict=True)):
            torch.mv(x[rows].t().to(sums.dtype), amount, out=sums[i])
        return sums


def add_rows_(p: Projection, total: Tensor, index: Tensor | None, rows: Tensor) -> None:
    """`total[index] += rows`, whose indices are all different; None: all of them."""
    if index is None:
        total.add_(rows)
    else:
        p.ops.scatter_rows_(total, index, rows, total.new_ones(index.shape[0]))


def residual_within(
    p: Projection, block: Block, rows: slice, columns: slice, i_slice: int
) -> tuple[Tensor | None, Tensor]:
    """The residual of a block in a slice of the vocabulary: at which of its columns (None: all), and the entries."""
    if block.columns is not None:
        assert block.entries is not None
        assert block.bounds is not None
        first, last = block.bounds.tolist()[i_slice : i_slice + 2]
        return block.columns[first:last] - columns.start, block.entries[:, first:last]
    if block.entries is not None:
        return None, block.entries[:, columns]
    assert block.lse_others is not None
    only = replace(p, position=p.position[rows], target=p.target[rows])
    x, w = only.hidden_rows(), p.weight[columns].to(p.plan.gemm_dtype)
    residual = x.new_empty(x.shape[0], w.shape[0])
    only.residual_slice(x, w, columns, block.lse_others, residual)
    return None, residual


def row_slices(blocks: list[Block], start: int = 0) -> Iterator[slice]:
    """The rows of each block."""
    for block in blocks:
        yield slice(start, start + block.num_rows)
        start += block.num_rows


def gemms(work: Work) -> int:
    """Those that are always whole."""
    return 1


def memory(work: Work, chunks: Chunks, budget: int) -> Memory:
    """At the most: half of the columns active, or dense chunks up to the budget."""
    limits, itemsize, wide = work.limits, work.gemm_dtype.itemsize, max(4, work.gemm_dtype.itemsize)
    chunk_rows, columns = min(chunks.row_chunk, work.rows), int(limits.dense_share * work.vocab_size)
    blocks_of_chunk = -(-chunk_rows // limits.block_rows)
    blocks = blocks_of_chunk * -(-work.rows // max(chunks.row_chunk, 1))
    profiles, indices = blocks * work.vocab_size * wide, 8 * columns
    # Dense chunks are kept where the budget has room for them, sparse ones, half of the columns at most, always.
    dense = min(work.residual_bytes, budget)
    residual = dense + int(limits.dense_share * (work.residual_bytes - dense))
    of_head = residual + profiles + blocks * indices if work.needs_head else 0
    held = 24 * work.rows + work.needs_hidden * work.hidden_rows_bytes + of_head

    # Of each column of a block: whether it is active, a byte and its copy, and its rank among them, four.
    logits = (chunk_rows * work.logit_bytes + 6 * blocks_of_chunk) * work.vocab_size
    logits += work.casts * chunks.weight_slice * work.weight_row_bytes
    of_chunk = 0 if work.needs_head else profiles + blocks_of_chunk * indices + chunk_rows * columns * itemsize
    row_wise = 0 if work.in_place else min(limits.block_rows, chunk_rows) * work.vocab_size * wide
    of_block = max(columns * work.weight_row_bytes, row_wise, profiles)
    forward = held + logits + of_chunk + of_block
    if not work.needs_head:
        return Memory(held, forward, held)
    columns = min(limits.sparse_columns, work.vocab_size)
    of_slice = columns * (work.hidden_size * (2 * wide + itemsize) + chunk_rows * work.logit_bytes)
    backward = held + profiles + 2 * work.hidden_rows_bytes + of_slice + 8 * work.vocab_size
    return Memory(held, forward, backward)
