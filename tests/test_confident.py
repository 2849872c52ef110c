"""Confident answers: logit gaps of 5 to 80 between the target and its rivals, where everybody else's loss breaks.

The logits are exact in every dtype: the lm-head is the identity, so that the hidden states are the logits. Everyone is
compared with float64 arithmetic on the same logits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import peers
from orpo_kernels import reference

from .batches import IGNORE, relative_error
from .test_peers import peer_named

BETA = 0.1
VOCABULARY, PAIRS = 16, 2
GAPS = (*range(5, 31), 40, 50, 60, 67, 70, 80)
FEW_GAPS = (8, 17, 30, 80)  # one where bf16 peers fail, one where fp32 peers do, and beyond
SIDES = {"chosen": slice(0, PAIRS), "rejected": slice(PAIRS, None), "both": slice(None)}
DTYPES = (torch.float32, torch.bfloat16)


def confident(gap: float, side: str, rivals: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states (= logits), weight and labels of ragged answers whose targets on `side` lead by `gap`.

    The other side's lead by 0 to 2. Against "one" rival, at logit 0, the gap is the target's log-odds (all other tokens
    are at -64); "many" are between -2 and 0. All are multiples of 1/64 that bf16 holds.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (2 * PAIRS, 4)
    labels = torch.randint(VOCABULARY, shape, generator=generator)
    logits = torch.full((*shape, VOCABULARY), -64.0)
    if rivals == "many":
        logits = -torch.randint(128, logits.shape, generator=generator) / 64
    leads = torch.randint(64, shape, generator=generator) / 32
    leads[SIDES[side]] = gap
    logits.scatter_(-1, (labels[..., None] + 3) % VOCABULARY, 0.0)
    logits.scatter_(-1, labels[..., None], leads[..., None])
    lengths = torch.tensor([4, 2, 3, 1])
    labels = torch.where(torch.arange(4) < lengths[:, None], labels, IGNORE)
    return logits.to(dtype), torch.eye(VOCABULARY, dtype=dtype), labels


def results(
    loss: Callable[..., Tensor], hidden: Tensor, weight: Tensor, labels: Tensor, **options: Any
) -> dict[str, Tensor]:
    """The loss, and the gradients of chosen hidden states, rejected ones (either may be tiny) and the weight."""
    frozen = options.get("schedule") == "single_pass"
    hidden, weight = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
    value = loss(hidden, weight, labels, labels[:PAIRS], BETA, **options)
    value.backward()
    assert hidden.grad is not None
    found = {"loss": value.detach(), "chosen": hidden.grad[:PAIRS], "rejected": hidden.grad[PAIRS:]}
    return found if weight.grad is None else found | {"weight": weight.grad}


def exact(hidden: Tensor, weight: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """float64 arithmetic on the same logits."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor, beta: float) -> Tensor:
        return reference.orpo_loss(hidden, weight, labels, nll_labels=nll_labels, beta=beta).loss

    return results(loss, hidden.double(), weight.double(), labels)


