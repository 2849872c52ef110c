"""Cases that take long in Triton's interpreter and repeat what others have shown: `make test-all` runs them too."""

from __future__ import annotations

import pytest
from hypothesis import settings

EXAMPLES = {"default": 10, "thorough": 200}  # of each property, by hypothesis's profile


def only_thorough(is_extra: bool, reason: str) -> None:
    """Skip an extra case, unless `--hypothesis-profile=thorough` asks for all."""
    if is_extra and settings.default.max_examples < EXAMPLES["thorough"]:
        pytest.skip(f"{reason}; make test-all runs it")
