"""Labels to rows: against loops that say what is meant, and the dialects against their authors' own formulas."""

from __future__ import annotations

import copy
import pickle
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orpo_kernels import Rows, dialects, orpo_loss_from_rows, rows_from_labels
from orpo_kernels.engine.objective import count_rows, denominators, segment_sum
from orpo_kernels.ops import torch_ops
from orpo_kernels.rows import DTYPES, Known

from .batches import IGNORE, assert_known, random_labels, random_rows


def as_set(rows: Rows) -> set[tuple]:
    columns = (rows.position, rows.target, rows.sequence, rows.scored, rows.nll_weight)
    entries = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(set(entries)) == len(entries)
    return set(entries)


def rows_by_loops(labels, nll_labels, shift: bool) -> set[tuple]:
    entries = set()
    sequences, length = labels.shape
    for s in range(sequences):
        for t in range(length - shift):
            label = labels[s, t + shift].item()
            nll_label = nll_labels[s, t + shift].item() if s < sequences // 2 else IGNORE
            position = s * length + t
            if label != IGNORE:
                entries.add((position, label, s, True, float(label == nll_label)))
            if nll_label not in (IGNORE, label):
                entries.add((position, nll_label, s, False, 1.0))
    return entries


@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 3),
    length=st.integers(1, 8),
    shift=st.booleans(),
    vocab=st.integers(1, 4),
)
def test_every_target_becomes_one_row(seed, pairs, length, shift, vocab):
    generator = torch.Generator().manual_seed(seed)
    labels = random_labels(generator, (2 * pairs, length), vocab, 0.6)
    nll_labels = random_labels(generator, (pairs, length), vocab, 0.6)
    assert as_set(rows_from_labels(labels, nll_labels, shift=shift)) == rows_by_loops(labels, nll_labels, shift)
    assert as_set(rows_from_labels(labels, shift=shift)) == rows_by_loops(labels, labels[:pairs], shift)


def test_sequence_reduction_weighs_sequences_alike():
    labels = torch.tensor([[1, 2, 3, 4], [1, IGNORE, IGNORE, IGNORE], [5, 6, 7, 8], [5, 6, 7, 8]])
    rows = rows_from_labels(labels, nll_reduction="sequence")
    assert rows.nll_weight[rows.sequence == 0].tolist() == [0.25] * 4
    assert rows.nll_weight[rows.sequence == 1].tolist() == [1.0]
    assert rows.nll_weight[rows.sequence >= 2].sum() == 0


def a_padded_batch():
    """Two pairs: prompt lengths 3 and 2, answers of different lengths, right padding with the EOS."""
    eos, length = 0, 9
    prompts, answers = [[5, 6, 7], [8, 9]], [[[11, 12, eos], [13, eos]], [[14, 15, 16, 17, eos], [18, 19, eos]]]
    ids, mask, labels = [], [], []
    for side in range(2):
        for prompt, answer in zip(prompts, answers, strict=True):
            tokens, pad = prompt + answer[side], length - len(prompt + answer[side])
            ids.append(tokens + [eos] * pad)
            mask.append([1] * len(tokens) + [0] * pad)
            labels.append([IGNORE] * len(prompt) + answer[side] + [IGNORE] * pad)
    prompt_mask = [[1] * len(p) + [0] * (length - len(p)) for p in prompts] * 2
    return tuple(map(torch.tensor, (ids, mask, labels, prompt_mask)))


@pytest.fixture
def log_probs():
    """A float64 model: the identity as lm-head, so that hidden states are logits."""
    return torch.randn(4, 9, 20, dtype=torch.float64).log_softmax(-1)


def ours(log_probs, rows: Rows, **options):
    identity = torch.eye(20, dtype=torch.float64)
    return orpo_loss_from_rows(log_probs.flatten(0, 1), identity, rows, **options)


