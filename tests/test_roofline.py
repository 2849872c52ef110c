"""The roofline's accounting: what is launched is counted, once, and each kind of launch costs what its shapes say."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the estimate is printed with rich: pip install 'orpo-kernels[bench]'")

from benchmarks.estimates import roofline
from benchmarks.estimates.roofline import COSTS, DATA_SHEETS, GPU, SCHEDULES, Launch, bare_gemms, estimate
from benchmarks.shapes import SHAPES, ModelShape
from orpo_kernels import Limits, plan
from orpo_kernels.ops import torch_ops

ROWS = 8192
H100 = next(gpu for gpu in DATA_SHEETS if gpu.name.startswith("H100"))
ran = functools.cache(roofline.launches)
LLAMA = SHAPES["Llama-3-8B"]
SOME = [LLAMA, SHAPES["Phi-2"], SHAPES["Gemma-2-2B"], SHAPES["SmolLM2-135M"]]


def launches(
    shape: ModelShape, rows: int, schedule: str, gpu: GPU, dtype: torch.dtype = torch.bfloat16, active: float = 0.0
) -> list[Launch]:
    """Found by running the schedule: once for all tests."""
    return ran(shape, rows, schedule, gpu, dtype, active)


@pytest.fixture(autouse=True)
def _launched_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(roofline, "launches", launches)


def of(name: str, found: list[Launch]) -> list[Launch]:
    return [launch for launch in found if launch.name == name]


@pytest.mark.parametrize("shape", SOME, ids=str)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_flops_are_the_plans(schedule: str, shape: ModelShape) -> None:
    gradient, trained = schedule != "evaluation", schedule in ("resident", "recompute")
    planned = plan(
        ROWS,
        shape.hidden_size,
        shape.vocab_size,
        needs_hidden=gradient,
        needs_weight=trained,
        needs_bias=trained and shape.bias,
        schedule=schedule if gradient else "auto",
    )
    assert planned.schedule == schedule
    assert sum(launch.flops for launch in launches(shape, ROWS, schedule, H100)) == planned.flops


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bytes_are_between_what_must_and_what_may_move(schedule: str) -> None:
    """No less than the inputs and gradients; in an evaluation not the logits, elsewhere them a few times."""
    h, v = LLAMA.hidden_size, LLAMA.vocab_size
    weight, hidden, logits = 2 * v * h, 2 * ROWS * h, 2 * ROWS * v
    moved = sum(launch.bytes for launch in launches(LLAMA, ROWS, schedule, H100))
    gradients = {"evaluation": 0, "single_pass": hidden}.get(schedule, hidden + weight)
    assert moved >= weight + hidden + gradients
    if schedule == "evaluation":
        assert moved < logits
    elif schedule == "recompute":
        assert 2 * logits < moved < 8 * logits  # written, and read by two GEMMs
    else:
        assert 4 * logits < moved < 16 * logits  # written, read and written by the residual, read by a GEMM


@pytest.mark.parametrize("gpu", DATA_SHEETS, ids=lambda gpu: gpu.name)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_estimate_is_no_less_than_the_bare_gemms(schedule: str, gpu: GPU) -> None:
    """A third more for the fourth GEMM of recompute, and never several times as much."""
    for shape in SOME[:2]:
        found, _ = estimate(shape, ROWS, schedule, gpu)
        assert found.seconds >= found.flops / gpu.flops
        assert (4 / 3 if schedule == "recompute" else 1) <= found.ratio < 2.5, shape


def test_what_is_launched() -> None:
    """As often as the plan's chunks say; and the eager operations inside the stand-ins do not count."""
    frozen = launches(LLAMA, ROWS, "single_pass", H100)
    chunks = of("residual_", frozen)
    assert sum(chunk.sizes["rows"] for chunk in chunks) == ROWS
    assert max(chunk.sizes["rows"] for chunk in chunks) >= 1024  # smaller ones starve the GEMM
    assert len(of("GEMM", frozen)) == 2 * len(chunks)
    assert len(of("scatter_rows_", frozen)) == len(of("odds_ratio", frozen)) == 1

    trained = launches(LLAMA, ROWS, "recompute", H100)
    slices = of("project_residual", trained)
    assert sum(s.sizes["columns"] for s in slices) == LLAMA.vocab_size
    assert all(s.sizes["rows"] == ROWS for s in slices)
    assert len(of("GEMM", trained)) == 2 * len(slices)
    into_fp32 = [g for g in of("GEMM", trained) if g.sizes["accumulates"]]
    assert len(into_fp32) == len(slices)  # dh is summed over the slices, in fp32
    assert {g.sizes["out_itemsize"] for g in into_fp32} == {4}
    for found in (frozen, trained):
        other = sum(launch.bytes for launch in of("other", found))
        assert other < 0.02 * sum(launch.bytes for launch in found)


