"""No kernel leaves its tensors, and no two of its programs touch one element that either writes: see `under_ttsem.py`.

The interpreter looks for both as well, in every test that it runs (`interpreter.check_memory`). ttsem executes what
Triton's front end makes of the kernels, knows what an out-of-order reduction may do, and honours `input_precision`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
pytest.importorskip("ttsem", reason="ttsem is not installed; it asks for Python 3.12, `make` has 3.11 take it too")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ttsem's faults need Python 3.11")
@pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_under_ttsem(which):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, "tests/under_ttsem.py"],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr
