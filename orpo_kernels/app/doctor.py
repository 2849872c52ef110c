"""Which kernels run here, why the others do not, and whether they compute what they should: `orpo-kernels doctor`."""

from __future__ import annotations

import importlib
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .. import reference
from ..devices import has_float64, rows_device
from ..loss import orpo_loss
from ..ops import BACKENDS, devices, is_interpreted, resolve, why_not
from .machine import describe

PAIRS, LENGTH, HIDDEN_SIZE, VOCAB_SIZE = 2, 24, 64, 1000  # of the self-test
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Choice:
    """Which backend `backend="auto"` takes for a kind of tensor, and why each of the others does not serve it.

    `why_not` has "" for a backend that would serve if it were asked for.
    """

    device: str
    dtype: str
    backend: str
    why_not: dict[str, str]


@dataclass(frozen=True)
class Check:
    """The self-test of one backend: relative error of the gradients to float64, and that of plain PyTorch.

    `passed` if the loss and the gradients are finite and their error at most twice the plain one's (the bar of all our
    tests), or `problem` says what was raised instead.
    """

    device: str
    backend: str
    dtype: str
    schedule: str
    error: float | None
    plain_error: float | None
    seconds: float
    passed: bool
    problem: str = ""


def diagnose() -> dict[str, Any]:
    """Machine, versions, devices, choices and checks; `ok` is whether every check passed. For JSON."""
    checks = self_test()
    return {
        "ok": all(check.passed for check in checks),
        **describe(),
        "cuda": _cuda(),
        "devices": devices(),
        "native_kernels": native_kernels(),
        "choices": [asdict(choice) for choice in choices()],
        "checks": [asdict(check) for check in checks],
    }


def choices() -> list[Choice]:
    """For every kind of tensor that could be here."""
    found = []
    for device in map(torch.device, devices()):
        for dtype in DTYPES if has_float64(device) else DTYPES[:-1]:
            others = {name: why_not(name, device, dtype) or "" for name in BACKENDS if name != "auto"}
            backend = resolve("auto", device, dtype)
            found.append(Choice(device.type, _name(dtype), backend, {k: v for k, v in others.items() if k != backend}))
    return found


def native_kernels() -> dict[str, Any] | None:
    """The instruction sets that the CPU kernels have and the one that runs; None where there are no such kernels."""
    if why_not("native", torch.device("cpu")):
        return None
    native = importlib.import_module("orpo_kernels._native")
    return {"running": native.isa(), "available": list(native.isas())}


def _cuda() -> str:
    """Why there is no GPU, or that there is one."""
    if torch.cuda.is_available():
        return "available"
    if torch.version.cuda is None and torch.version.hip is None:
        return f"this torch ({torch.__version__}) was built without CUDA and ROCm"
    return "torch was built for a GPU, but finds none: look at the driver (nvidia-smi, rocm-smi)"


# --- the self-test -------------------------------------------------------------------------------------------------


def self_test() -> list[Check]:
    """Every backend that is available here, with a frozen and with a trained head; about two seconds."""
    checks = []
    for device in map(torch.device, devices()):
        for backend in (name for name in BACKENDS if name != "auto"):
            if backend == "triton" and is_interpreted() and device.type == "cpu":
                continue  # emulated, minutes
            for dtype in (torch.float32, torch.bfloat16):
                if why_not(backend, device, dtype) is None:
                    checks += [_check(device, backend, dtype, schedule) for schedule in ("single_pass", "recompute")]
    return checks


def _check(device: torch.device, backend: str, dtype: torch.dtype, schedule: str) -> Check:
    began = time.perf_counter()
    error = plain_error = None
    problem = ""
    try:
        error, plain_error = _errors(device, backend, dtype, schedule)
    except Exception as raised:  # whatever it is, it is the finding
        problem = f"{type(raised).__name__}: {raised}"
    passed = error is not None and plain_error is not None and error <= 2 * plain_error + torch.finfo(dtype).eps
    seconds = time.perf_counter() - began
    return Check(device.type, backend, _name(dtype), schedule, error, plain_error, round(seconds, 3), passed, problem)


def _errors(device: torch.device, backend: str, dtype: torch.dtype, schedule: str) -> tuple[float, float]:
    """Relative error of ours and of plain PyTorch in the same dtype; NaN where something is not finite."""
    generator = torch.Generator().manual_seed(0)
    shape = (2 * PAIRS, LENGTH)
    hidden = torch.randn(*shape, HIDDEN_SIZE, generator=generator).to(dtype)
    weight = (torch.randn(VOCAB_SIZE, HIDDEN_SIZE, generator=generator) / 4).to(dtype)
    labels = torch.randint(VOCAB_SIZE, shape, generator=generator)
    labels[:, : LENGTH // 3] = -100
    trained = schedule != "single_pass"

    def gradients(function: Any, wide: torch.dtype, device: torch.device = device, **options: Any) -> Tensor:
        leaves = [hidden.to(device, wide).requires_grad_(), weight.to(device, wide).requires_grad_(trained)]
        loss = function(*leaves, labels.to(device), **options).loss
        found = torch.autograd.grad(loss, [leaf for leaf in leaves if leaf.requires_grad])
        return torch.cat([loss.detach().reshape(1), *(gradient.flatten() for gradient in found)]).cpu().double()

    true = gradients(reference.orpo_loss, torch.float64, rows_device(device))
    ours = gradients(orpo_loss, dtype, backend=backend, schedule=schedule)
    plain = gradients(reference.orpo_loss, dtype)
    return tuple(float((values - true)[1:].norm() / true[1:].norm()) for values in (ours, plain))  # type: ignore[return-value]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
