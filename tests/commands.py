"""What the tests of the command line have in common: a tiny model, pairs, and a way to run a command."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orpo_kernels.app.cli import main

from .training import ANSWERS, tiny, tokenizer

Run = Callable[..., dict[str, Any]]


def save_tiny(folder: Path, **changes: Any) -> str:
    """A model of random weights with its tokenizer, in a folder."""
    tiny(**{"initializer_range": 0.02, **changes}).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return str(folder)


def pair(number: int, length: int = 1) -> dict[str, str]:
    """A pair that can be told by its prompt and by its answers."""
    prompt = f"question {number}? " * length
    return {"prompt": prompt, "chosen": f" {ANSWERS[number % 4]} c{number}.", "rejected": f" r{number}"}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def run_in(capsys: pytest.CaptureFixture[str]) -> Run:
    """A command line with --json in this process; returns the one JSON object on stdout, and checks the errors."""

    def run(*arguments: Any, status: int = 0) -> dict[str, Any]:
        capsys.readouterr()
        ended = main([*map(str, arguments), "--json"])
        out, err = capsys.readouterr()
        assert ended == status, err
        assert "Traceback" not in err
        said = json.loads(out)
        if status:
            assert said.keys() == {"error"}
            assert "\n" not in said["error"]
        return said

    return run
