"""What only a GPU can show: `pytest tests/gpu`. Everything here is skipped where there is none."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import pytest
import torch

from orpo_kernels.ops import why_not


@pytest.fixture(autouse=True, scope="session")
def device() -> torch.device:
    """The GPU; without one, every test that asks for it, which is every test here, is skipped."""
    if not torch.cuda.is_available():
        pytest.skip("torch.cuda.is_available() is False: no NVIDIA or AMD GPU that this torch can use")
    return torch.device("cuda")


@pytest.fixture(params=["triton", "torch"])
def backend(request: pytest.FixtureRequest, device: torch.device) -> str:
    """Our kernels, and the eager operations that mirror them."""
    if reason := why_not(request.param, device):
        pytest.skip(reason)
    return request.param


@pytest.fixture
def room(device: torch.device) -> Iterator[None]:
    """Nothing of an earlier test is on the device, and nothing of this one stays."""
    gc.collect()
    torch.cuda.empty_cache()
    yield
    gc.collect()
    torch.cuda.empty_cache()
