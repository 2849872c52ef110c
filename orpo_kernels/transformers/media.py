"""Pictures in a batch, which the model's body takes beside the tokens.

What a model's forward takes beside text (`pixel_values`, `image_grid_thw`, `image_sizes`, `mm_token_type_ids`, ...) is
handed to its body under the same names. The loss only has to know which tokens stand for a picture, because those are
no targets.
"""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel

from .body import unwrap

# What a forward takes of text, or for other purposes than training on it.
_NOT_MEDIA = {
    *("input_ids", "attention_mask", "position_ids", "inputs_embeds", "labels", "past_key_values", "cache_position"),
    *("use_cache", "logits_to_keep", "num_logits_to_keep", "return_dict", "kwargs", "head_mask"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "rope_deltas", "image_hidden_states"),
}
_TOKENS = tuple(f"{kind}_token_{name}" for kind in ("image", "video", "audio") for name in ("id", "index"))


def media_tokens(model: nn.Module) -> tuple[int, ...]:
    """The ids that stand for a piece of a picture, a video or a sound in the text of `model`; () for most models."""
    config = unwrap(model).config
    ids = {getattr(config, name, None) for name in _TOKENS}
    return tuple(sorted(token for token in ids if isinstance(token, int) and token >= 0))


def media_inputs(inner: PreTrainedModel, options: dict[str, Any]) -> dict[str, Tensor]:
    """Those of the `options` that the model's own forward takes beside text, taken out of them.

    Raises `TypeError` for pictures that it does not take.
    """
    if inner.config.is_encoder_decoder:
        return {}
    takes = inspect.signature(inner.forward).parameters.keys() - _NOT_MEDIA
    if strange := [name for name in options if "pixel" in name and name not in takes]:
        raise TypeError(
            f"The batch has {strange[0]}, but the forward of {type(inner).__name__} takes none: leave the pictures "
            "out, or load the model that sees them (AutoModelForImageTextToText)."
        )
    media = {name: options.pop(name) for name in list(options) if name in takes}
    return {name: value for name, value in media.items() if value is not None}


def vision_parts(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of a model that sees pictures which are not language, by name: its towers, and what projects to it.

    Those that hold neither the decoder nor the head nor the embeddings, as large as can be.
    """
    inner = unwrap(model)
    language = [inner.get_decoder(), inner.get_input_embeddings(), inner.get_output_embeddings()]
    spoken = {module for part in language if part is not None for module in part.modules()}

    def apart(name: str, module: nn.Module) -> dict[str, nn.Module]:
        if module in spoken:
            return {}
        if spoken.isdisjoint(module.modules()):
            return {name: module}
        parts = (apart(f"{name}.{child}" if name else child, below) for child, below in module.named_children())
        return {name: part for found in parts for name, part in found.items()}

    return {name: part for name, part in apart("", inner).items() if next(part.parameters(), None) is not None}


def freeze_vision(model: nn.Module) -> list[str]:
    """Take the gradient from all of the model but its language, and return the names of those modules.

    Raises `ValueError` for a model that sees no pictures.
    """
    parts = vision_parts(model)
    if not parts:
        raise ValueError(f"{type(unwrap(model)).__name__} has no tower for pictures that could be frozen.")
    for part in parts.values():
        part.requires_grad_(False)
    return list(parts)
