"""Errors that a user of the command line is told, and the report of one that nobody has foreseen."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import traceback
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

PACKAGES = (
    *("orpo-kernels", "torch", "transformers", "tokenizers", "accelerate", "peft", "datasets", "safetensors"),
    *("triton", "numpy", "matplotlib", "pyyaml", "rich", "typer"),
)


class UserError(ValueError):
    """What was given cannot be used. The message is a sentence or two: what was wrong, and what to do."""


class Diverged(UserError):
    """What a model computes is not finite. Every process of a run finds it out at the same step."""


def first_line(error: BaseException) -> str:
    """What an error of a library says, without its end and its full stop; the kind of one that says nothing."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def save_report(error: BaseException, folder: Path | None = None) -> Path | None:
    """Write the command line, the versions and the traceback of an error that nobody has foreseen.

    Into `folder` where it holds something already (an empty one stays free for the next try), else into the current
    folder, else into that of temporary files. Returns the file, or None where no place can be written to.
    """
    lines = [f"command line: {sys.argv}", f"python {platform.python_version()} on {platform.platform()}"]
    lines += [f"{package} {version_of(package) or '(not installed)'}" for package in PACKAGES]
    report = "\n".join([*lines, "", "".join(traceback.format_exception(error))])
    places = [Path(), Path(tempfile.gettempdir())]
    if folder is not None and folder.is_dir() and any(folder.iterdir()):
        places.insert(0, folder)
    name = f"orpo-kernels-report-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for place in places:
        try:
            with (place / name).open("x", encoding="utf-8", errors="backslashreplace") as file:
                file.write(report)
        except OSError:
            continue
        return place / name
    return None


def version_of(package: str) -> str | None:
    """None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
