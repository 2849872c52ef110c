"""A file as text, whatever its compression and encoding; every way in which that fails is a `UserError`."""

from __future__ import annotations

import gzip
import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import IO, TextIO, cast

from ..errors import UserError, first_line

LFS_POINTER = b"version https://git-lfs.github.com/spec/"
COMPRESSIONS = (".gz", ".zst")
# What a file begins with that is no text, and what to do about it.
NO_TEXT = {
    b"\x1f\x8b": "is compressed by gzip, and its name does not end in .gz: rename it",
    b"\x28\xb5\x2f\xfd": "is compressed by zstd, and its name does not end in .zst: rename it",
    b"PK\x03\x04": "is a ZIP archive, or a workbook: take the file out of it, or save it as CSV",
    b"PAR1": "is a Parquet file, and its name does not end in .parquet: rename it",
    b"\xff\xfe\0\0": "is in UTF-32: save it in UTF-8",
    b"\0\0\xfe\xff": "is in UTF-32: save it in UTF-8",
}
BROKEN_BYTES = "surrogateescape"  # bytes that are no UTF-8 become lone surrogates


def format_of(path: Path) -> str:
    """The suffix that says the format: of `pairs.jsonl.gz`, .jsonl."""
    inner = path.with_suffix("") if is_compressed(path) else path
    return inner.suffix.lower()


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSIONS


@contextmanager
def opened(path: Path, newline: str | None = None) -> Iterator[TextIO]:
    """The file's text: UTF-8 or, by its byte order mark, UTF-16; decompressed."""
    with explained(path), _bytes(path) as file:
        head = file.read(4)
    _check_text(path, head)
    encoding = _encoding(head)
    # Broken UTF-16 cannot be kept as surrogates, only those that are lone in the file.
    errors = BROKEN_BYTES if encoding == "utf-8-sig" else "surrogatepass"
    with explained(path), _bytes(path) as file, io.TextIOWrapper(file, encoding, errors, newline) as text:
        yield text


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into a sentence."""
    try:
        yield
    except (gzip.BadGzipFile, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise _damaged(path, error) from error
    except OSError as error:
        # The operating system's have a number; those of a decompressor have none.
        if error.errno is None:
            raise _damaged(path, error) from error
        raise UserError(f"{path} cannot be read ({error.strerror or error}).") from error


def library(name: str, source: object) -> ModuleType:
    """An optional package that reads `source`."""
    try:
        return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        raise UserError(f"{source} takes {package} to be read: pip install {package}.") from error


def is_pointer(path: Path) -> bool:
    """Whether Git LFS has left a pointer in place of the file."""
    with path.open("rb") as file:
        return file.read(len(LFS_POINTER)) == LFS_POINTER


def _damaged(path: Path, error: BaseException) -> UserError:
    return UserError(f"{path} is damaged ({first_line(error)}); it may have been cut off, so copy it again.")


def _bytes(path: Path) -> IO[bytes]:
    suffix = path.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(path))
    if suffix != ".zst":
        return path.open("rb")
    pyarrow = library("pyarrow", path)
    with path.open("rb"):
        pass  # which says why it cannot be opened; pyarrow does not
    return cast(IO[bytes], pyarrow.input_stream(str(path), compression="zstd"))


def _check_text(path: Path, head: bytes) -> None:
    why = next((why for begins, why in NO_TEXT.items() if head.startswith(begins)), None)
    if why is None and len(head) == 4 and [byte == 0 for byte in head] in ([False, True] * 2, [True, False] * 2):
        why = "is in UTF-16 without its byte order mark: save it in UTF-8"
    if why:
        raise UserError(f"{path} {why}.")


def _encoding(head: bytes) -> str:
    """By the byte order mark, if a letter of a header or a brace of JSON follows it; else it is damaged UTF-8."""
    if head[:2] == b"\xff\xfe" and head[2:3] != b"\0" and head[3:4] == b"\0":
        return "utf-16"
    if head[:2] == b"\xfe\xff" and head[2:3] == b"\0" and head[3:4] != b"\0":
        return "utf-16"
    return "utf-8-sig"
