"""Every Triton kernel beside its eager mirror, at sizes that are no multiple of anything.

Both are compared with the mirror in float64 on the same inputs: at most twice the mirror's own error in that dtype.
The whole loss through the kernels is in `test_loss`, `test_edges` and `test_confident`, by their `backend` fixture;
the operations on rows and pairs in `test_row_ops`.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("triton", reason="triton is not installed")

from orpo_kernels import ops, orpo_loss_from_rows, reference
from orpo_kernels.devices import GPU_KIND, KINDS
from orpo_kernels.engine import checks
from orpo_kernels.engine.gemm import WeightSlices
from orpo_kernels.ops import torch_ops
from orpo_kernels.ops import triton as triton_ops
from orpo_kernels.ops.triton import tiles
from orpo_kernels.ops.triton.tiles import MatmulTile

from .batches import random_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# The modules: the package has their functions by the same names.
PROJECT_LOG_ODDS, PROJECT_RESIDUAL = (
    importlib.import_module(f"orpo_kernels.ops.triton.{name}") for name in ("project_log_odds", "project_residual")
)
LOGIT_SIZE = 2.0  # of those of `Head`

dtypes = pytest.mark.parametrize(
    "dtype",
    [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)],  # which is as bfloat16
    ids=str,
)


class Head:
    """Hidden states, a head and targets, with odd sizes and every option."""

    def __init__(self, draw: st.DrawFn):
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.rows, self.size = draw(st.sampled_from([1, 2, 15, 16, 17, 33])), draw(st.sampled_from([1, 7, 16, 24, 33]))
        self.vocab = draw(st.sampled_from([2, 13, 31, 32, 33, 71, 130]))
        self.scale, self.softcap = draw(st.sampled_from([1.0, 0.25])), draw(st.sampled_from([None, 5.0]))
        self.shift = draw(st.sampled_from([0.0, 0.0, -1e4]))  # strongly negative logits
        self.has_bias = draw(st.booleans()) or self.shift != 0
        self.slices = draw(st.sampled_from([1, 3]))

    def tensors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        x, w = self.normal(self.rows, self.size), self.normal(self.vocab, self.size) * 2 / self.size**0.5
        bias = self.normal(self.vocab) + self.shift if self.has_bias else None
        target = torch.randint(self.vocab, (self.rows,), generator=self.generator).to(DEVICE)
        return x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype), target

    def logits(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(R, V), and targets."""
        x, w, bias, target = self.tensors(dtype)
        return (x.double() @ w.double().t() + (0 if bias is None else bias.double())).to(dtype), target

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, dtype=torch.float64).to(DEVICE)

    @property
    def transform(self) -> tuple[float, float | None]:
        return self.scale, self.softcap


heads = st.composite(Head)()


def assert_as_good_as_the_mirror(
    run: Callable[[ModuleType, torch.dtype], tuple[Tensor, ...]], dtype: torch.dtype, rounding: float = 0.0
):
    """`run(ops, dtype)` gives results; `dtype` is that of its inputs, which float64 holds exactly.

    Beside that a few roundings of fp32, for the mirror may be lucky: of the result, and of the logits, whose difference
    a row of it is.
    rounding: relative, that another order of the same sums may cost where they cancel.
    """
    results = zip(run(triton_ops, dtype), run(torch_ops, dtype), run(torch_ops, torch.float64), strict=True)
    for ours, mirror, true in results:
        assert ours.shape == true.shape
        assert ours.isfinite().all()
        eps = torch.finfo(dtype if ours.dtype == torch.float64 else ours.dtype).eps
        error, of_mirror = ((t.double() - true.double()).norm() for t in (ours, mirror))
        norm, logits = true.double().norm(), LOGIT_SIZE * len(true) ** 0.5
        assert error <= 2 * of_mirror + 4 * min(eps, 1e-7) * (norm + logits) + rounding * norm


