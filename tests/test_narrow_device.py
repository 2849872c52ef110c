"""Devices without float64: which they are, what is said of them, and everything on one (`under_narrow_device.py`)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils import backend_registration

from orpo_kernels import backends, devices
from orpo_kernels.app import doctor
from orpo_kernels.ops import resolve, why_not

from .processes import run_tests

ARC, MAX = torch.device("xpu", 0), torch.device("xpu", 1)


@pytest.fixture(autouse=True)
def _two_xpus(monkeypatch):
    """An Arc card, and a data centre's, which has float64."""
    of_index = {0: SimpleNamespace(has_fp64=False), 1: SimpleNamespace(has_fp64=True)}
    monkeypatch.setattr(torch.xpu, "is_available", lambda: True)
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda index: of_index[index or 0])


def test_which_have_float64():
    assert not devices.has_float64(torch.device("mps"))
    assert not devices.has_float64(ARC)
    for device in (MAX, torch.device("cpu"), torch.device("cuda", 1)):
        assert devices.has_float64(device)
        assert devices.rows_device(device) == device
    assert devices.rows_device(ARC) == torch.device("cpu")


def test_they_get_eager_torch():
    for device in (torch.device("mps"), ARC):
        assert resolve("auto", device) == "torch"
        with pytest.raises(RuntimeError, match="has no float64, which Triton's kernels need"):
            resolve("triton", device)
    assert "no float64" not in (why_not("triton", MAX) or "")


def test_backends_and_doctor_say_so():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU to tell of")
    pytest.importorskip("triton")
    assert "xpu has no float64" in backends()["triton"]
    found = [choice for choice in doctor.choices() if choice.device == "xpu"]
    assert {choice.dtype for choice in found} == {"float32", "bfloat16", "float16"}
    for choice in found:
        assert choice.backend == "torch"
        assert "with rows on the host" in choice.why_not["triton"]


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch has no devices that are written in Python",
)
def test_under_a_narrow_device():
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    run_tests("under_narrow_device.py")
