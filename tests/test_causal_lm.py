"""Any Hugging Face causal LM: our loss and gradients against the definition, applied to the model's own logits."""

from __future__ import annotations

import copy
import re
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")

import transformers

from orpo_kernels import reference
from orpo_kernels.engine import autograd
from orpo_kernels.methods import METHODS
from orpo_kernels.transformers import (
    causal_lm_answers,
    causal_lm_orpo_loss,
    causal_lm_preference_loss,
    probe,
    resolve_lm_head,
)
from orpo_kernels.transformers.packing import pack_pairs
from orpo_kernels.transformers.versions import body_of, version_of

from .models import (
    MODELS,
    SIZES,
    VOCAB,
    assert_same,
    assert_sharing_is_exact,
    build,
    by_logits,
    gradients,
    make_batch,
    make_pairs,
)


def llama(**changes: Any) -> nn.Module:
    return build("Llama", **changes)


# --- models --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llama", "Gemma2: soft-cap, tied", "Phi: bias"])
def test_without_the_prompts_nll(name):
    """With it, every model: `test_models.py`."""
    model, batch = build(name).train(), make_batch()
    ours = causal_lm_orpo_loss(model, **batch, prompt_nll=False, beta=0.5)
    assert_same(ours, by_logits(model, batch, prompt_nll=False, beta=0.5), model)


@pytest.mark.parametrize("name", [name for name in MODELS if re.search(":.* (soft-cap|factor|divisor)", name)])
def test_the_transform_matters_in_these_models(name):
    """Otherwise what `test_models.py` finds would be so without it."""
    model, batch = build(name), make_batch()
    head = resolve_lm_head(model)
    hidden = body_of(model)(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)[0]
    plain = reference.orpo_loss(hidden, head.weight, batch["labels"], shift=True).loss
    assert abs(float(plain - by_logits(model, batch, prompt_nll=False).loss)) > 1e-2


def test_the_head_is_found():
    tied = resolve_lm_head(build("Llama, tied"))
    assert (tied.bias, tied.logit_scale, tied.logit_softcap) == (None, 1.0, None)
    model = build("Llama, tied")
    assert resolve_lm_head(model).weight is model.model.embed_tokens.weight
    untied = llama()
    assert resolve_lm_head(untied).weight is untied.lm_head.weight
    assert resolve_lm_head(untied).weight is not untied.model.embed_tokens.weight
    assert resolve_lm_head(build("Phi: bias")).bias is not None
    assert resolve_lm_head(build("Gemma2: soft-cap, tied")).logit_softcap == 2.0
    assert resolve_lm_head(build("Granite: divisor")).logit_scale == 0.25


def test_no_grad_and_frozen_parts():
    model, batch = llama(), make_batch()
    expected = by_logits(model, batch)
    with torch.no_grad():
        out = causal_lm_orpo_loss(model, **batch)
    assert not out.loss.requires_grad
    torch.testing.assert_close(out.loss.double(), expected.loss, rtol=1e-5, atol=0)
    model.lm_head.requires_grad_(False)
    assert_same(causal_lm_orpo_loss(model, **batch), by_logits(model, batch), model)
    model.requires_grad_(False)
    model.lm_head.requires_grad_(True)
    assert_same(causal_lm_orpo_loss(model, **batch), by_logits(model, batch), model)


