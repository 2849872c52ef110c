"""A file or data set as rows: the number of each, and what it holds or why that is unreadable.

Lines of JSON and CSV are read one by one, Parquet by row groups, so that a broken row costs itself alone. (`datasets`
infers one schema for a file, and one row of another type makes it refuse all.) Bytes that are no UTF-8 become lone
surrogates here, and `layouts` refuses the text that has them.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..errors import UserError

FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
ENCODING, BROKEN_BYTES = "utf-8-sig", "surrogateescape"
LONGEST_FIELD = 2**31 - 1  # of CSV; its reader would refuse 128 KiB


class Unreadable(Exception):
    """A row that holds nothing. The message is the reason, a clause about "it"."""


Row = tuple[int, Any]  # its number, from 1, and its value: a mapping, if all is well, or an `Unreadable`


def read_rows(source: str, split: str = "train") -> Iterator[Row]:
    """All rows of a file, or of the `split` of a folder or data set that `datasets` knows.

    Raises `UserError` where nothing can be read at all.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        return _data_set(source, split)
    if path.stat().st_size == 0:
        raise UserError(f"{source} is empty.")
    readers = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".json": _json}
    if path.suffix not in FORMATS:
        raise UserError(f"{source} ends in {path.suffix!r}, but the formats are {', '.join(FORMATS)}.")
    return readers.get(path.suffix, _json_lines)(path)


def _json_lines(path: Path) -> Iterator[Row]:
    with path.open(newline="\n", encoding=ENCODING, errors=BROKEN_BYTES) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line)


def _json(path: Path) -> Iterator[Row]:
    """One list of objects, or JSON Lines under another name."""
    text = path.read_text(encoding=ENCODING, errors=BROKEN_BYTES)
    if not text.lstrip().startswith("["):
        return _json_lines(path)
    rows = _parsed(text)
    if isinstance(rows, Unreadable):
        raise UserError(f"{path} cannot be used: {rows}. Mend it, or write one object a line (.jsonl).")
    return iter(enumerate(rows, start=1))


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        return Unreadable(f"it is not JSON ({error})")


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    with path.open(newline="", encoding=ENCODING, errors=BROKEN_BYTES) as file:
        reader = csv.DictReader(file, delimiter="\t" if path.suffix == ".tsv" else ",")
        number = 0
        while True:
            number += 1
            try:
                row = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                yield number, Unreadable(f"it is not CSV ({error})")
                continue
            if None in row:
                yield number, Unreadable(f"it has {len(row[None])} fields more than the header")
            else:
                yield number, {name: _messages_or_text(value) for name, value in row.items()}


def _messages_or_text(cell: Any) -> Any:
    """A cell of CSV can hold a chat as JSON."""
    if not isinstance(cell, str) or not cell.startswith(("[", "{")):
        return cell
    parsed = _parsed(cell)
    messages = parsed if isinstance(parsed, list) else [parsed]
    return parsed if messages and all(map(_is_message, messages)) else cell


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and (value.keys() >= {"role", "content"} or value.keys() >= {"from", "value"})


def _parquet(path: Path) -> Iterator[Row]:
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except Exception as error:  # of very many kinds, where bytes are damaged
        raise UserError(
            f"{path} is not a whole Parquet file ({_first_line(error)}); it may have been cut off, so copy it again."
        ) from error
    with file:
        number = 0
        for group, count in enumerate(groups):
            try:
                table = file.read_row_group(group)
            except Exception as error:
                broken = Unreadable(f"its part of the file (row group {group}) cannot be read ({_first_line(error)})")
                yield from ((number + i, broken) for i in range(1, count + 1))
            else:
                yield from ((number + i + 1, _record(table, i)) for i in range(count))
            number += count


def _record(table: Any, index: int) -> Any:
    try:
        return table.slice(index, 1).to_pylist()[0]
    except Exception as error:  # such as text that is not UTF-8
        return Unreadable(f"it cannot be decoded ({_first_line(error)})")


def _data_set(source: str, split: str) -> Iterator[Row]:
    import datasets

    if source.endswith(FORMATS):
        raise UserError(f"There is no file {source}.")
    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:  # of very many kinds: of the hub, the network, the builder
        raise UserError(
            f"{source} is neither a file nor a data set whose split {split!r} can be loaded "
            f"({type(error).__name__}: {_first_line(error)})."
        ) from error
    return iter(enumerate(rows, start=1))


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".")
