"""`python -m orpo_kernels.app.cli.dependent`: the command line in a process that ends with the one that started it.

Its stdin is a pipe that the other process holds open. However that ends, SIGKILL included, the pipe closes with it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time

from ..finetuning.children import PATIENCE
from . import INTERRUPTED, main


def end_with_stdin() -> None:
    """Let this process be interrupted once its stdin closes."""
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    while os.read(sys.stdin.fileno(), 1):
        pass
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(PATIENCE)
    os._exit(INTERRUPTED)


if __name__ == "__main__":
    end_with_stdin()
    sys.exit(main())
