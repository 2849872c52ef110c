"""`orpo-kernels doctor`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import typer

from .console import Output
from .flags import command


@dataclass(frozen=True)
class DoctorSettings:
    """There is nothing to set."""


@command(DoctorSettings)
def doctor(settings: DoctorSettings, output: Output) -> None:
    """Say what is installed, which kernels run here and why not others, and test them.

    The test compares loss and gradients of every backend that is available with float64: its error may be at most twice
    that of plain PyTorch in the same dtype. Exit status 1 if one fails.

        orpo-kernels doctor
    """
    from ..doctor import diagnose

    found = diagnose()
    output.result(found, *_tables(found), *_failures(found))
    if not found["ok"]:
        raise typer.Exit(1)


def _failures(found: dict[str, Any]) -> list[str]:
    """What is wrong with each check that failed, in full."""
    told = []
    for check in found["checks"]:
        if not check["passed"]:
            errors = f"its error is {check['error']} where plain PyTorch's is {check['plain_error']}"
            which = f"{check['backend']} on {check['device']}, {check['dtype']}, {check['schedule']}"
            told.append(f"{which}: {check['problem'] or errors}")
    return told


def _tables(found: dict[str, Any]) -> list[Any]:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    versions = Table(title="Machine and versions", box=SIMPLE_HEAD, show_header=False)
    gpu = found["gpu"]
    native = found["native_kernels"]
    rows = {
        "processor": f"{found['processor']}, {found['cores']} cores, {found['threads']} threads",
        "bf16 products": "in hardware" if found["bf16_gemm_hardware"] else "emulated; the loss multiplies in fp32",
        "GPU": f"{gpu['name']} ({gpu['architecture']}, {gpu['toolkit']})" if gpu else f"none: {found['cuda']}",
        "CPU kernels": f"{native['running']} (of {', '.join(native['available'])})" if native else "none",
        "python": found["python"],
        **{name: version or "not installed" for name, version in found["packages"].items()},
    }
    for name, value in rows.items():
        versions.add_row(name, value)

    backends = Table(title='What backend="auto" takes', box=SIMPLE_HEAD)
    for column in ("tensors", "backend", "why not another"):
        backends.add_column(column)
    for choice in found["choices"]:
        why = [f"{name}: {reason or 'would serve, if asked for'}" for name, reason in choice["why_not"].items()]
        backends.add_row(f"{choice['device']}, {choice['dtype']}", choice["backend"], "\n".join(why))

    checks = Table(title="Self-test: gradients beside float64", box=SIMPLE_HEAD)
    for column in ("backend", "dtype", "schedule", "error", "plain PyTorch's", "s", ""):
        checks.add_column(column, justify="left" if column in ("backend", "dtype", "schedule", "") else "right")
    for check in found["checks"]:
        errors = [f"{check[name]:.1e}" if check[name] is not None else "" for name in ("error", "plain_error")]
        verdict = Text("passed", "green") if check["passed"] else Text("FAILED", "bold red")
        names = (f"{check['backend']}, {check['device']}", check["dtype"], check["schedule"])
        checks.add_row(*names, *errors, f"{check['seconds']:.2f}", verdict)
    return [versions, backends, checks]
