"""What the tests of the command line have in common: a tiny model, pairs, and a way to run a command."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any

from orpo_kernels.app.cli import main

from .training import ANSWERS, chat_examples, tiny, tokenizer


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


def write_chats(path: Path, count: int) -> str:
    return write_rows(path, chat_examples(count))


def command(*arguments: Any) -> tuple[int, dict[str, Any], str]:
    """A command line with --json in this process: (exit status, the one JSON object on stdout, stderr)."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([*map(str, arguments), "--json"])
    assert "Traceback" not in err.getvalue(), err.getvalue()
    return status, json.loads(out.getvalue()), err.getvalue()


def run(*arguments: Any, status: int = 0) -> dict[str, Any]:
    """The JSON object of a command that ends with `status`; of one that fails, its error in one line."""
    ended, said, told = command(*arguments)
    assert ended == status, (said, told)
    if status:
        assert said.keys() == {"error"}
        assert "\n" not in said["error"]
    return said


def records(folder: Path, name: str = "metrics") -> list[dict[str, Any]]:
    """What a run has logged into a file of its folder."""
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def without_times(log: list[dict[str, Any]]) -> list[dict[str, Any]]:
    times = ("seconds", "tokens_per_second", "memory_bytes")
    return [{name: value for name, value in record.items() if name not in times} for record in log]


def assert_same_run(folder: Path, whole: Path) -> None:
    """The same logs but for times, and the same weights bit for bit."""
    assert without_times(records(folder)) == without_times(records(whole))
    assert records(folder, "evaluations") == records(whole, "evaluations")
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (whole / weights).read_bytes()