def test_gradient_checkpointing():
    model, batch = llama().train(), make_batch()
    expected = by_logits(model, batch)
    expected_gradients = gradients(model, expected.loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = gradients(model, causal_lm_orpo_loss(model, **batch).loss)
    for name, grad in expected_gradients.items():
        torch.testing.assert_close(found[name], grad, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("name", ["Llama", "GPT-2: absolute positions, tied"])
def test_padding_on_the_left(name):
    model, batch = build(name), make_batch(left=True)
    ours = causal_lm_orpo_loss(model, **batch)
    assert_same(ours, by_logits(model, batch), model)
    right = causal_lm_orpo_loss(model, **make_batch())
    if name == "Llama":  # relative positions: the side of the padding makes no difference
        torch.testing.assert_close(ours.loss, right.loss, rtol=1e-5, atol=0)


def test_a_mask_of_bools_and_no_mask():
    model, batch = llama(), make_batch()
    expected = causal_lm_orpo_loss(model, **batch).loss
    assert torch.equal(
        causal_lm_orpo_loss(model, **{**batch, "attention_mask": batch["attention_mask"].bool()}).loss, expected
    )
    whole = {key: value[:, :7] for key, value in batch.items()}
    without = causal_lm_orpo_loss(model, whole["input_ids"], None, whole["labels"]).loss
    torch.testing.assert_close(without, causal_lm_orpo_loss(model, **whole).loss)


def test_another_ignore_index():
    model, batch = llama(), make_batch()
    expected = causal_lm_orpo_loss(model, **batch).loss
    labels = torch.where(batch["labels"] == -100, -7, batch["labels"])
    found = causal_lm_orpo_loss(model, **{**batch, "labels": labels}, ignore_index=-7).loss
    assert torch.equal(found, expected)


# --- weights of pairs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt_nll", [True, False], ids=["prompt_nll", "response_nll"])
def test_a_weight_multiplies_all_of_a_pairs_loss(prompt_nll):
    model, batch = llama(), make_batch()
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    ours = causal_lm_orpo_loss(model, **batch, pair_weights=weights, prompt_nll=prompt_nll, beta=0.5)
    assert_same(ours, by_logits(model, batch, prompt_nll, beta=0.5, pair_weight=weights), model)


def test_weights_in_a_batch_that_shares_its_prompts():
    pairs, weights = make_pairs(), torch.tensor([0.5, 0.0, 2.0], dtype=torch.float64)
    assert_sharing_is_exact(llama(), pairs, pair_weights=weights, beta=0.5)
    with_and_without = [
        causal_lm_orpo_loss(llama(), **pack_pairs(pairs, 0), pair_weights=w).loss for w in (weights, None)
    ]
    assert with_and_without[0] != with_and_without[1]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_takes_the_weights_of_a_batch(name):
    """A batch with all its keys, as a trainer passes it on; SFT's has the chosen sequences alone."""
    model, batch = llama(), make_batch()
    weights = torch.tensor([0.5, 2.0], dtype=torch.float64)
    logps = causal_lm_answers(model, **batch, pair_weights=weights).logps
    assert torch.equal(logps, causal_lm_answers(model, **batch).logps)
    extra = {}
    if name == "dpo":
        extra["reference_logps"] = logps - torch.arange(4)
    if name == "sft":
        batch, extra = {key: value[:2] for key, value in batch.items()}, {"chosen_only": True}

    def loss(*weights: float) -> Tensor:
        pair_weights = torch.tensor(weights, dtype=torch.float64)
        return causal_lm_preference_loss(model, **batch, **extra, method=name, pair_weights=pair_weights).loss

    torch.testing.assert_close(loss(0.5, 2.0), 0.5 * loss(1.0, 0.0) + 2 * loss(0.0, 1.0))
    torch.testing.assert_close(loss(1.0, 1.0), causal_lm_preference_loss(model, **batch, **extra, method=name).loss)
    assert loss(0.5, 2.0) != loss(1.0, 1.0)
    with pytest.raises(ValueError, match=r"pair_weight has shape \(3,\), but the batch has 2 pairs"):
        loss(1.0, 1.0, 1.0)


# --- precision -----------------------------------------------------------------------------------------------------


def test_bfloat16_models():
    for name in ("Llama", "Gemma2: soft-cap, tied", "Granite: divisor"):
        model, batch = build(name).to(torch.bfloat16), make_batch()
        out = causal_lm_orpo_loss(model, **batch)
        torch.testing.assert_close(out.loss.double(), by_logits(model, batch).loss, rtol=2e-2, atol=0)
        assert all(grad.isfinite().all() for grad in gradients(model, out.loss).values())


def test_autocast_in_the_first_call_trains_every_parameter():
    """The probe runs without gradient; what autocast cast there must not be reused by the training forward."""
    model, batch = llama().train(), make_batch()
    expected = gradients(model, by_logits(model, batch).loss)
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_lm_orpo_loss(model, **batch)
    found = gradients(model, out.loss)
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        assert float((found[name] - grad).norm()) < 0.1 * float(grad.norm()) + 1e-3, name


def test_a_head_of_another_dtype_than_the_body():
    model, batch = llama().to(torch.bfloat16), make_batch()
    model.lm_head.float()
    with pytest.raises(TypeError, match=r"gives torch.bfloat16, its lm head is torch.float32, .* fails on that"):
        causal_lm_orpo_loss(model, **batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert causal_lm_orpo_loss(model, **batch).loss.isfinite()


# --- the probe -----------------------------------------------------------------------------------------------------


class ScaledLlama(transformers.LlamaForCausalLM):
    """An architecture that does to its logits what no config field tells."""

    change: Callable[[Tensor], Tensor] = staticmethod(lambda logits: logits)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = type(self).change(out.logits)
        return out


@pytest.mark.parametrize(
    ("change", "finding"),
    [
        (lambda z: z * 1.1, "its logits differ by"),
        (lambda z: 50 * torch.tanh(z / 50), "its logits differ by"),
        (lambda z: z.index_fill(-1, torch.tensor([5]), -torch.inf), "its logits differ by"),
        (lambda z: z[..., :90], r"its logits have shape \(1, 8, 90\), ours \(1, 8, 97\)"),
        (lambda z: z * torch.nan, "its logits differ by nan"),
    ],
    ids=["scale", "soft-cap", "mask", "cut", "nan"],
)
@pytest.mark.parametrize("spread", [0.02, 0.2], ids=["small logits", "large logits"])
def test_a_head_that_is_more_than_linear_is_refused(change, finding, spread, monkeypatch):
    monkeypatch.setattr(ScaledLlama, "change", staticmethod(change))
    torch.manual_seed(0)
    model = ScaledLlama(transformers.LlamaConfig(**{**SIZES, "initializer_range": spread}))
    for _ in range(2):  # a refusal is not forgotten
        with pytest.raises(ValueError, match=f"ScaledLlama is not supported.*{finding}"):
            causal_lm_orpo_loss(model, **make_batch())


@pytest.mark.parametrize(
    ("architecture", "finding"),
    [
        ("ModernBertDecoder", "its logits differ by"),  # a layer between body and head
        ("RemBert", "the body gives 32 features, the head takes 16"),
    ],
)
def test_architectures_with_layers_between_body_and_head_are_refused(architecture, finding):
    config = getattr(transformers, f"{architecture}Config")(
        **SIZES, is_decoder=True, output_embedding_size=16, input_embedding_size=16
    )
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ValueError, match=f"{architecture}ForCausalLM is not supported.*{finding}"):
        causal_lm_orpo_loss(model, **make_batch())


def test_the_probe_runs_once_and_again_when_the_head_changes(monkeypatch):
    runs = []
    compare = probe._compare
    monkeypatch.setattr(probe, "_compare", lambda *args: runs.append(1) or compare(*args))
    model, batch = build("Granite: divisor"), make_batch()
    for _ in range(3):
        causal_lm_orpo_loss(model, **batch)
    assert len(runs) == 1
    copied = copy.deepcopy(model)
    causal_lm_orpo_loss(copied, **batch)
    assert len(runs) == 2
    model.lm_head = nn.Linear(32, VOCAB, bias=True)
    assert_same(causal_lm_orpo_loss(model, **batch), by_logits(model, batch), model)
    assert len(runs) == 3
    model.config.logits_scaling = 2.0  # Granite reads it at every call
    assert_same(causal_lm_orpo_loss(model, **batch), by_logits(model, batch), model)
    assert len(runs) == 4


def test_a_config_that_the_model_does_not_follow_is_noticed():
    model, batch = build("Cohere: factor, tied"), make_batch()
    causal_lm_orpo_loss(model, **batch)
    model.config.logit_scale = 3.0  # Cohere read it when it was built
    with pytest.raises(ValueError, match=r"CohereForCausalLM is not supported.* 3 \* W h .*differ"):
        causal_lm_orpo_loss(model, **batch)


def test_a_forward_wrapped_for_mixed_precision_needs_the_loss_in_the_same_autocast():
    """Accelerate's `prepare` puts autocast into `model.forward`, which the loss does not call."""
    model, batch = llama(), make_batch()
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)
    with pytest.raises(ValueError, match=r"its logits differ.* call the loss inside that autocast"):
        causal_lm_orpo_loss(model, **batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert causal_lm_orpo_loss(model, **batch).loss.isfinite()


def test_the_probe_leaves_no_trace():
    batch = make_batch()
    probed, known = (build("GPT-2: absolute positions, tied", resid_pdrop=0.3).train() for _ in range(2))
    probed.transformer.h[0].eval()
    known.transformer.h[0].eval()
    causal_lm_orpo_loss(known, **batch)
    modes = [module.training for module in probed.modules()]
    torch.manual_seed(5)
    first = causal_lm_orpo_loss(probed, **batch).loss  # with its probe
    torch.manual_seed(5)
    again = causal_lm_orpo_loss(known, **batch).loss  # without one: the same dropout
    assert torch.equal(first, again)
    assert [module.training for module in probed.modules()] == modes
    assert not probed.lm_head._forward_pre_hooks
    assert not probed.transformer._forward_pre_hooks
    assert all(p.grad is None for p in probed.parameters())


# --- heads that are refused ----------------------------------------------------------------------------------------


class QuantizedLinear(nn.Linear):
    """Stands for bitsandbytes' Linear8bitLt and its kind: a subclass with another weight and another product."""


class QuantizedTensor(nn.Parameter):
    """Stands for torchao's: an ordinary nn.Linear around an extraordinary weight."""


def quantized(model: nn.Module) -> None:
    model.lm_head = QuantizedLinear(32, VOCAB, bias=False)


def doubled(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output * 2


HOOKED = (ValueError, "has hooks or a replaced forward")
HEADS: dict[str, tuple[Callable[[nn.Module], Any], tuple[type[Exception], str]]] = {
    "parametrized": (
        lambda model: nn.utils.parametrizations.weight_norm(model.lm_head),
        (TypeError, "ParametrizedLinear, not a plain torch.nn.Linear"),
    ),
    "old weight norm": (lambda model: nn.utils.weight_norm(model.lm_head), HOOKED),
    "hooked": (lambda model: model.lm_head.register_forward_hook(doubled), HOOKED),
    "replaced forward": (
        lambda model: setattr(model.lm_head, "forward", lambda hidden: hidden @ model.lm_head.weight.T),
        HOOKED,
    ),
    "quantized": (quantized, (TypeError, "QuantizedLinear, not a plain torch.nn.Linear")),
    "quantized weight": (
        lambda model: setattr(model.lm_head, "weight", QuantizedTensor(model.lm_head.weight.data)),
        (TypeError, "is a QuantizedTensor, not a plain tensor"),
    ),
    "offloaded": (lambda model: model.lm_head.to("meta"), (TypeError, "device 'meta'")),
    "two layers": (
        lambda model: setattr(model, "lm_head", nn.Sequential(nn.Linear(32, 32), nn.Linear(32, VOCAB))),
        (TypeError, "torch.nn.modules.container.Sequential, not a plain"),
    ),
    "none": (lambda model: delattr(model, "lm_head"), (TypeError, "LlamaForCausalLM has no output embeddings")),
}


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
def test_heads_that_are_not_plain_are_refused_by_class(head):
    change, (error, message) = HEADS[head]
    model, batch = llama(), make_batch()
    causal_lm_orpo_loss(model, **batch)  # a verdict from before does not help
    change(model)
    with pytest.raises(error, match=message):
        causal_lm_orpo_loss(model, **batch)
    with pytest.raises(error, match=message):
        resolve_lm_head(model)


# --- peft ----------------------------------------------------------------------------------------------------------


def with_lora(model: nn.Module, **options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    usual = {"target_modules": ["q_proj", "v_proj"], "r": 4, "init_lora_weights": False, "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(model, peft.LoraConfig(**{**usual, **options}))


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"task_type": None}], ids=["lora", "dora", "no task"])
def test_lora_in_the_body_acts_and_the_head_stays_frozen(options):
    model, batch = llama(), make_batch()
    without = causal_lm_orpo_loss(model, **batch).loss
    model = with_lora(model, **options)
    ours = causal_lm_orpo_loss(model, **batch)
    assert abs(float(ours.loss - without)) > 1e-4
    assert_same(ours, by_logits(model, batch), model)
    assert all("lora_" in name for name in gradients(model, causal_lm_orpo_loss(model, **batch).loss))
    assert not resolve_lm_head(model).weight.requires_grad


@pytest.mark.parametrize("name", ["Llama", "Gemma2: soft-cap, tied"])
def test_modules_to_save_trains_the_copy_of_the_head(name):
    batch = make_batch()
    model = with_lora(build(name), modules_to_save=["lm_head"])
    wrapper = model.get_base_model().lm_head
    copied = wrapper.modules_to_save["default"]
    with torch.no_grad():
        copied.weight.add_(torch.randn_like(copied.weight) * 0.1)
    assert resolve_lm_head(model).weight is copied.weight
    assert_same(causal_lm_orpo_loss(model, **batch), by_logits(model, batch), model)
    assert any("lm_head.modules_to_save" in key for key in gradients(model, causal_lm_orpo_loss(model, **batch).loss))
    with model.disable_adapter():
        assert resolve_lm_head(model).weight is wrapper.original_module.weight
        expected = by_logits(model, batch).loss
        torch.testing.assert_close(causal_lm_orpo_loss(model, **batch).loss.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"target_modules": ["lm_head"]},
        {"lora_bias": True},
        {"use_rslora": True, "lora_alpha": 3},
        {"init_lora_weights": True},  # B = 0
    ],
    ids=["head and body", "head", "bias", "rslora", "fresh"],
)
@pytest.mark.parametrize("name", ["Llama", "Llama, tied", "Phi: bias", "Gemma2: soft-cap, tied", "Granite: divisor"])
def test_lora_on_the_head(name, options):
    model, batch = with_lora(build(name), **{"target_modules": ["q_proj", "lm_head"], **options}), make_batch()
    assert_same(causal_lm_orpo_loss(model, **batch, beta=0.5), by_logits(model, batch, beta=0.5), model)
    found = gradients(model, causal_lm_orpo_loss(model, **batch).loss)
    assert any("lm_head.lora_B" in name for name in found)
    assert all("lora_" in name for name in found)


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ],
    ids=["both", "both, tied", "embeddings, tied", "saved, tied"],
)
def test_adapters_on_tied_embeddings(options):
    model, batch = with_lora(build("Llama, tied"), **options), make_batch()
    assert_same(causal_lm_orpo_loss(model, **batch), by_logits(model, batch), model)


