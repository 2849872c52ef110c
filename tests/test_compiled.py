"""What every kernel is compiled to, in every specialisation that the models' shapes ask for.

`benchmarks.kernels.compiled` runs once for each dtype, in a process where kernels are compiled, not interpreted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

WITH_A_DOT = ("split_statistics_kernel", "project_residual_kernel")
KERNELS = {
    *WITH_A_DOT,
    "are_within_kernel",
    "column_statistics_kernel",
    "count_labels_kernel",
    "count_rows_kernel",
    "gather_columns_kernel",
    "gather_rows_kernel",
    "join_splits_kernel",
    "label_rows_kernel",
    "odds_ratio_kernel",
    "recomputed_residual_kernel",
    "residual_kernel",
    "scatter_rows_kernel",
    "sequence_sums_kernel",
    "statistics_kernel",
}
# The matrix instruction that each target should be given, and its asynchronous copy to shared memory. gfx942 and
# gfx1100 have none that Triton uses: their operands go through registers.
INSTRUCTIONS = {
    "sm_80": ("mma.sync", "cp.async"),
    "sm_89": ("mma.sync", "cp.async"),
    "sm_90": ("wgmma", "TMA"),
    "sm_100": ("tcgen05.mma", "TMA"),
    "sm_120": ("mma.sync", "TMA"),
    "gfx942": ("mfma", None),
    "gfx950": ("mfma", "lds"),
    "gfx1100": ("wmma", None),
}
slow = pytest.mark.slow


def compile_all(path: Path, *arguments: str, tiles: Path | None = None) -> tuple[subprocess.CompletedProcess, Any]:
    """The command's result, and the figures it wrote."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "ORPO_KERNELS_TILES": str(tiles or "")}
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks.kernels.compiled", "--json", str(path / "code.json"), *arguments],
        cwd=Path(__file__).parents[1],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert (path / "code.json").exists(), run.stdout + run.stderr
    return run, json.loads((path / "code.json").read_text())


# Of every kind that kernels are specialised for: long rows, one that fits the registers, a soft-cap.
FEW = ("Mistral-7B", "Gemma-2-2B")
# Of the ways that operands reach the matrix units (cp.async, TMA, registers) the two that differ the most.
FEW_TARGETS = ("sm_90", "gfx942")


@pytest.fixture(
    scope="module",
    params=["few", *(pytest.param(dtype, marks=slow) for dtype in ("bfloat16", "float16", "float32"))],
)
def compiled(request, tmp_path_factory):
    """bfloat16 for a few models on a few targets; thoroughly, every dtype for all of them on all."""
    which = ("--shape", *FEW, "--target", *FEW_TARGETS) if request.param == "few" else ("--dtype", request.param)
    targets = FEW_TARGETS if request.param == "few" else tuple(INSTRUCTIONS)
    return *compile_all(tmp_path_factory.mktemp("code"), *which), targets


@pytest.fixture
def codes(compiled) -> list[dict]:
    return compiled[1]


def named(codes: list[dict]) -> list[str]:
    return [f"{c['kernel']} {c['types']} {c['head']} on {c['target']}: {c}" for c in codes]


def test_everything_is_compiled(codes, compiled):
    assert {(c["kernel"], c["target"]) for c in codes} == {(k, t) for k in KERNELS for t in compiled[2]}
    assert not named([c for c in codes if c["error"]])
    assert {c["head"] for c in codes if c["kernel"] == "odds_ratio_kernel"} == {"", "pair weights"}
    assert compiled[0].returncode == 0, compiled[0].stdout[-2000:]


def test_nothing_spills(codes):
    assert all(c["registers"] > 0 for c in codes)
    assert not named([c for c in codes if c["spilled"] or c["stack"]])


def test_shared_memory_is_within_the_limit(codes):
    assert max(c["shared"] for c in codes) > 48 * 1024
    assert not named([c for c in codes if c["shared"] > c["shared_limit"]])


def test_products_run_on_matrix_units(codes):
    assert not named(
        [c for c in codes if c["kernel"] in WITH_A_DOT and INSTRUCTIONS[c["target"]][0] not in c["matrix"]]
    )
    assert not named([c for c in codes if c["kernel"] not in WITH_A_DOT and c["matrix"]])


def test_operands_are_copied_asynchronously(codes):
    for c in codes:
        if c["kernel"] in WITH_A_DOT:
            expected = INSTRUCTIONS[c["target"]][1]
            assert set(c["asynchronous"]) == ({expected} if expected else set()), c


def test_the_residual_is_one_read_and_one_write_of_the_row(codes):
    """A row that does not fit the registers is read again, which the L2 cache serves."""
    rows = [c for c in codes if c["kernel"] == "residual_kernel"]
    assert {"one tile" in c["head"] for c in rows} == {True, False}
    for c in rows:
        assert c["row_stores"] == 1, c
        assert c["row_loads"] == (1 if "one tile" in c["head"] else 2), c


@slow
def test_a_tile_that_spills_is_found(tmp_path):
    tile = {"rows": 128, "columns": 256, "depth": 64, "warps": 4, "stages": 5}
    (tmp_path / "tiles.json").write_text(json.dumps({"sm_80": {"bfloat16": tile}}))
    one = ["--target", "sm_80", "--shape", "SmolLM2-135M"]
    run, codes = compile_all(tmp_path, *one, tiles=tmp_path / "tiles.json")
    found = {c["kernel"] for c in codes if c["spilled"] and c["shared"] > c["shared_limit"]}
    assert found == set(WITH_A_DOT)
    assert run.returncode == 1
    assert "split_statistics_kernel bf16 on sm_80" in run.stdout
