"""Tiny random encoder-decoder models, and what is true of each: `python -m tests.encoder_decoder`.

Writes the table of docs/encoder_decoder.md: whether loss and gradients are those of the model's own logits, or who
refuses and why.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from orpo_kernels import reference
from orpo_kernels.transformers import causal_lm_orpo_loss, resolve_lm_head
from orpo_kernels.transformers.versions import version_of

from .models import VOCAB, assert_same, write_table

SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 0}
T5 = {"vocab_size": VOCAB, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
BART = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    "scale_embedding": False,
    **{f"{part}_{size}": n for part in ("encoder", "decoder") for size, n in (("layers", 2), ("ffn_dim", 48))},
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    **{f"{where}dropout": 0.0 for where in ("", "attention_", "activation_")},
    **{f"{part}_layerdrop": 0.0 for part in ("encoder", "decoder")},
}
GEMMA = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 4,
    "final_logit_softcapping": 2.0,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "query_pre_attn_scalar": 8,
    "initializer_range": 0.2,
    "layer_types": ["sliding_attention", "full_attention"],
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
LED = {"attention_window": 4, "max_encoder_position_embeddings": 64, "max_decoder_position_embeddings": 64}
NLLB_MOE = {"num_experts": 2, "expert_capacity": 64, "router_jitter_noise": 0.0, "moe_token_dropout": 0.0}
PROPHETNET = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "max_position_embeddings": 64,
    "init_std": 0.2,
    **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
    **{f"num_{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")},
}
FSMT = {**BART, "src_vocab_size": VOCAB, "tgt_vocab_size": VOCAB, "langs": ["en", "de"]}
UNTIED = {"tie_word_embeddings": False}
# Name, architecture, what its config says, and the transformers that has it.
MODELS: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "T5: tied, scaled": ("T5", T5, ()),
    "T5 1.1 and Flan-T5: gated, untied": ("T5", {**T5, **UNTIED, "feed_forward_proj": "gated-gelu"}, ()),
    "mT5: untied": ("MT5", {**T5, **UNTIED}, ()),
    "mT5: tied": ("MT5", T5, ()),
    "UMT5: tied, scaled": ("UMT5", T5, ()),
    "LongT5: local": ("LongT5", {**T5, "local_radius": 3}, ()),
    "Switch": ("SwitchTransformers", {**T5, "num_experts": 2, "expert_capacity": 64, "router_jitter_noise": 0.0}, ()),
    "BART: bias": ("Bart", BART, ()),
    "mBART: bias": ("MBart", BART, ()),
    "PLBart: bias": ("PLBart", BART, ()),
    "Pegasus: bias": ("Pegasus", BART, ()),
    "Marian: bias": ("Marian", BART, ()),
    "Blenderbot: bias": ("Blenderbot", BART, ()),
    "M2M100, NLLB": ("M2M100", BART, ()),
    "BigBird-Pegasus: bias": ("BigBirdPegasus", {**BART, "attention_type": "original_full"}, ()),
    "Pegasus-X": ("PegasusX", {**BART, "num_global_tokens": 2, "block_size": 4}, ()),
    "LED: bias": ("LED", {**BART, **LED}, ()),
    "MVP: bias": ("Mvp", BART, ()),
    "Blenderbot small: bias": ("BlenderbotSmall", BART, ()),
    "NLLB-MoE": ("NllbMoe", {**BART, **NLLB_MOE}, ()),
    "T5Gemma: soft-cap": ("T5Gemma", {"encoder": GEMMA, "decoder": GEMMA}, (5,)),
    "T5Gemma2: soft-cap": (
        "T5Gemma2",
        {"encoder": {"text_config": GEMMA, "vision_config": VISION}, "decoder": GEMMA},
        (5,),
    ),
}
# What is refused, and how the table says it.
REFUSED: dict[str, tuple[str, dict[str, Any], tuple[int, ...]]] = {
    "ProphetNet": ("ProphetNet", PROPHETNET, ()),
    "FSMT": ("FSMT", FSMT, ()),
}


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> nn.Module:
    architecture, settings, since = (MODELS | REFUSED)[name]
    if version_of("transformers") < since:
        pytest.skip(f"{name} is not in transformers {transformers.__version__}, or another one")
    config = getattr(transformers, f"{architecture}Config")(**{**SPECIAL, **settings, **changes})
    torch.manual_seed(1)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=dtype)
    if "untied" in name:  # which transformers 5 takes from the checkpoint, not from the config
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().flip(0))
    if hasattr(model, "final_logits_bias"):
        nn.init.normal_(model.final_logits_bias)
    return model


def make_batch() -> dict[str, Tensor]:
    """Two pairs: prompts of 7 and 5 tokens, answers of 6, 4, 5 and 3."""
    generator = torch.Generator().manual_seed(3)

    def padded(lengths: list[int], padding: int) -> Tensor:
        rows = [torch.randint(3, VOCAB, (length,), generator=generator) for length in lengths]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=padding)

    prompts = padded([7, 5], 0)
    return {"input_ids": prompts, "attention_mask": (prompts != 0).long(), "labels": padded([6, 4, 5, 3], -100)}


def own_logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """(2B, T, V): of the model's own forward, which runs its encoder for every answer, and shifts by itself."""
    repeated = {name: batch[name].repeat(2, 1) for name in ("input_ids", "attention_mask")}
    return model(**repeated, labels=batch["labels"]).logits


def by_logits(logits: Tensor, labels: Tensor, **options: Any) -> Any:
    """The definition on logits, in float64."""
    identity = torch.eye(logits.shape[-1], dtype=torch.float64)
    return reference.orpo_loss(logits.double(), identity, labels, shift=False, **options)


# --- the table -----------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "encoder_decoder.md"


def table() -> list[str]:
    lines = ["| model | class | head | loss, gradients |", "|---|---|---|---|"]
    return lines + [line(name, build(name), own_logits_say(name)) for name in MODELS | REFUSED]


def line(name: str, model: nn.Module, finding: str) -> str:
    return f"| {name} | {type(model).__name__} | {head_of(model)} | {finding} |"


def head_of(model: nn.Module) -> str:
    try:
        found = resolve_lm_head(model)
    except ValueError:
        return ""
    parts = [
        "tied" if found.weight is model.get_decoder().get_input_embeddings().weight else "",
        "bias" if found.bias is not None else "",
        f"x {found.logit_scale:.3g}" if found.logit_scale != 1 else "",
        f"soft-cap {found.logit_softcap:g}" if found.logit_softcap is not None else "",
    ]
    return ", ".join(filter(None, parts)) or "linear"


def own_logits_say(name: str) -> str:
    model, batch = build(name).train(), make_batch()
    try:
        ours = causal_lm_orpo_loss(model, **batch, beta=0.5)
    except ValueError as refusal:
        finding = re.split("the model does more: |encoder-decoder model whose ", str(refusal))[-1]
        return f"refused: {re.sub(' by [0-9].*|;.*', '', finding)}"  # the number is the machine's
    assert_same(ours, by_logits(own_logits(model, batch), batch["labels"], beta=0.5), model)
    return "equal"


if __name__ == "__main__":
    write_table(PAGE, "encoder_decoder", table())
