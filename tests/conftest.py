from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tensors of most tests are tiny: threads would only wait for each other. Tests of the real model ask for theirs.
torch.set_num_threads(1)
settings.register_profile("default", deadline=None, max_examples=60, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks small enough that tiny tensors are taken in several of them."""
    monkeypatch.setattr("orpo_kernels.planning.CHUNK_ROWS", {"cpu": 3, "other": 3})
    monkeypatch.setattr("orpo_kernels.planning.CHUNK_BYTES", {"cpu": 512, "other": 512})
    monkeypatch.setattr("orpo_kernels.planning.MIN_SLICE", 5)
