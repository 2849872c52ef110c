"""Size and hash of files when they were written, which tell later whether one of them has changed.

The hash is of all the content, so that no change goes unseen, and costs about a second a gigabyte: less than reading
the file did, or writing it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Manifest = dict[str, list]  # the path below a folder -> [size in bytes, hash]

_BLOCK = 2**24


def manifest(folder: Path, files: Iterable[Path]) -> Manifest:
    """Of files below `folder`, as they are now."""
    return {str(path.relative_to(folder)): [path.stat().st_size, digest(path)] for path in sorted(files)}


def differing(folder: Path, written: Manifest, appended: bool = False) -> list[str]:
    """Which files are no longer as they were written, or gone; with `appended`, more may stand behind it."""
    return [name for name, (size, known) in written.items() if not _is_same(folder / name, size, known, appended)]


def digest(path: Path, size: int | None = None) -> str:
    """The hash of a file, or of its first `size` bytes."""
    found, left = hashlib.blake2b(digest_size=16), path.stat().st_size if size is None else size
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, _BLOCK))):
            found.update(block)
            left -= len(block)
    return found.hexdigest()


def sealed(record: dict[str, Any]) -> str:
    """`record` as JSON with its own hash."""
    return json.dumps({"record": record, "hash": _hash_of(record)})


def unsealed(text: str) -> dict[str, Any] | None:
    """The record in a sealed text; None if it is damaged, or none."""
    try:
        content = json.loads(text)
    except ValueError:
        return None
    whole = isinstance(content, dict) and content.keys() == {"record", "hash"}
    return content["record"] if whole and content["hash"] == _hash_of(content["record"]) else None


def _hash_of(record: Any) -> str:
    return hashlib.blake2b(json.dumps(record, sort_keys=True).encode(), digest_size=16).hexdigest()


def _is_same(path: Path, size: int, known: str, appended: bool) -> bool:
    try:
        length = path.stat().st_size
        return (length >= size if appended else length == size) and digest(path, size) == known
    except OSError:
        return False
