"""How a command ends that cannot finish: what it says, and its exit status.

What a user can mend is told in a sentence: a `UserError`, a wrong flag, and what the machine refuses (a folder that may
not be written, a full disk, a full memory). Any other error is told in a sentence as well, and a report of it is
written to a file; so the list of causes does not have to be complete.
"""

from __future__ import annotations

import errno
import os
import sys
import time
from pathlib import Path
from typing import Any

import typer

from ..errors import UserError, save_report
from . import BAD_INPUT, INTERRUPTED, UNFORESEEN
from .console import Output, flush

ClickException: Any = typer.BadParameter.__mro__[2]  # which typer has of its own, or from click, and does not name

# What to do about an error of the file system.
ELSEWHERE = "choose another place"
ADVICE = {
    **dict.fromkeys((errno.EACCES, errno.EPERM), f"change its permissions, or {ELSEWHERE}"),
    **dict.fromkeys((errno.ENOSPC, errno.EDQUOT), f"make room on that disk, or {ELSEWHERE}"),
    **dict.fromkeys((errno.EROFS, errno.ENOTEMPTY), ELSEWHERE),
    errno.ENOTDIR: f"part of it is a file, not a folder: {ELSEWHERE}",
    errno.EISDIR: f"it is a folder, not a file: {ELSEWHERE}",
    errno.EEXIST: f"it is there already, and no folder: {ELSEWHERE}",
    errno.ENOENT: "it is not there, or no longer",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: f"its links lead in a circle: {ELSEWHERE}",
    errno.EFBIG: "the limit (ulimit -f) or the file system has to allow larger files",
    errno.EMFILE: "the limit (ulimit -n) has to allow more open files",
    errno.EIO: f"the disk has an error: {ELSEWHERE}",
}
# Those that libraries say in words (safetensors, PyTorch).
WORDS = {os.strerror(code): code for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EROFS)}
OUT_OF_MEMORY = ("OutOfMemoryError", "MemoryError")
NO_MEMORY_WORDS = ("can't allocate memory", "Cannot allocate memory", "out of memory")

GRACE = 5  # seconds in which the first process can say what is wrong, before another one's end makes torchrun end it


def end(error: BaseException, output: Output, folder: Path | None = None) -> int:
    """Say in one sentence why a command has stopped; returns the exit status. `folder`: that of its output."""
    if isinstance(error, KeyboardInterrupt):
        output.interrupted(str(error))
        return INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return 1  # nobody reads
    sentence = _sentence(error, folder)
    if sentence is not None:
        output.error(sentence)
        return BAD_INPUT
    report = save_report(error, folder)
    where = f"what led to it is in {report}" if report else "and no report of it could be written"
    reason = f"{type(error).__name__}: {error}".strip().partition("\n")[0].rstrip(".: ")
    output.error(f"This was not foreseen: {reason} ({where}).")
    return UNFORESEEN


def _sentence(error: BaseException, folder: Path | None) -> str | None:
    """What a user can mend; None for all else."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, ClickException):
        context = getattr(error, "ctx", None)
        help = f" See {context.command_path} --help." if context else ""
        return f"{error.format_message().rstrip('.')}.{help}"
    if type(error).__name__ in OUT_OF_MEMORY or any(words in str(error) for words in NO_MEMORY_WORDS):
        return "The memory is full: give a smaller --batch-size or --max-length, or take a smaller model."
    code = error.errno if isinstance(error, OSError) else None
    code = code or next((number for words, number in WORDS.items() if words in str(error)), None)
    if code not in ADVICE:
        return None
    path = getattr(error, "filename", None) or folder
    subject = f"{os.fspath(path)!s} cannot be used" if path is not None else "A file cannot be used"
    return f"{subject} ({os.strerror(code)}): {ADVICE[code]}."


def leave(status: int) -> int:
    """To be called last. One of several processes ends here and now: what waits for the others would wait for ever.

    Others than the first one let it speak before they go.
    """
    heard = flush(sys.stdout)
    flush(sys.stderr)
    if status and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        if int(os.environ.get("RANK", "0")) > 0:
            time.sleep(GRACE)
        os._exit(status)
    return status if heard else status or 1
