"""Which machine and which versions a number belongs to: what `orpo-kernels doctor` says as well."""

from orpo_kernels.app.machine import PACKAGES, describe, gpu, has_bf16_gemm, kind

__all__ = ["PACKAGES", "describe", "gpu", "has_bf16_gemm", "kind"]