@pytest.mark.parametrize(("schedule", "products"), [("sparse, frozen", 1), ("sparse, trained", 2)])
def test_what_the_sparse_schedule_launches(schedule: str, products: int) -> None:
    """A GEMM and a share of one or two; of every block the tail, and one look at all of its entries."""
    shape, active = SHAPES["SmolLM2-135M"], 0.125
    found = launches(shape, ROWS, schedule, H100, active=active)
    flops = sum(launch.flops for launch in found) / (2 * ROWS * shape.hidden_size * shape.vocab_size)
    assert flops == pytest.approx(1 + products * (active + 1 / Limits().block_rows), rel=0.01)
    looked_at, gathered = of("column_statistics", found), of("gather_columns", found)
    assert len(looked_at) == len(gathered) == ROWS // Limits().block_rows
    assert sum(launch.sizes["rows"] for launch in looked_at) == ROWS
    assert {launch.sizes["active"] for launch in gathered} == {active * shape.vocab_size}


def test_what_a_shard_of_the_vocabulary_launches() -> None:
    """Beside what every schedule does."""
    recorder, logits, target = roofline.Recorder(), torch.randn(3, 50), torch.tensor([1, 2, 3])
    with recorder:
        _, lse_others = recorder.ops.statistics(logits, target, 1.0, None)
        recorder.ops.recomputed_residual_(logits, target, lse_others, 1.0, None)
    sizes = {"rows": 3, "columns": 50, "itemsize": 4}
    assert recorder.launches == [Launch("statistics", sizes), Launch("recomputed_residual_", sizes)]


def test_each_operation_costs_what_its_shapes_say() -> None:
    gemm = Launch("GEMM", {"m": 3, "k": 5, "n": 7, "itemsize": 2, "out_itemsize": 4, "accumulates": 0})
    assert (gemm.flops, gemm.bytes) == (2 * 3 * 5 * 7, 2 * (15 + 35) + 4 * 21)
    assert Launch("GEMM", gemm.sizes | {"accumulates": 1}).bytes == gemm.bytes + 4 * 21
    residual = Launch("residual_", {"rows": 10, "columns": 1000, "itemsize": 2})
    assert (residual.flops, residual.bytes) == (0, 2 * 2 * 10_000 + 160)
    assert Launch("recomputed_residual_", residual.sizes).bytes == residual.bytes
    assert Launch("statistics", residual.sizes).bytes == 2 * 10_000 + 240
    assert Launch("column_statistics", residual.sizes).bytes == 2 * 10_000 + 40 + 8000
    few, most = (Launch("gather_columns", residual.sizes | {"active": active}).bytes for active in (10, 900))
    assert few == 10 * (10 * 32 + 10 * 2 + 8) + 80  # a sector each
    assert most == 10 * (2000 + 900 * 2 + 8) + 7200  # all of the row
    sizes = {"rows": 10, "hidden_size": 64, "columns": 1000, "itemsize": 2}
    fused, tile = Launch("project_log_odds", sizes), Launch("project_residual", sizes)
    assert fused.flops == tile.flops == 2 * 10 * 64 * 1000
    assert tile.bytes == 2 * (640 + 64_000 + 10_000) + 160
    assert 2 * (640 + 64_000) < fused.bytes < tile.bytes  # no logits, but partial statistics
    rows = {"rows": 10, "hidden_size": 64, "itemsize": 2, "out_itemsize": 4}
    assert Launch("gather_rows", rows).bytes == 10 * (64 * 6 + 16)
    assert Launch("scatter_rows_", rows | {"positions": 4}).bytes == 10 * (64 * 2 + 24) + 2 * 4 * 64 * 4
    assert set(COSTS) == {"GEMM", "other", *roofline.SIZES}
    assert set(roofline.SIZES) == set(torch_ops.__all__)


def test_a_launch_takes_the_longer_of_its_two_times() -> None:
    gpu = GPU("", flops=100.0, bandwidth=10.0, memory=0)
    computes = Launch("GEMM", {"m": 10, "k": 10, "n": 10, "itemsize": 1, "out_itemsize": 1, "accumulates": 0})
    moves = Launch("other", {"bytes": 70})
    assert roofline.seconds(gpu, [computes]) == pytest.approx(max(2000 / 100, 300 / 10))
    assert roofline.seconds(gpu, [computes, moves, moves]) == pytest.approx(30 + 14)


def test_bare_gemms() -> None:
    counts = {schedule: len(bare_gemms(LLAMA, ROWS, schedule, 2)) for schedule in SCHEDULES}
    assert counts == {"evaluation": 1, "single_pass": 2, "resident": 3, "recompute": 3}
    assert {gemm.flops for gemm in bare_gemms(LLAMA, ROWS, "resident", 2)} == {2 * ROWS * 4096 * 128256}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "roofline.json"
    roofline.main(["--shape", "Phi-2", "1024x32000", "--rows", "1024", "--launches", "--json", str(path)])
    printed = " ".join(capsys.readouterr().out.split())
    assert "ESTIMATE, not a measurement: Phi-2 (H = 2560, V = 51200, bias)" in printed
    assert "recompute: launches" in printed
    records = json.loads(path.read_text())
    assert len(records) == 2 * len(SCHEDULES) * len(DATA_SHEETS)
    assert {record["label"] for record in records} == {roofline.TITLE}
    assert all(record["ratio"] == record["seconds"] / record["bare_gemm_seconds"] for record in records)

    roofline.main(["--shape", "1024x32000", "--rows", "1024", "--active", "0.1", "--json", str(path)])
    assert "sparse, trained" in capsys.readouterr().out
    assert {record["schedule"] for record in json.loads(path.read_text())} == {*SCHEDULES, *roofline.SPARSE}
