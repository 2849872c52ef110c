"""The command line: `orpo-kernels`, or `python -m orpo_kernels`.

    app.py      the commands, one file each beside it
    flags.py    a dataclass of settings -> the flags of a command; `--config FILE` and `--json`
    console.py  what a command prints: tables and bars for people, one JSON object for machines
    endings.py  what it says when it cannot go on

A command's file holds what it says. What it does is imported when it runs, so that `--help` does not wait for it.

Exit status: 0 done, 1 failed, 2 bad input (`errors.UserError`, a flag, what the machine refuses), 70 unforeseen (a
report is written), 130 interrupted.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

BAD_INPUT, UNFORESEEN, INTERRUPTED = 2, 70, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line (by default the process's own); returns the exit status."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _run(words or ["--help"])
    except KeyboardInterrupt:  # before there is a command
        return INTERRUPTED


def _run(words: list[str]) -> int:
    as_json = "--json" in words
    try:
        from .app import app
        from .console import Output
        from .endings import end, leave
    except ModuleNotFoundError as missing:
        if missing.name not in ("typer", "rich", "yaml"):
            raise
        message = f"{missing.name} is not installed; run: pip install 'orpo-kernels[cli]'"
        print(f"orpo-kernels: {message}", file=sys.stderr)
        if as_json:
            print(json.dumps({"error": message}))
        return BAD_INPUT
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # what the encoding lacks is escaped, not an error
            stream.reconfigure(errors="backslashreplace")
    try:
        status = app(words, prog_name="orpo-kernels", standalone_mode=False)
    except SystemExit as stop:  # of `--help`, of completion
        status = stop.code
    except Exception as error:  # of the flags: a command's own errors end in it
        from_file = getattr(getattr(error, "ctx", None), "default_map", None) or {}
        status = end(error, Output(as_json or from_file.get("json") is True))
    return leave(status if isinstance(status, int) else int(status is not None))
