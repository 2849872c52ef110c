"""Shared prompts under forwards that others have replaced: what is tried is what will run."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")

from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from orpo_kernels.transformers import refuses_shared_prompt
from orpo_kernels.transformers.probe import training_without_noise, undisturbed

from .models import build

Forward = Callable[..., Any]


def without_mask(forward: Forward, drops: Callable[[nn.Module], bool]) -> Forward:
    """A forward that forgets its attention mask where `drops(module)`, as Unsloth's does in training."""

    @functools.wraps(forward)
    def patched(module: nn.Module, *args: Any, attention_mask: Any = None, **options: Any) -> Any:
        return forward(module, *args, attention_mask=None if drops(module) else attention_mask, **options)

    return patched


def in_training(module: nn.Module) -> bool:
    return module.training


def with_gradient(module: nn.Module) -> bool:
    return torch.is_grad_enabled()


def patch(model: nn.Module, where: str, drops: Callable[[nn.Module], bool], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace forwards of the body, its layers or their attention, in the class or on the instance."""
    place, owner = where.split()
    cls = {"body": LlamaModel, "layer": LlamaDecoderLayer, "attention": LlamaAttention}[place]
    if owner == "class":
        monkeypatch.setattr(cls, "forward", without_mask(cls.forward, drops))
        return
    for module in model.modules():
        if isinstance(module, cls):
            module.forward = without_mask(cls.forward, drops).__get__(module)


PLACES = [f"{place} {owner}" for place in ("body", "layer", "attention") for owner in ("class", "instance")]


@pytest.mark.parametrize("where", PLACES)
@pytest.mark.parametrize("drops", [in_training, with_gradient])
@pytest.mark.parametrize(
    ("mode", "tried_before"), [(True, False), (False, True)], ids=["train", "eval, patched after a trial"]
)
def test_a_forward_that_drops_masks_in_training_is_found(where, drops, mode, tried_before, monkeypatch):
    model = build("Llama").train(mode)
    if tried_before:
        assert refuses_shared_prompt(model) is None
    patch(model, where, drops, monkeypatch)
    assert "in training mode, the hidden states of a rejected sequence differ" in str(refuses_shared_prompt(model))
    assert all(module.training is mode for module in model.modules())


@pytest.mark.parametrize("where", PLACES)
def test_a_forward_that_drops_masks_in_both_modes_is_found_after_a_trial(where, monkeypatch):
    model = build("Llama")
    assert refuses_shared_prompt(model) is None
    patch(model, where, lambda module: True, monkeypatch)
    assert "cannot share prompts: the hidden states of a rejected" in str(refuses_shared_prompt(model))


def test_a_forward_that_is_put_back_is_tried_again(monkeypatch):
    model = build("Llama")
    with monkeypatch.context() as patched:
        patch(model, "body class", in_training, patched)
        assert refuses_shared_prompt(model)
    assert refuses_shared_prompt(model) is None


def test_checkpointing_that_drops_masks_is_found():
    """Switched on after a first trial, as the Trainer does when it begins to train."""
    model = build("Llama").train()
    assert refuses_shared_prompt(model) is None
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert refuses_shared_prompt(model) is None

    def lossy(function: Any, *args: Any) -> Any:
        function.keywords["attention_mask"] = None
        return function(*args)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = lossy
    assert "in training mode" in str(refuses_shared_prompt(model))


def test_an_attention_of_the_callers_own(monkeypatch):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    model, sdpa = build("Llama"), ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert refuses_shared_prompt(model) is None

    def causal(module: nn.Module, query: Any, key: Any, value: Any, attention_mask: Any, **options: Any) -> Any:
        return sdpa(module, query, key, value, None if module.training else attention_mask, **options)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "sdpa", causal)
    assert "in training mode" in str(refuses_shared_prompt(model))


class Noisy(nn.Module):
    """All that is random in training, in front of what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.weight, self.dropout = module, module.weight, nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(32, affine=False)

    def forward(self, *args: Any) -> torch.Tensor:
        x = self.dropout(self.module(*args))
        if self.training:
            x = torch.dropout(x, 0.5, True) + torch.zeros_like(x).uniform_(-1, 1) + torch.randn_like(x)
            x = nn.functional.dropout(x, p=0.3) + torch.empty_like(x).normal_(mean=0, std=2)
            x = x * torch.empty_like(x).uniform_(1 - 0.3, 1 + 0.3)
            if torch.rand([]) < 0.4:  # LayerDrop
                x = x * 0
        return self.norm(x.flatten(0, 1)).view_as(x)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_noise_is_no_reason(checkpointing):
    """Dropout, NEFTune, jitter, dropped layers: in the trial all are their mean; nothing has changed behind it."""
    model = build("Llama", attention_dropout=0.4).train()
    model.model.embed_tokens = Noisy(model.model.embed_tokens)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before, state = {k: v.clone() for k, v in model.state_dict().items()}, torch.get_rng_state()
    assert refuses_shared_prompt(model) is None
    assert torch.equal(torch.get_rng_state(), state)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.is_grad_enabled()


def test_in_the_trial_training_is_evaluation_for_a_model_that_does_only_drop_out():
    model = build("GPT-2: absolute positions, tied", attn_pdrop=0.5, embd_pdrop=0.5, resid_pdrop=0.5).train()
    ids = torch.arange(8)[None]
    with undisturbed(model):
        expected = model(ids).logits
        with training_without_noise(model):
            found = model(ids).logits
            assert found.requires_grad
    torch.testing.assert_close(found, expected)
    assert not torch.equal(model(ids).logits, expected)


def test_what_does_not_train_at_all_says_so_itself():
    """The trial is for what would be silently wrong: a body that raises in training mode, whatever it is given."""
    model = build("Llama")
    forward = model.model.forward

    @functools.wraps(forward)
    def no_training(*args: Any, **options: Any) -> Any:
        if torch.is_grad_enabled():
            raise NotImplementedError("inference only")
        return forward(*args, **options)

    model.model.forward = no_training
    assert refuses_shared_prompt(model) is None

    @functools.wraps(forward)
    def no_masks_in_training(*args: Any, attention_mask: Any = None, **options: Any) -> Any:
        if torch.is_grad_enabled() and attention_mask is not None:
            raise NotImplementedError("causal only")
        return forward(*args, attention_mask=attention_mask, **options)

    model.model.forward = no_masks_in_training
    assert "in training mode, its body fails on a 4-D attention mask" in str(refuses_shared_prompt(model))


def test_the_trial_holds_no_model():
    model = build("Llama")

    def own(model: nn.Module, forward: Forward) -> Forward:
        return functools.wraps(forward)(lambda *args, **options: forward(*args, **options))

    model.model.forward = own(model, model.model.forward)
    assert refuses_shared_prompt(model) is None
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None
