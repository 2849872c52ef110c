"""A file or data set as rows: the number of each, and what it holds or why that is unreadable.

Lines of JSON and CSV are read one by one, Parquet by row groups, so that a broken row costs itself alone. (`datasets`
infers one schema for a file, and one row of another type makes it refuse all.) Bytes that are no UTF-8 become lone
surrogates here, and `layouts` refuses the text that has them. Text files may be compressed and in UTF-16 (`opening`).
"""

from __future__ import annotations

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ...text.columns import without_nulls
from ...text.messages import is_message
from ..errors import UserError, first_line
from .opening import COMPRESSIONS, explained, format_of, is_compressed, is_pointer, library, opened

FORMATS = (".jsonl", ".ndjson", ".json", ".parquet", ".csv", ".tsv")
_NEXT = re.compile(r"[\s,]*(?=[^\s,])")  # up to what is not between values of JSON
ABOUT_DATA = ("dataset_info.json", "dataset_infos.json")  # no rows, in folders of data
LONGEST_FIELD = 2**31 - 1  # of CSV; its reader would refuse 128 KiB


class Unreadable(Exception):
    """A row that holds nothing. The message is the reason, a clause about "it"."""


Row = tuple[int, Any]  # its number, from 1, and its value: a mapping, if all is well, or an `Unreadable`


def read_rows(source: str, split: str = "train") -> Iterator[Row]:
    """All rows of a file, or of the `split` of a folder or data set that `datasets` knows.

    Raises `UserError` where nothing can be read at all.
    """
    path = Path(os.path.expanduser(source))
    with explained(path):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{source} is a link to {path.readlink()}, which is not there.")
        if path.is_dir():
            return _folder(path, split)
        if not path.exists():
            if source.startswith((".", "/", "~")) or format_of(path) in FORMATS:
                raise UserError(f"There is no file {source}.")
            return _data_set(source, split)
        if path.stat().st_size == 0:
            raise UserError(f"{source} is empty.")
        _check_pointer(path)
    readers = {".parquet": _parquet, ".csv": _csv, ".tsv": _csv, ".json": _json}
    found = format_of(path)
    if found not in FORMATS or (found == ".parquet" and is_compressed(path)):
        raise UserError(
            f"{source} ends in {path.suffix!r}, but the formats are {', '.join(FORMATS)}, those of text also with "
            f"{' or '.join(COMPRESSIONS)} behind."
        )
    return readers.get(found, _lines)(path)


def _check_pointer(path: Path) -> None:
    if is_pointer(path):
        raise UserError(f"{path} is a pointer of Git LFS, not the data itself: git lfs pull.")


# --- JSON ----------------------------------------------------------------------------------------------------------


def _lines(path: Path) -> Iterator[Row]:
    """JSON Lines; or what is named so and is one list, or pretty-printed objects."""
    with opened(path, newline="\n") as file:
        filled = (line.strip() for line in file if line.strip())
        first, second = next(filled, ""), next(filled, "")
    if first.startswith("["):
        value = _parsed(first)
        is_json = isinstance(value, list) and not second
        if isinstance(value, Unreadable):
            with opened(path) as file:
                is_json = _is_json(file.read())
    else:
        is_json = first == "{" and second.startswith('"')
    return _json(path) if is_json else _json_lines(path)


def _json_lines(path: Path) -> Iterator[Row]:
    with opened(path, newline="\n") as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _parsed(line)


def _json(path: Path) -> Iterator[Row]:
    """One list of objects, at the top or under a key; or objects one after another, a line each or pretty-printed."""
    with opened(path) as file:
        text = file.read()
    first = text.lstrip().partition("\n")[0]
    if not text.lstrip().startswith("[") and _is_json(first) and text.strip() != first.strip():
        return _json_lines(path)
    value = _parsed(text)
    if not isinstance(value, Unreadable):
        return iter(enumerate(_rows_in(path, value), start=1))
    if text.lstrip().startswith("["):
        raise UserError(f"{path} cannot be used: {value}. Mend it, or write one object a line (.jsonl).")
    return iter(enumerate(_one_after_another(text), start=1))


def _rows_in(path: Path, value: Any) -> list[Any]:
    """The rows of a JSON value: a list, an object that has a list of rows under one key, or one row."""
    if isinstance(value, list):
        return value
    lists = {key: rows for key, rows in value.items() if _are_rows(rows)} if isinstance(value, dict) else {}
    if not lists or any(key.startswith(("chosen", "rejected")) for key in value):
        return [value]
    if len(lists) > 1:
        raise UserError(f"{path} holds lists of rows under {' and '.join(lists)}; write the one to be used as a file.")
    return next(iter(lists.values()))


def _are_rows(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(row, Mapping) for row in value)
        and not all(map(is_message, value))
    )


def _one_after_another(text: str) -> Iterator[Any]:
    """The values of a text; behind one that is broken, from the next brace that begins a line."""
    place = 0
    while place >= 0 and (rest := _NEXT.match(text, place)):
        found = _decoded(_JSON.raw_decode, text, rest.end())
        value, place = (found, text.find("\n{", rest.end())) if isinstance(found, Unreadable) else found
        yield value


def _parsed(text: str) -> Any:
    return _decoded(_JSON.decode, text)


def _is_json(text: str) -> bool:
    return not isinstance(_parsed(text), Unreadable)


def _decoded(decode: Callable, *arguments: Any) -> Any:
    """What `decode` returns, or why the text is unreadable."""
    try:
        return decode(*arguments)
    except Unreadable as twice:
        return twice
    except (ValueError, RecursionError) as error:
        return Unreadable(f"it is not JSON ({error})")


