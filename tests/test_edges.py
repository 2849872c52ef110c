"""Degenerate batches have a defined result, bad input a clear error."""

from __future__ import annotations

import re

import pytest
import torch

from orpo_kernels import Rows, backends, orpo_loss, orpo_loss_from_rows, rows_from_labels, token_logps

from .batches import IGNORE

SCHEDULES = ("single_pass", "resident", "recompute")


def inputs(pairs=2, length=5, size=8, vocab=13, dtype=torch.float32):
    hidden = torch.randn(2 * pairs, length, size, dtype=dtype, requires_grad=True)
    weight = torch.randn(vocab, size, dtype=dtype)
    return hidden, weight, torch.randint(vocab, (2 * pairs, length))


def assert_finite(out, hidden) -> None:
    assert all(torch.isfinite(value.double()).all() for value in out)
    assert torch.isfinite(hidden.grad).all()


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_nothing_valid_is_zero_and_attached(schedule, backend):
    hidden, weight, labels = inputs()
    weight.requires_grad_(schedule != "single_pass")
    out = orpo_loss(hidden, weight, torch.full_like(labels, IGNORE), schedule=schedule)
    assert out.loss.item() == out.nll_loss.item() == out.or_loss.item() == 0
    assert not out.valid_pairs.any()
    assert not out.log_odds.any()
    out.loss.backward()
    assert hidden.grad.abs().max() == 0
    if weight.requires_grad:
        assert weight.grad.abs().max() == 0


@pytest.mark.parametrize("empty", ["chosen", "rejected", "both"])
def test_pair_with_an_empty_answer_leaves_the_odds_ratio(empty, backend):
    hidden, weight, labels = inputs()
    both = {"chosen": [0], "rejected": [2], "both": [0, 2]}[empty]
    labels[both] = IGNORE
    out = orpo_loss(hidden, weight, labels)
    assert out.valid_pairs.tolist() == [False, True]
    assert out.log_odds[0] == 0
    out.loss.backward()
    assert_finite(out, hidden)
    # Without NLL the first pair gets no gradient at all, and the second is what it would be alone.
    hidden.grad = None
    out = orpo_loss(hidden, weight, labels, alpha=0.0)
    out.loss.backward()
    assert hidden.grad[[0, 2]].abs().max() == 0
    alone = orpo_loss(hidden[[1, 3]], weight, labels[[1, 3]], alpha=0.0)
    assert out.loss.item() == pytest.approx(alone.loss.item(), rel=1e-6)


def test_empty_batch(backend):
    hidden = torch.randn(0, 5, 8, requires_grad=True)
    out = orpo_loss(hidden, torch.randn(13, 8), torch.empty(0, 5, dtype=torch.int64))
    out.loss.backward()
    assert out.loss.item() == 0
    assert out.chosen_logps.shape == (0,)


def test_no_positions_to_predict(backend):
    hidden, weight, labels = inputs(length=1)
    assert orpo_loss(hidden, weight, labels, shift=True).loss.item() == 0


def test_vocabulary_of_one(backend):
    """The only token is certain: log-probability 0 (to the last bit of float64), zero gradient, nothing is NaN."""
    hidden, _, labels = inputs()
    out = orpo_loss(hidden, torch.randn(1, 8), torch.zeros_like(labels))
    out.loss.backward()
    assert_finite(out, hidden)
    assert out.nll_loss.item() == 0
    assert out.log_odds.tolist() == [0, 0]
    assert hidden.grad.abs().max() == 0


