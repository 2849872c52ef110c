"""The tests of trainers and models in other versions: `make test-versions`, `python -m tests.versions.run ROW ...`.

A row is a file of constraints in this folder. Each gets an environment of its own (`--folder` keeps them, and takes
those that it has), and its line in docs/versions.md.

`make test-oldest` is brief (`--brief`): of the oldest row, the tests of what differs between versions, with the torch
of constraints.txt, of which there is a CPU build at hand; no line is written.
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
BRIEF = ("test_versions", "test_trl", "test_trl_rows", "test_trainer")
HEADER = f"| row | {' | '.join(PACKAGES)} | passed | failed | skipped | date |"


class Outcome(NamedTuple):
    passed: int
    failed: list[str]
    skipped: int


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", nargs="*", choices=[*ROWS, []], help="by default all")
    parser.add_argument("--folder", type=Path, help="where the environments are kept")
    parser.add_argument("--brief", action="store_true", help="a few tests, with the torch of constraints.txt")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (options.folder or Path(temporary)) / ("brief" if options.brief else "")
        outcomes = {row: run(row, folder / row, options.brief) for row in options.rows or ROWS}
    sys.exit(any(outcome.failed for outcome in outcomes.values()))


def run(row: str, environment: Path, brief: bool) -> Outcome:
    """Make the row's environment, run its tests there, and write its line."""
    python = environment / "bin" / "python"
    if not python.exists():
        install(row, environment, brief)
    outcome = tested(python, environment / "tests.xml", BRIEF if brief else TESTS)
    if not brief:
        write(row, versions(python), outcome)
    print(f"{row}: {outcome.passed} passed, {len(outcome.failed)} failed, {outcome.skipped} skipped", flush=True)
    return outcome


def install(row: str, environment: Path, brief: bool) -> None:
    """torch first, by its exact version, so that no package's range picks another build; then this checkout."""
    venv.create(environment, with_pip=True)
    extras = "cli" if row in OLDER_TRL else "cli,trl"
    trl = ["trl"] if row in OLDER_TRL else []
    file = environment / "constraints.txt"
    file.write_text("\n".join(constraints(row, brief)) + "\n")
    pip = [str(environment / "bin" / "python"), "-m", "pip", "install", "--quiet", "--constraint", str(file)]
    subprocess.run([*pip, "torch"], check=True)
    subprocess.run([*pip, "--editable", f"{ROOT}[{extras}]", "hypothesis", "pytest", *trl], check=True)


def constraints(row: str, brief: bool) -> list[str]:
    """The row's versions, and the torch of constraints.txt where the row names none or `brief` says so."""
    lines = (HERE / f"{row}.txt").read_text().splitlines()
    usual = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch==")]
    if brief:
        lines = [line for line in lines if not line.startswith("torch==")]
    return lines if any(line.startswith("torch==") for line in lines) else usual + lines


def tested(python: Path, report: Path, names: tuple[str, ...]) -> Outcome:
    files = [f"tests/{name}.py" for name in names]
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
