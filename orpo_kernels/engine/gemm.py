"""Matrix multiplications through the library, in chunks: what every backend shares."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# 16-bit operands with an fp32 result: in torch for CUDA since 2.8, for ROCm since 2.10 (pytorch#162600).
WIDENS = torch.version.hip is None or tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 10)

# Slices of the vocabulary begin and end here: their rows are aligned for the GEMM, and kernels can store vectors.
COLUMN_MULTIPLE = 128


class WeightSlices:
    """The weight in the GEMM's dtype: as it is, as one cast copy, or cast slice by slice where a copy is too large."""

    def __init__(self, weight: Tensor, dtype: torch.dtype, slice_size: int):
        self.weight, self.dtype = weight, dtype
        self.vocab_size, self.is_cast = weight.shape[0], weight.dtype != dtype
        if weight.dtype == dtype or slice_size >= self.vocab_size:
            self.weight, slice_size = weight.to(dtype), self.vocab_size
        self.columns = list(even_chunks(self.vocab_size, slice_size, COLUMN_MULTIPLE))

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        return ((columns, self[columns]) for columns in self.columns)

    def __getitem__(self, columns: slice) -> Tensor:
        return self.weight[columns].to(self.dtype)


def even_chunks(total: int, largest: int, multiple: int = 1) -> Iterator[slice]:
    """[0, total) in the fewest chunks of at most `largest`, of nearly equal size: no starved GEMM at the end.

    Chunks begin at a multiple of `multiple`, or of `largest` where that is smaller.
    """
    multiple = min(multiple, largest)
    units = -(-total // multiple)
    count = -(-units // (largest // multiple))
    bounds = [min(units * i // count * multiple, total) for i in range(count + 1)] if count else []
    return map(slice, bounds[:-1], bounds[1:])


def project(x: Tensor, weight: WeightSlices, bias: Tensor | None, out: Tensor) -> Tensor:
    """`x @ weight.T + bias` into `out` (C, V)."""
    for columns, w in weight:
        project_slice(x, w, None if bias is None else bias[columns], out[:, columns])
    return out


def project_slice(x: Tensor, w: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """`x @ w.T + bias` into `out`: x (C, H), w (S, H), bias (S,) or None, out (C, S)."""
    if bias is None:
        return torch.mm(x, w.t(), out=out)
    return torch.addmm(bias.to(x.dtype), x, w.t(), out=out)


def matmul_long(a: Tensor, b: Tensor, parts: int = 16) -> Tensor:
    """`a @ b` of few rows with a long inner dimension: a (K, V), b (V, N), K much less than V.

    In parts of the inner dimension side by side: as one product it takes MKL three times as long (K = 7, fp32).
    """
    size = b.shape[0] // parts
    whole = parts * size
    a_parts = a[:, :whole].unflatten(1, (parts, size)).transpose(0, 1)
    product = torch.bmm(a_parts, b[:whole].unflatten(0, (parts, size))).sum(0)
    return product if whole == b.shape[0] else product.addmm_(a[:, whole:], b[whole:])


def matmul_into(out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
    """`out = a @ b` or `out += a @ b`. On a GPU the product is not rounded before it joins a wider `out`."""
    widens = a.is_cuda and WIDENS and out.dtype == torch.float32 and a.dtype in (torch.float16, torch.bfloat16)
    if out.dtype == a.dtype or widens:
        dtype: dict[str, Any] = {"out_dtype": out.dtype} if widens else {}
        torch.addmm(out, a, b, **dtype, out=out) if accumulate else torch.mm(a, b, **dtype, out=out)
    elif accumulate:
        out.add_(torch.mm(a, b))
    else:
        out.copy_(torch.mm(a, b))