@pytest.mark.parametrize("vocab", [13, 77], ids=["in a tile", "whole tiles"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_masked_vocabulary(schedule, vocab, backend):
    """A bias of -inf takes tokens out of the vocabulary, as for padded lm-heads."""
    hidden, weight, labels = inputs(vocab=vocab)
    bias = torch.zeros(vocab)
    bias[10:] = -torch.inf
    weight.requires_grad_(schedule != "single_pass")
    out = orpo_loss(hidden, weight, labels % 10, bias=bias, schedule=schedule)
    expected = orpo_loss(hidden, weight[:10], labels % 10)
    assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    torch.testing.assert_close(grad, torch.autograd.grad(expected.loss, hidden)[0])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_strongly_negative_logits(schedule, backend):
    hidden, weight, labels = inputs(dtype=torch.float64)
    hidden, weight = hidden.float().detach().requires_grad_(), weight.float()
    bias = torch.full((13,), -1e4)
    weight.requires_grad_(schedule != "single_pass")
    out = orpo_loss(hidden, weight, labels, bias=bias, schedule=schedule)
    out.loss.backward()
    assert_finite(out, hidden)
    assert out.loss.item() == pytest.approx(orpo_loss(hidden, weight, labels).loss.item(), rel=1e-3)


def test_nan_is_not_hidden(backend):
    hidden, weight, labels = inputs()
    with torch.no_grad():
        hidden[0, 0, 0] = torch.nan
    assert orpo_loss(hidden, weight, labels).loss.isnan()


def test_certain_answers_beyond_fp32(backend):
    """A log-odds of 1e6 rounds every probability to 1, in float64 too: large, finite, zero gradient."""
    hidden = torch.zeros(2, 3, 4, requires_grad=True)
    bias = torch.tensor([1e6, 0.0, 0.0])
    for labels in ([[0] * 3, [0] * 3], [[0] * 3, [1] * 3], [[1] * 3, [0] * 3]):
        hidden.grad = None
        out = orpo_loss(hidden, torch.randn(3, 4), torch.tensor(labels), bias=bias)
        out.loss.backward()
        assert_finite(out, hidden)


BAD = {
    "odd batch": (lambda h, w, y: orpo_loss(h[:3], w, y[:3]), ValueError, "3 sequences, an odd number"),
    "label too large": (lambda h, w, y: orpo_loss(h, w, y + 13), ValueError, r"to 2\d, but weight has 13 rows"),
    "negative label": (lambda h, w, y: orpo_loss(h, w, y - 20), ValueError, r"from -\d+ to .* 13 rows"),
    "nll label too large": (
        lambda h, w, y: orpo_loss(h, w, y, nll_labels=y[:2] + 13),
        ValueError,
        "but weight has 13 rows",
    ),
    "labels shape": (lambda h, w, y: orpo_loss(h, w, y[:, :4]), ValueError, r"\(4, 4\).*asks for \(4, 5\)"),
    "labels dtype": (lambda h, w, y: orpo_loss(h, w, y.int()), TypeError, "int32, it must be torch.int64"),
    "nll shape": (lambda h, w, y: orpo_loss(h, w, y, nll_labels=y), ValueError, r"\(4, 5\).*asks for \(2, 5\)"),
    "nll dtype": (lambda h, w, y: orpo_loss(h, w, y, nll_labels=y[:2].int()), TypeError, "int32"),
    "hidden size": (lambda h, w, y: orpo_loss(h, w[:, :7], y), ValueError, "they are 8 and 7"),
    "hidden dim": (lambda h, w, y: orpo_loss(h[0], w, y), ValueError, r"it must be \(2B, T, H\)"),
    "weight dim": (lambda h, w, y: orpo_loss(h, w[0], y), ValueError, r"it must be \(V, H\)"),
    "empty vocabulary": (lambda h, w, y: orpo_loss(h, w[:0], y), ValueError, "vocabulary is empty"),
    "bias shape": (lambda h, w, y: orpo_loss(h, w, y, bias=w[0]), ValueError, r"asks for \(13,\)"),
    "dtype": (lambda h, w, y: orpo_loss(h, w.double(), y), TypeError, "float32, but weight is torch.float64"),
    "bias dtype": (lambda h, w, y: orpo_loss(h, w, y, bias=w[:, 0].half()), TypeError, "but bias is torch.float16"),
    "quantized": (lambda h, w, y: orpo_loss(h, w.to(torch.int8), y), TypeError, "int8.*dequantise"),
    "device": (lambda h, w, y: orpo_loss(h, w.to("meta"), y), TypeError, "on cpu, but weight is on meta"),
    "label device": (lambda h, w, y: orpo_loss(h, w, y.to("meta")), TypeError, "on cpu, but labels is on meta"),
    "reduction": (lambda h, w, y: orpo_loss(h, w, y, nll_reduction="mean"), ValueError, "'mean', it must be"),
    "schedule": (lambda h, w, y: orpo_loss(h, w, y, schedule="fast"), ValueError, "'fast', it must be one of"),
    "budget": (lambda h, w, y: orpo_loss(h, w, y, memory_budget=0), ValueError, "memory_budget is 0"),
    "backend": (lambda h, w, y: orpo_loss(h, w, y, backend="cuda"), ValueError, "'cuda', it must be one of"),
    "scale": (lambda h, w, y: orpo_loss(h, w, y, logit_scale=0.0), ValueError, "logit_scale is 0.0"),
    "softcap": (lambda h, w, y: orpo_loss(h, w, y, logit_softcap=-1.0), ValueError, "logit_softcap is -1.0"),
    "denominator": (lambda h, w, y: orpo_loss(h, w, y, nll_denominator=0), ValueError, "nll_denominator is 0"),
    "denominator shape": (
        lambda h, w, y: orpo_loss(h, w, y, pair_denominator=torch.ones(2)),
        ValueError,
        "pair_denominator has shape",
    ),
    "flat hidden": (
        lambda h, w, y: orpo_loss_from_rows(h, w, rows_from_labels(y)),
        ValueError,
        r"it must be \(N, H\)",
    ),
    "position": (
        lambda h, w, y: orpo_loss_from_rows(h[0], w, rows_from_labels(y)),
        ValueError,
        "but hidden has 5 positions",
    ),
    "targets shape": (lambda h, w, y: token_logps(h, w, y[0]), ValueError, r"\(5,\).*asks for \(4, 5\)"),
    "targets dtype": (lambda h, w, y: token_logps(h, w, y.int()), TypeError, "int32"),
    "targets range": (lambda h, w, y: token_logps(h, w, y + 13), ValueError, "targets holds token ids"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_both_sides(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call(*inputs())


def test_rows_check_themselves():
    rows = rows_from_labels(torch.tensor([[1, 2], [3, 4]]))
    fields = {name: getattr(rows, name) for name in ("position", "target", "sequence", "scored", "nll_weight")}
    with pytest.raises(ValueError, match=r"Rows.target has shape \(3,\)"):
        Rows(**{**fields, "target": rows.target[:3]}, num_pairs=1)
    with pytest.raises(TypeError, match=r"Rows.scored is torch.int64"):
        Rows(**{**fields, "scored": rows.target}, num_pairs=1)
    with pytest.raises(TypeError, match=r"Rows.target is on meta"):
        Rows(**{**fields, "target": rows.target.to("meta")}, num_pairs=1)


def test_backends_say_why_not():
    reasons = backends()
    assert reasons["torch"] == "available"
    for name, reason in reasons.items():
        if reason != "available":
            with pytest.raises(RuntimeError, match=re.escape(reason)):
                orpo_loss(*inputs(), backend=name)
