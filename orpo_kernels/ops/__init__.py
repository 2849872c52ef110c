"""The row-wise operations between the matrix multiplications: one contract, one module for each backend.

A backend is a module with the functions of `torch_ops`, same names and signatures. `select` finds the one to use.
"""

from __future__ import annotations

from types import ModuleType

import torch

from . import torch_ops
from .torch_ops import segment_sum

BACKENDS = ("auto", "torch", "native", "triton")
NOT_BUILT = {
    "native": "the native CPU kernels are not part of this version",
    "triton": "the Triton kernels are not part of this version",
}


def backends() -> dict[str, str]:
    """Every backend's name and "available", or the reason why it cannot be used here."""
    return {name: NOT_BUILT.get(name, "available") for name in BACKENDS if name != "auto"}


def select(backend: str, device: torch.device) -> ModuleType:
    """The module that serves `backend` for tensors on `device`.

    Raises:
        ValueError: a name that is not a backend.
        RuntimeError: a backend that cannot be used here, with the reason.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}, it must be one of {', '.join(map(repr, BACKENDS))}")
    if backend in NOT_BUILT:
        raise RuntimeError(f'backend="{backend}": {NOT_BUILT[backend]}; use backend="auto" or backend="torch"')
    return torch_ops


__all__ = ["BACKENDS", "backends", "segment_sum", "select"]
