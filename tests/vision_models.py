"""Tiny random instances of the models that see pictures, and what is true of each: the table of docs/images.md.

`python -m tests.vision_models` writes it: whether loss and gradients of pairs with pictures are those of the model's
own logits, and those of the padded batch where prompts, and with them pictures, are shared; or why not.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn

from orpo_kernels import ORPOOutput, reference
from orpo_kernels.transformers import causal_lm_orpo_loss, refuses_shared_prompt
from orpo_kernels.transformers.collator import pad_pairs
from orpo_kernels.transformers.packing import pack_pairs

from .models import SIZES, VOCAB, assert_same, own_logits, write_table

IMAGE, VIDEO, START, END = VOCAB - 1, VOCAB - 2, VOCAB - 3, VOCAB - 4
TEXT = {**SIZES, "max_position_embeddings": 128, "tie_word_embeddings": False}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
TOWER = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_channels": 3,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_TOWER = {
    "depth": 2,
    "embed_dim": 16,
    "hidden_size": 32,
    "num_heads": 2,
    "mlp_ratio": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
}
OUT = {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}}
LINEAR = {
    "layer_types": ["linear_attention", "full_attention"],
    **{f"linear_{part}_head_dim": 8 for part in ("key", "value")},
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
GLM_ROPE = {"rope_parameters": {**MROPE["rope_parameters"], "partial_rotary_factor": 1.0}}


# --- pictures of 16 x 16, one a row ----------------------------------------------------------------------------------


def pixels(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(rows, 3, 16, 16, generator=torch.Generator().manual_seed(5))}


def nested(rows: int) -> dict[str, Tensor]:
    return {"pixel_values": pixels(rows)["pixel_values"][:, None]}


def sized(rows: int) -> dict[str, Tensor]:
    return {**pixels(rows), "image_sizes": torch.full((rows, 2), 16)}


def tiled(rows: int) -> dict[str, Tensor]:
    """A picture of 16 x 32: the whole, small, and its two halves."""
    values = torch.randn(rows, 3, 3, 16, 16, generator=torch.Generator().manual_seed(5))
    return {"pixel_values": values, "image_sizes": torch.tensor([[16, 32]]).expand(rows, 2).contiguous()}


def patches(rows: int) -> dict[str, Tensor]:
    """4 x 4 patches of two frames."""
    values = torch.randn(16 * rows, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(5))
    return {"pixel_values": values, "image_grid_thw": torch.tensor([[1, 4, 4]]).expand(rows, 3).contiguous()}


def spatial(rows: int) -> dict[str, Tensor]:
    """4 x 4 patches, which a mask and the shape go with."""
    values = torch.randn(rows, 16, 48, generator=torch.Generator().manual_seed(5))
    return {
        "pixel_values": values,
        "spatial_shapes": torch.full((rows, 2), 4),
        "pixel_attention_mask": torch.ones(rows, 16, dtype=torch.int64),
    }


def merged(rows: int) -> dict[str, Tensor]:
    values = torch.randn(16 * rows, 48, generator=torch.Generator().manual_seed(5))
    grids = torch.tensor([[1, 4, 4]]).expand(rows, 3).contiguous()
    return {"pixel_values": values, "image_grid_thw": grids, "image_merge_sizes": torch.full((rows,), 2)}


class Vision(NamedTuple):
    """What makes a model of it: sizes of its tower and its text beyond the usual, the rest of its config, its pictures,
    and how many tokens one of them takes."""

    architecture: str
    pictures: Callable[[int], dict[str, Tensor]]
    tokens: int
    tower: dict[str, Any]
    text: Mapping[str, Any] = MappingProxyType({})
    rest: Mapping[str, Any] = MappingProxyType({})


INDEX = {"image_token_index": IMAGE}
IDS = {"image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END}
GLM_IDS = {**IDS, "image_start_token_id": START, "image_end_token_id": END}
CLIP = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 16}
SIGLIP = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
PINPOINTS = {"image_grid_pinpoints": [[16, 32], [32, 16]]}

MODELS: dict[str, Vision] = {
    "Llava": Vision("Llava", pixels, 16, CLIP, {"model_type": "llama"}, INDEX),
    "VipLlava": Vision(
        "VipLlava", pixels, 16, CLIP, {"model_type": "llama"}, {**INDEX, "vision_feature_layers": [-1, 1]}
    ),
    "LLaVA-NeXT": Vision("LlavaNext", tiled, 52, CLIP, {"model_type": "llama"}, {**INDEX, **PINPOINTS}),
    "LLaVA-OneVision": Vision(
        "LlavaOnevision", tiled, 52, SIGLIP, {"model_type": "qwen2"}, {**INDEX, "video_token_index": VIDEO, **PINPOINTS}
    ),
    "Idefics2": Vision(
        "Idefics2",
        nested,
        3,
        TOWER,
        {"model_type": "mistral"},
        {
            "image_token_id": IMAGE,
            "perceiver_config": {
                "hidden_size": 32,
                "resampler_n_latents": 3,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "num_key_value_heads": 1,
                "resampler_head_dim": 8,
            },
        },
    ),
    "Idefics3": Vision("Idefics3", nested, 4, TOWER, {"model_type": "llama"}, {"image_token_id": IMAGE}),
    "SmolVLM": Vision("SmolVLM", nested, 4, TOWER, {"model_type": "llama"}, {"image_token_id": IMAGE}),
    "InternVL": Vision(
        "InternVL",
        pixels,
        4,
        {**TOWER, "image_size": [16, 16], "patch_size": [4, 4]},
        {"model_type": "qwen2"},
        {"image_token_id": IMAGE, "tie_word_embeddings": False},
    ),
    "Mistral 3": Vision(
        "Mistral3",
        sized,
        4,
        {**TOWER, "head_dim": 8, "model_type": "pixtral"},
        {"model_type": "mistral"},
        {**INDEX, "tie_word_embeddings": False},
    ),
    "LightOnOCR": Vision(
        "LightOnOcr",
        sized,
        4,
        {**TOWER, "head_dim": 8, "model_type": "pixtral"},
        {"model_type": "qwen3"},
        {"image_token_id": IMAGE},
    ),
    "AyaVision": Vision(
        "AyaVision",
        pixels,
        4,
        SIGLIP,
        {"model_type": "cohere2", "logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]},
        {**INDEX, "downsample_factor": 2},
    ),
    "Cohere2 Vision": Vision(
        "Cohere2Vision",
        pixels,
        4,
        SIGLIP,
        {"model_type": "cohere2", "logit_scale": 0.25, "layer_types": ["sliding_attention", "full_attention"]},
        {"image_token_id": IMAGE, "downsample_factor": 2, "alignment_intermediate_size": 64},
    ),
    "GOT-OCR2": Vision(
        "GotOcr2",
        pixels,
        1,
        {
            "image_size": 16,
            "patch_size": 4,
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "output_channels": 8,
            "window_size": 2,
            "global_attn_indexes": [1],
            "mlp_dim": 24,
        },
        {"model_type": "qwen2"},
        {"image_token_index": IMAGE},
    ),
    "Janus": Vision(
        "Janus",
        pixels,
        16,
        {**TOWER, "projection_dim": 32, "depth": 1},
        {"model_type": "llama"},
        {
            "image_token_id": IMAGE,
            "vq_config": {
                "embed_dim": 8,
                "num_embeddings": 16,
                "base_channels": 32,
                "channel_multiplier": [1, 1],
                "num_res_blocks": 1,
                "projection_dim": 32,
                "num_hidden_layers": 1,
                "hidden_size": 16,
                "image_token_embed_dim": 32,
                "latent_channels": 8,
            },
        },
    ),
    "LFM2-VL": Vision(
        "Lfm2Vl",
        spatial,
        4,
        {**TOWER, "num_patches": 16, "model_type": "siglip2_vision_model"},
        {"model_type": "lfm2", "layer_types": ["conv", "full_attention"]},
        {"image_token_id": IMAGE},
    ),
    "Gemma 3": Vision(
        "Gemma3",
        pixels,
        4,
        SIGLIP,
        {"sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"]},
        {
            **INDEX,
            "mm_tokens_per_image": 4,
            "tie_word_embeddings": False,
            "boi_token_index": START,
            "eoi_token_index": END,
        },
    ),
    "PaliGemma": Vision(
        "PaliGemma",
        pixels,
        16,
        {**SIGLIP, "projection_dim": 32},
        {"model_type": "gemma"},
        {**INDEX, "projection_dim": 32},
    ),
    "Qwen2-VL": Vision("Qwen2VL", patches, 4, QWEN_TOWER, MROPE, IDS),
    "Qwen2.5-VL": Vision(
        "Qwen2_5_VL", patches, 4, {**QWEN_TOWER, **OUT, "fullatt_block_indexes": [1], "window_size": 16}, MROPE, IDS
    ),
    "Qwen3-VL": Vision(
        "Qwen3VL",
        patches,
        4,
        {**QWEN_TOWER, **OUT, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        MROPE,
        IDS,
    ),
    "Qwen3-VL-MoE": Vision(
        "Qwen3VLMoe",
        patches,
        4,
        {**QWEN_TOWER, **OUT, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
        {**MROPE, **EXPERTS},
        IDS,
    ),
    "Qwen3.5": Vision(
        "Qwen3_5", patches, 4, {**QWEN_TOWER, **OUT, "num_position_embeddings": 16}, {**MROPE, **LINEAR}, IDS
    ),
    "GLM-4V": Vision("Glm4v", patches, 4, {**QWEN_TOWER, **OUT, "image_size": 16}, GLM_ROPE, GLM_IDS),
    "GLM-4V-MoE": Vision(
        "Glm4vMoe",
        patches,
        4,
        {**QWEN_TOWER, **OUT, "image_size": 16},
        {**GLM_ROPE, **EXPERTS, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        GLM_IDS,
    ),
    "Qianfan-OCR": Vision(
        "QianfanOCR",
        pixels,
        4,
        {**TOWER, "image_size": [16, 16], "patch_size": [4, 4], "drop_path_rate": 0.0},
        {"model_type": "qwen3"},
        {"image_token_id": IMAGE},
    ),
    "Exaone 4.5": Vision(
        "Exaone4_5_",
        patches,
        4,
        {**QWEN_TOWER, **OUT, "fullatt_block_indexes": [1], "num_key_value_heads": 2, "window_size": 16},
        {"model_type": "exaone4", "layer_types": ["sliding_attention", "full_attention"]},
        IDS,
    ),
    "Qwen3.5-MoE": Vision(
        "Qwen3_5Moe",
        patches,
        4,
        {**QWEN_TOWER, **OUT, "num_position_embeddings": 16},
        {**MROPE, **EXPERTS, "shared_expert_intermediate_size": 16, **LINEAR},
        IDS,
    ),
    "GLM-4.6V": Vision(
        "Glm46V",
        patches,
        4,
        {**QWEN_TOWER, **OUT, "image_size": 16, "model_type": "glm4v_vision"},
        {**GLM_ROPE, "model_type": "glm4v_text"},
        GLM_IDS,
    ),
    "GLM-OCR": Vision("GlmOcr", patches, 4, {**QWEN_TOWER, **OUT, "image_size": 16}, GLM_ROPE, GLM_IDS),
    "Video-LLaMA 3": Vision("VideoLlama3", merged, 4, TOWER, {"model_type": "qwen2"}, IDS),
    "Llama 4": Vision(
        "Llama4",
        pixels,
        4,
        {
            **TOWER,
            "vision_output_dim": 32,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "pixel_shuffle_ratio": 0.5,
        },
        {**EXPERTS, "intermediate_size_mlp": 48, "num_local_experts": 4},
        {"image_token_index": IMAGE},
    ),
    "Aria": Vision(
        "Aria",
        pixels,
        4,
        {**TOWER, "model_type": "idefics3_vision"},
        {"moe_num_experts": 4, "moe_topk": 2, "moe_num_shared_experts": 1},
        {"image_token_index": IMAGE, "projector_patch_to_query_dict": {"16": 4}},
    ),
    "DeepSeek-VL": Vision("DeepseekVL", pixels, 16, SIGLIP, {"model_type": "llama"}, {"image_token_id": IMAGE}),
    "LLaVA-NeXT-Video": Vision(
        "LlavaNextVideo", tiled, 52, CLIP, {"model_type": "llama"}, {**INDEX, "video_token_index": VIDEO, **PINPOINTS}
    ),
}


def build(name: str, vocab_size: int = VOCAB, image: int = IMAGE) -> nn.Module:
    """A random model; `image`: the token that stands for a piece of a picture."""
    vision = MODELS[name]
    rest = {key: image if value == IMAGE else value for key, value in vision.rest.items()}
    config = getattr(transformers, f"{vision.architecture}Config")(
        vision_config=dict(vision.tower), text_config={**TEXT, "vocab_size": vocab_size, **vision.text}, **rest
    )
    torch.manual_seed(1)
    return transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float32)


def make_pairs(name: str) -> list[dict[str, list[int]]]:
    """Two pairs with a picture in each prompt."""
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for lengths in ((5, 4), (3, 6)):
        before, behind, *answers = (torch.randint(3, END, (n,), generator=generator).tolist() for n in (2, 3, *lengths))
        prompt = [*before, START, *([IMAGE] * MODELS[name].tokens), END, *behind]
        pair: dict[str, list[int]] = {}
        for side, answer in zip(("chosen", "rejected"), answers, strict=True):
            pair[f"{side}_input_ids"] = prompt + answer
            pair[f"{side}_labels"] = [-100] * len(prompt) + answer
        pairs.append(pair)
    return pairs


def pictures(name: str, rows: int) -> dict[str, Tensor]:
    return MODELS[name].pictures(rows)


def padded_batch(name: str, model: nn.Module) -> dict[str, Tensor]:
    pairs = make_pairs(name)
    batch = pad_pairs(pairs, 0)
    batch |= {key: torch.cat((value, value)) for key, value in pictures(name, len(pairs)).items()}
    return batch | token_types(model, batch["input_ids"])


def token_types(model: nn.Module, input_ids: Tensor) -> dict[str, Tensor]:
    takes = inspect.signature(model.forward).parameters
    kinds = [key for key in ("token_type_ids", "mm_token_type_ids") if key in takes]
    return {key: (input_ids == IMAGE).long() for key in kinds}


def by_logits(model: nn.Module, batch: dict[str, Tensor], **options: Any) -> ORPOOutput:
    """The definition in float64 on the model's own logits; tokens of a picture are no targets."""
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    logits = model(**inputs, use_cache=False).logits
    ids, labels = batch["input_ids"], batch["labels"]
    nll = torch.where((batch["attention_mask"] == 1) & (ids != IMAGE), ids, -100)
    identity = torch.eye(logits.shape[-1], dtype=torch.float64)
    return reference.orpo_loss(
        logits.double(), identity, labels, nll_labels=nll[: len(labels) // 2], shift=True, **options
    )


# --- the table -------------------------------------------------------------------------------------------------------


def row(name: str) -> str:
    """The model's line in the table, found out by trying."""
    model = build(name).train()
    found = own_logits(model, padded_batch(name, model), by_logits), shared(name, model)
    return f"| {' | '.join((name, type(model).__name__, *found))} |"


def shared(name: str, model: nn.Module) -> str:
    try:
        reason = refuses_shared_prompt(model, images=True)
    except ValueError:
        return "refused with the head"
    if reason:
        return f"refused: {reason.partition('prompts: ')[2].rstrip('.')}"
    pairs = make_pairs(name)
    padded = causal_lm_orpo_loss(model, **padded_batch(name, model), beta=0.5)
    batch = pack_pairs(pairs, 0, capacity=0) | pictures(name, len(pairs))
    try:
        assert_same(causal_lm_orpo_loss(model, **batch, beta=0.5), padded, model)
    except AssertionError:
        return "**differs**"
    return "exact"


PAGE = Path(__file__).parents[1] / "docs" / "images.md"


def table() -> list[str]:
    lines = ["| model | class | loss, gradients | shared prompt and picture |", "|---|---|---|---|"]
    return [*lines, *map(row, MODELS)]


if __name__ == "__main__":
    write_table(PAGE, "vision_models", table())