def test_lora_on_the_head_merged_disabled_and_several_at_once():
    peft, batch = pytest.importorskip("peft"), make_batch()
    model = with_lora(llama(), target_modules=["lm_head"])
    model.add_adapter("second", peft.LoraConfig(target_modules=["lm_head", "q_proj"], r=3, init_lora_weights=False))
    model.add_adapter("body", peft.LoraConfig(target_modules=["v_proj"], r=2, init_lora_weights=False))
    for active in ("default", "second", "body", ["default", "second", "body"]):
        model.base_model.set_adapter(active)
        assert_same(causal_lm_orpo_loss(model, **batch), by_logits(model, batch), model)
    assert [lora.up.weight.shape[1] for lora in resolve_lm_head(model).lora] == [4, 3]
    both = causal_lm_orpo_loss(model, **batch).loss.detach()
    with model.disable_adapter():
        torch.testing.assert_close(
            causal_lm_orpo_loss(model, **batch).loss.double(), by_logits(model, batch).loss, rtol=1e-5, atol=0
        )
        assert abs(float(causal_lm_orpo_loss(model, **batch).loss - both)) > 1e-3
    model.merge_adapter()
    assert not resolve_lm_head(model).lora
    torch.testing.assert_close(causal_lm_orpo_loss(model, **batch).loss, both, rtol=1e-4, atol=0)
    model.base_model.disable_adapter_layers()
    with pytest.raises(ValueError, match=r"merged adapters that are disabled; call unmerge_adapter"):
        causal_lm_orpo_loss(model, **batch)


