"""Inputs of the GPU tests: batches and rows on the device, and one call with everything that it returns."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from orpo_kernels import Rows, orpo_loss_from_rows

from ..batches import PLAIN_OPTIONS, Batch, random_labels, random_rows

SCHEDULES = ("evaluation", "single_pass", "resident", "recompute")
SPARSE = ("sparse, frozen", "sparse")
SPARSE_EPS = 2.0**-8  # of logits of spread 2 a few hundredths of the columns are active
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def on(batch: Batch, device: torch.device) -> Batch:
    """The same batch on the device."""
    tensors = {name: getattr(batch, name) for name in ("labels", "nll_labels", "pair_weight")} | batch.floats()
    return replace(batch, **{name: None if t is None else t.to(device) for name, t in tensors.items()})


def realistic(
    dtype: torch.dtype, device: torch.device, *, length: int, size: int, vocab: int, pairs: int = 2, **options: Any
) -> Batch:
    """A padded batch of which two thirds matter, logits of spread 2; `options` as in `plain_loss`."""
    generator = torch.Generator().manual_seed(0)
    return Batch(
        hidden=torch.randn(2 * pairs, length, size, device=device).to(dtype),
        weight=(torch.randn(vocab, size, device=device) * (2 / size**0.5)).to(dtype),
        bias=torch.randn(vocab, device=device).to(dtype),
        labels=random_labels(generator, (2 * pairs, length), vocab, 0.67).to(device),
        options={**PLAIN_OPTIONS, **options},
    )


def packed(
    dtype: torch.dtype, device: torch.device, *, positions: int, rows: int, size: int, vocab: int, pairs: int = 3
) -> tuple[Tensor, Tensor, Rows]:
    """Hidden states, weight and rows, in any order and with repeated positions where there are more rows than those."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, size, generator=generator).to(device, dtype)
    weight = (torch.randn(vocab, size, generator=generator) * (2 / size**0.5)).to(device, dtype)
    return hidden, weight, random_rows(generator, positions, vocab, pairs, rows).to(device, non_blocking=False)


def all_of_a_call(
    hidden: Tensor, weight: Tensor, rows: Rows, schedule: str, bias: Tensor | None = None, **options: Any
) -> dict[str, Tensor]:
    """The outputs and the gradients of one call under `schedule`, one of `SCHEDULES` or `SPARSE`."""
    evaluation, trained = schedule == "evaluation", schedule in ("resident", "recompute", "sparse")
    hidden = hidden.detach().requires_grad_()
    weight = weight.detach().requires_grad_(trained)
    bias = None if bias is None else bias.detach().requires_grad_(trained)
    with torch.set_grad_enabled(not evaluation):
        if schedule in SPARSE:
            options["sparse_eps"] = SPARSE_EPS
        name = "auto" if evaluation or schedule in SPARSE else schedule
        out = orpo_loss_from_rows(hidden, weight, rows, bias=bias, schedule=name, **options)
        if not evaluation:
            out.loss.backward()
    leaves = {"hidden": hidden, "weight": weight, "bias": bias}
    grads = {f"{name}.grad": leaf.grad for name, leaf in leaves.items() if leaf is not None and leaf.grad is not None}
    return {name: value.detach() for name, value in out._asdict().items()} | grads
