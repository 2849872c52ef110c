"""The operations on labels, rows and pairs of the native and of the Triton kernels, beside their eager mirrors."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_kernels.engine.objective import Denominators, odds_ratio_loss
from orpo_kernels.ops import torch_ops, why_not

from .batches import assert_known, assert_same_rows, labelled, random_rows

CPU = torch.device("cpu")
KERNELS: list[Any] = []
if why_not("native", CPU) is None:
    from orpo_kernels.ops import native

    KERNELS.append(pytest.param(native, CPU, id="native"))
if importlib.util.find_spec("triton") is not None:
    from orpo_kernels.ops import triton as triton_ops

    KERNELS.append(pytest.param(triton_ops, torch.device("cuda" if torch.cuda.is_available() else "cpu"), id="triton"))
each_backend = pytest.mark.parametrize(("ops", "device"), KERNELS)


@each_backend
@given(labelled(), st.booleans(), st.booleans())
def test_rows_of_labels(ops, device, case, shift, per_sequence):
    """Bit for bit those of the mirror, in its order; no sequence, no position and no row at all among them."""
    labels, nll_labels, ignore_index = case
    nll_labels = None if nll_labels is None else nll_labels.to(device)
    arguments = labels.to(device), nll_labels, shift, ignore_index, per_sequence
    ours, mirror = ops.label_rows(*arguments), torch_ops.label_rows(*arguments)
    assert_same_rows(ours, mirror)
    assert_known(ours)
    assert_known(mirror)
    assert mirror.known.unique_positions or nll_labels is not None
    assert torch.equal(ours.known.offsets, mirror.known.offsets)
    assert ours.known.unique_positions >= mirror.known.unique_positions
    torch.testing.assert_close(ops.count_rows(ours), torch_ops.count_rows(mirror), rtol=1e-14, atol=0)


@each_backend
@given(seed=st.integers(0, 2**31), pairs=st.integers(1, 20), num_rows=st.sampled_from([0, 1, 70, 2500]))
def test_counts_of_rows(ops, device, seed, pairs, num_rows):
    """Of rows in any order; the same bits every time."""
    rows = random_rows(torch.Generator().manual_seed(seed), 50, 10, pairs, num_rows).to(device)
    counts = ops.count_rows(rows)
    assert torch.equal(counts, ops.count_rows(rows))
    torch.testing.assert_close(counts, torch_ops.count_rows(rows), rtol=1e-13, atol=0)


@each_backend
@given(st.lists(st.integers(-2, 5), max_size=20), st.sampled_from([0, 2**40, 2**62, -(2**62)]))
def test_rows_are_within(ops, device, values, offset):
    """At the bounds, beside them, and where 32 bits would wrap around to 0; among many others that are."""
    others = torch.zeros(3000, dtype=torch.int64)
    index = torch.cat((others, torch.tensor(values, dtype=torch.int64) + offset)).to(device)
    inside = torch.zeros_like(index)
    expected = all(0 <= value + offset < 4 for value in values)
    for arguments in ((index, 4, inside, 1), (inside, 1, index, 4)):
        assert bool(ops.are_within(*arguments)) == bool(torch_ops.are_within(*arguments)) == expected


@each_backend
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(0, 5),
    num_rows=st.sampled_from([0, 1, 30, 3000]),
    spread=st.sampled_from([0.1, 1.0, 80.0]),
    count=st.sampled_from([None, 0.0, 1000.0]),
    weighted=st.booleans(),
    in_order=st.booleans(),
)
def test_pair_loss(ops, device, seed, pairs, num_rows, spread, count, weighted, in_order):
    """Averages, loss, metrics and the gradient of every row in float64: the same numbers to its last digits."""
    generator = torch.Generator().manual_seed(seed)
    rows = random_rows(generator, 50, 10, max(pairs, 1), num_rows if pairs else 0, weighted and pairs > 0).to(device)
    if pairs == 0:
        object.__setattr__(rows, "num_pairs", 0)
    elif in_order:
        rows = rows.by_sequence()
    log_odds = (torch.randn(len(rows), generator=generator, dtype=torch.float64) * spread).to(device)
    nll = rows.nll_weight.sum() if count is None else torch.tensor(count, dtype=torch.float64, device=device)
    counts = Denominators(nll, torch.tensor(count or 1.0, dtype=torch.float64, device=device))
    sums = torch_ops.sequence_sums(log_odds, rows)
    for value, expected in zip(ops.sequence_sums(log_odds, rows), sums, strict=True):
        torch.testing.assert_close(value, expected, rtol=1e-11, atol=1e-300)
    mirror = odds_ratio_loss(log_odds, rows, 0.7, 0.1, counts, torch_ops)
    for name, ours, true in zip(
        mirror._fields, odds_ratio_loss(log_odds, rows, 0.7, 0.1, counts, ops), mirror, strict=True
    ):
        torch.testing.assert_close(ours, true, rtol=1e-11, atol=1e-14, msg=lambda m, name=name: f"{name}: {m}")
    if not weighted:  # with sums that are those of several ranks
        given_sums = ops.odds_ratio(log_odds, rows, sums, 0.7, 0.1, counts)
        torch.testing.assert_close(given_sums.numbers, mirror.numbers, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(given_sums.grad, mirror.grad, rtol=1e-11, atol=1e-14)


@pytest.mark.skipif(why_not("native", CPU) is not None, reason="no native kernels")
def test_the_native_kernels_refuse_what_does_not_fit():
    rows = random_rows(torch.Generator().manual_seed(0), 10, 7, 2, 8)
    log_odds, one = torch.zeros(len(rows), dtype=torch.float64), torch.ones((), dtype=torch.float64)
    object.__setattr__(rows, "pair_weight", torch.ones(3, dtype=torch.float64))
    with pytest.raises(ValueError, match=r"pair_weight has shape \(3\), it must be \(2\)"):
        native.odds_ratio(log_odds, rows, torch_ops.sequence_sums(log_odds, rows), 1.0, 1.0, Denominators(one, one))
