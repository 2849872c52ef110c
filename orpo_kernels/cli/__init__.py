"""The command line: `orpo-kernels`, or `python -m orpo_kernels`.

    app.py      the commands, one file each beside it
    flags.py    a dataclass of settings -> the flags of a command; `--config FILE` and `--json`
    console.py  what a command prints: tables and bars for people, one JSON object for machines

A command's file holds what it says. What it does is imported when it runs, so that `--help` does not wait for it.

Exit status: 0 done, 1 failed, 2 bad input (`errors.UserError`, or a flag), 130 interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

BAD_INPUT = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's own); returns the exit status."""
    try:
        from .app import app
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich", "yaml"):
            raise
        print(
            f"orpo-kernels: {missing.name} is not installed; run: pip install 'orpo-kernels[cli]'",
            file=sys.stderr,
        )
        return BAD_INPUT
    try:
        app(arguments, prog_name="orpo-kernels")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0
