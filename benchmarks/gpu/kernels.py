"""Every kernel beside what bounds it: those with a product beside the library's, the others beside a copy.

The bytes of a row-wise kernel are those of `estimates/roofline.py`: every operand once. Its bound is what the device's
own copy takes for as many bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.estimates.roofline import SIZES, Launch
from benchmarks.gpu.cases import Case, Settings, Skip
from benchmarks.shapes import ModelShape
from benchmarks.timing import device_seconds, medians
from orpo_kernels.engine.gemm import WeightSlices
from orpo_kernels.ops import select

ROW_WISE = (
    "residual_",
    "statistics",
    "recomputed_residual_",
    "column_statistics",
    "gather_columns",
    "gather_rows",
    "scatter_rows_",
)
PRODUCTS = ("project_log_odds", "project_residual")
ACTIVE = 0.13  # of the columns, as in docs/sparse.md
COLUMNS = 16384  # of `project_residual`, a slice as the recompute schedule takes them
HIDDEN_SIZE = 4096  # of the rows that are moved
REPEATS = 5


def cases(settings: Settings) -> Iterator[Case]:
    for vocabulary in settings.vocabularies:
        for name in ROW_WISE:
            yield Case(f"kernels/{name}/{vocabulary}", partial(row_wise, name, vocabulary, settings))
    for shape in settings.models[:2]:
        for name in PRODUCTS:
            yield Case(f"kernels/{name}/{shape.name}", partial(product, name, shape, settings))


def row_wise(name: str, vocabulary: int, settings: Settings) -> dict[str, Any]:
    """Seconds of the kernel and of a copy of as many bytes as it must move."""
    kernel = _operation(name, settings)
    source = torch.randn(
        max(2, settings.chunk_bytes // (2 * vocabulary)), vocabulary, device=settings.device
    ).bfloat16()
    arguments = _arguments(name, source)
    nbytes = Launch(name, SIZES[name](*arguments)).bytes
    into = torch.empty_like(source)
    found = _timed({"ours": lambda: kernel(*arguments), "copy": lambda: into.copy_(source)}, settings)
    found["copy"] *= nbytes / (2 * source.nbytes)
    return {**found, "bytes": nbytes, "share": found["copy"] / found["ours"]}


def _arguments(name: str, source: Tensor) -> tuple[Any, ...]:
    """What the operation takes, its logits or rows as large as `source`."""
    rows, columns = source.shape
    device = source.device
    target = torch.randint(columns, (rows,), device=device)
    if name in ("gather_rows", "scatter_rows_"):
        hidden = source.flatten()[: source.numel() // HIDDEN_SIZE * HIDDEN_SIZE].view(-1, HIDDEN_SIZE).clone()
        position = torch.randperm(len(hidden), device=device)
        coefficient = torch.rand(len(hidden), device=device)
        if name == "gather_rows":
            return hidden, position, coefficient, hidden.dtype
        return torch.zeros_like(hidden), position, hidden, coefficient
    logits = source.clone()
    if name == "recomputed_residual_":
        return logits, target, source.float().logsumexp(1).double(), 1.0, None
    if name == "column_statistics":
        return logits, torch.rand(rows, device=device)
    if name == "gather_columns":
        return logits, torch.randperm(columns, device=device)[: max(1, int(ACTIVE * columns))].sort().values
    return logits, target, 1.0, None


def product(name: str, shape: ModelShape, settings: Settings) -> dict[str, Any]:
    """Seconds of the kernel, of the library's product of the same sizes, and their ratio."""
    kernel = _operation(name, settings)
    x, w, target = shape.tensors(2 * settings.pairs * settings.length, torch.bfloat16, settings.device)
    rows = len(x)
    call: Callable[[], Any]
    if name == "project_log_odds":
        weight = WeightSlices(w, w.dtype, len(w))
        out = x.new_empty(rows, len(w))
        call = partial(kernel, x, weight, None, target, 1.0, shape.logit_softcap, None)
    else:
        w = w[:COLUMNS]
        out = x.new_empty(rows, len(w))
        call = partial(kernel, x, w, None, target, target.double(), 1.0, shape.logit_softcap, out)
    found = _timed({"ours": call, "GEMM": partial(torch.mm, x, w.t(), out=out)}, settings)
    return {**found, "flops": 2 * rows * w.numel(), "ratio": found["ours"] / found["GEMM"]}


def _operation(name: str, settings: Settings) -> Callable[..., Any]:
    ops = select(settings.backend, torch.device(settings.device))
    if not hasattr(ops, name):
        raise Skip(f"the backend {settings.backend} has no {name}")
    return getattr(ops, name)


def _timed(calls: dict[str, Callable[[], Any]], settings: Settings) -> dict[str, float]:
    """Medians. Several calls in a row, so that the host's part is behind the device's."""
    clock = partial(device_seconds, device=torch.device(settings.device), repeats=REPEATS)
    return medians(calls, settings.rounds, clock)