def odds_ratio_loss(a_chosen, a_rejected):
    odds = (a_chosen - a_rejected) - (torch.log1p(-torch.exp(a_chosen)) - torch.log1p(-torch.exp(a_rejected)))
    return -torch.nn.functional.logsigmoid(odds)


def label_logps(log_probs, labels):
    mask = labels[:, 1:] != IGNORE
    logps = log_probs[:, :-1].gather(2, labels[:, 1:].clamp(min=0)[..., None]).squeeze(2)
    return logps * mask, mask


def test_paper_and_llama_factory(log_probs):
    """LLaMA-Factory `odds_ratio_loss`: -chosen_logps (length-averaged) + beta * OR, a mean over pairs."""
    ids, mask, labels, _ = a_padded_batch()
    logps, scored = label_logps(log_probs, labels)
    average = logps.sum(1) / scored.sum(1)
    expected = (-average[:2] + 0.1 * odds_ratio_loss(average[:2], average[2:])).mean()
    for dialect in (dialects.paper, dialects.llama_factory):
        assert ours(log_probs, dialect(ids, mask, labels)).loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_trl(log_probs):
    """`ORPOTrainer`: cross entropy over all of the chosen tokens; see test_peers for TRL's own code."""
    ids, mask, labels, _ = a_padded_batch()
    logps, scored = label_logps(log_probs, labels)
    average = logps.sum(1) / scored.sum(1)
    all_logps, wanted = label_logps(log_probs[:2], torch.where(mask[:2] == 1, ids[:2], IGNORE))
    expected = -all_logps.sum() / wanted.sum() + 0.1 * odds_ratio_loss(average[:2], average[2:]).mean()
    assert ours(log_probs, dialects.trl(ids, mask, labels)).loss.item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("prompt_nll", [True, False])
def test_xfactlab(log_probs, prompt_nll):
    """`compute_logps` and `compute_loss` of xfactlab/orpo, line by line."""
    ids, mask, labels, prompt_mask = a_padded_batch()
    pad = 0
    response = mask[:, :-1] - prompt_mask[:, 1:]
    per_token = torch.gather(log_probs[:, :-1], 2, (response * ids[:, 1:]).unsqueeze(2)).squeeze(2)
    average = (per_token * response).sum(1) / response.sum(1)
    nll_labels = ids[:2].clone()
    if not prompt_nll:
        nll_labels = nll_labels * (prompt_mask[:2] * mask[:2]).logical_not()
    nll_labels[nll_labels == pad] = IGNORE
    all_logps, wanted = label_logps(log_probs[:2], nll_labels)
    expected = -all_logps.sum() / wanted.sum() + odds_ratio_loss(average[:2], average[2:]).mean()
    rows = dialects.xfactlab(ids, mask, labels, pad_token_id=pad, prompt_nll=prompt_nll)
    assert ours(log_probs, rows, beta=1.0).loss.item() == pytest.approx(expected.item(), rel=1e-12)


def test_liger_takes_the_chosen_half_of_nll_targets():
    target = torch.tensor([[1, 2, IGNORE], [3, IGNORE, IGNORE]])
    nll_target = torch.tensor([[4, 2, 5], [9, 9, 9]])
    expected = {(0, 1, 0, True, 0.0), (0, 4, 0, False, 1.0), (1, 2, 0, True, 1.0), (2, 5, 0, False, 1.0)}
    assert as_set(dialects.liger(target, nll_target)) == expected | {(3, 3, 1, True, 0.0)}
    assert as_set(dialects.liger(target, nll_target[:1])) == expected | {(3, 3, 1, True, 0.0)}


# --- what the maker of rows knows ----------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), num_rows=st.integers(0, 30))
def test_sums_over_ranges_are_the_sums(seed, num_rows):
    generator = torch.Generator().manual_seed(seed)
    rows = random_rows(generator, 9, 5, 3, num_rows)
    values = torch.randn(num_rows, generator=generator, dtype=torch.float64)
    order = rows.sequence.argsort(stable=True)
    in_order = rows.by_sequence()
    assert_known(in_order)
    assert in_order.known.offsets is not None
    assert as_list(in_order) == as_list(rows.select(order))
    assert torch.equal(segment_sum(values, rows), segment_sum(values[order], in_order))
    assert torch.equal(count_rows(rows)[1], count_rows(in_order)[1])