# ---------------------------------------------------------------------------------------------------------------------
# Ours
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
@pytest.mark.parametrize("rivals", ["one", "many"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ours_is_right_at_every_gap(
    dtype: torch.dtype, side: str, rivals: str, schedule: str, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """Loss to 1e-6 and gradients to 1e-5; a 16-bit gradient is that, rounded once to its dtype.

    GEMMs in fp32, as on every processor without bf16 units; `test_ours_in_16_bit_gemms` has the others.
    """
    gemms_in(monkeypatch, lambda dtype: torch.promote_types(dtype, torch.float32))
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for gap in gaps_of(backend):
        inputs = confident(gap, side, rivals, dtype)
        truth = exact(*inputs)
        found = results(peers.ours, *inputs, schedule=schedule)
        assert relative_error(found["loss"], truth["loss"]) <= 1e-6, (gap, found["loss"].item(), truth["loss"].item())
        for name in found.keys() - {"loss"}:
            true = truth[name]
            error = (found[name].double() - true).abs()
            assert (error <= rounding * true.abs() + 1e-5 * true.abs().max()).all(), (gap, name, error.max().item())


@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
@pytest.mark.parametrize("side", SIDES)
def test_ours_in_16_bit_gemms(side: str, schedule: str, monkeypatch: pytest.MonkeyPatch, backend: str) -> None:
    """Where bf16 multiplies in hardware, operands are rounded too: a few roundings, at every gap, and no more."""
    gemms_in(monkeypatch, lambda dtype: dtype)
    for gap in gaps_of(backend):
        inputs = confident(gap, side, "many", torch.bfloat16)
        truth = exact(*inputs)
        found = results(peers.ours, *inputs, schedule=schedule)
        assert relative_error(found["loss"], truth["loss"]) <= 1e-6, gap
        for name in found.keys() - {"loss"}:
            assert relative_error(found[name], truth[name]) <= torch.finfo(torch.bfloat16).eps, (gap, name)


def gaps_of(backend: str) -> list[float]:
    """All of them; a few for Triton's interpreter, which takes half a second for each."""
    return [gap for gap in GAPS if backend != "triton" or gap in FEW_GAPS]


def gemms_in(monkeypatch: pytest.MonkeyPatch, choose: Callable[[torch.dtype], torch.dtype]) -> None:
    monkeypatch.setattr("orpo_kernels.planning.gemm_dtype", lambda dtype, device, backend: choose(dtype))


# ---------------------------------------------------------------------------------------------------------------------
# Everybody else
# ---------------------------------------------------------------------------------------------------------------------

# The gap from which the loss or a gradient is not finite, or off by more than a tenth: measured, with room for another
# processor's exp and log. 1 - p of a token rounds to 0 at a gap of 16.6 in fp32, and at 5.5 in bf16, in which plain and
# TRL's trainer take the log-softmax; the others upcast their logits first.
FAILS_AT = {
    ("plain", torch.float32): (14, 17),
    ("plain", torch.bfloat16): (5, 8),
    ("plain fp32", torch.bfloat16): (14, 17),
    ("TRL trainer", torch.float32): (12, 17),
    ("TRL trainer", torch.bfloat16): (5, 8),
    ("Liger", torch.float32): (14, 17),
    ("Liger", torch.bfloat16): (14, 17),
    ("TRL-composed", torch.float32): (12, 17),
    ("TRL-composed", torch.bfloat16): (12, 17),
    ("torch native", torch.float32): (14, 17),
    ("torch native", torch.bfloat16): (14, 17),
}


def is_broken(found: dict[str, Tensor], truth: dict[str, Tensor]) -> bool:
    if not all(value.isfinite().all() for value in found.values()):
        return True
    return max(relative_error(found[name], true) for name, true in truth.items()) > 0.1


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("name", "dtype"), FAILS_AT, ids=str)
def test_peers_break(name: str, dtype: torch.dtype, side: str) -> None:
    """Where each peer first fails, and that it does not recover: from 18 on nobody is right, and ours is."""
    peer = peer_named(name)
    inputs = {gap: confident(gap, side, "one", dtype) for gap in GAPS}
    truth = {gap: exact(*inputs[gap]) for gap in GAPS}
    broken = [gap for gap in GAPS if is_broken(results(peer, *inputs[gap]), truth[gap])]
    first, last = FAILS_AT[name, dtype]
    assert first <= broken[0] <= last, broken
    assert {gap for gap in GAPS if gap >= 18} <= set(broken)
    assert not any(is_broken(results(peers.ours, *inputs[gap]), truth[gap]) for gap in broken)


@pytest.mark.parametrize("name", ["plain", "TRL trainer", "Liger", "TRL-composed", "torch native"])
def test_how_they_break(name: str) -> None:
    """fp32, gap 20: a confident rejected answer makes the loss infinite, a confident chosen one leaves it finite, with
    NaN for gradients."""
    peer = peer_named(name)
    rejected = results(peer, *confident(20, "rejected", "one", torch.float32))
    assert rejected["loss"].isinf()
    chosen = results(peer, *confident(20, "chosen", "one", torch.float32))
    assert chosen["loss"].isfinite()
    assert chosen["weight"].isnan().any()
