"""Rows that hold every prompt once: who sees whom, what the loss takes, and the loss and gradients it makes of it."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from orpo_kernels import Rows
from orpo_kernels.rows import rows_from_labels
from orpo_kernels.transformers import PackedPairs, PreferenceCollator, causal_lm_orpo_loss, packing, sharing
from orpo_kernels.transformers.collator import pad_pairs
from orpo_kernels.transformers.packing import aligned_width, cheapest_bins, first_fit_decreasing, pack_pairs

from .models import assert_same, assert_sharing_is_exact, build, gradients, make_pairs
from .test_collator import byte_level

PADDING_ID = 99


def pair(chosen: list[int], rejected: list[int], prompts: tuple[int, int]) -> dict[str, list[int]]:
    """A tokenised pair; `prompts` are the lengths of both sides' prompts."""
    return {
        "chosen_input_ids": chosen,
        "chosen_labels": [-100] * prompts[0] + chosen[prompts[0] :],
        "rejected_input_ids": rejected,
        "rejected_labels": [-100] * prompts[1] + rejected[prompts[1] :],
    }


@st.composite
def pairs(draw: Any) -> list[dict[str, list[int]]]:
    """Of few ids, so that sides share more or less than their prompt; some labels in the middle are left out."""
    ids = st.integers(3, 5)
    drawn = []
    for _ in range(draw(st.integers(1, 4))):
        prompt = draw(st.lists(ids, min_size=1, max_size=4))
        answers = [draw(st.lists(ids, min_size=1, max_size=5)) for _ in range(2)]
        cut = draw(st.integers(0, len(prompt) - 1))  # truncation may shorten one side's prompt
        sides = [prompt + answers[0], prompt[cut:] + answers[1]]
        made = pair(*sides, (len(prompt), len(prompt) - cut))
        for side in ("chosen", "rejected"):
            labels = made[f"{side}_labels"]
            hidden = draw(st.integers(0, len(labels) - 2))
            made[f"{side}_labels"] = [-100 if i == hidden else label for i, label in enumerate(labels)]
        drawn.append(made)
    return drawn


def seen(batch: dict[str, Any], position: int) -> list[int]:
    """The ids that the token at a flat position sees, itself included, by their position ids."""
    packed, width = batch["packed"], batch["input_ids"].shape[1]
    row, place = divmod(position, width)
    visible = packed.attention_mask()[row, 0, place]
    order = packed.position_ids[row][visible]
    assert order.sort().values.tolist() == list(range(len(order)))
    return batch["input_ids"][row][visible][order.argsort()].tolist()


def as_set(rows: Rows) -> list[tuple]:
    return sorted(columns(rows, "sequence", "target", "scored", "nll_weight"))


def columns(rows: Rows, *names: str) -> list[tuple]:
    return list(zip(*(getattr(rows, name).tolist() for name in names), strict=True))


# --- the layout ----------------------------------------------------------------------------------------------------


def test_one_pair_and_two_in_a_row():
    long = pair([1, 2, 3, 4, 5], [1, 2, 6, 7], (2, 2))
    short = pair([8, 9], [8, 3], (1, 1))
    batch = pack_pairs([short, long, short], PADDING_ID, capacity=0)
    packed = batch["packed"]
    assert batch["input_ids"].tolist() == [[1, 2, 3, 4, 5, 6, 7], [8, 9, 3, 8, 9, 3, PADDING_ID]]
    assert packed.segments.tolist() == [[3, 3, 4, 4, 4, 5, 5], [0, 1, 2, 6, 7, 8, -1]]
    assert packed.position_ids.tolist() == [[0, 1, 2, 3, 4, 2, 3], [0, 1, 1, 0, 1, 1, 0]]
    assert as_set(packed.answers) == [
        *[(0, 9, True, 1.0), (1, 3, True, 1.0), (1, 4, True, 1.0), (1, 5, True, 1.0), (2, 9, True, 1.0)],
        *[(3, 3, True, 0.0), (4, 6, True, 0.0), (4, 7, True, 0.0), (5, 3, True, 0.0)],
    ]
    assert as_set(packed.prompts) == [(1, 2, False, 1.0)]
    # The last hidden state of the prompt predicts both first tokens.
    places = columns(packed.answers, "sequence", "target", "position")
    assert (1, 3, 1) in places
    assert (4, 6, 1) in places