@dtypes
@given(head=heads, held=st.booleans())
def test_project_log_odds(dtype, head, held):
    """Inside the kernel, or by the library's product, which has a buffer for the logits of more rows than there are."""
    x, w, bias, target = head.tensors(dtype)

    def run(ops: ModuleType, dtype: torch.dtype) -> tuple[Tensor, ...]:
        weight = WeightSlices(w.to(dtype), dtype, head.vocab)
        weight.columns = [slice(*c) for c in cuts(head.vocab, head.slices)]
        buffer = x.new_empty(head.rows + 2, head.vocab, dtype=dtype) if held else None
        return ops.project_log_odds(x.to(dtype), weight, cast(bias, dtype), target, *head.transform, buffer)

    assert_as_good_as_the_mirror(run, dtype)


@contextlib.contextmanager
def at_most(module: ModuleType, most: int | None) -> Iterator[None]:
    """A tile a program, or persistent ones, at most so many."""

    def tile_of(*arguments: Any) -> MatmulTile:
        return replace(tiles.tile_of(*arguments), persistent=most is not None, group=2)

    with (
        mock.patch.object(module, "tile_of", tile_of),
        mock.patch.object(module, "programs", lambda tiles, tile, target: min(tiles, most or tiles)),
    ):
        yield


@dtypes
@given(rows=st.sampled_from([1, 16, 33]), vocab=st.sampled_from([32, 96, 160]), most=st.sampled_from([1, 3]))
def test_project_log_odds_by_persistent_programs(dtype, rows, vocab, most):
    """Which take whole tiles, each with statistics of its own; the target's is the only one in its tile, or is not."""
    generator = torch.Generator().manual_seed(rows * vocab)
    x, w = (torch.randn(n, 24, generator=generator, dtype=torch.float64).to(DEVICE, dtype) for n in (rows, vocab))
    target = torch.randint(vocab, (rows,), generator=generator).to(DEVICE)
    seen = []

    def run(ops: ModuleType, dtype: torch.dtype) -> tuple[Tensor, ...]:
        weight = WeightSlices(w.to(dtype), dtype, vocab)
        return ops.project_log_odds(x.to(dtype), weight, None, target, 1.0, None, None)

    launch = PROJECT_LOG_ODDS.launch
    with (
        at_most(PROJECT_LOG_ODDS, most),
        mock.patch.object(
            PROJECT_LOG_ODDS, "launch", lambda *a, **k: (seen.append(k.get("PERSISTENT")), launch(*a, **k))
        ),
    ):
        assert_as_good_as_the_mirror(run, dtype)
    assert seen[0] is True


@dtypes
@given(head=heads)
def test_residual(dtype, head):
    logits, target = head.logits(dtype)

    def run(ops: ModuleType, dtype: torch.dtype) -> tuple[Tensor, ...]:
        residual = apart(logits, dtype)
        return ops.residual_(residual, target, *head.transform), residual

    assert_as_good_as_the_mirror(run, dtype)


@dtypes
@given(head=heads)
def test_statistics_and_recomputed_residual(dtype, head):
    """Of logits that exist; targets among other columns leave no mark in the residual."""
    logits, target = head.logits(dtype)
    _, lse_others = torch_ops.statistics(logits.double(), target, *head.transform)

    def run(ops: ModuleType, dtype: torch.dtype) -> tuple[Tensor, ...]:
        residual = apart(logits, dtype)
        statistics = ops.statistics(residual, target, *head.transform)
        assert torch.equal(residual, logits.to(dtype))  # they are only read
        elsewhere = torch.where(target % 2 == 0, target, target - head.vocab)
        ops.recomputed_residual_(residual, elsewhere, lse_others, *head.transform)
        return *statistics, residual

    assert_as_good_as_the_mirror(run, dtype)


