"""The pictures that a row names. Plain Python: nothing is decoded here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

IMAGES = ("images", "image")  # the columns of a row that have them


def sources_of(row: Mapping[str, Any]) -> list[Any]:
    """What a row gives as pictures, in their order: paths, bytes, PIL images, ...; [] for none."""
    found: list[Any] = []
    for name in IMAGES:
        value = row.get(name)
        found += list(value) if isinstance(value, list | tuple) else [] if value is None else [value]
    return found


def content_of(source: Any) -> Any:
    """The bytes or the path of an object that has both, as `datasets` writes a picture; any other source as it is."""
    return source.get("bytes") or source.get("path") if isinstance(source, Mapping) else source


def beside(source: Any, folder: Path) -> Any:
    """A source whose path, if it is one and relative, begins in `folder`."""
    if isinstance(source, Mapping):
        path = source.get("path")
        return source if source.get("bytes") or not isinstance(path, str) else {**source, "path": beside(path, folder)}
    is_path = isinstance(source, str) and source and "://" not in source
    return str(folder / source) if is_path else source


def fingerprint(source: Any) -> str:
    """A hash of what a picture holds, as hexadecimal; of one that cannot be read, of its name."""
    source = content_of(source)
    try:
        content = _bytes_of(source)
    except Exception:  # of the file system, or of PIL, which reads some pictures only now
        content = repr(source).encode()
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _bytes_of(source: Any) -> bytes:
    if isinstance(source, bytes | bytearray):
        return bytes(source)
    if isinstance(source, str | Path):
        return Path(source).read_bytes()
    return source.tobytes()
