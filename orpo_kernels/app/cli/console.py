"""What a command prints."""

from __future__ import annotations

import os
import sys
from contextlib import nullcontext, suppress
from typing import Any, TextIO

import rich.console
from rich.table import Table
from rich.text import Text

from ..finetuning.records import to_json


class Console(rich.console.Console):
    """Rich's, for text that comes from users: names are shown as they are, escaped where the encoding lacks them.

    (Brackets are no markup, `:cat:` is no picture.) Who closes the pipe is told no more, and the work goes on.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        """Also called for every cell of a table, before its width is measured."""
        return super().render_str(text.encode(self.encoding, "backslashreplace").decode(self.encoding), **options)

    def on_broken_pipe(self) -> None:
        discard(self.file)


def discard(stream: Any) -> None:
    """Let all that is written to the stream from now on, or waits in its buffer, go nowhere."""
    with suppress(AttributeError, OSError, ValueError):  # where no file is behind it
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def flush(stream: TextIO | None) -> bool:
    """Write out what waits in the buffer, while there is still somebody to tell if it cannot be; whether it could."""
    try:
        if stream is not None:
            stream.flush()
    except OSError as error:
        discard(stream)
        return isinstance(error, BrokenPipeError)  # which is nobody's loss
    return True


def table(title: str, *columns: str) -> Table:
    """An empty table: the first column names things, the others hold figures."""
    made = Table(title=title, min_width=len(title) + 4)
    for index, column in enumerate(columns):
        made.add_column(column, justify="right" if index else "left")
    return made


def interval(value: dict[str, float], form: str) -> str:
    """A cell: a value, and below it the low and high end of its interval."""
    return f"{form.format(value['value'])}\n({form.format(value['low'])} to {form.format(value['high'])})"


class Output:
    """Where a command says things: to people, or (`--json`) to a machine. Of several processes the first one speaks.

    Attributes:
        as_json: whether stdout is for one JSON object alone.
        console: for tables, bars and remarks; stderr if `as_json`.
    """

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        self.is_first = int(os.environ.get("RANK", "0")) == 0
        self.console = Console(stderr=as_json, quiet=not self.is_first)

    def loading(self) -> Any:
        """A spinner while the block imports what takes seconds."""
        return self.console.status("Loading torch and transformers …") if self.console.is_terminal else nullcontext()

    def result(self, record: dict[str, Any], *renderables: Any) -> None:
        """The outcome: `record` as JSON, or else `renderables` (rich's, or text)."""
        if self.as_json and self.is_first:
            self._print_json(record)
        elif not self.as_json:
            for renderable in renderables:
                self.console.print(renderable, soft_wrap=isinstance(renderable, str))

    def error(self, message: str) -> None:
        """A sentence for stderr; for a machine also an object with the key "error"."""
        message = " ".join(message.split())
        self._print_error(message)
        Console(stderr=True).print(Text.assemble(("Error:", "bold red"), f" {message}"), soft_wrap=True)

    def interrupted(self, how_to_go_on: str) -> None:
        """What to do next, said to people and to a machine."""
        message = " ".join(["Interrupted.", *filter(None, [how_to_go_on])])
        self._print_error(message)
        self.console.print(message, soft_wrap=True)

    def _print_error(self, message: str) -> None:
        """For a machine. People read it on stderr, also where stdout takes no more."""
        if not (self.as_json and self.is_first and flush(sys.stdout)):
            return
        try:
            self._print_json({"error": message})
        except OSError:
            discard(sys.stdout)

    def _print_json(self, record: dict[str, Any]) -> None:
        """One line of ASCII, which every encoding has."""
        try:
            print(to_json(record, ascii_only=True), flush=True)
        except BrokenPipeError:
            discard(sys.stdout)
