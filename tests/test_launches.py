"""Grids, specialisations and resource checks of every wrapper, at the sizes of real models: see `under_stub_gpu.py`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from benchmarks.kernels.stub_gpu import stub_gpu


@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_a_stub_gpu(which):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, "tests/under_stub_gpu.py"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_the_stub_refuses_where_kernels_are_interpreted(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET is set"), stub_gpu("sm_90"):
        pass
