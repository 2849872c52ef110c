"""Shared prompts by attention of variable lengths: an eager stand-in for flash attention, which wants a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

pytest.importorskip("transformers")

from orpo_kernels.transformers import PackedPairs, causal_lm_orpo_loss, refuses_shared_prompt, varlen
from orpo_kernels.transformers.collator import pad_pairs
from orpo_kernels.transformers.packing import Sequences, pack_pairs
from orpo_kernels.transformers.varlen import VARLEN, varlen_attention

from .models import assert_same, build, make_pairs
from .test_packing import PADDING_ID
from .test_packing import pairs as ragged_pairs

HEADS, KEY_HEADS, SIZE = 4, 2, 8


def eager(query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: Any, window: Any) -> Tensor:
    """Sequence after sequence, the last query aligned with the last key."""
    bounds = [ends.tolist() for ends in (sequences.cu_seqlens_q, sequences.cu_seqlens_k)]
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    outputs = []
    for index in range(len(bounds[0]) - 1):
        (q0, q1), (k0, k1) = ((ends[index], ends[index + 1]) for ends in bounds)
        place = torch.arange(k1 - k0)
        queries = place[len(place) - (q1 - q0) :, None]
        seen = (place <= queries) & (place > queries - (window or k1 - k0))
        q, k, v = (t.transpose(0, 1) for t in (query[q0:q1], key[k0:k1], value[k0:k1]))
        outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v, seen, scale=scale).transpose(0, 1))
    assert [ends[-1] for ends in bounds] == [len(query), len(key)]
    return torch.cat(outputs)


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "flash_attention", eager)


def inputs_of(packed: PackedPairs, dtype: torch.dtype) -> list[Tensor]:
    """Queries, keys and values of the rows, (R, heads, T, D), with fewer heads of keys."""
    rows, width = packed.segments.shape
    shapes = [(rows, heads, width, SIZE) for heads in (HEADS, KEY_HEADS, KEY_HEADS)]
    return [torch.randn(shape, dtype=dtype, device=packed.segments.device, requires_grad=True) for shape in shapes]


def module_of(window: int | None) -> Any:
    """What of a layer its attention looks at."""
    return SimpleNamespace(config=SimpleNamespace(sliding_window=window))


def masked(query: Tensor, key: Tensor, value: Tensor, packed: PackedPairs, window: int | None) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, packed.attention_mask(window), scale=0.3, enable_gqa=True
    ).transpose(1, 2)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None)
@given(pairs=ragged_pairs(), window=st.sampled_from([None, 1, 3]), aligned=st.booleans(), capacity=st.integers(0, 40))
def test_output_and_gradients_are_those_under_the_mask(pairs, window, aligned, capacity):
    packed: PackedPairs = pack_pairs(pairs, PADDING_ID, capacity, aligned)["packed"]
    inputs = inputs_of(packed, torch.float64)
    ours, _ = varlen_attention(
        module_of(window), *inputs, None, scaling=0.3, sliding_window=window, sequences=packed.sequences
    )
    expected = masked(*inputs, packed, window)
    assert ours.shape == expected.shape
    is_token = (packed.segments >= 0)[..., None, None]
    gradient = torch.randn_like(ours) * is_token
    torch.testing.assert_close(ours * is_token, expected * is_token)
    for one, other in zip(
        torch.autograd.grad(ours, inputs, gradient), torch.autograd.grad(expected, inputs, gradient), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_the_sequences_of_two_pairs_and_padding():
    """Pair: a prompt of 2, answers of 3 and 1; then one of 1, 1 and 2, and six places of padding."""
    found = pack_pairs(make_pairs((2, 3, 1), (1, 1, 2)), 0, aligned=True)["packed"].sequences
    assert found.cu_seqlens_q.tolist() == [0, 5, 6, 8, 10, 16]
    assert found.cu_seqlens_k.tolist() == [0, 5, 8, 10, 13, 19]
    assert found.key_index.tolist() == [0, 1, 2, 3, 4, 0, 1, 5, 6, 7, 6, 8, 9, *range(10, 16)]
    assert (found.max_seqlen_q, found.max_seqlen_k) == (6, 6)
    assert found.cu_seqlens_q.dtype == found.cu_seqlens_k.dtype == torch.int32  # what the kernels take


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Mistral: window", "Qwen2: window", "Qwen3"])
def test_loss_and_gradients_of_a_model_are_those_of_sdpa(name, checkpointing):
    model = build(name).train()
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    pairs = make_pairs((4, 6, 5), (3, 3, 2), (2, 2, 2))
    if checkpointing:
        model.gradient_checkpointing_enable()
    padded, shared = pad_pairs(pairs, 0), pack_pairs(pairs, 0)
    for batch in (shared, padded):  # the latter by sdpa in any case
        model.set_attn_implementation("sdpa")
        expected = causal_lm_orpo_loss(model, **padded)
        model.set_attn_implementation(VARLEN)
        assert refuses_shared_prompt(model) is None
        assert_same(causal_lm_orpo_loss(model, **batch), expected, model)


def test_each_query_is_run_once(monkeypatch):
    calls = []
    monkeypatch.setattr(varlen, "flash_attention", lambda *given: calls.append(given) or eager(*given))
    model = build("Llama").eval()
    model.set_attn_implementation(VARLEN)
    refuses_shared_prompt(model)
    calls.clear()
    batch = pack_pairs(make_pairs((4, 6, 5), (3, 3, 2)), 0)
    causal_lm_orpo_loss(model, **batch)
    assert len(calls) == model.config.num_hidden_layers
    assert {len(query) for query, *_ in calls} == {batch["input_ids"].numel()}
    assert {key.shape[1] for _, key, *_ in calls} == {model.config.num_key_value_heads}


# --- what it does not serve ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("Gemma2: soft-cap, tied", "orpo_varlen serves no soft-cap"),
        ("gpt-oss: window", "orpo_varlen serves no attention sinks"),
    ],
)
def test_what_it_does_not_serve_is_refused_by_name(name, reason):
    model = build(name)
    model.set_attn_implementation(VARLEN)
    assert reason in str(refuses_shared_prompt(model))


def test_dropout_of_attention_is_refused():
    model = build("Llama", attention_dropout=0.1).train()
    model.set_attn_implementation(VARLEN)
    assert "orpo_varlen serves no dropout of attention" in str(refuses_shared_prompt(model))


def test_a_model_that_keeps_the_sequences_to_itself_is_found(monkeypatch):
    """It would go through sdpa with the mask that shows nothing."""
    model = build("Llama")
    model.set_attn_implementation(VARLEN)
    forward = type(model.model.layers[0].self_attn).forward

    def forgetful(self: Any, *arguments: Any, sequences: Any = None, **options: Any) -> Any:
        return forward(self, *arguments, **options)

    monkeypatch.setattr(type(model.model.layers[0].self_attn), "forward", forgetful)
    assert "sequence differ by" in str(refuses_shared_prompt(model))


def test_without_a_gpu_it_says_what_it_needs(monkeypatch):
    monkeypatch.undo()
    model = build("Llama")
    model.set_attn_implementation(VARLEN)
    reason = str(refuses_shared_prompt(model))
    assert "on a GPU in bf16 or fp16, but here is torch.float32 on a cpu" in reason


def test_autocast_is_part_of_what_is_tried(monkeypatch):
    """A model in float32 shares under autocast, as it does in its steps, and not without."""

    def halves_alone(query: Tensor, *rest: Any) -> Tensor:
        assert query.dtype == torch.bfloat16, "flash attention takes bf16"
        return eager(query, *rest)

    monkeypatch.setattr(varlen, "flash_attention", halves_alone)
    model = build("Qwen3")
    model.set_attn_implementation(VARLEN)
    assert "flash attention takes bf16" in str(refuses_shared_prompt(model))
    with torch.autocast("cpu", torch.bfloat16):
        assert refuses_shared_prompt(model) is None