def test_dropout_of_lora_on_the_head_is_that_of_peft():
    model, batch = with_lora(llama(), target_modules=["q_proj", "lm_head"], lora_dropout=0.5).train(), make_batch()
    causal_lm_orpo_loss(model, **batch)  # the probe
    torch.manual_seed(5)
    ours = causal_lm_orpo_loss(model, **batch)
    torch.manual_seed(5)
    assert_same(ours, by_logits(model, batch), model)
    torch.manual_seed(6)
    assert abs(float(causal_lm_orpo_loss(model, **batch).loss - ours.loss)) > 1e-3


def test_lora_on_the_head_in_low_precision():
    batch = make_batch()
    model = with_lora(llama().to(torch.bfloat16), target_modules=["q_proj", "lm_head"])
    assert resolve_lm_head(model).lora[0].up.weight.dtype == torch.float32  # as peft keeps its adapters
    expected = gradients(model, by_logits(model, batch).loss)
    out = causal_lm_orpo_loss(model, **batch)
    torch.testing.assert_close(out.loss.double(), by_logits(model, batch).loss, rtol=2e-2, atol=0)
    for name, grad in gradients(model, out.loss).items():
        assert float((grad - expected[name]).norm()) < 0.05 * float(expected[name].norm()), name
    model = with_lora(llama(), target_modules=["q_proj", "lm_head"])
    expected = gradients(model, by_logits(model, batch).loss)
    with torch.autocast("cpu", torch.bfloat16):
        out = causal_lm_orpo_loss(model, **batch)
    found = gradients(model, out.loss)
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        assert float((grad - expected[name]).norm()) < 0.1 * float(expected[name].norm()), name