def _once(items: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, if it has no key twice, of which JSON's reader would drop the first."""
    found = dict(items)
    if len(found) < len(items):
        twice = next(key for key, count in Counter(key for key, _ in items).items() if count > 1)
        raise Unreadable(f"it has {twice!r} twice")
    return found


_JSON = json.JSONDecoder(object_pairs_hook=_once)


# --- CSV -----------------------------------------------------------------------------------------------------------


def _csv(path: Path) -> Iterator[Row]:
    csv.field_size_limit(LONGEST_FIELD)
    with opened(path, newline="") as file:
        header = file.readline()
    delimiters = "\t" if format_of(path) == ".tsv" else ",;\t"
    delimiter = max(delimiters, key=lambda delimiter: _width(header, delimiter))
    with opened(path, newline="") as file:
        reader = csv.DictReader(file, delimiter=delimiter)
        if twice := [name for name, count in Counter(_header(reader)).items() if count > 1]:
            raise UserError(f"{path} has several columns that are called {' and '.join(twice)}.")
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
            elif missing := sum(value is None for value in row.values()):
                yield number, Unreadable(f"it has {missing} fields fewer than the header")
            else:
                yield number, row


def _header(reader: csv.DictReader) -> list[str]:
    try:
        return list(reader.fieldnames or ())
    except csv.Error:
        return []


def _width(header: str, delimiter: str) -> int:
    try:
        return len(next(csv.reader([header], delimiter=delimiter), []))
    except csv.Error:
        return 0


# --- Parquet, and data sets ----------------------------------------------------------------------------------------


def _parquet(path: Path) -> Iterator[Row]:
    parquet = library("pyarrow.parquet", path)
    with explained(path), path.open("rb"):
        pass
    try:
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(group).num_rows for group in range(file.num_row_groups)]
    except Exception as error:  # of very many kinds, where bytes are damaged
        raise UserError(
            f"{path} is not a whole Parquet file ({first_line(error)}); it may have been cut off, so copy it again."
        ) from error
    with file:
        number = 0
        for group, count in enumerate(groups):
            try:
                table = file.read_row_group(group)
            except Exception as error:
                broken = Unreadable(f"its part of the file (row group {group}) cannot be read ({first_line(error)})")
                yield from ((number + i, broken) for i in range(1, count + 1))
            else:
                yield from ((number + i + 1, _record(table, i)) for i in range(count))
            number += count


def _record(table: Any, index: int) -> Any:
    try:
        return without_nulls(table.slice(index, 1).to_pylist()[0])
    except Exception as error:  # such as text that is not UTF-8
        return Unreadable(f"it cannot be decoded ({first_line(error)})")


def _folder(path: Path, split: str) -> Iterator[Row]:
    """What `Dataset.save_to_disk` wrote, or files of data."""
    datasets = library("datasets", path)
    any(path.iterdir())  # raises for a folder that may not be read
    saved = [name for name in ("dataset_dict.json", "state.json") if (path / name).is_file()]
    if not saved:
        files = _data_files(path)
        if not files:
            raise UserError(f"{path} is a folder without data: no file in it ends in {', '.join(FORMATS)}.")
        for file in files:
            _check_pointer(file)
        _check_all_read(path, files)
        return _data_set(str(path), split)
    try:
        rows = datasets.load_from_disk(str(path))
    except Exception as error:  # of very many kinds, where files are missing or damaged
        raise UserError(f"{path} is no whole data set that was saved to disk ({first_line(error)}).") from error
    if isinstance(rows, datasets.DatasetDict):
        if split not in rows:
            raise UserError(f"{path} has no split {split!r}; its splits are {', '.join(rows)}.")
        rows = rows[split]
    return _numbered(str(path), rows)


def _data_files(path: Path) -> list[Path]:
    files = (file for file in sorted(path.rglob("*")) if file.is_file() and file.name not in ABOUT_DATA)
    seen = [file for file in files if format_of(file) in (*FORMATS, ".arrow")]
    return [file for file in seen if not any(part[0] in "._" for part in file.relative_to(path).parts)]


def _check_all_read(path: Path, files: list[Path]) -> None:
    """Refuse a folder of which `datasets` reads some files only: it takes one format, and names that say a split."""
    card = path / "README.md"
    if card.is_file() and "configs:" in card.read_text(errors="replace"):
        return  # which says what is to be read
    try:
        splits = library("datasets", path).load_dataset_builder(str(path)).config.data_files or {}
    except Exception:  # `_data_set` says it
        return
    read = {os.path.realpath(file) for names in splits.values() for file in names}
    unread = [str(file.relative_to(path)) for file in files if os.path.realpath(file) not in read]
    if read and unread:
        raise UserError(
            f"{path} has files that would not be read: {', '.join(unread)}. Files of one folder have one format, and "
            "either all of their names say a split (train, test, ...) or none; or give one file."
        )


def _data_set(source: str, split: str) -> Iterator[Row]:
    datasets = library("datasets", source)
    try:
        rows = datasets.load_dataset(source, split=split)
    except Exception as error:  # of very many kinds: of the hub, the network, the builder
        raise UserError(
            f"{source} is neither a file nor a data set whose split {split!r} can be loaded "
            f"({type(error).__name__}: {first_line(error)})."
        ) from error
    return _numbered(source, rows)


def _numbered(source: str, rows: Any) -> Iterator[Row]:
    try:
        for number, row in enumerate(rows, start=1):
            yield number, without_nulls(row)
    except Exception as error:  # of pyarrow, where a file of the data set is damaged
        raise UserError(f"{source} cannot be read to its end ({type(error).__name__}: {first_line(error)}).") from error
