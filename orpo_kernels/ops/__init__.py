"""The operations between the library's matrix multiplications: one contract, one module for each backend.

A backend is a module with the functions of `torch_ops`, same names and signatures. `select` finds the one to use.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType

import torch

BACKENDS = ("auto", "torch", "native", "triton")
MODULES = {"torch": ".torch_ops", "triton": ".triton"}
GPUS = ("cuda", "xpu")  # torch calls AMD's GPUs cuda as well


def backends() -> dict[str, str]:
    """Every backend's name and "available", or the reason why it cannot be used here."""
    gpu = next((kind for kind in GPUS if getattr(torch, kind).is_available()), "cpu")
    return {
        name: why_not(name, torch.device(gpu if name == "triton" else "cpu")) or "available"
        for name in BACKENDS
        if name != "auto"
    }


def resolve(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """The name of the backend that serves tensors on `device`: "auto" is Triton on a GPU and torch elsewhere.

    Raises:
        ValueError: a name that is not a backend.
        RuntimeError: a backend that cannot be used here, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, it must be one of {', '.join(map(repr, BACKENDS))}")
    if backend == "auto":
        return "triton" if device.type in GPUS and why_not("triton", device, dtype) is None else "torch"
    if reason := why_not(backend, device, dtype):
        raise RuntimeError(f'backend="{backend}": {reason}; use backend="auto" or backend="torch"')
    return backend


def why_not(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why a backend cannot serve tensors of `dtype` on `device`; None where it can."""
    if backend == "native":
        return "the native CPU kernels are not part of this version"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if dtype == torch.float64:
            return "float64 is for checking, which eager torch does; Triton's kernels take fp32, fp16 and bf16"
        if device.type not in GPUS and not is_interpreted():
            return f"the tensors are on {device.type} and Triton's kernels need a GPU (TRITON_INTERPRET=1 emulates one)"
    return None


def is_interpreted() -> bool:
    """Whether Triton emulates its kernels on the CPU, to check them; slow."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def select(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> ModuleType:
    """The module that serves `backend` for tensors of `dtype` on `device`; raises as `resolve`."""
    return importlib.import_module(MODULES[resolve(backend, device, dtype)], __name__)


__all__ = ["BACKENDS", "backends", "is_interpreted", "resolve", "select"]
