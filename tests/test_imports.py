"""`import orpo_kernels` and the help of the command line do without torch; every public name is there all the same."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ("", "inspect", "train", "evaluate", "sweep", "compare", "plan", "doctor")


def python(code: str, **environment: str) -> str:
    """What a new Python prints that runs the code."""
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[1],
        env={**os.environ, **environment},
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_help_does_not_import_torch():
    pytest.importorskip("typer")
    code = f"""
import sys
from orpo_kernels.app.cli import main
for command in {COMMANDS}:
    assert main([*command.split(), "--help"]) == 0
    assert "torch" not in sys.modules, command
"""
    shown = python(code)
    assert all(f"orpo-kernels {command}" in shown for command in COMMANDS)


def test_completion_does_not_import_torch():
    pytest.importorskip("typer")
    code = """
import sys
from orpo_kernels.app.cli import main
main()
assert "torch" not in sys.modules
"""
    line = {"COMP_WORDS": "orpo-kernels train --grad", "COMP_CWORD": "2"}
    shown = python(code, _ORPO_KERNELS_COMPLETE="complete_bash", **line)
    assert shown.split() == ["--grad-accum", "--gradient-checkpointing"]


@pytest.mark.parametrize("first", ["", "import orpo_kernels.transformers", "from orpo_kernels import loss, ops"])
def test_every_public_name_is_there(first):
    """However the package is entered; `from ... import *` takes them and nothing else."""
    code = f"""
import sys
{first}
import orpo_kernels
assert {bool(first)} or "torch" not in sys.modules
assert set(orpo_kernels.__all__) <= set(dir(orpo_kernels))
assert orpo_kernels.token_logps.__module__ == "orpo_kernels.loss"
names = {{}}
exec("from orpo_kernels import *", names)
assert set(names) - {{"__builtins__"}} == set(orpo_kernels.__all__)
assert names["reference"].orpo_loss is not names["orpo_loss"]
assert not hasattr(orpo_kernels, "no_such_name")
"""
    python(code)