@given(pairs())
def test_every_row_is_predicted_from_its_own_sequence_alone(drawn):
    batch = pack_pairs(drawn, PADDING_ID)
    sequences = [made[f"{side}_input_ids"] for side in ("chosen", "rejected") for made in drawn]
    for rows in (batch["packed"].answers, batch["packed"].prompts):
        for sequence, target, position in columns(rows, "sequence", "target", "position"):
            before = seen(batch, position)
            assert [*before, target] == sequences[sequence][: len(before) + 1]


@given(pairs(), st.booleans(), st.sampled_from(["token", "sequence"]))
def test_the_rows_are_those_of_the_padded_batch(drawn, prompt_nll, reduction):
    padded = pad_pairs(drawn, PADDING_ID)
    is_token = padded["attention_mask"] == 1
    source = torch.where(is_token, padded["input_ids"], -100) if prompt_nll else padded["labels"]
    expected = rows_from_labels(padded["labels"], source[: len(drawn)], shift=True, nll_reduction=reduction)
    found = pack_pairs(drawn, PADDING_ID)["packed"].rows(prompt_nll, reduction)
    assert as_set(found) == as_set(expected)
    assert not found.padded


@given(pairs(), st.integers(1, 4))
def test_a_window_counts_places_in_the_sequence(drawn, window):
    packed = pack_pairs(drawn, PADDING_ID)["packed"]
    distance = packed.position_ids[:, :, None] - packed.position_ids[:, None, :]
    expected = packed.attention_mask()[:, 0] & (distance < window)
    assert torch.equal(packed.attention_mask(window)[:, 0], expected)
    assert packed.attention_mask(window).diagonal(dim1=-2, dim2=-1).all()  # padding sees itself: no row is empty


@given(st.lists(st.integers(1, 10), min_size=1, max_size=20))
def test_bins(sizes):
    bins = first_fit_decreasing(sizes, max(sizes))
    assert sorted(index for members in bins for index in members) == list(range(len(sizes)))
    totals = [sum(sizes[index] for index in members) for members in bins]
    assert max(totals) == max(sizes)
    assert sum(total <= max(sizes) / 2 for total in totals) <= 1  # else two of them would have been one


@pytest.mark.parametrize(
    ("sizes", "bins"),
    [
        ([1140, 440], [[0, 1]]),  # little more attention, and no padding
        ([1037, 1000], [[0], [1]]),  # nothing to be saved
        ([50, 60, 40, 30], [[0, 2], [1, 3]]),  # no padding, and as narrow as that goes
        ([2000, 1500, 600], [[0], [1, 2]]),  # wider than the longest
    ],
)
def test_rows_as_wide_as_is_cheapest(sizes, bins):
    assert sorted(sorted(members) for members in cheapest_bins(sizes)) == sorted(sorted(members) for members in bins)


@given(st.lists(st.integers(1, 3000), min_size=1, max_size=20))
def test_the_cheapest_bins_hold_every_pair_once(sizes):
    assert sorted(index for members in cheapest_bins(sizes) for index in members) == list(range(len(sizes)))


def test_fewer_tokens_than_padded():
    generator = random.Random(0)
    lengths = [(generator.randint(5, 40), generator.randint(5, 60), generator.randint(5, 60)) for _ in range(16)]
    drawn = make_pairs(*lengths)
    packed, padded = pack_pairs(drawn, 0)["input_ids"], pad_pairs(drawn, 0)["input_ids"]
    assert sum(map(sum, lengths)) <= packed.numel() < 0.7 * padded.numel()


def test_labels_that_are_not_the_ids_are_refused():
    wrong = pair([1, 2, 3], [1, 4], (1, 1))
    wrong["rejected_labels"] = [-100, 5]
    with pytest.raises(ValueError, match=r"Pair 1 .* rejected_labels holds 5 at 1, where its .*_ids holds 4"):
        pack_pairs([pair([1, 2], [1, 3], (1, 1)), wrong], 0)


def test_nothing_is_read_on_the_host():
    packed = pack_pairs(make_pairs(), 0, capacity=0)["packed"].to("meta")
    assert packed.rows(True, "sequence").nll_weight.is_meta
    assert packed.attention_mask(3).shape == (2, 1, 15, 15)


# --- through models ------------------------------------------------------------------------------------------------


