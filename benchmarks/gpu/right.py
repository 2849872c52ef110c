"""The tests that only a GPU can run, `tests/gpu`, several at a time: values first, what needs room last."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.gpu.cases import Case, Settings, Skip
from benchmarks.report.results import PROJECT

FILES = (
    "test_values.py",
    "test_promises.py",
    "test_memory.py",
    "test_flex_attention.py",
    "test_varlen.py",
    "test_large.py",
)
PROCESSES = 4  # at most
GIB_EACH = 18  # of device memory: a large test holds up to 16
NEEDED = ("pytest", "hypothesis")
WORDS = "PASSED|FAILED|ERROR|SKIPPED"
# "[gw1] [ 40%] PASSED tests/gpu/test_x.py::test_y[a b]" of several processes, "tests/...::test_y[a b] PASSED" of one.
OUTCOME = re.compile(
    rf"^(?:\[gw\d+\].*? )?(?P<first>{WORDS}) (?P<then>\S+\.py::.*?)(?: - .*)?\s*$"
    rf"|^(?P<test>\S+\.py::.*?) (?P<outcome>{WORDS})\b",
    re.MULTILINE,
)


def cases(settings: Settings) -> Iterator[Case]:
    folder = PROJECT / "tests" / "gpu"
    first = [folder / name for name in FILES if (folder / name).exists()]
    files = [*first, *sorted(set(folder.glob("test_*.py")) - set(first))]
    yield Case("tests", partial(run, [str(file.relative_to(PROJECT)) for file in files], settings))


def run(files: Sequence[str], settings: Settings) -> dict[str, Any]:
    """How many tests passed, which failed, and whether the time was up before the last one.

    Raises:
        Skip: what runs tests is not installed.
    """
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise Skip(f"{' and '.join(missing)} not installed")
    command = [sys.executable, "-m", "pytest", *files, "-v", "--no-header", "--tb=line", "-p", "no:cacheprovider"]
    if importlib.util.find_spec("xdist") is not None:
        command += ["--numprocesses", str(processes(settings))]
    with tempfile.TemporaryFile("w+") as output:
        is_cut = not _ends_within(command, settings.seconds, output)
        output.seek(0)
        return {**outcomes(output.read()), "cut": is_cut, "seconds_given": round(settings.seconds)}


def processes(settings: Settings) -> int:
    """As many as the device's free memory has room for."""
    if settings.device != "cuda":
        return 1
    torch.cuda.empty_cache()
    return max(1, min(PROCESSES, int(torch.cuda.mem_get_info()[0] / 2**30 / GIB_EACH)))


def _ends_within(command: list[str], seconds: float, output: Any) -> bool:
    """Run it with its output in that file; False where it had to be ended, and whatever it had started."""
    child = subprocess.Popen(command, cwd=PROJECT, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        child.wait(timeout=seconds)
        return True
    except subprocess.TimeoutExpired:
        return False
    finally:
        if child.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def outcomes(text: str) -> dict[str, Any]:
    """Of pytest's lines, one a test, however many processes wrote them.

    Raises:
        Skip: there is none, with the last line that there is.
    """
    found = {m["then"] or m["test"]: m["first"] or m["outcome"] for m in OUTCOME.finditer(text)}
    if not found:
        lines = text.strip().splitlines() or ["no output"]
        raise Skip(f"no test ran: {lines[-1].strip('= ')}")
    values = list(found.values())
    return {
        "passed": values.count("PASSED"),
        "skips": values.count("SKIPPED"),
        "failed": [test for test, value in found.items() if value in ("FAILED", "ERROR")],
    }
