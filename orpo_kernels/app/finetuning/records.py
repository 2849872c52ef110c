"""JSON that every reader takes."""

from __future__ import annotations

import json
import math
from typing import Any


def to_json(record: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """`record` as JSON; numbers that are not finite, which JSON does not have, become null, other objects text."""
    return json.dumps(_finite(record), indent=indent, ensure_ascii=ascii_only, allow_nan=False, default=str)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return value