def test_lora_on_the_head_with_shared_prompts():
    model = with_lora(build("Llama, tied"), target_modules=["q_proj", "lm_head"]).train()
    assert_sharing_is_exact(model, make_pairs())


@pytest.mark.parametrize(
    ("options", "variant"),
    [({"use_dora": True}, "DoraLinearVariant"), ({"init_lora_weights": "mica"}, "MiCALinearVariant")],
    ids=["dora", "mica"],
)
def test_variants_of_lora_on_the_head_are_refused(options, variant):
    if "init_lora_weights" in options and version_of("peft") < (0, 19):
        pytest.skip("peft has no MiCA")
    model = with_lora(llama(), **{"target_modules": ["lm_head"], **options})
    with pytest.raises(TypeError, match=f"'default' on the lm head is not plain LoRA but a {variant}"):
        causal_lm_orpo_loss(model, **make_batch())


def test_other_adapters_on_the_head_are_refused_by_class():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(llama(), peft.IA3Config(target_modules=["lm_head"], feedforward_modules=[]))
    with pytest.raises(TypeError, match=r"peft\.tuners\.ia3\.layer\.Linear.*modules_to_save"):
        causal_lm_orpo_loss(model, **make_batch())


def test_lora_on_a_head_that_is_quantized_or_hooked_is_refused():
    batch = make_batch()
    quantized_model = llama()
    quantized(quantized_model)
    with pytest.raises(TypeError, match=r"QuantizedLinear, not a plain torch\.nn\.Linear"):
        causal_lm_orpo_loss(with_lora(quantized_model, target_modules=["lm_head"]), **batch)
    for part in (lambda head: head, lambda head: head.base_layer, lambda head: head.lora_B["default"]):
        model = with_lora(llama(), target_modules=["lm_head"])
        part(model.get_base_model().lm_head).register_forward_hook(doubled)
        with pytest.raises(ValueError, match="has hooks or a replaced forward"):
            causal_lm_orpo_loss(model, **batch)