def test_options_of_the_loss():
    model = build("Llama").train()
    for options in (
        {"prompt_nll": False},
        {"nll_reduction": "sequence"},
        {"prompt_nll": False, "nll_reduction": "sequence", "beta": 1.0, "alpha": 0.5},
        {"nll_denominator": 40, "pair_denominator": 7},
        {"schedule": "resident"},
    ):
        assert_sharing_is_exact(model, make_pairs(), **options)
    model.lm_head.requires_grad_(False)
    assert_sharing_is_exact(model, make_pairs())


def test_prompts_that_differ_and_answers_that_begin_alike():
    model = build("Llama").train()
    straddled = pair([3, 4, 5, 6, 7], [3, 4, 8, 9], (3, 2))  # a token of the rejected prompt went to its answer
    cut = pair([4, 5, 6], [3, 4, 5, 7], (2, 3))
    alike = pair([3, 4, 5, 6, 7], [3, 4, 5, 9], (1, 1))
    prefix = pair([3, 4, 5], [3, 4, 5, 6, 7], (2, 2))
    for drawn in ([straddled], [cut], [alike], [prefix], [straddled, cut, alike, prefix]):
        assert_sharing_is_exact(model, drawn)


@pytest.mark.parametrize("name", ["Llama", "Gemma2: soft-cap, tied", "Mistral: window", "gpt-oss: window"])
def test_eager_attention(name):
    model = build(name).train()
    model.set_attn_implementation("eager")
    assert_sharing_is_exact(model, make_pairs())


def test_gradient_checkpointing_and_a_compiled_body():
    model = build("Gemma2: soft-cap, tied").train()
    batch = pack_pairs(make_pairs(), 0, capacity=0)
    expected = causal_lm_orpo_loss(model, **batch).loss
    grads = gradients(model, expected)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in gradients(model, causal_lm_orpo_loss(model, **batch).loss).items():
        torch.testing.assert_close(grad, grads[name], rtol=1e-3, atol=1e-5)
    model.gradient_checkpointing_disable()
    graphs = []
    model.base_model.compile(backend=lambda graph, inputs: graphs.append(1) or graph)
    torch.testing.assert_close(causal_lm_orpo_loss(model, **batch).loss, expected)
    assert graphs


def test_low_precision():
    batch, drawn = pack_pairs(make_pairs(), 0, capacity=0), make_pairs()
    model = build("Llama")
    expected = causal_lm_orpo_loss(model, **pad_pairs(drawn, 0)).loss
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(causal_lm_orpo_loss(model, **batch).loss, expected, rtol=2e-2, atol=0)
    model = model.to(torch.bfloat16)
    torch.testing.assert_close(causal_lm_orpo_loss(model, **batch).loss, expected, rtol=2e-2, atol=0)


def test_the_collator_packs_and_accelerate_moves_its_batches():
    accelerate = pytest.importorskip("accelerate")
    tokenizer = byte_level()
    examples = [
        {"prompt": "The cat sat on the", "chosen": " mat. The dog sat, too.", "rejected": " foobar foo bar"},
        {"prompt": "déjà", "chosen": " vu", "rejected": " naïve"},
        {"prompt": "def", "chosen": " f(x)", "rejected": "bar"},
    ]
    model = build("Llama", vocab_size=len(tokenizer))
    loader = torch.utils.data.DataLoader(
        examples, batch_size=3, collate_fn=PreferenceCollator(tokenizer, packing="shared")
    )
    (batch,) = accelerate.Accelerator(cpu=True).prepare(loader)
    assert isinstance(batch["packed"], PackedPairs)
    padded = PreferenceCollator(tokenizer)(examples)
    assert batch["input_ids"].shape[0] < len(examples)
    assert_same(causal_lm_orpo_loss(model, **batch), causal_lm_orpo_loss(model, **padded), model)
    with pytest.raises(
        ValueError, match=r"packing must be one of \('auto', 'measure', 'padded', 'shared'\); got 'bfd'"
    ):
        PreferenceCollator(tokenizer, packing="bfd")


# --- refusals ------------------------------------------------------------------------------------------------------


def test_a_model_that_cannot_share_is_refused_by_name():
    with pytest.raises(ValueError, match=r"BloomForCausalLM cannot share prompts: its ALiBi .*packing=\"padded\""):
        causal_lm_orpo_loss(build("BLOOM: ALiBi"), **pack_pairs(make_pairs(), 0, capacity=0))