def as_list(rows: Rows) -> list[list]:
    return [getattr(rows, name).tolist() for name in DTYPES]


def known_rows() -> Rows:
    rows = rows_from_labels(torch.tensor([[1, 2, 3], [4, IGNORE, 5]]))
    return rows.knowing(counts=count_rows(rows))


def test_what_is_known_moves_with_the_rows():
    rows = known_rows()
    weighted = rows.weighted(torch.ones(1, dtype=torch.float64))
    for same in (rows.to("cpu"), rows.live(), weighted, copy.deepcopy(rows), pickle.loads(pickle.dumps(rows))):
        assert_known(same)
        assert same.known.counts is not None
        assert same.known.offsets is not None
        assert same.known.unique_positions
    assert rows.to("meta").known.offsets.is_meta
    reweighted = rows.with_nll_weight(2 * rows.nll_weight)
    assert_known(reweighted)
    assert reweighted.known.counts is None
    assert reweighted.known.offsets is not None


def test_what_is_known_is_forgotten_where_it_may_be_wrong():
    rows = known_rows()
    changed = {"nll_weight": 2 * rows.nll_weight, "position": rows.position * 0, "sequence": rows.sequence.flip(0)}
    for other in (rows.select(torch.tensor([1, 1, 0])), *(replace(rows, **{k: v}) for k, v in changed.items())):
        assert other.known == Known()
    # So the means divide by what is there, whatever was counted before.
    counts = denominators(replace(rows, nll_weight=2 * rows.nll_weight), None, None)
    assert [float(count) for count in counts] == [6.0, 1.0]


def test_counts_that_are_known_are_what_the_means_divide_by():
    rows = known_rows().knowing(counts=torch.tensor([7.0, 5.0], dtype=torch.float64))
    assert [float(count) for count in denominators(rows, None, None)] == [7.0, 5.0]
    assert [float(count) for count in denominators(rows, 4, None)] == [4.0, 5.0]


@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
def test_the_gradient_of_positions_that_do_not_repeat_is_not_sorted(schedule, monkeypatch):
    said = []
    scatter = torch_ops.scatter_rows_
    monkeypatch.setattr(torch_ops, "scatter_rows_", lambda *args: [said.append(args[4]), scatter(*args)])
    rows = known_rows()
    gradients = []
    for same in (rows, replace(rows)):
        hidden = torch.arange(24.0).view(6, 4).sin().requires_grad_()
        weight = torch.arange(28.0).view(7, 4).cos().requires_grad_(schedule != "single_pass")
        orpo_loss_from_rows(hidden, weight, same, schedule=schedule, backend="torch").loss.backward()
        gradients.append(hidden.grad)
    assert said == [True, False]
    assert torch.equal(*gradients)


def test_what_cannot_be_of_the_rows_is_refused():
    rows = known_rows()
    with pytest.raises(ValueError, match=r"Rows.known.offsets is \(2,\) of torch.int64, but 1 pairs ask for \(3,\)"):
        rows.knowing(offsets=torch.tensor([0, 5]))
    with pytest.raises(ValueError, match=r"Rows.known.counts is \(2,\) of torch.float32"):
        rows.knowing(counts=torch.ones(2))
    with pytest.raises(TypeError, match=r"Rows\.known\.counts is on meta, but the rows are on cpu"):
        rows.knowing(counts=torch.ones(2, dtype=torch.float64, device="meta"))


def test_select_keeps_whole_rows():
    rows = rows_from_labels(torch.tensor([[1, 2, 3], [4, IGNORE, 5]]))
    assert len(rows) == 5
    assert as_set(rows.select(torch.tensor([0, 4]))) <= as_set(rows)
    assert rows.pair_sizes() == [5]
