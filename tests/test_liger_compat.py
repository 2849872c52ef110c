"""Liger's interface: the same as the real package on random cases, right where it is not, and as it is documented."""

from __future__ import annotations

import inspect
import random
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from orpo_kernels.compat.liger import LigerFusedLinearORPOLoss, liger_fused_linear_orpo

NAMES = (
    *("chosen_logps", "rejected_logps", "chosen_logits_mean", "rejected_logits_mean", "nll_loss"),
    *("chosen_rewards", "rejected_rewards", "log_odds_ratio", "log_odds_chosen"),
)


def random_case(seed: int, ignore_index: int = -100) -> dict[str, Any]:
    """Arguments of the loss: ragged targets, at least one in each sequence; NLL targets of their own, or none."""
    generator, choose = torch.Generator().manual_seed(seed), random.Random(seed)
    pairs, length, size, vocab = choose.randint(1, 4), choose.randint(1, 9), choose.choice([8, 24]), 53
    shape = (2 * pairs, length)

    def targets(keep: float) -> Tensor:
        ids = torch.randint(vocab, shape, generator=generator)
        kept = torch.rand(shape, generator=generator) < keep
        kept[:, choose.randrange(length)] = True
        return torch.where(kept, ids, ignore_index)

    target = targets(0.5)
    nll_target = {"none": None, "same": target, "other": targets(0.8)}[choose.choice(["none", "same", "other"])]
    return {
        "lin_weight": torch.randn(vocab, size, generator=generator) * 0.4,
        "_input": torch.randn(*shape, size, generator=generator),
        "target": target,
        "bias": torch.randn(vocab, generator=generator) if choose.random() < 0.5 else None,
        "nll_target": nll_target,
    }


def outputs(loss: Any, case: dict[str, Any], upstream: float = 1.0) -> dict[str, Tensor]:
    """Loss, metrics and gradients by name."""
    floats = ("lin_weight", "_input", "bias")
    leaves = {name: case[name].clone().requires_grad_() for name in floats if case[name] is not None}
    value, metrics = loss(**{**case, **leaves})
    assert not any(metric.requires_grad for metric in metrics)
    grads = torch.autograd.grad(value * upstream, list(leaves.values()))
    return {
        "loss": value.detach(),
        **dict(zip(NAMES, metrics, strict=True)),
        **{f"d{name}": grad for name, grad in zip(leaves, grads, strict=True)},
    }


def real_liger(**options: Any) -> torch.nn.Module:
    chunked_loss = pytest.importorskip("liger_kernel.chunked_loss")
    return chunked_loss.LigerFusedLinearORPOLoss(**options, compiled=False)


@pytest.mark.parametrize("seed", range(60))
def test_equals_liger_on_random_cases(seed):
    choose = random.Random(1000 + seed)
    options = {
        "beta": choose.choice([0.1, 1.0]),
        "ignore_index": choose.choice([-100, -1]),
        "compute_nll_loss": choose.random() < 0.8,
    }
    case, upstream = random_case(seed, options["ignore_index"]), choose.choice([1.0, 0.3])
    theirs = outputs(real_liger(**options), case, upstream)
    ours = outputs(LigerFusedLinearORPOLoss(**options), case, upstream)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, rtol=3e-5, atol=3e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_the_signatures_are_ligers():
    theirs = type(real_liger())
    for method in ("__init__", "forward"):
        ours = inspect.signature(getattr(LigerFusedLinearORPOLoss, method)).parameters.values()
        expected = inspect.signature(getattr(theirs, method)).parameters.values()
        assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in expected]


@pytest.mark.parametrize("seed", [0, 3, 5])
def test_the_function_is_ligers(seed):
    functional = pytest.importorskip("liger_kernel.chunked_loss.functional")
    theirs = functional.liger_fused_linear_orpo
    own = list(inspect.signature(liger_fused_linear_orpo).parameters.values())
    expected = list(inspect.signature(theirs.__self__.forward).parameters.values())[1:]  # without ctx
    assert [(p.name, p.default) for p in own] == [(p.name, p.default) for p in expected]
    case = random_case(seed)

    def called(loss: Any) -> Any:
        def call(lin_weight: Tensor, _input: Tensor, target: Tensor, bias: Any = None, nll_target: Any = None) -> Any:
            return loss(_input, lin_weight, target, bias, -100, 0.3, seed != 5, nll_target, False, 1)

        return call

    ours, liger = (outputs(called(loss), case) for loss in (liger_fused_linear_orpo, theirs))
    assert ours.keys() == liger.keys()
    for name, value in liger.items():
        torch.testing.assert_close(ours[name], value, rtol=3e-5, atol=3e-6, msg=name)


def test_an_empty_answer_leaves_the_odds_ratio():
    """Liger's loss is NaN there. The pair that is left is all the odds ratio sees; every other NLL target stays."""
    case = random_case(5)
    pairs = len(case["target"]) // 2
    assert pairs > 1
    case["nll_target"] = case["target"].clone()
    case["target"] = case["target"].clone()
    case["target"][0] = -100
    out = outputs(LigerFusedLinearORPOLoss(), case)
    assert all(value.isfinite().all() for value in out.values())
    others = [row for row in range(2 * pairs) if row % pairs]
    without = {**case, "_input": case["_input"][others], "target": case["target"][others], "nll_target": None}
    alone = outputs(LigerFusedLinearORPOLoss(), without)
    torch.testing.assert_close(out["log_odds_ratio"], alone["log_odds_ratio"])
    torch.testing.assert_close(out["log_odds_chosen"], alone["log_odds_chosen"])
    torch.testing.assert_close(out["loss"], out["nll_loss"] - 0.1 * out["log_odds_ratio"])
    assert outputs(real_liger(), case)["loss"].isnan()


def test_what_does_not_fit_is_refused():
    case = random_case(2)
    loss = LigerFusedLinearORPOLoss()
    with pytest.raises(ValueError, match="odd number"):
        loss(case["lin_weight"], case["_input"][:-1], case["target"][:-1])
    with pytest.raises(ValueError, match=r"_input must be \(2B, T, H\)"):
        loss(case["lin_weight"], case["_input"].flatten(0, 1), case["target"].flatten())
    with pytest.raises(ValueError, match="nll_labels has shape"):
        loss(**{**case, "nll_target": case["target"].flatten()})


def test_without_gradient_it_is_one_gemm():
    case = random_case(7)
    case |= {"nll_target": None, "bias": None}
    rows = int((case["target"] != -100).sum())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        LigerFusedLinearORPOLoss()(**case)
    assert counter.get_total_flops() == 2 * rows * case["lin_weight"].numel()


def test_bfloat16():
    case = {
        name: value.bfloat16() if isinstance(value, Tensor) and value.is_floating_point() else value
        for name, value in random_case(11).items()
    }
    exact = {
        name: value.double() if name in ("lin_weight", "_input", "bias") and value is not None else value
        for name, value in case.items()
    }
    loss = LigerFusedLinearORPOLoss()
    rounded, truth = outputs(loss, case), outputs(loss, exact)
    assert rounded["loss"].dtype == torch.float32
    assert rounded["dlin_weight"].dtype == torch.bfloat16
    for name in ("loss", *NAMES):
        torch.testing.assert_close(rounded[name].double(), truth[name].double(), rtol=2e-2, atol=2e-2)
