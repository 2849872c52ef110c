"""Resident memory: what a fresh process holds while it runs one contestant.

The accounting of `memory` is exact, but sees no code that torch.compile generates, and nothing that a library keeps for
itself. Here the operating system counts. Each contestant gets a process, with the same inputs from a file; its first
call of each head compiles and warms up, during its second the high-water mark of the resident set is read, above what
was resident before it. Linux only.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.contest.workloads import Workload


class ProcessPeak:
    """`nbytes`: the most that was held inside. On Linux: resident set; on a GPU: what torch allocated."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.nbytes = device, 0

    def __enter__(self) -> ProcessPeak:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark falls to what is resident now
        return self

    def __exit__(self, *_: Any) -> None:
        if self.device.type == "cuda":
            self.nbytes = torch.cuda.max_memory_allocated(self.device)
        else:
            # Not getrusage: a process begins there with the peak of the one that started it.
            status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
            self.nbytes = int(status["VmHWM"].split()[0]) * 1024


def last_line(module: str, *arguments: str) -> str:
    """What a module prints last, run in a fresh process.

    Raises:
        RuntimeError: the process failed; its last line says why.
    """
    command = [sys.executable, "-m", module, *arguments]
    run = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    if run.returncode:
        raise RuntimeError((run.stderr.strip() or "it left no message").splitlines()[-1])
    return run.stdout.splitlines()[-1]


def measure(work: Workload, names: Sequence[str], heads: Sequence[str], threads: int, advance: Any) -> dict[str, Any]:
    """Peak resident bytes of everybody's call by head, above what its process held before; or why there are none."""
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        inputs = Path(folder) / "inputs.pt"
        torch.save(vars(work), inputs)
        for name in names:
            try:
                options = ("--threads", str(threads), "--head", *heads)
                found[name] = json.loads(last_line("benchmarks.contest.process", name, str(inputs), *options))
            except RuntimeError as error:
                found[name] = {"failure": str(error)}
            advance()
    return found


def main() -> None:
    from benchmarks.contest.turns import Contest

    parser = argparse.ArgumentParser(prog="python -m benchmarks.contest.process", description=__doc__)
    parser.add_argument("name")
    parser.add_argument("inputs", type=Path)
    parser.add_argument("--head", nargs="+", required=True)
    parser.add_argument("--threads", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    work, found = Workload(**torch.load(options.inputs)), {}
    for head in options.head:
        contest = Contest(work, head)
        contestant = contest.contestant(options.name)
        contest.run(contestant)
        contest.clear()
        with ProcessPeak(contest.device) as before:
            pass
        with ProcessPeak(contest.device) as peak:
            contest.run(contestant)
        found[head] = peak.nbytes - before.nbytes
    print(json.dumps(found))


if __name__ == "__main__":
    main()
