"""What needs a process of its own: code, a command, or a file of tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def python(*arguments: str, **environment: str) -> str:
    """What `python arguments...` prints, run from the project's folder; all of it is the error where it fails."""
    run = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def run_tests(file: str, which: str = "", **environment: str) -> None:
    """The tests of a file in this folder, those that are marked `which`."""
    python("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", which, f"tests/{file}", **environment)
