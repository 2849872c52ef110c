"""FlexAttention, compiled and with its backward, which it has on a GPU alone: rows that share their prompt."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from orpo_kernels.transformers import causal_lm_orpo_loss, refuses_shared_prompt
from orpo_kernels.transformers.collator import pad_pairs
from orpo_kernels.transformers.packing import pack_pairs

from ..models import assert_same, build, make_pairs
from ..test_flex_attention import LONG, SHORT


@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
@pytest.mark.parametrize("name", ["Llama", "Mistral: window", "Gemma2: soft-cap, tied", "gpt-oss: window"])
def test_loss_and_gradients_are_those_of_padded_rows_under_eager_attention(name, lengths, device):
    model = build(name, head_dim=16).to(device).train()  # the kernels' smallest head
    pairs = make_pairs(*lengths)
    padded, shared = (
        {key: value.to(device) for key, value in make(pairs, 0).items()} for make in (pad_pairs, pack_pairs)
    )
    model.set_attn_implementation("flex_attention")
    assert refuses_shared_prompt(model) is None
    ours = causal_lm_orpo_loss(model, **shared)
    model.set_attn_implementation("eager")
    assert_same(ours, causal_lm_orpo_loss(model, **padded), model, tolerance=1e-3)  # of other kernels, in fp32
