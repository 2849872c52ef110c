"""Flash attention by variable lengths, whose kernels a GPU alone has: rows that share their prompt."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformers")

from orpo_kernels.transformers import causal_lm_orpo_loss, refuses_shared_prompt
from orpo_kernels.transformers.packing import pack_pairs
from orpo_kernels.transformers.varlen import VARLEN, varlen_attention

from ..models import build, gradients, make_pairs
from ..test_flex_attention import LONG, SHORT
from ..test_varlen import inputs_of, masked, module_of


@pytest.mark.parametrize("window", [None, 3, 100])
@pytest.mark.parametrize("lengths", [SHORT, LONG], ids=["short", "long"])
def test_output_and_gradients_are_those_under_the_mask(lengths, window, device):
    """In bf16, no further from float64 under the mask than twice what masked bf16 is."""
    packed = pack_pairs(make_pairs(*lengths), 0, capacity=0, aligned=True)["packed"].to(device)
    exact = inputs_of(packed, torch.float64)
    coarse = [tensor.detach().bfloat16().requires_grad_() for tensor in exact]
    is_token = (packed.segments >= 0)[..., None, None]
    weight = torch.randn_like(masked(*exact, packed, window)) * is_token

    def results(output: torch.Tensor, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        return [output * is_token, *torch.autograd.grad(output, inputs, weight.to(output.dtype))]

    expected = results(masked(*exact, packed, window), exact)
    plain = results(masked(*coarse, packed, window), coarse)
    options = {"scaling": 0.3, "sliding_window": window, "sequences": packed.sequences}
    ours = results(varlen_attention(module_of(window), *coarse, None, **options)[0], coarse)
    for name, one, other, true in zip(("output", "dq", "dk", "dv"), ours, plain, expected, strict=True):
        assert (one - true).norm() <= 2 * (other - true).norm(), name


def test_a_model_takes_it_in_bf16(device):
    model = build("Llama", head_dim=16).to(device, torch.bfloat16).train()
    model.set_attn_implementation(VARLEN)
    assert refuses_shared_prompt(model) is None
    batch = {name: value.to(device) for name, value in pack_pairs(make_pairs(*LONG), 0).items()}
    ours = causal_lm_orpo_loss(model, **batch)
    found = gradients(model, ours.loss)
    model.set_attn_implementation("sdpa")
    expected = causal_lm_orpo_loss(model, **batch)
    torch.testing.assert_close(ours.loss, expected.loss, rtol=2e-2, atol=2e-2)
    wanted = gradients(model, expected.loss)
    largest = max(gradient.norm() for gradient in wanted.values())
    for name, gradient in wanted.items():
        assert (found[name] - gradient).norm() <= 0.05 * gradient.norm() + 0.01 * largest, name