@dtypes
@given(head=heads, most=st.sampled_from([None, 1, 3]))
def test_project_residual(dtype, head, most):
    """Slice by slice, a tile a program or by at most so many; targets outside the slice leave no mark in it."""
    x, w, bias, target = head.tensors(dtype)
    exact = WeightSlices(w.double(), torch.float64, head.vocab)
    _, lse_others = torch_ops.project_log_odds(
        x.double(), exact, cast(bias, torch.float64), target, *head.transform, None
    )

    def run(ops: ModuleType, dtype: torch.dtype) -> tuple[Tensor, ...]:
        out = torch.full((head.rows, head.vocab), torch.nan, dtype=dtype, device=DEVICE)
        for start, stop in cuts(head.vocab, head.slices):
            some = None if bias is None else bias[start:stop].to(dtype)
            ops.project_residual(
                x.to(dtype),
                w[start:stop].to(dtype),
                some,
                target - start,
                lse_others,
                *head.transform,
                out[:, start:stop],
            )
        return (out,)

    with at_most(PROJECT_RESIDUAL, most):
        assert_as_good_as_the_mirror(run, dtype)


@dtypes
@given(head=heads)
def test_column_statistics(dtype, head):
    """Of a residual with its targets' -1, and rows that weigh nothing."""
    residual = residual_of(head, dtype)
    row_weight = head.normal(head.rows).sigmoid().float()
    row_weight[::5] = 0

    def run(ops: ModuleType, dtype: torch.dtype) -> tuple[Tensor, ...]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        return ops.column_statistics(apart(residual, dtype), row_weight.to(wide))

    assert_as_good_as_the_mirror(run, dtype, rounding=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(run(triton_ops, dtype), run(triton_ops, dtype), strict=True))
    peak, _ = run(triton_ops, dtype)
    assert peak.min() >= 0


def test_a_nan_shows_in_the_sums_of_its_column():
    residual = torch.zeros(20, 300, device=DEVICE)
    residual[17, 130] = torch.nan
    _, mass = triton_ops.column_statistics(residual, torch.ones(20, device=DEVICE))
    assert mass.isnan().nonzero().tolist() == [[130]]


@dtypes
@given(head=heads, share=st.sampled_from([0.0, 0.2, 1.0]))
def test_gather_columns(dtype, head, share):
    """The entries themselves; their sums as exact as fp32 holds the entries."""
    residual = residual_of(head, dtype)
    columns = (torch.rand(head.vocab, generator=head.generator) < share).nonzero().squeeze(1).to(DEVICE)
    entries, sums = triton_ops.gather_columns(apart(residual, dtype), columns)
    mirror, true = torch_ops.gather_columns(residual, columns)
    assert torch.equal(entries, mirror)
    assert sums.dtype == torch.float64
    assert ((sums - true).abs() <= 1e-6 * mirror.double().abs().sum(1)).all()
    assert torch.equal(sums, triton_ops.gather_columns(residual, columns)[1])


def test_columns_of_several_tiles():
    """What fp32 alone would round away, since one tile sums to 1 and the next to 2^-30."""
    residual = torch.zeros(3, 9000, device=DEVICE)
    residual[:, 10], residual[:, 8000] = 1, 2.0**-30
    columns = torch.arange(1, 9000, device=DEVICE)
    entries, sums = triton_ops.gather_columns(residual, columns)
    assert torch.equal(entries, residual[:, 1:])
    assert sums.tolist() == [1 + 2.0**-30] * 3


def residual_of(head: Head, dtype: torch.dtype) -> Tensor:
    """(R, V) of random logits."""
    x, w, _, target = head.tensors(dtype)
    residual = x.double() @ w.double().t()
    torch_ops.residual_(residual, target, *head.transform)
    return residual.to(dtype)


