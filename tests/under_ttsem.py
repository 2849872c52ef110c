"""The kernels as Triton's compiler reads them, executed by ttsem: no access out of bounds, no race, the right values.

`test_compiled.py` runs this file in a process of its own: kernels have to be compiled here, not interpreted,
and ttsem lets torch believe in a GPU. Within the session every launch is compiled to Triton's IR for sm_90, which is
executed on a copy of the tensors; a fault raises with the line of the kernel. Bounds are those of a tensor's storage.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from ttsem import harness, mlir, sanitize

from orpo_kernels.engine import objective
from orpo_kernels.engine.gemm import WeightSlices
from orpo_kernels.ops import torch_ops
from orpo_kernels.ops import triton as triton_ops
from orpo_kernels.ops.triton.launch import INTERPRETER, Target
from orpo_kernels.ops.triton.tiles import MatmulTile, matmul_tile
from tests.batches import assert_same_rows, random_labels, random_rows

SM_90 = Target("cuda", 90)
FEW_PROGRAMS = INTERPRETER._replace(processors=3)  # of which each goes over several tiles
DESCRIPTORS = MatmulTile(16, 32, 16, 4, 1, tma=True, persistent=True, group=2)
TILES = {
    "small tiles": (INTERPRETER, matmul_tile),
    "small tiles by descriptors": (FEW_PROGRAMS, lambda dtype, target: DESCRIPTORS),
    "tiles of sm_90": (SM_90, matmul_tile),
}
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2}
# Rows, vocabulary, hidden size: one of each, below one tile, no multiple of a tile, multiples, one beyond.
SHAPES = [(1, 2, 1), (5, 7, 5), (7, 100, 24), (33, 71, 40), (32, 64, 48), (17, 33, 17), (129, 130, 64)]
# Where a kernel reads and writes depends on the sizes and on what is there at all; values are checked elsewhere.
PLAIN, CAPPED = HEADS = (torch.float32, 1.0, None, False), (torch.bfloat16, 1.7, 5.0, True)
FEW = [((1, 2, 1), CAPPED), ((7, 100, 24), PLAIN), ((17, 33, 17), CAPPED)]


def compile_to_ttir(record: harness.LaunchRecord, stage: str, target: object) -> str:
    """A launch's IR, from the front end alone: ttsem would compile on to machine code first, ten times as long."""
    return mlir.to_generic(harness._stage_text(record, stage, target), None)


@pytest.fixture(scope="module", autouse=True)
def executed_by_ttsem() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)  # with it torch fills uninitialised memory with NaN
    mlir.enable_generic_printing()
    harness.ir_for_launch = compile_to_ttir
    with sanitize.session(cuda_is_cpu=False) as session:
        yield
    assert session.launches > 0
    assert session.races_unchecked == 0


@pytest.fixture(params=TILES)
def tiles(request, monkeypatch) -> None:
    """How the work is divided: small tiles make many programs of a small matrix."""
    target, tile = TILES[request.param]
    monkeypatch.setattr("orpo_kernels.ops.triton.tiles.matmul_tile", tile)
    for kernel in ("project_log_odds", "project_residual", "recomputed_residual", "residual", "statistics"):
        # By the module: the package has each kernel's wrapper under the same name.
        module = importlib.import_module(f"orpo_kernels.ops.triton.{kernel}")
        monkeypatch.setattr(module, "current_target", lambda: target)


each_case = pytest.mark.parametrize(
    ("rows", "vocab", "size", "dtype", "scale", "softcap", "has_bias"),
    [
        pytest.param(*shape, *head, marks=() if (shape, head) in FEW else pytest.mark.slow)
        for shape in SHAPES
        for head in HEADS
    ],
)
each_dtype = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
each_head = pytest.mark.parametrize(("dtype", "scale", "softcap", "has_bias"), HEADS, ids=str)