class RoundedLinear(nn.Linear):
    """Stands for a 4-bit layer: keeps its weight as small integers and multiplies by what they stand for."""

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden, self.weight.mul(8).round().div(8), self.bias)


def test_qlora_a_quantized_body_under_a_plain_head():
    model, batch = llama(), make_batch()
    for layer in model.model.layers:
        for name in ("q_proj", "v_proj"):
            getattr(layer.self_attn, name).__class__ = RoundedLinear
    exact = causal_lm_orpo_loss(llama(), **batch).loss
    model = with_lora(model)
    assert_same(causal_lm_orpo_loss(model, **batch), by_logits(model, batch), model)
    assert abs(float(causal_lm_orpo_loss(model, **batch).loss - exact)) > 1e-3


def test_schedules_of_adapters(monkeypatch):
    """A frozen head takes two GEMMs; one that is trained, in full or by LoRA, cannot."""
    used = []

    class Noting(dict):
        def __getitem__(self, name):
            used.append(name)
            return super().__getitem__(name)

    monkeypatch.setattr(autograd, "TABLE", Noting(autograd.TABLE))
    for options, schedule in (
        ({}, "single_pass"),
        ({"modules_to_save": ["lm_head"]}, "resident"),
        ({"target_modules": ["lm_head"]}, "resident"),
    ):
        used.clear()
        causal_lm_orpo_loss(with_lora(llama(), **options), **make_batch()).loss.backward()
        assert used == [schedule, schedule]


