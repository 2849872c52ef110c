"""FlexAttention in models whose rows share their prompt. On a CPU it has no backward: `tests/gpu` has the gradients."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.attention.flex_attention import create_block_mask, create_mask, flex_attention

pytest.importorskip("transformers")

from orpo_kernels import ORPOOutput
from orpo_kernels.transformers import PackedPairs, causal_lm_orpo_loss, refuses_shared_prompt
from orpo_kernels.transformers.body import block_mask
from orpo_kernels.transformers.collator import pad_pairs
from orpo_kernels.transformers.packing import pack_pairs

from .models import build, make_pairs

pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")

SHORT = ((4, 6, 5), (3, 3, 2), (2, 2, 2))
LONG = ((140, 150, 130), (100, 30, 40), (60, 90, 100))  # rows of several blocks, which are of 128 tokens


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """transformers compiles FlexAttention and its own masks, which takes a compiler and is the same arithmetic."""
    with torch.compiler.set_stance("force_eager"):
        yield


def with_flex(name: str) -> nn.Module:
    model = build(name).eval()
    model.set_attn_implementation("flex_attention")
    return model


@torch.no_grad()
def results(model: nn.Module, batch: dict[str, Any]) -> ORPOOutput:
    return causal_lm_orpo_loss(model, **batch)


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize(
    "name",
    ["Llama", "Mistral: window", "Gemma2: soft-cap, tied", "Qwen2: window", "GPT-NeoX", "Cohere2: factor, window"],
)
def test_shared_rows_are_the_padded_ones_and_those_of_sdpa(name, lengths):
    model, pairs = with_flex(name), make_pairs(*lengths)
    assert refuses_shared_prompt(model) is None
    shared = results(model, pack_pairs(pairs, 0, capacity=0))
    for expected in (results(model, pad_pairs(pairs, 0)), results(build(name).eval(), pad_pairs(pairs, 0))):
        for field in ("loss", "nll_loss", "chosen_logps", "rejected_logps"):
            torch.testing.assert_close(
                getattr(shared, field), getattr(expected, field), rtol=2e-5, atol=2e-5, msg=field
            )


@pytest.mark.parametrize("name", ["Mistral: window", "Gemma2: soft-cap, tied"])
def test_a_window_left_out_would_be_found(name, monkeypatch):
    visible = PackedPairs.visible
    monkeypatch.setattr(
        PackedPairs, "visible", lambda packed, row, query, key, window: visible(packed, row, query, key)
    )
    assert "sequence differ by" in str(refuses_shared_prompt(with_flex(name)))


def test_what_it_cannot_do_on_a_cpu_is_the_reason():
    assert "Attention sinks cannot be run on CPU" in str(refuses_shared_prompt(with_flex("gpt-oss: window")))


# --- the mask ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
def test_it_is_the_mask_of_the_others(lengths, window):
    packed = pack_pairs(make_pairs(*lengths), 0, capacity=0)["packed"]
    mask = block_mask(build("Llama"), packed, window)
    rows, width = packed.segments.shape
    assert torch.equal(create_mask(mask.mask_mod, rows, 1, width, width, "cpu"), packed.attention_mask(window))
    assert mask.shape == (rows, 1, width, width)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_its_blocks_are_those_of_the_whole_mask(data):
    """Ragged pairs, several in a row, padding behind them; windows of any width."""
    lengths = data.draw(st.lists(st.tuples(*[st.integers(1, 300)] * 3), min_size=1, max_size=4))
    window = data.draw(st.sampled_from([None, 1, 3, 130, 1000]))
    is_aligned = data.draw(st.booleans())
    capacity = data.draw(st.sampled_from([0, 900]))
    packed = pack_pairs(make_pairs(*lengths), 0, capacity, is_aligned)["packed"]
    rows, width = packed.segments.shape
    ours = block_mask(build("Llama"), packed, window)
    whole = create_block_mask(ours.mask_mod, rows, None, width, width, "cpu")
    for name in ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices", "q_num_blocks", "q_indices"):
        assert torch.equal(getattr(ours, name), getattr(whole, name)), name
    assert ours.seq_lengths == whole.seq_lengths


def test_blocks_in_which_nothing_is_seen_are_skipped():
    """Prompt, chosen and rejected answer of a block each; then two pairs of two blocks each."""

    def blocks(*lengths: tuple[int, int, int]) -> list:
        return (
            block_mask(build("Llama"), pack_pairs(make_pairs(*lengths), 0, capacity=0)["packed"], None)
            .to_dense()[:, 0]
            .tolist()
        )

    assert blocks((128, 128, 128)) == [[[1, 0, 0], [1, 1, 0], [1, 0, 1]]]
    two_pairs = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    assert blocks((256, 128, 128), (128, 64, 64), (128, 64, 64))[1] == two_pairs


def test_kinds_of_layers_share_one_compiled_attention(monkeypatch):
    """Past eight graphs torch gives up, and attention runs unfused."""
    graphs: list[torch.fx.GraphModule] = []
    compiled = torch.compile(flex_attention, backend=lambda graph, _: graphs.append(graph) or graph.forward)
    monkeypatch.setattr("transformers.integrations.flex_attention.WrappedFlexAttention.__call__", lambda _: compiled)
    model = with_flex("Gemma2: soft-cap, tied")
    refuses_shared_prompt(model)
    torch.compiler.reset()
    with torch.compiler.set_stance("default"):
        results(model, pack_pairs(make_pairs(), 0, capacity=0))
    assert len(graphs) == 1
