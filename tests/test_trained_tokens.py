"""`trainable_token_indices` of `peft` on a head that is tied to the embeddings: as the model's own logits have it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft

from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss, resolve_lm_head

from .models import assert_same, assert_sharing_is_exact, build, gradients, make_pairs
from .test_causal_lm import by_logits, make_batch
from .training import chat_examples, losses, tiny, tokenizer, trained

TOKENS = [3, 5, 11, 90]
each_target = pytest.mark.parametrize(
    "target_modules", [["q_proj"], ["q_proj", "lm_head"]], ids=["body", "LoRA on the head"]
)


def with_tokens(model: nn.Module, **options: Any) -> nn.Module:
    """Tokens that have been trained a little: rows that are not the weight's."""
    options = {"target_modules": ["q_proj"], "trainable_token_indices": TOKENS, "init_lora_weights": False, **options}
    model = peft.get_peft_model(model, peft.LoraConfig(r=4, **options))
    torch.manual_seed(7)
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data += torch.randn_like(parameter)
    return model


@each_target
@pytest.mark.parametrize("name", ["Llama, tied", "Gemma2: soft-cap, tied"])
def test_loss_and_gradients_are_those_of_the_models_logits(name, target_modules):
    model, batch = with_tokens(build(name), target_modules=target_modules), make_batch()
    (trained,) = resolve_lm_head(model).tokens
    assert trained.indices == tuple(TOKENS)
    out = causal_lm_orpo_loss(model, **batch)
    assert_same(out, by_logits(model, batch), model)
    found = gradients(model, causal_lm_orpo_loss(model, **batch).loss)
    (tokens,) = (grad for name, grad in found.items() if "trainable_tokens_delta" in name)
    assert tokens.shape == (len(TOKENS), 32)
    assert (tokens.norm(dim=1) > 0).all()


def test_a_head_of_its_own_is_left_as_it_is():
    model, batch = with_tokens(build("Llama")), make_batch()
    assert not resolve_lm_head(model).tokens
    assert_same(causal_lm_orpo_loss(model, **batch), by_logits(model, batch), model)


@each_target
def test_disabled_and_merged(target_modules):
    model, batch = with_tokens(build("Llama, tied"), target_modules=target_modules), make_batch()
    trained = causal_lm_orpo_loss(model, **batch).loss.detach()
    with model.disable_adapter():
        assert not resolve_lm_head(model).adapters
        base = causal_lm_orpo_loss(model, **batch).loss.detach()
        torch.testing.assert_close(base, causal_lm_orpo_loss(build("Llama, tied"), **batch).loss.detach())
    assert abs(float(base - trained)) > 1e-2
    torch.testing.assert_close(causal_lm_orpo_loss(model, **batch).loss.detach(), trained)
    model.merge_adapter()
    assert not resolve_lm_head(model).adapters
    merged = causal_lm_orpo_loss(model, **batch).loss  # with LoRA on the head, merged into the embeddings as well
    torch.testing.assert_close(merged.double(), by_logits(model, batch).loss, rtol=1e-5, atol=0)
    if target_modules == ["q_proj"]:
        torch.testing.assert_close(merged.detach(), trained, rtol=1e-4, atol=0)


@each_target
def test_with_shared_prompts(target_modules):
    assert_sharing_is_exact(with_tokens(build("Llama, tied"), target_modules=target_modules).train(), make_pairs())


@each_target
def test_mean_logits(target_modules):
    head = resolve_lm_head(with_tokens(build("Llama, tied"), target_modules=target_modules))
    hidden = torch.randn(5, 32)
    torch.testing.assert_close(head.mean_logits(hidden), head.logits(hidden).mean(-1), rtol=1e-4, atol=1e-5)


def test_low_precision():
    model, batch = with_tokens(build("Llama, tied").to(torch.bfloat16)), make_batch()
    expected = by_logits(model, batch).loss
    torch.testing.assert_close(causal_lm_orpo_loss(model, **batch).loss.double(), expected, rtol=2e-2, atol=0)
    model = with_tokens(build("Llama, tied"))
    expected = causal_lm_orpo_loss(model, **batch).loss
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(causal_lm_orpo_loss(model, **batch).loss, expected, rtol=2e-2, atol=0)


def test_they_are_trained_and_saved(tmp_path):
    model = with_tokens(tiny(tie_word_embeddings=True))
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    trainer = trained(tmp_path, model=model, train_dataset=chat_examples(4), learning_rate=1e-2, max_steps=8)
    assert losses(trainer)[-1] < losses(trainer)[0]
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert any("trainable_tokens_delta" in name for name in changed)
    assert all("lora_" in name or "trainable_tokens_delta" in name for name in changed)
    trainer.save_model(str(tmp_path / "adapter"))
    loaded = peft.PeftModel.from_pretrained(tiny(tie_word_embeddings=True), tmp_path / "adapter")
    batch = PreferenceCollator(tokenizer(), packing="padded")(chat_examples(3))
    with torch.no_grad():
        torch.testing.assert_close(
            causal_lm_orpo_loss(loaded, **batch).loss, causal_lm_orpo_loss(model.eval(), **batch).loss
        )
