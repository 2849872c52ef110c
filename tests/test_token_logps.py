"""Per-token log-probabilities with any upstream gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orpo_kernels import token_logps

SHAPE, SIZE, VOCAB = (3, 7), 12, 41


def make(dtype=torch.float64):
    hidden = torch.randn(*SHAPE, SIZE, dtype=dtype, requires_grad=True)
    weight = torch.randn(VOCAB, SIZE, dtype=dtype)
    targets = torch.randint(VOCAB, SHAPE)
    return hidden, weight, torch.where(torch.rand(SHAPE) < 0.7, targets, -100)


def plain(hidden, weight, targets, bias=None, scale=1.0, softcap=None):
    logits = scale * torch.nn.functional.linear(hidden, weight, bias)
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    mask = targets != -100
    return torch.where(mask, logits.log_softmax(-1).gather(-1, targets.clamp(min=0)[..., None]).squeeze(-1), 0)


@pytest.mark.parametrize("schedule", ["auto", "single_pass", "resident", "recompute"])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, 4.0)])
def test_values_and_gradients(schedule, scale, softcap, small_chunks):
    hidden, weight, targets = make()
    trained = schedule in ("resident", "recompute")
    weight.requires_grad_(trained)
    bias = torch.randn(VOCAB, dtype=torch.float64, requires_grad=trained)
    upstream = torch.randn(SHAPE, dtype=torch.float64)  # not constant, as of PPO's ratio

    def run(function, **options):
        logps = function(hidden, weight, targets, bias=bias, **options)
        leaves = [t for t in (hidden, weight, bias) if t.requires_grad]
        return logps, *torch.autograd.grad(logps, leaves, upstream)

    ours = run(token_logps, logit_scale=scale, logit_softcap=softcap, schedule=schedule, limits=small_chunks)
    for value, true in zip(ours, run(plain, scale=scale, softcap=softcap), strict=True):
        torch.testing.assert_close(value, true, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("needs_weight", "gemms"), [(False, 2), (True, 3)])
def test_gemms(needs_weight, gemms):
    hidden, weight, targets = make(torch.float32)
    with FlopCounterMode(display=False) as counter:
        token_logps(hidden, weight.requires_grad_(needs_weight), targets).sum().backward()
    assert counter.get_total_flops() == gemms * 2 * (targets != -100).sum().item() * SIZE * VOCAB


def test_flat_and_empty():
    hidden, weight, targets = make()
    flat = token_logps(hidden.flatten(0, 1), weight, targets.flatten())
    assert torch.equal(flat.view(SHAPE), token_logps(hidden, weight, targets))
    nothing = token_logps(hidden, weight, torch.full_like(targets, -100))
    nothing.sum().backward()
    assert nothing.abs().sum() == 0
    assert hidden.grad.abs().sum() == 0