def assert_close(value: Tensor, truth: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(value.double(), truth.double(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


def head(rows: int, vocab: int, size: int, dtype: torch.dtype, has_bias: bool):
    x, w = torch.randn(rows, size).to(dtype), (torch.randn(vocab, size) / size**0.5).to(dtype)
    return x, w, torch.randn(vocab).to(dtype) if has_bias else None, torch.randint(vocab, (rows,))


@each_case
def test_project_log_odds(tiles, rows, vocab, size, dtype, scale, softcap, has_bias):
    x, w, bias, target = head(rows, vocab, size, dtype, has_bias)
    truth = torch_ops.project_log_odds(
        x.double(),
        WeightSlices(w.double(), torch.float64, vocab),
        None if bias is None else bias.double(),
        target,
        scale,
        softcap,
        None,
    )
    for weight in (WeightSlices(w, dtype, vocab), WeightSlices(w.double(), dtype, vocab // 2)):  # whole, and two slices
        ours = triton_ops.project_log_odds(x, weight, bias, target, scale, softcap, None)
        for value, expected in zip(ours, truth, strict=True):
            assert_close(value, expected, torch.float32)


@pytest.mark.parametrize("tiles", ["small tiles by descriptors"], indirect=True)
def test_project_log_odds_by_persistent_programs(tiles):
    """Which take whole tiles of a plain head: here nine of three, the last rows' without all of its rows."""
    x, w, _, target = head(40, 96, 48, torch.float32, False)
    truth = torch_ops.project_log_odds(
        x.double(), WeightSlices(w.double(), torch.float64, 96), None, target, 1.0, None, None
    )
    ours = triton_ops.project_log_odds(x, WeightSlices(w, torch.float32, 96), None, target, 1.0, None, None)
    for value, expected in zip(ours, truth, strict=True):
        assert_close(value, expected, torch.float32)


@pytest.mark.parametrize("tiles", ["small tiles", "tiles of sm_90"], indirect=True)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 1), (1, 2), (3, 7), (2, 32), (4, 71)])
@each_head
def test_residual(tiles, rows, vocab, dtype, scale, softcap, has_bias):
    logits, target = 3 * torch.randn(rows, vocab + 5).to(dtype), torch.randint(vocab, (rows,))
    mirror = logits.float().clone()
    ours = triton_ops.residual_(logits[:, :vocab], target, scale, softcap)
    truth = torch_ops.residual_(mirror[:, :vocab], target, scale, softcap)
    assert_close(ours, truth, torch.float32)
    assert_close(logits, mirror, dtype)  # what lies between the rows is as it was


@pytest.mark.parametrize("tiles", ["small tiles", "tiles of sm_90"], indirect=True)
@pytest.mark.parametrize(("rows", "vocab"), [(1, 2), (3, 7), (2, 32), (4, 71)])
@each_head
def test_statistics_and_recomputed_residual(tiles, rows, vocab, dtype, scale, softcap, has_bias):
    logits, target = 3 * torch.randn(rows, vocab + 5).to(dtype), torch.randint(vocab, (rows,))
    mirror = logits.float().clone()
    ours = triton_ops.statistics(logits[:, :vocab], target, scale, softcap)
    truth = torch_ops.statistics(mirror[:, :vocab], target, scale, softcap)
    for value, expected in zip(ours, truth, strict=True):
        assert_close(value, expected, torch.float32)
    elsewhere = target - vocab // 2  # negative for some
    triton_ops.recomputed_residual_(logits[:, :vocab], elsewhere, truth[1], scale, softcap)
    torch_ops.recomputed_residual_(mirror[:, :vocab], elsewhere, truth[1], scale, softcap)
    assert_close(logits, mirror, dtype)  # what lies between the rows is as it was


@each_dtype
@pytest.mark.parametrize(
    ("rows", "vocab", "active"), [(1, 1, 1), (3, 7, 0), (16, 128, 128), (17, 131, 50), (2, 5000, 4500)]
)
def test_columns_of_a_residual(rows, vocab, active, dtype):
    residual = torch.randn(rows, vocab + 5).to(dtype)[:, :vocab]  # its rows lie apart
    weight, columns = torch.rand(rows), torch.randperm(vocab)[:active].sort().values
    ours = triton_ops.column_statistics(residual, weight)
    for value, truth in zip(ours, torch_ops.column_statistics(residual, weight), strict=True):
        assert_close(value, truth, torch.float32)
    ours = triton_ops.gather_columns(residual, columns)
    for value, truth in zip(ours, torch_ops.gather_columns(residual, columns), strict=True):
        torch.testing.assert_close(value, truth, rtol=0, atol=1e-3 if value.dtype == torch.float64 else 0)


@each_case
def test_project_residual(tiles, rows, vocab, size, dtype, scale, softcap, has_bias):
    x, w, bias, target = head(rows, vocab, size, dtype, has_bias)
    b = bias.double() if has_bias else None
    _, lse_others = torch_ops.project_log_odds(
        x.double(), WeightSlices(w.double(), torch.float64, vocab), b, target, scale, softcap, None
    )
    for start, stop in ((0, vocab), (vocab // 2, vocab)):  # the second without some rows' targets
        columns = slice(start, stop)
        ours = x.new_empty(rows, stop - start)
        truth = ours.double()
        args = target - start, lse_others, scale, softcap
        triton_ops.project_residual(x, w[columns], bias[columns] if has_bias else None, *args, ours)
        torch_ops.project_residual(x.double(), w[columns].double(), b[columns] if has_bias else None, *args, truth)
        assert_close(ours, truth, dtype)


@pytest.mark.parametrize(
    ("num_rows", "pairs", "in_order", "weighted"),
    [
        (1, 1, False, False),
        (9, 2, True, True),
        (4, 7, False, True),
        (1100, 2, True, False),
        (1100, 2, False, True),
        pytest.param(40, 260, False, True, marks=pytest.mark.slow),
    ],
)
def test_sequence_sums_and_odds_ratio(num_rows, pairs, in_order, weighted):
    rows = random_rows(torch.Generator().manual_seed(0), 50, 20, pairs, num_rows, weighted)
    rows = rows.by_sequence() if in_order else rows
    token_log_odds = 3 * torch.randn(num_rows, dtype=torch.float64)
    sums = objective.sequence_sums(token_log_odds, rows)
    for value, truth in zip(triton_ops.sequence_sums(token_log_odds, rows), sums, strict=True):
        torch.testing.assert_close(value, truth)
    counts = objective.denominators(rows, None, None)
    ours = triton_ops.odds_ratio(token_log_odds, rows, sums, 0.7, 0.1, counts)
    mirror = objective.odds_ratio(token_log_odds, rows, sums, 0.7, 0.1, counts)
    for value, truth in zip(ours, mirror, strict=True):
        torch.testing.assert_close(value, truth, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize(
    ("pairs", "length", "block", "own_nll"),
    [
        (0, 3, 16, False),
        (1, 0, 16, True),
        (1, 1, 16, False),
        (3, 21, 4, True),
        (3, 21, 4, False),
        (2, 1100, 1024, True),
    ],
)
def test_rows_of_labels(pairs, length, block, own_nll, monkeypatch):
    monkeypatch.setattr(importlib.import_module("orpo_kernels.ops.triton.label_rows"), "BLOCK", block)
    generator = torch.Generator().manual_seed(0)
    labels, nll_labels = (random_labels(generator, (count, length), 3, 0.6) for count in (2 * pairs, pairs))
    arguments = labels, nll_labels if own_nll else None, own_nll, -100, own_nll
    assert_same_rows(triton_ops.label_rows(*arguments), torch_ops.label_rows(*arguments))


@pytest.mark.parametrize(("num_rows", "pairs"), [(0, 1), (1, 1), (9, 20), (5000, 2)])
def test_counts_and_checks_of_rows(num_rows, pairs):
    rows = random_rows(torch.Generator().manual_seed(0), 50, 20, pairs, num_rows)
    torch.testing.assert_close(triton_ops.count_rows(rows), torch_ops.count_rows(rows))
    for positions, tokens in ((50, 20), (1, 20), (50, 1)):
        arguments = rows.position, positions, rows.target, tokens
        assert torch.equal(triton_ops.are_within(*arguments), torch_ops.are_within(*arguments))


@each_dtype
@pytest.mark.parametrize(
    ("num_rows", "positions", "size"), [(0, 3, 4), (1, 1, 1), (7, 3, 17), (5, 9, 1030), (40, 4, 8)]
)
def test_rows_of_repeated_positions(num_rows, positions, size, dtype):
    position, coefficient = torch.randint(positions, (num_rows,)), torch.randn(num_rows)
    hidden, rows = torch.randn(positions, size).to(dtype), torch.randn(num_rows, size).to(dtype)
    for c in (None, coefficient):
        ours = triton_ops.gather_rows(hidden, position, c, dtype)
        assert_close(ours, torch_ops.gather_rows(hidden, position, c, dtype), dtype)
    out, truth = hidden.clone(), hidden.double()
    triton_ops.scatter_rows_(out, position, rows, coefficient)
    torch_ops.scatter_rows_(truth, position, rows.double(), coefficient.double())
    assert_close(out, truth, dtype)


@triton.jit
def read_before_the_start(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i - 1, mask=i < n, other=0.0)  # FAULT
    tl.store(out + i, value, mask=i < n)


@triton.jit
def write_without_mask(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, value)  # FAULT


@triton.jit
def sum_over_programs(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0)
    tl.store(out, tl.load(out) + total)  # FAULT


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [(read_before_the_start, "oob_read"), (write_without_mask, "oob_write"), (sum_over_programs, "race")],
)
def test_planted_faults_are_found(kernel, kind):
    with pytest.raises(sanitize.KernelFault) as found:
        kernel[(3,)](torch.rand(10), torch.zeros(10), 10, BLOCK=4)
    assert found.value.fault.kind == kind
    lines, first = inspect.getsourcelines(kernel.fn)
    assert "# FAULT" in lines[found.value.fault.source_line - first]
