"""Weights of pairs: what each pair's loss is multiplied by, in every schedule, backend, method and layout.

`test_loss.py` and `test_parallel.py` have weighted pairs among their random batches; here is what weights promise.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orpo_kernels import Rows, orpo_loss, orpo_loss_from_rows, preference_loss_from_rows, rows_from_labels
from orpo_kernels.methods import METHODS, ORPO, method_named

from .batches import IGNORE, random_labels, random_weights
from .thorough import only_thorough

SIZE, VOCAB, LENGTH = 12, 41, 7
SCHEDULES = ("single_pass", "resident", "by groups", "recompute", "sparse")
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES)
each_method = pytest.mark.parametrize("name", METHODS)


def inputs(pairs: int = 3, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight, and labels of answers with at least one token."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(2 * pairs, LENGTH, SIZE, generator=generator, dtype=torch.float64)
    weight = torch.randn(VOCAB, SIZE, generator=generator, dtype=torch.float64)
    labels = random_labels(generator, (2 * pairs, LENGTH), VOCAB, 0.7)
    labels[:, 2] = torch.randint(VOCAB, (2 * pairs,), generator=generator)
    return hidden.to(dtype), weight.to(dtype), labels


def options_of(schedule: str, dtype: torch.dtype) -> dict[str, Any]:
    """How to compute the loss of `inputs`."""
    itemsize = max(dtype.itemsize, 4)
    return {
        "by groups": {"schedule": "resident", "memory_budget": itemsize * VOCAB * (SIZE + 2 * LENGTH)},
        "sparse": {"schedule": "auto", "sparse_eps": 0.0},
    }.get(schedule, {"schedule": schedule})


def run(hidden: Tensor, weight: Tensor, schedule: str, loss: Any) -> tuple[Any, list[Tensor]]:
    """The output of `loss(hidden, weight, **options)`, and the gradients of what the schedule trains."""
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(schedule != "single_pass")]
    out = loss(*leaves, **options_of(schedule, hidden.dtype))
    return out, list(torch.autograd.grad(out.loss, [leaf for leaf in leaves if leaf.requires_grad]))


def method_loss(labels: Tensor, name: str, pair_weight: Tensor | None, reference_logps: Tensor, **counts: int) -> Any:
    """The loss of a method with an NLL, as a function of hidden, weight and options."""
    rows = rows_from_labels(labels, pair_weight=pair_weight)

    def loss(hidden: Tensor, weight: Tensor, **options: Any) -> Any:
        method = method_named(name, alpha=0.7)
        flat = hidden.flatten(0, 1)
        return preference_loss_from_rows(
            flat, weight, rows, method, reference_logps=reference_logps, **counts, **options
        )

    return loss


# --- what a weight is ------------------------------------------------------------------------------------------------


@each_schedule
@each_method
@given(seed=st.integers(0, 2**31))
def test_a_weighted_loss_is_the_weighted_sum_of_the_pairs_own_losses(name, schedule, seed):
    """Each pair alone and without weights, over the denominators of all: loss, its parts, and every gradient."""
    pairs = 3
    hidden, weight, labels = inputs(pairs, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    weights, ref = random_weights(generator, pairs), -9 * torch.rand(2 * pairs, generator=generator)
    counts = {"nll_denominator": int((labels[:pairs] != IGNORE).sum()), "pair_denominator": pairs}
    out, grads = run(hidden, weight, schedule, method_loss(labels, name, weights, ref))
    alone = []
    for pair in range(pairs):
        own = labels.clone()
        own[[i for i in range(2 * pairs) if i % pairs != pair]] = IGNORE
        alone.append(run(hidden, weight, schedule, method_loss(own, name, None, ref, **counts)))
    for field in ("loss", "nll_loss"):
        expected = sum(w * getattr(own, field).detach() for w, (own, _) in zip(weights, alone, strict=True))
        torch.testing.assert_close(getattr(out, field).detach(), expected, rtol=1e-9, atol=1e-12)
    for i, grad in enumerate(grads):
        expected = sum(w * own_grads[i] for w, (_, own_grads) in zip(weights, alone, strict=True))
        torch.testing.assert_close(grad, expected, rtol=1e-8, atol=1e-12)


@each_schedule
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ones_are_no_weights_bit_for_bit(dtype, schedule, backend, small_chunks):
    only_thorough(backend == "triton" and (dtype, schedule) != (torch.float32, "recompute"), "interpreted for long")
    hidden, weight, labels = inputs(dtype=dtype)
    results = []
    for pair_weight in (None, torch.ones(3, dtype=torch.float64)):
        loss = partial(orpo_loss, labels=labels, pair_weight=pair_weight, beta=0.3, limits=small_chunks)
        out, grads = run(hidden, weight, schedule, loss)
        results.append((*out, *grads))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@each_method
def test_what_is_of_a_pair_does_not_know_its_weight(name):
    """Log-probabilities, rewards, log-odds: as without weights. The parts of the loss still add up to it."""
    hidden, weight, labels = inputs()
    ref, weights = -9 * torch.rand(6), torch.tensor([0.0, 2.5, 0.3], dtype=torch.float64)
    out = method_loss(labels, name, weights, ref)(hidden, weight)
    plain = method_loss(labels, name, None, ref)(hidden, weight)
    for field in set(out._fields) - {"loss", "nll_loss", "pair_loss"}:
        assert torch.equal(getattr(out, field), getattr(plain, field)), field
    assert out.nll_loss != plain.nll_loss
    if isinstance(method_named(name), ORPO):
        orpo = orpo_loss(hidden, weight, labels, pair_weight=weights, alpha=0.7, beta=0.4)
        assert float(orpo.loss) == pytest.approx(0.7 * float(orpo.nll_loss) + 0.4 * float(orpo.or_loss), rel=1e-12)


@each_method
def test_weight_0_wins_over_an_impossible_answer(name, backend):
    """A pair whose tokens a mask over the vocabulary forbids has an infinite loss: with weight 0 it has none."""
    hidden, weight, labels = inputs(dtype=torch.float32)
    bias = torch.zeros(VOCAB)
    bias[5] = -torch.inf
    labels[labels == 5] = 6
    labels[1, 2] = 5
    ref = torch.zeros(6)

    def loss_of(weights: list[float]) -> Any:
        loss = method_loss(labels, name, torch.tensor(weights, dtype=torch.float64), ref)
        with torch.no_grad():
            return loss(hidden, weight, bias=bias).loss

    assert not math.isfinite(loss_of([1.0, 1.0, 1.0]))
    assert math.isfinite(loss_of([1.0, 0.0, 1.0]))


def test_a_bad_weight_is_refused_inside_a_graph():
    """`test_graph.py` has good ones."""
    torch._dynamo.reset()
    hidden, weight, labels = inputs(dtype=torch.float32)
    compiled = torch.compile(orpo_loss, fullgraph=True, backend="aot_eager")
    with pytest.raises(ValueError, match=r"pair_weight is -1.0 for pair 1"):
        compiled(hidden, weight, labels, pair_weight=torch.tensor([0.0, -1.0, 0.3], dtype=torch.float64))


# --- rows and checks -------------------------------------------------------------------------------------------------


def test_rows_keep_their_weights():
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    rows = rows_from_labels(torch.tensor([[1, 2], [3, IGNORE], [4, 5], [6, 7]]), pair_weight=weights)
    for kept in (rows, rows.to("cpu"), rows.select(torch.tensor([0])), replace(rows, padded=True).live()):
        assert torch.equal(kept.pair_weight, weights)
    assert rows.to("meta").pair_weight.is_meta
    assert rows.pair.tolist() == [0, 0, 1, 0, 0, 1, 1]
    assert rows.weighted_nll().tolist() == [0.5, 0.5, 2.0, 0, 0, 0, 0]
    file = io.BytesIO()
    torch.save(rows, file)  # as between the processes of a DataLoader
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False).pair_weight, weights)


BAD = {
    "shape": (torch.ones(3, dtype=torch.float64), ValueError, r"pair_weight has shape \(3,\), but the batch has 2"),
    "column": (torch.ones(2, 1, dtype=torch.float64), ValueError, r"pair_weight has shape \(2, 1\)"),
    "dtype": (torch.ones(2), TypeError, "pair_weight is torch.float32, it must be torch.float64"),
    "device": (torch.ones(2, dtype=torch.float64, device="meta"), TypeError, "pair_weight is on meta"),
    "gradient": (torch.ones(2, dtype=torch.float64, requires_grad=True), TypeError, "pair_weight requires grad"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_weights_are_a_sentence(case):
    weights, error, message = BAD[case]
    hidden, weight, labels = inputs(2)
    with pytest.raises(error, match=message):
        orpo_loss(hidden, weight, labels, pair_weight=weights)
    rows = rows_from_labels(labels)
    with pytest.raises(error, match=message):
        replace(rows, pair_weight=weights)


@each_method
@pytest.mark.parametrize("value", [-0.5, math.inf, math.nan])
def test_bad_values_are_a_sentence(name, value):
    hidden, weight, labels = inputs(2)
    weights = torch.tensor([1.0, value], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"pair_weight is \S+ for pair 1: weights must be finite and at least 0"):
        method_loss(labels, name, weights, torch.zeros(4))(hidden, weight)


def test_the_weights_of_no_pairs():
    rows = Rows(*(torch.empty(0, dtype=torch.int64) for _ in range(3)), torch.empty(0, dtype=torch.bool),
                torch.empty(0, dtype=torch.float64), 0, pair_weight=torch.empty(0, dtype=torch.float64))  # fmt: skip
    out = orpo_loss_from_rows(torch.randn(2, SIZE), torch.randn(VOCAB, SIZE), rows)
    assert out.loss == 0