def apart(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Its rows do not follow one another."""
    rows, columns = matrix.shape
    return torch.zeros(rows, columns + 3, dtype=dtype, device=DEVICE)[:, :columns].copy_(matrix)


def cuts(vocab: int, slices: int) -> list[tuple[int, int]]:
    """Slices of uneven width."""
    if vocab < slices:
        return [(0, vocab)]
    bounds = [0, *(vocab * i // (slices + 1) + 1 for i in range(1, slices)), vocab]
    return list(itertools.pairwise(bounds))


def cast(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if bias is None else bias.to(dtype)


@dtypes
@given(seed=st.integers(0, 2**31), rows=st.sampled_from([0, 1, 5, 40]), scaled=st.booleans())
def test_gather_and_scatter(dtype, seed, rows, scaled):
    """Repeated positions add up in a fixed order."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(7, 19, generator=generator).to(DEVICE, dtype)
    values = torch.randn(rows, 19, generator=generator).to(DEVICE, dtype)
    position = torch.randint(7, (rows,), generator=generator).to(DEVICE)
    coefficient = torch.randn(rows, generator=generator).to(DEVICE)

    def run(ops: ModuleType, dtype: torch.dtype) -> tuple[Tensor, ...]:
        gathered = ops.gather_rows(hidden.to(dtype), position, coefficient if scaled else None, dtype)
        out = hidden.to(dtype, copy=True)
        ops.scatter_rows_(out, position, values.to(dtype), coefficient)
        return gathered, out

    assert_as_good_as_the_mirror(run, dtype)
    assert all(torch.equal(a, b) for a, b in zip(run(triton_ops, dtype), run(triton_ops, dtype), strict=True))


@dtypes
@pytest.mark.parametrize("rows", [0, 1, 7])
def test_scatter_to_positions_that_do_not_repeat(dtype, rows):
    """In any order, and without a sort the same bits."""
    generator = torch.Generator().manual_seed(rows)
    hidden, values = (torch.randn(n, 19, generator=generator).to(DEVICE, dtype) for n in (9, rows))
    position = torch.randperm(9, generator=generator)[:rows].to(DEVICE)
    coefficient = torch.randn(rows, generator=generator).to(DEVICE)
    for backend in (triton_ops, torch_ops):
        sums = hidden.clone(), hidden.clone()
        for out, unique in zip(sums, (False, True), strict=True):
            backend.scatter_rows_(out, position, values, coefficient, unique)
        assert torch.equal(*sums)


def test_a_gpu_checks_its_rows_by_the_kernels(monkeypatch):
    """Of tensors on a CPU that stands in for one: the error is raised where the verdict is looked at, here at once."""
    monkeypatch.setitem(KINDS, "cpu", GPU_KIND)
    inside = torch.tensor([0, 6], device=DEVICE)
    assert ops.host_ops(inside) is triton_ops
    checks.check_rows("labels", inside, 7, inside, 7)
    if DEVICE.type == "cpu":  # on a GPU the assertion would end all later tests
        with pytest.raises(RuntimeError, match=r"labels holds a token id outside \[0, 6\)"):
            checks.check_rows("labels", inside, 7, inside, 6)
        with pytest.raises(RuntimeError, match=r"a position outside \[0, 6\)"):
            checks.check_rows("labels", inside, 6, inside, 7)


@pytest.mark.parametrize("num_rows", [0, 60])
@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
def test_packed_rows(schedule, num_rows, backend, small_chunks):
    """Rows in any order, their positions repeated: the whole loss, through each backend."""
    generator = torch.Generator().manual_seed(5)
    rows = random_rows(generator, num_positions=12, vocab=45, pairs=3, num_rows=num_rows)
    hidden = torch.randn(12, 17, generator=generator, dtype=torch.float64)
    weight = torch.randn(45, 17, generator=generator, dtype=torch.float64)

    def run(loss, dtype, **options):
        leaves = [hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(schedule != "single_pass")]
        out = loss(*leaves, rows, beta=0.3, **options)
        out.loss.backward()
        return (*out, *(leaf.grad for leaf in leaves if leaf.grad is not None))

    ours = run(orpo_loss_from_rows, torch.float32, schedule=schedule, limits=small_chunks)
    for value, true in zip(ours, run(reference.orpo_loss_from_rows, torch.float64), strict=True):
        torch.testing.assert_close(value.double(), true.double(), rtol=1e-5, atol=1e-6)