def test_adapters_outside_the_layers_are_refused():
    peft = pytest.importorskip("peft")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    with pytest.raises(ValueError, match="PromptTuningConfig acts in the forward of the PeftModel"):
        causal_lm_orpo_loss(peft.get_peft_model(llama(), config), **make_batch())
    activated = with_lora(llama(), alora_invocation_tokens=[5])
    with pytest.raises(ValueError, match="LoraConfig acts in the forward of the PeftModel"):
        causal_lm_orpo_loss(activated, **make_batch())


# --- the router loss of a mixture of experts -----------------------------------------------------------------------

ROUTED = ["Mixtral", "Qwen2-MoE", "Qwen3-MoE", "OLMoE", "Phi-MoE: bias", "Granite-MoE: divisor", "gpt-oss: window"]


@pytest.mark.parametrize("name", ROUTED)
def test_the_router_loss_is_added_as_the_model_adds_it(name):
    if name.startswith("Granite") and version_of("transformers") < (5, 19):
        pytest.skip("its body does not give its router_logits: the router loss is refused")
    model, batch = build(name, output_router_logits=True, router_aux_loss_coef=0.5).train(), make_batch()
    own = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    expected = by_logits(model, batch)
    ours = causal_lm_orpo_loss(model, **batch)
    torch.testing.assert_close(ours.aux_loss, own.aux_loss)
    assert not ours.aux_loss.requires_grad
    assert_same(ours, expected._replace(loss=expected.loss + 0.5 * own.aux_loss), model)
    assert abs(float(ours.loss - expected.loss)) > 0.1
    alone = causal_lm_orpo_loss(model, **batch, router_aux_loss_coef=0.0)
    assert_same(alone, by_logits(model, batch), model)


def test_the_router_loss_of_micro_batches():
    model, batch = build("Mixtral", output_router_logits=True).train(), make_batch()
    halves = [{key: value[i::2] for key, value in batch.items()} for i in range(2)]
    coef = model.router_aux_loss_coef
    counts = {"nll_denominator": 19, "pair_denominator": 2}
    parts = [causal_lm_orpo_loss(model, **half, **counts, router_aux_loss_coef=coef / 2) for half in halves]
    total = sum(part.nll_loss + 0.1 * part.or_loss for part in parts)
    mean = sum(part.aux_loss for part in parts) / 2
    torch.testing.assert_close(sum(part.loss for part in parts), total + coef * mean)


def test_models_without_a_router_loss():
    assert causal_lm_orpo_loss(llama(), **make_batch()).aux_loss is None
    assert causal_lm_orpo_loss(build("Mixtral"), **make_batch()).aux_loss is None
    with pytest.raises(ValueError, match=r"router_aux_loss_coef is 0.1, but .*output_router_logits = True"):
        causal_lm_orpo_loss(llama(), **make_batch(), router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match=r"DogeForCausalLM asks for a router loss .* does not offer"):
        causal_lm_orpo_loss(build("Doge", output_router_logits=True), **make_batch())
    with pytest.raises(ValueError, match=r"MixtralForCausalLM cannot share prompts: its router loss"):
        causal_lm_orpo_loss(build("Mixtral", output_router_logits=True), **pack_pairs(make_pairs(), 0, capacity=0))


