"""`orpo-kernels doctor`: what it says is so, and a kernel that computes something else does not pass."""

from __future__ import annotations

import json
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("typer")

import orpo_kernels
from orpo_kernels.app import doctor
from orpo_kernels.app.cli import main
from orpo_kernels.ops import torch_ops


def test_this_machine_is_well(capsys, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"]
    assert found["packages"]["torch"] == torch.__version__
    assert "cpu" in found["devices"]
    backends = {check["backend"] for check in found["checks"]}
    available = {name for name, state in orpo_kernels.backends().items() if state == "available"}
    assert "torch" in backends
    assert ("native" in available) == ("native" in backends)
    assert all(check["passed"] and 0 < check["error"] < 0.1 for check in found["checks"])
    float32 = next(c for c in found["choices"] if (c["device"], c["dtype"]) == ("cpu", "float32"))
    assert float32["backend"] == ("native" if "native" in available else "torch")
    if not torch.cuda.is_available():
        assert "triton" in float32["why_not"]
        assert float32["why_not"]["triton"]


def test_people_get_tables(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "Self-test" in out
    assert "passed" in out
    assert "float64 is for checking" in " ".join(out.split())


@pytest.mark.parametrize("fault", ["wrong", "raises"])
def test_a_broken_kernel_is_found(fault, monkeypatch, capsys):
    """The eager backend with one operation that is off by a hundredth, or that raises."""

    def broken(logits: Any, *arguments: Any) -> Any:
        if fault == "raises":
            raise RuntimeError("illegal instruction")
        out = torch_ops.residual_(logits, *arguments)
        logits.mul_(1.01)
        return out

    faulty: Any = SimpleNamespace(**{**vars(torch_ops), "residual_": broken})
    real = orpo_kernels.engine.head.select

    def select(backend: str, *arguments: Any) -> ModuleType:
        return faulty if backend == "torch" else real(backend, *arguments)

    monkeypatch.setattr(orpo_kernels.engine.head, "select", select)
    checks = [check for check in doctor.self_test() if (check.backend, check.schedule) == ("torch", "single_pass")]
    assert not any(check.passed for check in checks if check.dtype == "float32")
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED" in out
    said = next(line for line in out.splitlines() if line.startswith("torch on cpu, float32, single_pass: "))
    assert ("RuntimeError: illegal instruction" if fault == "raises" else "where plain PyTorch's is") in said
