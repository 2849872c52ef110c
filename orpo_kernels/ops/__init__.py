"""The operations between the library's matrix multiplications: one contract, one module for each backend.

A backend is a module with the functions of `torch_ops`, same names and signatures. `select` finds the one to use.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from types import ModuleType

import torch
from torch import Tensor

from ..devices import has_float64, kind_of

BACKENDS = ("auto", "torch", "native", "triton")
MODULES = {"torch": ".torch_ops", "native": ".native", "triton": ".triton"}
NO_FLOAT64 = "has no float64, which Triton's kernels need; eager torch serves it, with rows on the host"


def backends() -> dict[str, str]:
    """Every backend's name and "available", or the reason why it cannot be used here."""
    best = torch.device(devices()[-1])
    return {
        name: why_not(name, best if name == "triton" else torch.device("cpu")) or "available"
        for name in BACKENDS
        if name != "auto"
    }


def devices() -> list[str]:
    """The kinds of device whose tensors could be used here, the CPU first."""
    return ["cpu", *(kind for kind in ("cuda", "xpu", "mps") if getattr(torch, kind).is_available())]


def resolve(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend that serves tensors on `device`.

    "auto" is Triton on a GPU and native on a CPU, where they can be used, and torch elsewhere.

    Raises:
        ValueError: a name that is not a backend.
        RuntimeError: a backend that cannot be used here, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, it must be one of {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        best = kind_of(device).backend
        return best if why_not(best, device, dtype) is None else "torch"
    if reason := why_not(backend, device, dtype):
        raise RuntimeError(f'backend="{backend}": {reason}; use backend="auto" or backend="torch"')
    return backend


def why_not(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot serve tensors of `dtype` on `device`; None where it can."""
    if backend == "native":
        if reason := _not_built():
            return reason
        if dtype == torch.float64:
            return "float64 is for checking, which eager torch does; the native kernels take fp32, fp16 and bf16"
        if device.type != "cpu":
            return f"the tensors are on {device.type} and the native kernels run on a CPU"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if dtype == torch.float64:
            return "float64 is for checking, which eager torch does; Triton's kernels take fp32, fp16 and bf16"
        if not has_float64(device):
            return f"{device.type} {NO_FLOAT64}"
        if kind_of(device).backend != "triton" and not is_interpreted():
            return f"the tensors are on {device.type} and Triton's kernels need a GPU (TRITON_INTERPRET=1 emulates one)"
    return None


@functools.cache
def _not_built() -> str | None:
    """Why there are no native kernels, and what to do; None where there are."""
    if importlib.util.find_spec("orpo_kernels._native") is None:
        return (
            "the native CPU kernels were not built, for want of a C++17 compiler or of an install: "
            "get g++ or clang and run `pip install .` in the source folder"
        )
    try:
        importlib.import_module("orpo_kernels._native")
    except ImportError as error:  # a processor or an ORPO_KERNELS_ISA without kernels, a build for another Python
        return f"the native CPU kernels cannot be loaded: {error}"
    return None


def is_interpreted() -> bool:
    """Whether Triton emulates its kernels on the CPU, to check them; slow."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def select(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """The module that serves `backend` for tensors of `dtype` on `device`; raises as `resolve`."""
    return _module(resolve(backend, device, dtype))


def host_ops(tensor: Tensor) -> ModuleType:
    """The module for what is done with a few numbers a row where `tensor`, of any dtype, is: a backend's, or eager."""
    name = kind_of(tensor.device).rows_backend
    is_real = is_readable(tensor) and not torch.compiler.is_compiling()
    return _module(name if is_real and why_not(name, tensor.device) is None else "torch")


@functools.cache
def _module(name: str) -> ModuleType:
    return importlib.import_module(MODULES[name], __name__)


def is_readable(tensor: Tensor) -> bool:
    """False for a tensor without data (fake or meta), as in memory accounting and tracing."""
    return tensor.device.type != "meta" and not isinstance(tensor, torch._subclasses.FakeTensor)


__all__ = ["BACKENDS", "backends", "devices", "host_ops", "is_interpreted", "is_readable", "resolve", "select"]
