"""What is told to people beside the result: our own remarks, and not those of the libraries."""

from __future__ import annotations

import transformers
from rich.console import Console


def say(console: Console, text: str) -> None:
    """One remark, as it is: brackets are no markup, and the terminal breaks the line."""
    console.print(text, markup=False, soft_wrap=True)


def silence_transformers() -> None:
    """Errors alone are to be heard, and no bars beside ours."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
