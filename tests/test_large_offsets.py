"""Matrices of more than 2^31 elements: an offset that is not 64 bits wide raises here (`interpreter.check_overflow`).

Their rows lie 2^30 elements apart in a sparse file, of which only the pages that are touched exist.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from orpo_kernels.ops import is_interpreted

pytest.importorskip("triton", reason="triton is not installed")
if not is_interpreted():
    pytest.skip("Triton compiles its kernels here", allow_module_level=True)

from orpo_kernels.engine.gemm import WeightSlices
from orpo_kernels.ops import torch_ops
from orpo_kernels.ops import triton as triton_ops

ROWS, VOCAB, SIZE = 3, 40, 17
TARGET = torch.tensor([0, 17, 39])
POSITION = torch.tensor([2, 0, 2])


@pytest.fixture
def apart(tmp_path: Path) -> Callable[[Tensor], Tensor]:
    """Copies of matrices with their rows 2^30 elements apart."""

    def copy(matrix: Tensor) -> Tensor:
        rows, columns = matrix.shape
        stride = 2**30
        file = tmp_path / str(len(list(tmp_path.iterdir())))
        storage = torch.from_file(str(file), shared=True, size=(rows - 1) * stride + columns, dtype=matrix.dtype)
        return storage.as_strided((rows, columns), (stride, 1)).copy_(matrix)

    return copy


def half(*shape: int) -> Tensor:
    return torch.randn(*shape).half()


def assert_close(value: Tensor, truth: Tensor) -> None:
    torch.testing.assert_close(value.double(), truth.double(), rtol=4e-3, atol=4e-3)


def test_residual(apart):
    logits = half(ROWS, VOCAB)
    ours, truth = apart(logits), logits.double()
    log_odds = triton_ops.residual_(ours, TARGET, 1.0, None)
    assert_close(log_odds, torch_ops.residual_(truth, TARGET, 1.0, None))
    assert_close(ours, truth)


def test_projections(apart):
    x, w = half(ROWS, SIZE), half(VOCAB, SIZE) / 4
    log_odds, lse_others = triton_ops.project_log_odds(
        apart(x), WeightSlices(w, x.dtype, VOCAB), None, TARGET, 1.0, None, None
    )
    exact = WeightSlices(w.double(), torch.float64, VOCAB)
    truth = torch_ops.project_log_odds(x.double(), exact, None, TARGET, 1.0, None, None)
    assert_close(log_odds, truth[0])
    assert_close(lse_others, truth[1])

    ours, residual = apart(half(ROWS, VOCAB)), torch.empty(ROWS, VOCAB, dtype=torch.float64)
    triton_ops.project_residual(apart(x), w, None, TARGET, lse_others, 1.0, None, ours)
    torch_ops.project_residual(x.double(), w.double(), None, TARGET, lse_others, 1.0, None, residual)
    assert_close(ours, residual)


def test_gather_and_scatter(apart):
    hidden, rows, coefficient = half(ROWS, SIZE), half(ROWS, SIZE), torch.randn(ROWS)
    ours = triton_ops.gather_rows(apart(hidden), POSITION, coefficient, torch.float32)
    assert_close(ours, torch_ops.gather_rows(hidden, POSITION, coefficient, torch.float32))
    ours, truth = apart(hidden), hidden.double()
    triton_ops.scatter_rows_(ours, POSITION, apart(rows), coefficient)
    torch_ops.scatter_rows_(truth, POSITION, rows.double(), coefficient.double())
    assert_close(ours, truth)


def test_columns(apart):
    residual, columns = half(ROWS, VOCAB), torch.tensor([0, 17, 18, 39])
    weight = torch.rand(ROWS)
    for ours, truth in zip(
        triton_ops.column_statistics(apart(residual), weight),
        torch_ops.column_statistics(residual, weight),
        strict=True,
    ):
        assert_close(ours, truth)
    entries, sums = triton_ops.gather_columns(apart(residual), columns)
    assert torch.equal(entries, residual[:, columns])
    assert_close(sums, torch_ops.gather_columns(residual, columns)[1])


def test_statistics_and_recomputed_residual(apart):
    logits = half(ROWS, VOCAB)
    ours, truth = apart(logits), logits.double()
    statistics = torch_ops.statistics(truth, TARGET, 1.0, None)
    for value, expected in zip(triton_ops.statistics(ours, TARGET, 1.0, None), statistics, strict=True):
        assert_close(value, expected)
    triton_ops.recomputed_residual_(ours, TARGET, statistics[1], 1.0, None)
    torch_ops.recomputed_residual_(truth, TARGET, statistics[1], 1.0, None)
    assert_close(ours, truth)
