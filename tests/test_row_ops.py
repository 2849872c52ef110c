"""The native operations on labels, rows and pairs beside their eager mirrors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_kernels.engine.objective import Denominators, count_rows, odds_ratio, sequence_sums
from orpo_kernels.ops import torch_ops, why_not
from orpo_kernels.rows import label_rows

from .batches import assert_same_rows, labelled, random_rows

if why_not("native", torch.device("cpu")):
    pytest.skip("no native kernels", allow_module_level=True)

from orpo_kernels.ops import native


@given(labelled(), st.booleans(), st.booleans())
def test_rows_of_labels(case, shift, per_sequence):
    labels, nll_labels, ignore_index = case
    ours = native.label_rows(labels, nll_labels, shift, ignore_index, per_sequence)
    mirror = label_rows(labels, nll_labels, shift, ignore_index, per_sequence)
    assert_same_rows(ours, mirror)
    assert torch.equal(ours.known.offsets, mirror.known.offsets)
    assert ours.known.unique_positions == (len(set(ours.position.tolist())) == len(ours))
    assert mirror.known.unique_positions <= ours.known.unique_positions
    torch.testing.assert_close(native.count_rows(ours), count_rows(mirror), rtol=1e-14, atol=0)
    assert torch.equal(ours.known.counts, native.count_rows(ours))


@given(st.lists(st.integers(-2, 5), max_size=20), st.sampled_from([0, 2**62, -(2**62)]))
def test_rows_are_within(values, offset):
    inside, index = torch.zeros(len(values), dtype=torch.int64), torch.tensor(values, dtype=torch.int64) + offset
    for arguments in ((index, 4, inside, 1), (inside, 1, index, 4)):
        expected = all(0 <= value + offset < 4 for value in values)
        assert native.are_within(*arguments) == bool(torch_ops.are_within(*arguments)) == expected


@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 30), st.sampled_from([0.1, 5.0, 60.0]), st.booleans())
def test_pairs(seed, pairs, count, spread, weighted):
    """Loss, metrics and gradients of float64, with weights and without, of answers of any confidence."""
    generator = torch.Generator().manual_seed(seed)
    rows = random_rows(generator, 10, 7, pairs, count, weighted)
    log_odds = spread * torch.randn(count, generator=generator, dtype=torch.float64)
    sums = sequence_sums(log_odds, rows)
    counts = Denominators(*count_rows(rows).unbind())
    mirror = odds_ratio(log_odds, rows, sums, 0.7, 0.3, counts)
    for given_sums in (sums, None):
        ours = native.odds_ratio(log_odds, rows, given_sums, 0.7, 0.3, counts)
        assert torch.equal(ours.valid_pairs, mirror.valid_pairs)
        for mine, theirs in ((ours.numbers, mirror.numbers), (ours.grad, mirror.grad)):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


def test_the_kernels_refuse_what_does_not_fit():
    rows = random_rows(torch.Generator().manual_seed(0), 10, 7, 2, 8)
    log_odds = torch.zeros(len(rows), dtype=torch.float64)
    sums, counts = sequence_sums(log_odds, rows), Denominators(*count_rows(rows).unbind())
    with pytest.raises(ValueError, match=r"pair_weight has shape \(3\), it must be \(2\)"):
        native.call(
            native._native.odds_ratio,
            log_odds,
            *(rows.sequence, rows.scored, rows.nll_weight),
            torch.cat(sums),
            torch.ones(3, dtype=torch.float64),
            *(1.0, 1.0),
            *counts,
            torch.empty(9, dtype=torch.float64),
            torch.empty(2, dtype=torch.bool),
            torch.empty_like(log_odds),
        )
