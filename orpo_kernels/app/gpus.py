"""The makers' data sheets of GPUs, from which estimates are computed."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class GPU:
    """Peaks of one GPU: dense bf16 FLOP/s of its matrix units, bytes/s of its memory, and the memory's bytes.

    target: its kind, as the kernels' tables have it.
    """

    name: str
    flops: float
    bandwidth: float
    memory: int
    target: str | None = None


DATA_SHEETS = (
    # NVIDIA A100 Tensor Core GPU data sheet, A100 80GB SXM: 312 TFLOPS BF16 without sparsity, 2,039 GB/s
    GPU("A100 80GB", 312e12, 2.039e12, 80 * 10**9, "sm_80"),
    # NVIDIA H100 Tensor Core GPU data sheet, H100 SXM: 1,979 TFLOPS BF16 with sparsity (half of it dense), 3.35 TB/s
    GPU("H100 SXM", 989.5e12, 3.35e12, 80 * 10**9, "sm_90"),
    # NVIDIA H200 Tensor Core GPU data sheet, H200 SXM: 1,979 TFLOPS BF16 with sparsity, 4.8 TB/s, 141 GB
    GPU("H200", 989.5e12, 4.8e12, 141 * 10**9, "sm_90"),
    # NVIDIA DGX B200 data sheet, an eighth of the system: 72 PFLOPS FP8 with sparsity, bf16 half of it, dense again
    # half: 2.25 PFLOPS; 64 TB/s, 1,440 GB
    GPU("B200", 2.25e15, 8.0e12, 180 * 10**9, "sm_100"),
    # AMD Instinct MI300X data sheet: 1,307.4 TFLOPS bfloat16 without sparsity, 5.3 TB/s, 192 GB
    GPU("MI300X", 1307.4e12, 5.3e12, 192 * 10**9, "gfx942"),
)


def gpu_named(text: str) -> GPU:
    """The GPU whose name begins so, or for a size as in "24GB" one of that memory whose speed is not known (0).

    Raises:
        ValueError: neither.
    """
    key = text.replace(" ", "").lower()
    for gpu in DATA_SHEETS:
        if key and gpu.name.replace(" ", "").lower().startswith(key):
            return gpu
    size, unit = key.rstrip("gib"), key[len(key.rstrip("gib")) :]
    if unit in ("g", "gb", "gib") and size.replace(".", "", 1).isdecimal() and float(size) > 0:
        return GPU(f"a GPU of {text}", 0.0, 0.0, int(float(size) * (2**30 if unit == "gib" else 10**9)))
    names = ", ".join(gpu.name for gpu in DATA_SHEETS)
    raise ValueError(f"{text!r} is neither one of {names}, nor the size of its memory as in 24GB.")
