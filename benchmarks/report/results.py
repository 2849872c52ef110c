"""The results of a run, in one JSON file, from which an interrupted run goes on."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from orpo_kernels.app import machine

PROJECT = Path(__file__).resolve().parents[2]


class Results:
    """`results.json` of a folder: the machine, the options, and a record for each case that is finished.

    Raises:
        ValueError: the file is of another machine, other versions, other code or other options.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.path, self.machine, self.options = folder / "results.json", machine.describe(), options
        self.machine["code"] = code_hash()
        self.cases: dict[str, dict[str, Any]] = {}
        if not self.path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            return
        saved = read(self.path)
        for what, mine in (("machine", self.machine), ("options", options)):
            other = [key for key in mine if key != "date" and mine[key] != saved[what].get(key)]
            if other:
                raise ValueError(
                    f"{self.path} is of another {what} ({', '.join(other)} differ): "
                    "start anew with --fresh, or give another --output"
                )
        self.machine, self.cases = saved["machine"], saved["cases"]

    def add(self, key: str, record: dict[str, Any]) -> None:
        self.cases[key] = record
        text = json.dumps({"machine": self.machine, "options": self.options, "cases": self.cases}, indent=1)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(text)
        unfinished.replace(self.path)  # at once: an interruption leaves the old file or the new one


def read(path: Path) -> dict[str, Any]:
    """The content of a `results.json`: "machine", "options", "cases"."""
    return json.loads(path.read_text())


def code_hash() -> str:
    """Of all that is measured, the compiled kernels included."""
    digest = hashlib.sha256()
    for folder in ("orpo_kernels", "native"):
        for path in sorted(PROJECT.joinpath(folder).rglob("*")):
            if path.suffix in (".py", ".cpp", ".h", ".so"):
                digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
