"""What every kernel is compiled to, in every specialisation that the models' shapes ask for, and how it is launched.

In processes where kernels are compiled, not interpreted: `benchmarks.kernels.compiled`, once for each dtype;
`under_stub_gpu.py` (grids, specialisations, resource checks) and `under_ttsem.py` (bounds and races).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.kernels.stub_gpu import stub_gpu

from .processes import python, run_tests

WITH_A_DOT = ("split_statistics_kernel", "project_residual_kernel")
KERNELS = """are_within column_statistics count_labels count_rows gather_columns gather_rows join_splits label_rows
    odds_ratio project_residual recomputed_residual residual scatter_rows sequence_sums split_statistics statistics"""
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


def compile_all(path: Path, *arguments: str, tiles: Path | None = None) -> list[dict[str, Any]]:
    """The figures that the command wrote."""
    interpreted = {"TRITON_INTERPRET": "0", "ORPO_KERNELS_TILES": str(tiles or "")}
    python("-m", "benchmarks.kernels.compiled", "--json", str(path / "code.json"), *arguments, **interpreted)
    return json.loads((path / "code.json").read_text())


# The longest rows, with a soft-cap. `under_stub_gpu.py` has a row that fits the registers.
FEW = ("--shape", "Gemma-2-2B", "--target")
# Of the ways that operands reach the matrix units (cp.async, TMA, registers) the two that differ the most.
FEW_TARGETS = ("sm_90", "gfx942")


@pytest.fixture(
    scope="module",
    params=["few", *(pytest.param(dtype, marks=slow) for dtype in ("bfloat16", "float16", "float32"))],
)
def compiled(request, tmp_path_factory):
    """bfloat16 for one model on a few targets; thoroughly, every dtype for all of them on all."""
    which = (*FEW, *FEW_TARGETS) if request.param == "few" else ("--dtype", request.param)
    targets = FEW_TARGETS if request.param == "few" else tuple(INSTRUCTIONS)
    return compile_all(tmp_path_factory.mktemp("code"), *which), targets


@pytest.fixture
def codes(compiled) -> list[dict]:
    return compiled[0]


def named(codes: list[dict]) -> list[str]:
    return [f"{c['kernel']} {c['types']} {c['head']} on {c['target']}: {c}" for c in codes]


def test_everything_is_compiled(codes, compiled):
    assert {(c["kernel"], c["target"]) for c in codes} == {
        (f"{k}_kernel", t) for k in KERNELS.split() for t in compiled[1]
    }
    assert not named([c for c in codes if c["error"]])
    assert {c["head"] for c in codes if c["kernel"] == "odds_ratio_kernel"} == {"", "pair weights"}


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
    for c in (c for c in codes if c["kernel"] == "residual_kernel"):
        assert c["row_stores"] == 1, c
        assert c["row_loads"] == (1 if "one tile" in c["head"] else 2), c


@slow
def test_a_tile_that_spills_is_found(tmp_path):
    tile = {"rows": 128, "columns": 256, "depth": 64, "warps": 4, "stages": 5}
    (tmp_path / "tiles.json").write_text(json.dumps({"sm_80": {"bfloat16": tile}}))
    one = ["--target", "sm_80", "--shape", "SmolLM2-135M"]
    with pytest.raises(AssertionError, match="split_statistics_kernel bf16 on sm_80"):  # the command fails
        compile_all(tmp_path, *one, tiles=tmp_path / "tiles.json")
    codes = json.loads((tmp_path / "code.json").read_text())
    found = {c["kernel"] for c in codes if c["spilled"] and c["shared"] > c["shared_limit"]}
    assert found == set(WITH_A_DOT)


each_set = pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=slow)])


@each_set
def test_under_a_stub_gpu(which):
    run_tests("under_stub_gpu.py", which, TRITON_INTERPRET="0")


def test_the_stub_refuses_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), stub_gpu("sm_90"):
        pass


@each_set
@pytest.mark.skipif(sys.version_info < (3, 11), reason="ttsem's faults need Python 3.11")
def test_under_ttsem(which):
    pytest.importorskip("ttsem", reason="ttsem is not installed; it asks for Python 3.12, `make` has 3.11 take it too")
    run_tests("under_ttsem.py", which, TRITON_INTERPRET="0")
