"""Processes that are started for a part of the work, and end with the one that started them."""

from __future__ import annotations

import os
import signal
import subprocess
from contextlib import suppress
from typing import Any

PATIENCE = 10  # seconds that one has to end by itself, as upon Ctrl-C


def run_child(command: list[str]) -> tuple[int, str]:
    """(status, stdout) of a process, which does not outlive this one's Ctrl-C or SIGTERM.

    Its stdin is a pipe that closes when this process ends in any other way; `app.cli.dependent` heeds it.
    """

    def stop(*_: Any) -> None:
        raise SystemExit(128 + signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, stop)
    stdin, held_open = os.pipe()
    try:
        with subprocess.Popen(command, stdin=stdin, stdout=subprocess.PIPE, text=True, encoding="utf-8") as child:
            try:
                out, _ = child.communicate()
            except BaseException:
                _end(child)
                raise
    finally:
        os.close(stdin)
        os.close(held_open)
        signal.signal(signal.SIGTERM, before)
    return child.returncode, out


def _end(child: subprocess.Popen) -> None:
    """Ctrl-C in a terminal has reached the child as well; what was sent to this process alone is passed on."""
    for seconds, signal_behind in ((1, signal.SIGINT), (PATIENCE, signal.SIGKILL)):
        with suppress(subprocess.TimeoutExpired):
            child.wait(seconds)
            return
        child.send_signal(signal_behind)
