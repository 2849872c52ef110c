"""The tests of trainers and models in other versions: `make test-versions`, `python -m tests.versions.run ROW ...`.

A row is a file of constraints in this folder. Each gets an environment of its own (`--folder` keeps them, and takes
those that it has), and its line in docs/versions.md.
"""

from __future__ import annotations

import argparse
import datetime
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TABLE = ROOT / "docs" / "versions.md"
ROWS = ("oldest", "llama-factory-4.57", "llama-factory", "ms-swift", "axolotl", "unsloth", "newest")
OLDER_TRL = ("llama-factory-4.57", "llama-factory")  # than the extra `trl` allows
PACKAGES = ("torch", "transformers", "trl", "accelerate", "peft", "datasets")
TESTS = (
    *("test_versions", "test_trl", "test_trl_rows", "test_trainer", "test_method_trainer"),
    *("test_causal_lm", "test_models", "test_sharing"),
)
HEADER = f"| row | {' | '.join(PACKAGES)} | passed | failed | skipped | date |"


class Outcome(NamedTuple):
    passed: int
    failed: list[str]
    skipped: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="by default all")
    parser.add_argument("--folder", type=Path, help="where the environments are kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        outcomes = {row: run(row, folder / row) for row in options.rows or ROWS}
    sys.exit(any(outcome.failed for outcome in outcomes.values()))


def run(row: str, environment: Path) -> Outcome:
    """Make the row's environment, run its tests there, and write its line."""
    python = environment / "bin" / "python"
    if not python.exists():
        install(row, environment)
    outcome = tested(python, environment / "tests.xml")
    write(row, versions(python), outcome)
    print(f"{row}: {outcome.passed} passed, {len(outcome.failed)} failed, {outcome.skipped} skipped", flush=True)
    return outcome


def install(row: str, environment: Path) -> None:
    """torch first, by the exact version of the row or the Makefile; then this checkout, within the constraints."""
    venv.create(environment, with_pip=True)
    extras = "cli" if row in OLDER_TRL else "cli,trl"
    trl = ["trl"] if row in OLDER_TRL else []
    file = HERE / f"{row}.txt"
    constraints = ["--constraint", str(file)]
    of_torch = file if "torch==" in file.read_text() else ROOT / "constraints.txt"
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, "--constraint", str(of_torch), "torch"], check=True)
    tools = ("hypothesis", "pytest", *trl)
    subprocess.run([*pip, *constraints, "--editable", f"{ROOT}[{extras}]", *tools], check=True)


def tested(python: Path, report: Path) -> Outcome:
    files = [f"tests/{name}.py" for name in TESTS]
    command = [str(python), "-m", "pytest", "-q", "-m", "not slow", "--tb=short", f"--junit-xml={report}", *files]
    report.unlink(missing_ok=True)
    subprocess.run(command, cwd=ROOT, env={**os.environ, "TRL_EXPERIMENTAL_SILENCE": "1"}, check=False)
    cases = list(ElementTree.parse(report).iter("testcase"))
    failed = [
        case.get("name", "") for case in cases if case.find("failure") is not None or case.find("error") is not None
    ]
    skipped = sum(case.find("skipped") is not None for case in cases)
    return Outcome(len(cases) - len(failed) - skipped, failed, skipped)


def versions(python: Path) -> list[str]:
    code = f"from importlib.metadata import version\nfor package in {PACKAGES}: print(version(package))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.split()


def write(row: str, installed: list[str], outcome: Outcome) -> None:
    """The row's line in the table, and the tests that failed under it."""
    counts = (outcome.passed, len(outcome.failed), outcome.skipped)
    line = f"| {' | '.join((row, *installed, *map(str, counts), datetime.date.today().isoformat()))} |"
    text = TABLE.read_text()
    before, header, after = text.partition(f"{HEADER}\n")
    rule, *lines = after.partition("\n\n")[0].splitlines()
    rest = after.partition("\n\n")[2]
    kept = {old.split(" | ")[0].strip("| "): old for old in lines} | {row: line}
    ordered = [kept[name] for name in ROWS if name in kept]
    notes = {note.partition(": ")[0]: note for note in rest.splitlines() if note.startswith("- `")}
    notes.pop(f"- `{row}` fails", None)
    if outcome.failed:
        notes[f"- `{row}` fails"] = f"- `{row}` fails: {', '.join(outcome.failed)}"
    TABLE.write_text(before + header + "\n".join((rule, *ordered, "", *notes.values())).rstrip() + "\n")


if __name__ == "__main__":
    main()
