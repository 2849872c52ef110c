"""The tests in other versions of TRL, transformers, Accelerate and peft: what a test needs of them, and `run.py`."""

from __future__ import annotations

import pytest

from orpo_kernels.transformers.versions import version_of

leaves_answers_empty = pytest.mark.skipif(
    version_of("trl") < (1, 15), reason="TRL before 1.15 lets answers be longer than max_length rather than empty"
)
keeps_the_order = pytest.mark.skipif(
    version_of("transformers") < (5, 2), reason="transformers before 5.2 always shuffles"
)
