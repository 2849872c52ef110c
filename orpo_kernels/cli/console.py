"""What a command prints."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table


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
        self.console = Console(stderr=as_json, highlight=False, quiet=not self.is_first)

    def waiting(self, for_what: str) -> Any:
        """A spinner while the block runs."""
        return self.console.status(for_what) if self.console.is_terminal else nullcontext()

    def result(self, record: dict[str, Any], *renderables: Any) -> None:
        """The outcome: `record` as JSON, or else `renderables` (rich's, or text)."""
        if self.as_json and self.is_first:
            print(json.dumps(record, ensure_ascii=False, allow_nan=False, default=str), flush=True)
        elif not self.as_json:
            for renderable in renderables:
                self.console.print(renderable, soft_wrap=isinstance(renderable, str), markup=False)

    def error(self, message: str) -> None:
        """A sentence for stderr; for a machine also an object with the key "error"."""
        if self.as_json and self.is_first:
            print(json.dumps({"error": message}, ensure_ascii=False), flush=True)
        Console(stderr=True, highlight=False).print(f"[bold red]Error:[/] {escape(message)}", soft_wrap=True)