def test_a_router_loss_that_the_model_computes_otherwise_is_refused(monkeypatch):
    model = build("Mixtral", output_router_logits=True)
    monkeypatch.setattr(model, "num_experts_per_tok", 1)
    forward = type(model).forward

    def with_two(self: Any, *args: Any, **kwargs: Any) -> Any:
        monkeypatch.setattr(model, "num_experts_per_tok", 2)
        try:
            return forward(self, *args, **kwargs)
        finally:
            monkeypatch.setattr(model, "num_experts_per_tok", 1)

    monkeypatch.setattr(type(model), "forward", with_two)
    with pytest.raises(ValueError, match=r"MixtralForCausalLM is not supported.* its router loss is"):
        causal_lm_orpo_loss(model, **make_batch())


# --- models and inputs that are refused ----------------------------------------------------------------------------


def test_models_of_another_kind_are_refused_by_name():
    batch = make_batch()
    with pytest.raises(ValueError, match="LlamaModel has no body apart from its head"):
        causal_lm_orpo_loss(llama().model, **batch)
    with pytest.raises(TypeError, match="but is a DataParallel"):
        causal_lm_orpo_loss(nn.DataParallel(llama()), **batch)
    with pytest.raises(TypeError, match="but is a Linear"):
        causal_lm_orpo_loss(nn.Linear(2, 2), **batch)
    with pytest.raises(TypeError, match=r"\(OptimizedModule\).*model.base_model.compile\(\)"):
        causal_lm_orpo_loss(torch.compile(llama(), backend="eager"), **batch)


def test_distributed_data_parallel_is_refused_by_name(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = nn.parallel.DistributedDataParallel(llama())
        with pytest.raises(TypeError, match="but is a DistributedDataParallel"):
            causal_lm_orpo_loss(model, **make_batch())
    finally:
        torch.distributed.destroy_process_group()


def test_a_compiled_body_works():
    model, batch = llama(), make_batch()
    expected = causal_lm_orpo_loss(model, **batch).loss
    compilations = []

    def backend(graph: Any, inputs: Any) -> Any:
        compilations.append(1)
        return graph

    model.base_model.compile(backend=backend)
    probe._verified.clear()
    torch.testing.assert_close(causal_lm_orpo_loss(model, **batch).loss, expected)
    after_one_shape = len(compilations)
    assert after_one_shape
    causal_lm_orpo_loss(model, **batch)
    assert len(compilations) == after_one_shape


def with_(**changes: Any) -> dict[str, Any]:
    return {**make_batch(), **changes}


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (with_(labels=torch.zeros(4, 11, dtype=torch.long)), ValueError, r"\(4, 12\) and \(4, 11\)"),
        (with_(attention_mask=torch.ones(4, 1, 12, 12)), ValueError, r"\(4, 12\) and \(4, 1, 12, 12\)"),
        (with_(labels=torch.zeros(4, 12, dtype=torch.int32)), TypeError, "labels must be int64, but is torch.int32"),
        (with_(attention_mask=torch.ones(4, 12)), TypeError, "attention_mask must be integer or bool"),
        (with_(labels=[[1]]), TypeError, "labels must be a tensor, but is a list"),
        (with_(labels=torch.zeros(4, 12, dtype=torch.long, device="meta")), ValueError, "on cpu but labels on meta"),
        ({key: value[:3] for key, value in make_batch().items()}, ValueError, "odd 3"),
        (with_(bias=torch.zeros(VOCAB)), TypeError, "bias is read from the model"),
        (with_(logit_scale=2.0), TypeError, "logit_scale is read from the model"),
        (with_(logit_softcap=2.0), TypeError, "logit_softcap is read from the model"),
        (with_(vocab_group=object()), ValueError, "vocab_group is given, but the model has the whole head"),
        (with_(sequence_group=object()), ValueError, "sequence_group is given"),
        (with_(nll_labels=make_batch()["labels"]), TypeError, "nll_labels is made from the batch"),
        (with_(shift=False), TypeError, "shift is made from the batch"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(batch, error, message):
    with pytest.raises(error, match=message):
        causal_lm_orpo_loss(llama(), **batch)


def test_the_core_does_not_import_transformers():
    import subprocess

    code = "import orpo_kernels, sys; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
