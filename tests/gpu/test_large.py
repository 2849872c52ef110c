"""Tensors of more than 2^31 elements, where a 32-bit offset would wrap around."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from orpo_kernels import Limits, Rows, orpo_loss_from_rows, reference, token_logps

from ..batches import IGNORE, relative_error

VOCAB = 256000
BF16_EPS = torch.finfo(torch.bfloat16).eps


def needs(gibibytes: float) -> None:
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gibibytes:
        pytest.skip(f"needs {gibibytes:.0f} GiB of free memory on the GPU, there are {free:.1f}")


def one_pair(position: Tensor, target: Tensor) -> Rows:
    """The first half of the rows is the chosen answer, the second half the rejected one; all have an NLL weight."""
    rows = len(position)
    sequence = (torch.arange(rows, device=position.device) >= rows // 2).long()
    every = torch.ones(rows, dtype=torch.bool, device=position.device)
    return Rows(position, target, sequence, every, torch.ones(rows, dtype=torch.float64, device=position.device), 1)


def exact_logps(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """(R,) float64 log-probabilities of rows (R, H), a slice of the weight at a time."""
    logits = torch.cat([hidden.double() @ w.double().t() for w in weight.split(8192)], dim=1)
    return logits.log_softmax(1).gather(1, target[:, None]).squeeze(1)


@pytest.mark.parametrize("what", ["logits", "weight", "hidden states"])
def test_evaluation(what, device, backend, room):
    """Rows x V, V x H and N x H past 2^31 elements, targets in the last words and positions at the end."""
    positions, size, rows = {
        "logits": (2**31 // VOCAB + 100, 64, 2**31 // VOCAB + 100),
        "weight": (64, 2**31 // VOCAB + 16, 64),
        "hidden states": (2**31 // 4096 + 100, 4096, 64),
    }[what]
    assert max(rows * VOCAB, VOCAB * size, positions * size) > 2**31
    needs(8)
    hidden = torch.empty(positions, size, dtype=torch.bfloat16, device=device).normal_()
    weight = torch.empty(VOCAB, size, dtype=torch.bfloat16, device=device).normal_(std=2 * size**-0.5)
    position = torch.arange(positions - rows, positions, device=device)
    target = VOCAB - 1 - torch.arange(rows, device=device) % 1000
    targets = torch.full((positions,), IGNORE, device=device)
    targets[position] = target
    with torch.no_grad():
        found = token_logps(hidden, weight, targets, backend=backend)[position]
        out = orpo_loss_from_rows(hidden, weight, one_pair(position, target), backend=backend)
    exact = torch.cat(
        [exact_logps(hidden[p], weight, t) for p, t in zip(position.split(256), target.split(256), strict=True)]
    )
    assert (found - exact).abs().max() <= 0.1  # roundings of bf16 logits of spread 2; other logits would be off by 2
    chosen, rejected = exact.split([rows // 2, rows - rows // 2])
    assert out.chosen_logps.item() == pytest.approx(chosen.mean().item(), rel=BF16_EPS)
    assert out.rejected_logps.item() == pytest.approx(rejected.mean().item(), rel=BF16_EPS)


@pytest.mark.parametrize("schedule", ["resident", "recompute"])
def test_residual(schedule, device, backend, room):
    """A residual of more than 2^31 entries: kept whole, or made again in slices that are as large."""
    rows, size = 2**31 // VOCAB + 100, 32
    needs(16 if backend == "triton" else 48)
    limits = Limits(chunk_bytes=2**35) if schedule == "recompute" else None
    hidden = torch.empty(rows, size, dtype=torch.bfloat16, device=device).normal_().requires_grad_()
    weight = torch.empty(VOCAB, size, dtype=torch.bfloat16, device=device).normal_(std=0.2).requires_grad_()
    position = torch.arange(rows, device=device)
    target = VOCAB - 1 - position * 29
    batch = one_pair(position, target)
    options = {"schedule": schedule, "backend": backend, "memory_budget": 2**37, "limits": limits}
    out = orpo_loss_from_rows(hidden, weight, batch, beta=0.0, **options)
    out.loss.backward()

    # The definition, a few rows at a time: without the odds ratio, the loss is a sum over rows.
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    for index in position.split(64):
        part = reference.orpo_loss_from_rows(
            exact_hidden, exact_weight, batch.select(index), beta=0.0, nll_denominator=rows
        )
        part.loss.backward()
    for name, ours, true in (("hidden", hidden, exact_hidden), ("weight", weight, exact_weight)):
        assert ours.grad is not None
        assert true.grad is not None
        last = slice(-100, None)  # where an offset would have wrapped around
        assert relative_error(ours.grad, true.grad) <= 4 * BF16_EPS, name
        assert relative_error(ours.grad[last], true.grad[last]) <= 4 * BF16_EPS, name


def test_many_rows(device, backend, room):
    """More rows than a grid's second and third dimensions can count (65535)."""
    rows, size, vocab = 70_000, 16, 640
    hidden = torch.randn(rows, size, device=device, requires_grad=True)
    weight = torch.randn(vocab, size, device=device, requires_grad=True)
    target = torch.arange(rows, device=device) % vocab
    out = orpo_loss_from_rows(
        hidden, weight, one_pair(torch.arange(rows, device=device), target), beta=0.0, backend=backend
    )
    out.loss.backward()
    exact_hidden, exact_weight = (t.detach().double().requires_grad_() for t in (hidden, weight))
    true = F.cross_entropy(exact_hidden @ exact_weight.t(), target)
    true.backward()
    assert out.loss.item() == pytest.approx(true.item(), rel=1e-5)
    assert relative_error(hidden.grad, exact_hidden.grad) <= 1e-5
    assert relative_error(weight.grad, exact_weight.grad) <= 1e-5