def test_inputs_that_do_not_fit_are_refused():
    model, batch = build("Llama"), pack_pairs(make_pairs(), 0, capacity=0)
    padded = pad_pairs(make_pairs(), 0)
    with pytest.raises(TypeError, match="labels and packed cannot both be given"):
        causal_lm_orpo_loss(model, **batch, labels=padded["labels"])
    with pytest.raises(TypeError, match="attention_mask and packed cannot both be given"):
        causal_lm_orpo_loss(model, **batch, attention_mask=padded["attention_mask"])
    with pytest.raises(ValueError, match=r"\(R, T\), but are \(1, 15\) and \(2, 15\)"):
        causal_lm_orpo_loss(model, batch["input_ids"][:1], packed=batch["packed"])
    with pytest.raises(TypeError, match="packed must be PackedPairs, but is a dict"):
        causal_lm_orpo_loss(model, batch["input_ids"], packed={})
    with pytest.raises(TypeError, match="labels are missing"):
        causal_lm_orpo_loss(model, batch["input_ids"])
    with pytest.raises(ValueError, match="nll_reduction is 'mean'"):
        causal_lm_orpo_loss(model, **batch, nll_reduction="mean")


# --- shapes that come again ----------------------------------------------------------------------------------------


@given(width=st.integers(1, 5000), steps=st.sampled_from([2, 8]), coarsest=st.sampled_from([None, 256]))
def test_few_widths_from_a_power_of_two_to_the_next(width, steps, coarsest):
    aligned = aligned_width(width, steps, coarsest)
    assert width <= aligned < width + max(8, min(width / steps, coarsest or width))
    assert aligned_width(aligned, steps, coarsest) == aligned
    power = 2 ** (width - 1).bit_length()
    few = max(steps, power // 2 // coarsest) if coarsest else steps
    assert len({aligned_width(w, steps, coarsest) for w in range(power // 2 + 1, power + 1)}) <= few


@given(st.data())
def test_an_aligned_batch_has_the_same_tokens(data):
    """Of the same pairs in few shapes: at most a third more places, and every row as it was."""
    generator = random.Random(data.draw(st.integers(0, 2**31)))
    batches = [
        [
            pair(*(generator.choices(range(1, 90), k=generator.randint(12, 90)) for _ in range(2)), (4, 4))
            for _ in range(4)
        ]
        for _ in range(20)
    ]
    shapes: dict[bool, list[torch.Size]] = {False: [], True: []}
    for pairs in batches:
        for aligned, found in shapes.items():
            batch = pack_pairs(pairs, PADDING_ID, aligned=aligned)
            found.append(batch["input_ids"].shape)
            assert (batch["packed"].segments >= 0).sum() == sum(len(packing._Piece.of(0, p)) for p in pairs)
    assert len(set(shapes[True])) < len(set(shapes[False]))
    assert sum(s.numel() for s in shapes[True]) <= 1.33 * sum(s.numel() for s in shapes[False])
    padded = pad_pairs(batches[0], PADDING_ID, aligned=True)
    assert {t.shape[1] for t in padded.values()} == {
        aligned_width(pad_pairs(batches[0], PADDING_ID)["labels"].shape[1])
    }


@pytest.mark.parametrize(
    ("device", "attention", "expected"),
    [
        ("cpu", "sdpa", "shared"),
        ("cuda", "sdpa", "padded"),
        ("cuda", "flex_attention", "shared"),
        ("cuda", "orpo_varlen", "shared"),
    ],
)
def test_prompts_are_shared_where_that_is_fast(device, attention, expected, monkeypatch):
    model = build("Llama")
    monkeypatch.setattr(sharing, "refuses_shared_prompt", lambda model, images: None)
    monkeypatch.setattr(model.config, "_attn_implementation", attention)
    chosen, why = sharing.automatic_packing(model, torch.device(device))
    assert chosen == expected
    assert ('attn_implementation="flex_attention" or "orpo_varlen"' in why) == (expected == "padded")


def test_a_model_that_cannot_share_pads_everywhere():
    chosen, why = sharing.automatic_packing(build("BLOOM: ALiBi"), torch.device("cpu"))
    assert chosen == "padded"
    assert "ALiBi" in why
