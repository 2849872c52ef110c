from __future__ import annotations

import gc
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from .thorough import EXAMPLES

# Where there is no GPU, Triton emulates one: to be said before any kernel is imported.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# The tensors of most tests are tiny: threads would only wait for each other. Tests of the real model ask for theirs.
torch.set_num_threads(1)
# `make test` tries a few examples of each property, `make test-all` (--hypothesis-profile=thorough) many.
for name, examples in EXAMPLES.items():
    settings.register_profile(name, deadline=None, max_examples=examples, derandomize=bool(os.environ.get("CI")))
settings.load_profile("default")


HAS_TRITON = importlib.util.find_spec("triton") is not None
if HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1":
    from .interpreter import check_overflow, correct_bf16, patch_once

    correct_bf16()
    check_overflow()
    patch_once()


HAS_MATPLOTLIB = importlib.util.find_spec("matplotlib") is not None


def pytest_collection_finish() -> None:
    """What is imported by now stays: Accelerate collects garbage after each run, which would look through all of it."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _drawings(request, monkeypatch) -> None:
    """Figures are drawn for tests that look at them, which are marked: it takes as long as to train a tiny model."""

    def save(figure: Any, file: Any, **options: Any) -> None:
        if hasattr(file, "write"):
            file.write(b"not drawn")
        else:
            Path(file).write_bytes(b"not drawn")

    if HAS_MATPLOTLIB and not request.node.get_closest_marker("draws"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", save)


@pytest.fixture(params=["torch", "native", "triton"])
def backend(request, monkeypatch) -> str:
    """Each of the backends in turn, chosen by backend="auto" on the CPU; Triton is interpreted there."""
    from orpo_kernels.devices import KINDS, Kind
    from orpo_kernels.ops import why_not

    if request.param == "torch":
        monkeypatch.setitem(KINDS, "cpu", Kind())
    if request.param == "native" and (reason := why_not("native", torch.device("cpu"))):
        pytest.skip(reason)
    if request.param == "triton":
        if not HAS_TRITON:
            pytest.skip("triton is not installed")
        monkeypatch.setitem(KINDS, "cpu", Kind("triton", rows_backend="native"))
    return request.param


@pytest.fixture(autouse=True)
def _environment():
    """TrainingArguments of transformers < 5.2 write bf16 and torch_compile into it, for all trainers that follow."""
    before = dict(os.environ)
    yield
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        if name in before:
            os.environ[name] = before[name]
        else:
            del os.environ[name]


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch.set_num_threads(1)  # whatever the test before has run


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> str:
    """The folder of a tiny random model with its tokenizer, for the command line: to be read, not to be written to."""
    from .commands import save_tiny

    return save_tiny(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def small_chunks():
    """Chunks small enough that tiny tensors are taken in several of them."""
    from orpo_kernels import Limits

    return Limits(chunk_rows=3, narrow_chunk_rows=3, chunk_bytes=512, least_rows=3, fused_rows=7, least_columns=5)


@pytest.fixture
def fake_gpu(monkeypatch):
    """An H100 of fake CPU tensors: Triton wrappers whose launches do nothing, a GPU's tiles and GEMMs."""
    pytest.importorskip("triton")
    from orpo_kernels.devices import GPU_KIND, KINDS
    from orpo_kernels.ops.triton.launch import Target

    monkeypatch.setattr("triton.runtime.interpreter.InterpretedFunction.run", lambda self, *args, **options: None)
    monkeypatch.setattr("orpo_kernels.ops.triton.launch.INTERPRETER", Target("cuda", 90, 132))
    monkeypatch.setitem(KINDS, "cpu", GPU_KIND)
    monkeypatch.setattr("orpo_kernels.engine.planning.target_of", lambda device: "sm_90")
    monkeypatch.setattr("torch._subclasses.FakeTensor.data_ptr", lambda tensor: tensor.storage_offset())
    monkeypatch.setattr("torch._subclasses.FakeTensor.is_cuda", True)  # where GEMMs widen their result
