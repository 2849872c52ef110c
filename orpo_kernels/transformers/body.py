"""The transformer without its head: find the model inside its wrappers, and run it up to the last hidden states."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .encoder_decoder import check_encoder_decoder, decoder_hidden_states
from .packing import PackedPairs
from .varlen import VARLEN
from .versions import body_of


def unwrap(model: nn.Module) -> PreTrainedModel:
    """The `transformers` model itself, which in a `peft` model keeps the adapter layers inside it.

    Raises `TypeError` for a wrapper whose work would be lost by calling what is inside, and `ValueError` for a model
    that is not a language model with everything in its layers.
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
            f"{type(inner).__name__}. Wrappers that synchronise or shard do so in their own forward, which the loss "
            "does not call. orpo_kernels.transformers.engines.run_inside runs it there for DistributedDataParallel and "
            "DeepSpeedEngine; a model under FSDP2 (fully_shard) is passed as it is; FullyShardedDataParallel (version "
            "1) is not supported."
        )
    if inner.config.is_encoder_decoder:
        check_encoder_decoder(inner)
    elif body_of(inner) is inner:
        name, body = type(inner).__name__, inner.base_model_prefix
        raise ValueError(f"{name} has no body apart from its head (no attribute {body!r}).")
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


class BodyOutput(NamedTuple):
    """What the body gives: `hidden` (rows, T, H), that the model feeds its head, and the router loss, 0-d, or None."""

    hidden: Tensor
    aux_loss: Tensor | None


def run_body(
    model: PreTrainedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    packed: PackedPairs | None = None,
    decoder_input_ids: Tensor | None = None,
    media: Mapping[str, Tensor] = MappingProxyType({}),
) -> BodyOutput:
    """Call the body as the model's own forward calls it. With `packed`, `attention_mask` is not read.

    media: what the model takes beside text (`media.py`), by the names of its forward.
    """
    if decoder_input_ids is not None:
        if wants_router_loss(model):
            raise ValueError(
                f"{type(model).__name__} asks for a router loss (config.output_router_logits=True), which is served "
                "for decoder-only models alone. Set model.config.output_router_logits = False to train without it."
            )
        return BodyOutput(decoder_hidden_states(model, input_ids, attention_mask, decoder_input_ids), None)
    arguments: dict[str, Any] = {"attention_mask": attention_mask}
    if packed is not None:
        arguments = {"attention_mask": shared_prompt_mask(model, packed), "position_ids": packed.position_ids}
        if model.config.get_text_config(decoder=True)._attn_implementation == VARLEN:
            arguments["sequences"] = packed.sequences
    routed = wants_router_loss(model)
    if routed:
        arguments["output_router_logits"] = True
    output = body_of(model)(input_ids=input_ids, use_cache=False, **arguments, **media)
    return BodyOutput(output[0], _router_loss(model, output, attention_mask) if routed else None)


# --- the router loss of a mixture of experts -----------------------------------------------------------------------


def wants_router_loss(model: PreTrainedModel) -> bool:
    """Whether the model's own forward would add a router loss to its loss."""
    config = model.config.get_text_config(decoder=True)
    return bool(getattr(config, "output_router_logits", False) and router_loss_coef(model))


def router_loss_coef(model: PreTrainedModel) -> float:
    """What the model multiplies its router loss by, before it adds it. 0 for a model that has none."""
    places = (model, model.config.get_text_config(decoder=True))
    coefs = [getattr(place, name, None) for place in places for name in ("router_aux_loss_coef", "aux_loss_coef")]
    return next((coef for coef in coefs if coef is not None), 0.0)


def _router_loss(model: PreTrainedModel, output: Any, attention_mask: Tensor | None) -> Tensor:
    """The model's own `load_balancing_loss_func`, called as the models of transformers call it."""
    modules = [sys.modules[cls.__module__] for cls in type(model).__mro__]
    functions = (getattr(module, "load_balancing_loss_func", None) for module in modules)
    function = next((function for function in functions if function is not None), None)
    arguments = {
        "gate_logits": getattr(output, "router_logits", None),
        "num_experts": getattr(model, "num_experts", None),
        "top_k": getattr(model, "num_experts_per_tok", None),
    }
    known = function is not None and set(inspect.signature(function).parameters) == {*arguments, "attention_mask"}
    if function is None or not known or not all(arguments.values()):
        raise ValueError(
            f"{type(model).__name__} asks for a router loss (config.output_router_logits=True), but does not offer "
            "what Mixtral computes it from: its body's router_logits, num_experts, num_experts_per_tok, and "
            "load_balancing_loss_func. Set model.config.output_router_logits = False to train without it."
        )
    return function(**arguments, attention_mask=attention_mask)


