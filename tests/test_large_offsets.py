"""Matrices of more than 2^31 elements: an offset that is not 64 bits wide raises here (`interpreter.check_overflow`).

Their rows lie 2^30 elements apart in a sparse file, of which only the pages that are touched exist.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

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
COLUMNS = torch.tensor([0, 17, 18, 39])
GENERATOR = torch.Generator().manual_seed(0)
LOGITS, HIDDEN, MORE = (torch.randn(ROWS, n, generator=GENERATOR).half() for n in (VOCAB, SIZE, SIZE))
WEIGHT = torch.randn(VOCAB, SIZE, generator=GENERATOR).half() / 4
OF_ROWS = torch.rand(ROWS, generator=GENERATOR)
LSE_OTHERS = torch_ops.statistics(LOGITS.double(), TARGET, 1.0, None)[1]

Put = Callable[[Tensor], Tensor]


def residual(ops: ModuleType, put: Put) -> tuple[Tensor, ...]:
    logits = put(LOGITS)
    return ops.residual_(logits, TARGET, 1.0, None), logits


def statistics(ops: ModuleType, put: Put) -> tuple[Tensor, ...]:
    return ops.statistics(put(LOGITS), TARGET, 1.0, None)


def recomputed_residual(ops: ModuleType, put: Put) -> tuple[Tensor, ...]:
    logits = put(LOGITS)
    ops.recomputed_residual_(logits, TARGET, LSE_OTHERS, 1.0, None)
    return (logits,)


def project_log_odds(ops: ModuleType, put: Put) -> tuple[Tensor, ...]:
    x = put(HIDDEN)
    weight = WeightSlices(WEIGHT.to(x.dtype), x.dtype, VOCAB)
    return ops.project_log_odds(x, weight, None, TARGET, 1.0, None, None)


def project_residual(ops: ModuleType, put: Put) -> tuple[Tensor, ...]:
    x, out = put(HIDDEN), put(LOGITS)
    ops.project_residual(x, WEIGHT.to(x.dtype), None, TARGET, LSE_OTHERS, 1.0, None, out)
    return (out,)


def gather_and_scatter(ops: ModuleType, put: Put) -> tuple[Tensor, ...]:
    hidden, coefficient = put(HIDDEN), OF_ROWS.double() if ops is torch_ops else OF_ROWS
    gathered = ops.gather_rows(hidden, POSITION, coefficient, torch.float32)
    ops.scatter_rows_(hidden, POSITION, put(MORE), coefficient)
    return gathered, hidden


def columns(ops: ModuleType, put: Put) -> tuple[Tensor, ...]:
    found = put(LOGITS)
    weight = OF_ROWS.double() if ops is torch_ops else OF_ROWS
    return *ops.column_statistics(found, weight), *ops.gather_columns(found, COLUMNS)


OPERATIONS = (
    residual,
    statistics,
    recomputed_residual,
    project_log_odds,
    project_residual,
    gather_and_scatter,
    columns,
)


@pytest.mark.parametrize("operation", OPERATIONS, ids=lambda operation: operation.__name__)
def test_rows_that_lie_far_apart(operation, tmp_path: Path):
    def far_apart(matrix: Tensor) -> Tensor:
        rows, width = matrix.shape
        stride = 2**30
        file = tmp_path / str(len(list(tmp_path.iterdir())))
        storage = torch.from_file(str(file), shared=True, size=(rows - 1) * stride + width, dtype=matrix.dtype)
        return storage.as_strided((rows, width), (stride, 1)).copy_(matrix)

    for ours, truth in zip(operation(triton_ops, far_apart), operation(torch_ops, Tensor.double), strict=True):
        torch.testing.assert_close(ours.double(), truth.double(), rtol=4e-3, atol=4e-3)
