"""The transformer without its head: find the model inside its wrappers, and run it up to the last hidden states."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The `transformers` model itself, which in a `peft` model keeps the adapter layers inside it.

    Raises `TypeError` for a wrapper whose work would be lost by calling what is inside, and `ValueError` for a model
    that is not a decoder-only language model with everything in its layers.
    """
    name = type(model).__name__
    if hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", None) is not None:
        raise TypeError(
            f"The model is compiled as a whole ({name}), and the loss calls only its body, which would run uncompiled. "
            "Compile the body instead: `model.base_model.compile()`, on the model that is not compiled."
        )
    inner: Any = model
    if hasattr(inner, "get_base_model"):  # PeftModel, PeftMixedModel
        _check_adapter(getattr(inner, "active_peft_config", None))
        inner = inner.get_base_model()
    if not isinstance(inner, PreTrainedModel):
        raise TypeError(
            "model must be a transformers PreTrainedModel or a peft PeftModel around one, but is a "
            f"{type(inner).__name__}. Wrappers that synchronise or shard (DistributedDataParallel, "
            "FullyShardedDataParallel, DeepSpeedEngine) do so in their own forward, which the loss does not call; they "
            "are not supported."
        )
    _check_config(inner)
    return inner


def _check_adapter(config: Any) -> None:
    """Refuse adapters that do their work outside the layers, in the forward of the `peft` model."""
    kind = getattr(config, "peft_type", None)
    outside = getattr(config, "is_prompt_learning", False) or getattr(config, "alora_invocation_tokens", None)
    if outside or kind in ("XLORA", "POLY"):
        raise ValueError(
            f"The adapter {type(config).__name__} acts in the forward of the PeftModel, not in the layers of the body, "
            "and would be bypassed. Use one that lives in the layers (LoRA, DoRA, IA3, OFT, ...)."
        )


def _check_config(model: PreTrainedModel) -> None:
    name, text = type(model).__name__, model.config.get_text_config(decoder=True)
    if model.config.is_encoder_decoder:
        raise ValueError(f"{name} is an encoder-decoder model; the loss serves decoder-only language models.")
    if model.base_model is model:
        raise ValueError(f"{name} has no body apart from its head (no attribute {model.base_model_prefix!r}).")
    if getattr(text, "output_router_logits", False) and getattr(text, "router_aux_loss_coef", 0):
        raise ValueError(
            f"{name} asks for a router loss (config.output_router_logits=True), which this loss leaves out; it would "
            "be dropped. Set model.config.output_router_logits = False to train without it."
        )


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(2B, T, H): what the model feeds its head. The body is called as the model's own forward calls it."""
    return model.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)[0]