# --- attention masks of rows that share their prompt ---------------------------------------------------------------


def _boolean_mask(model: PreTrainedModel, packed: PackedPairs, window: int | None) -> Tensor:
    return packed.attention_mask(window)


def _additive_mask(model: PreTrainedModel, packed: PackedPairs, window: int | None) -> Tensor:
    """Eager attention adds its mask to the scores; of True and False it would make 1 and 0."""
    visible = packed.attention_mask(window)
    return torch.zeros_like(visible, dtype=model.dtype).masked_fill(~visible, torch.finfo(model.dtype).min)


BLOCK = 128  # places of queries, and of keys, that FlexAttention takes or skips together


def block_mask(model: PreTrainedModel, packed: PackedPairs, window: int | None) -> Any:
    """FlexAttention skips blocks in which nothing is seen: the other answers and the other pairs cost nothing.

    The window is a tensor, and as wide as the row where there is none: the compiled attention is then one for all kinds
    of layers. (For a number of Python's it would be compiled for each, and past eight times no more, but run unfused.)
    """
    from torch.nn.attention.flex_attention import BlockMask

    width = packed.segments.shape[1]
    reach = torch.full((), window or width, device=packed.segments.device)
    partial, full = _seen_blocks(packed, window)
    return BlockMask.from_kv_blocks(
        *_ordered(partial),
        *_ordered(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=lambda row, _, query, key: packed.visible(row, query, key, reach),
        seq_lengths=(width, width),
    )


def _seen_blocks(packed: PackedPairs, window: int | None) -> tuple[Tensor, Tensor]:
    """(R, 1, Q, K) bool: the blocks of which some places are seen, and those of which all are.

    From the bounds of what each token sees. (`create_block_mask` evaluates the mask at all T x T places: 12 ms a step
    on an H100.)
    """
    rows, width = packed.segments.shape
    count = -(-width // BLOCK)
    place = torch.arange(count * BLOCK, device=packed.segments.device)
    edge = place[::BLOCK]

    def seen(first: Tensor, end: Tensor) -> Tensor:
        """(R, T, K) how many places of [first, end) are in each block of keys."""
        return (torch.minimum(end[..., None], edge + BLOCK) - torch.maximum(first[..., None], edge)).clamp(min=0)

    own, first, end = packed.visible_bounds(window)
    places = seen(own, place[:width] + 1) + seen(first, end)
    places = torch.nn.functional.pad(places, (0, 0, 0, count * BLOCK - width)).view(rows, 1, count, BLOCK, count).sum(3)
    full = places == BLOCK * BLOCK
    return (places > 0) & ~full, full


def _ordered(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of keys each block of queries has, (R, 1, Q), and which, those first, (R, 1, Q, K); int32."""
    return blocks.sum(-1, dtype=torch.int32), blocks.int().argsort(dim=-1, descending=True, stable=True).int()


def _no_mask(model: PreTrainedModel, packed: PackedPairs, window: int | None) -> Tensor:
    """Of None the body would make a mask; one of four axes it hands on. Whoever reads this one sees nothing."""
    return torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=packed.segments.device)


# The attention implementations that can serve rows with several sequences, and the mask that they take.
MASKS = {"sdpa": _boolean_mask, "eager": _additive_mask, "flex_attention": block_mask, VARLEN: _no_mask}


def shared_prompt_mask(model: PreTrainedModel, packed: PackedPairs) -> Any:
    """The 4-D mask of `packed` in the form that the model's attention takes, or one for each kind of its layers."""
    config = model.config.get_text_config(decoder=True)
    mask, window = MASKS[config._attn_implementation], getattr(config, "sliding_window", None) or None
    kinds = layer_kinds(config)
    if "sliding_attention" in kinds:
        windows = {"full_attention": None, "sliding_attention": window}
        return {kind: mask(model, packed, windows[kind]) for kind in kinds}
    # Models without kinds of layers (Mistral, StarCoder2) have the window in all of them.
    return mask(model, packed, None if kinds else window)


def layer_kinds(config: PretrainedConfig) -> list[str]:
    """The kinds of attention (or other mixing) that the config lists for the layers; [] where it lists none."""
    return sorted(set(getattr(config, "layer_types", None) or ()))
