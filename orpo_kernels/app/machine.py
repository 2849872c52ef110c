"""The machine and the package versions that a measurement was made with."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch

from .errors import version_of

PACKAGES = ("orpo-kernels", "torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


def describe() -> dict[str, Any]:
    """Date, processor, cores, threads, what its matrix units can do, and package versions (None: not installed)."""
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "processor": _processor(),
        "kind": kind(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "bf16_gemm_hardware": has_bf16_gemm(),
        "gpu": gpu() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "packages": {name: version_of(name) for name in PACKAGES},
    }


def has_bf16_gemm() -> bool:
    """Whether bf16 matrix products run in hardware. Where they do not, they take 10 to 100 times as long as in fp32."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def gpu() -> dict[str, Any]:
    """The current CUDA or ROCm device: its name, architecture, memory in bytes, and the toolkit torch was built for."""
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "name": properties.name,
        "architecture": properties.gcnArchName if torch.version.hip else f"sm_{properties.major}{properties.minor}",
        "memory": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "toolkit": f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}",
    }


def kind() -> str:
    """The processor's name, generation and instruction set: machines of one kind have the same ratios."""
    info = _cpuinfo()
    generation = f" (family {info['cpu family']}, model {info['model']})" if "cpu family" in info else ""
    return f"{_processor()}{generation}, {torch.backends.cpu.get_cpu_capability()}"


def _processor() -> str:
    return _cpuinfo().get("model name", platform.processor())


def _cpuinfo() -> dict[str, str]:
    """What Linux says of the first processor."""
    path = Path("/proc/cpuinfo")
    first = path.read_text().partition("\n\n")[0].splitlines() if path.exists() else []
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first)}
