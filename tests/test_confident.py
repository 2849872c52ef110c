"""Confident answers: logit gaps of 1 to 80 between the target and its rivals, where everybody else's loss breaks."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contest import confidence, peers
from benchmarks.contest.confidence import BROKEN, SIDES, confident, exact_results, results, worst_error
from orpo_kernels import Limits

from .batches import relative_error
from .test_peers import peer_named
from .thorough import only_thorough

GAPS = [gap for gap in confidence.GAPS if gap >= 5]  # below, a bf16 peer is off by its roundings alone
FEW_GAPS = (17, 80)  # one where peers in fp32 fail, and beyond
DTYPES = (torch.float32, torch.bfloat16)


# --- ours ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
@pytest.mark.parametrize("rivals", ["one", "many"])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ours_is_right_at_every_gap(dtype: torch.dtype, side: str, rivals: str, schedule: str, backend: str) -> None:
    """Loss to 1e-6 and gradients to 1e-5; a 16-bit gradient is that, rounded once to its dtype.

    GEMMs in fp32, as on every processor without bf16 units; `test_ours_in_16_bit_gemms` has the others.
    """
    only_thorough(backend == "triton" and schedule == "resident", "interpreted for long, by the kernels of single_pass")
    limits = Limits(gemm_dtype=torch.float32)
    rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
    for gap in gaps_of(backend):
        inputs = confident(gap, side, rivals, dtype)
        truth = exact_results(*inputs)
        found = results(peers.ours, *inputs, schedule=schedule, limits=limits)
        assert relative_error(found["loss"], truth["loss"]) <= 1e-6, (gap, found["loss"].item(), truth["loss"].item())
        for name in found.keys() - {"loss"}:
            true = truth[name]
            error = (found[name].double() - true).abs()
            assert (error <= rounding * true.abs() + 1e-5 * true.abs().max()).all(), (gap, name, error.max().item())


@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
@pytest.mark.parametrize("side", SIDES)
def test_ours_in_16_bit_gemms(side: str, schedule: str, backend: str) -> None:
    """Where bf16 multiplies in hardware, operands are rounded too: a few roundings, at every gap, and no more."""
    only_thorough(backend == "triton" and schedule == "resident", "interpreted for long, by the kernels of single_pass")
    limits = Limits(gemm_dtype=torch.bfloat16)
    for gap in gaps_of(backend):
        inputs = confident(gap, side, "many", torch.bfloat16)
        truth = exact_results(*inputs)
        found = results(peers.ours, *inputs, schedule=schedule, limits=limits)
        assert relative_error(found["loss"], truth["loss"]) <= 1e-6, gap
        for name in found.keys() - {"loss"}:
            assert relative_error(found[name], truth[name]) <= torch.finfo(torch.bfloat16).eps, (gap, name)


def gaps_of(backend: str) -> list[float]:
    """All of them; a few for the kernels, whose mirror eager torch is."""
    return [gap for gap in GAPS if backend == "torch" or gap in FEW_GAPS]


# --- everybody else --------------------------------------------------------------------------------------------------

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
    ("torch native", torch.bfloat16): (5, 8),  # the policy of accuracy that is fastest on a CPU; its own choice: 14
}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(("name", "dtype"), FAILS_AT, ids=str)
def test_peers_break(name: str, dtype: torch.dtype, side: str) -> None:
    """Where each peer first fails, and that it does not recover: from 18 on nobody is right (ours is, see above)."""
    peer = peer_named(name)
    inputs = {gap: confident(gap, side, "one", dtype) for gap in GAPS}
    found = {gap: worst_error(results(peer, *inputs[gap]), exact_results(*inputs[gap])) for gap in GAPS}
    broken = [gap for gap, error in found.items() if not error <= BROKEN]  # NaN is
    first, last = FAILS_AT[name, dtype]
    assert first <= broken[0] <= last, broken
    assert {gap for gap in GAPS if gap >= 18} <= set(broken)


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
