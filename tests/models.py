"""Tiny random instances of the models of transformers, and what is true of each: `python -m tests.models`.

Writes the table of docs/models.md: whether loss and gradients are those of the model's own logits, and those of the
padded batch where prompts are shared, or who refuses and why.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from orpo_kernels import ORPOOutput, reference
from orpo_kernels.transformers import TokenizedPair, causal_lm_orpo_loss, refuses_shared_prompt, resolve_lm_head
from orpo_kernels.transformers.collator import pad_pairs
from orpo_kernels.transformers.packing import pack_pairs
from orpo_kernels.transformers.versions import version_of

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Weights ten times as large as usual, so that logits reach the soft-caps.
    "initializer_range": 0.2,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.2,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "attn_pdrop": 0.0,
}
# Sequences of the batches below are longer than this window.
WINDOW = {"sliding_window": 4, "use_sliding_window": True}
TWO_KINDS = {**WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
DEEPSEEK = LATENT | EXPERTS | {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "num_key_value_heads": 4}
LINEAR = {"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4}
FALCON_H1 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_d_state": 8, "num_key_value_heads": 4}
MAMBA2 = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "num_key_value_heads": None}
MPT = {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": VOCAB, "initializer_range": 0.2}
FALCON = {"num_kv_heads": 4, "head_dim": None, "num_key_value_heads": None, "intermediate_size": None}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0, "init_std": 0.2}

# Name of the architecture, and what its config says beyond the sizes (None: not even that).
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Llama, tied": ("Llama", {"tie_word_embeddings": True}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Mistral: window": ("Mistral", WINDOW),
    "Ministral: window": ("Ministral", TWO_KINDS),
    "Mixtral": ("Mixtral", EXPERTS),
    "Mixtral: window": ("Mixtral", {**EXPERTS, **WINDOW}),
    "Qwen2": ("Qwen2", {}),
    "Qwen2, tied": ("Qwen2", {"tie_word_embeddings": True}),
    "Qwen2: window": ("Qwen2", TWO_KINDS),
    "Qwen2-MoE": ("Qwen2Moe", {**EXPERTS, "shared_expert_intermediate_size": 16}),
    "Qwen3": ("Qwen3", {}),
    "Qwen3-MoE": ("Qwen3Moe", EXPERTS),
    "Qwen3-Next": ("Qwen3Next", {**EXPERTS, **LINEAR, "shared_expert_intermediate_size": 16}),
    "Gemma, tied": ("Gemma", {"tie_word_embeddings": True}),
    "Gemma2: soft-cap, tied": ("Gemma2", {"final_logit_softcapping": 2.0, "tie_word_embeddings": True, **TWO_KINDS}),
    "Gemma2 without soft-cap": ("Gemma2", {"final_logit_softcapping": None}),
    "Gemma3: soft-cap": ("Gemma3Text", {"final_logit_softcapping": 2.0, **TWO_KINDS}),
    "RecurrentGemma: soft-cap": ("RecurrentGemma", {"logits_soft_cap": 0.5, "lru_width": 32}),
    "Phi: bias": ("Phi", {}),
    "Phi-3: window": ("Phi3", WINDOW),
    "Phi-MoE: bias": ("Phimoe", {**EXPERTS, "lm_head_bias": True, "router_jitter_noise": 0.0}),
    "SmolLM3": ("SmolLM3", {}),
    "Cohere: factor, tied": ("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
    "Cohere2: factor, window": ("Cohere2", {"logit_scale": 0.25, **TWO_KINDS}),
    "Granite: divisor": ("Granite", {"logits_scaling": 4.0}),
    "Granite-MoE: divisor": ("GraniteMoe", {**EXPERTS, "logits_scaling": 4.0}),
    "HyperCLOVAX: factor under Granite's name": ("HyperCLOVAX", {"logits_scaling": 4.0}),
    "OLMo2": ("Olmo2", {}),
    "OLMo3: window": ("Olmo3", TWO_KINDS),
    "OLMoE": ("Olmoe", EXPERTS),
    "StableLM": ("StableLm", {}),
    "StarCoder2: window": ("Starcoder2", {**WINDOW, "embedding_dropout": 0.0, "residual_dropout": 0.0}),
    "DeepSeek-V2": ("DeepseekV2", {**DEEPSEEK, "first_k_dense_replace": 1}),
    "DeepSeek-V3": ("DeepseekV3", {**DEEPSEEK, "first_k_dense_replace": 1}),
    "GLM": ("Glm", {}),
    "GLM4": ("Glm4", {}),
    "GLM4-MoE": ("Glm4Moe", {**DEEPSEEK, "num_key_value_heads": 2, "first_k_dense_replace": 1}),
    "gpt-oss: window": ("GptOss", {**EXPERTS, **TWO_KINDS}),
    "EXAONE4: window": ("Exaone4", TWO_KINDS),
    "ERNIE 4.5": ("Ernie4_5", {}),
    "Hunyuan": ("HunYuanDenseV1", {}),
    "Seed-OSS": ("SeedOss", {"residual_dropout": 0.0, "attention_dropout": 0.0}),
    "Apertus": ("Apertus", {}),
    "Arcee": ("Arcee", {}),
    "BitNet": ("BitNet", {}),
    "Nemotron": ("Nemotron", {}),
    "Helium": ("Helium", {}),
    "Persimmon": ("Persimmon", {}),
    "MiniMax-M2": ("MiniMaxM2", EXPERTS),
    "GPT-2: absolute positions, tied": ("GPT2", {}),
    "GPT-BigCode: absolute positions, tied": ("GPTBigCode", {}),
    "GPT-NeoX": ("GPTNeoX", {}),
    "GPT-J: bias": ("GPTJ", {"rotary_dim": 4}),
    "CodeGen: bias": ("CodeGen", {"rotary_dim": 4}),
    "GPT-Neo": ("GPTNeo", {"attention_types": [[["global", "local"], 1]], "window_size": 4, "head_dim": None}),
    "OPT: absolute positions, tied": ("OPT", OPT),
    "Falcon": ("Falcon", FALCON),
    "Falcon: ALiBi": ("Falcon", {**FALCON, "alibi": True}),
    "BLOOM: ALiBi": ("Bloom", {}),
    "MPT: ALiBi": ("Mpt", {}),
    "Doge": ("Doge", {"keep_window_size": 8}),
    "LFM2": ("Lfm2", {"layer_types": ["conv", "full_attention"]}),
    "Mamba2": ("Mamba2", MAMBA2),
    "Jamba": ("Jamba", {**EXPERTS, "mamba_d_state": 8, "attn_layer_period": 2, "attn_layer_offset": 1}),
    "FalconH1: factor": ("FalconH1", {"lm_head_multiplier": 3.0, **FALCON_H1}),
    "RWKV": ("Rwkv", {"attention_hidden_size": 32}),
}
# Decoders with a layer between body and head, which the loss refuses.
WITH_MORE_THAN_A_HEAD: dict[str, tuple[str, dict[str, Any]]] = {
    "ModernBERT decoder": ("ModernBertDecoder", {}),
    "RemBERT": ("RemBert", {"is_decoder": True, "output_embedding_size": 16, "input_embedding_size": 16}),
}
# Before these versions of transformers (of those in tests/versions) a model is missing, does not run, or is refused in
# other words than in the table.
SINCE = {
    **dict.fromkeys(("MiniMax-M2", "GPT-Neo", "FalconH1: factor", "RWKV"), (5, 6)),
    **dict.fromkeys(("HyperCLOVAX: factor under Granite's name", "Mamba2", "Jamba"), (5, 16)),
    "RemBERT": (5, 19),
    "RecurrentGemma: soft-cap": (5, 23),
}
OWN_SIZES = {"GPT2": GPT2, "GPTBigCode": GPT2, "GPTJ": GPT2, "CodeGen": GPT2, "Mpt": MPT}
ALWAYS_TIED = ("GPT2", "GPTBigCode", "Mpt", "Bloom", "OPT")


def build(name: str, **changes: Any) -> nn.Module:
    if version_of("transformers") < SINCE.get(name, ()):
        pytest.skip(f"{name} is another one in transformers {transformers.__version__}")
    architecture, extra = (MODELS | WITH_MORE_THAN_A_HEAD)[name]
    settings = {**OWN_SIZES.get(architecture, SIZES), "tie_word_embeddings": architecture in ALWAYS_TIED}
    settings |= extra | changes
    settings = {key: value for key, value in settings.items() if value is not None or key not in SIZES}
    config = getattr(transformers, f"{architecture}Config")(**settings)
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def make_batch(left: bool = False) -> dict[str, Tensor]:
    """Two pairs of different lengths, and prompts of 4 tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths, prompt = [12, 9, 10, 7], 4
    batch = {"input_ids": torch.zeros(4, 12), "attention_mask": torch.zeros(4, 12), "labels": torch.full((4, 12), -100)}
    batch = {key: value.long() for key, value in batch.items()}
    for row, length in enumerate(lengths):
        ids = torch.randint(3, VOCAB, (length,), generator=generator)
        place = slice(12 - length, 12) if left else slice(0, length)
        batch["input_ids"][row, place] = ids
        batch["attention_mask"][row, place] = 1
        batch["labels"][row, place] = torch.where(torch.arange(length) < prompt, -100, ids)
    return batch


def by_logits(model: nn.Module, batch: dict[str, Tensor], prompt_nll: bool = True, **options: Any) -> ORPOOutput:
    """The definition in float64 on the model's own logits, which pass for hidden states of an identity head."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    mask, labels = batch["attention_mask"], batch["labels"]
    after_token = nn.functional.pad(mask[:, :-1], (1, 0))
    nll = torch.where(mask * after_token == 1, batch["input_ids"] if prompt_nll else labels, -100)
    identity = torch.eye(logits.shape[-1], dtype=torch.float64)
    return reference.orpo_loss(
        logits.double(), identity, labels, nll_labels=nll[: len(labels) // 2], shift=True, **options
    )


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(ours: ORPOOutput, theirs: ORPOOutput, model: nn.Module, tolerance: float = 2e-5) -> None:
    for field in ("loss", "nll_loss", "or_loss", "chosen_logps", "rejected_logps", "log_odds"):
        torch.testing.assert_close(
            getattr(ours, field).double(), getattr(theirs, field).double(), rtol=tolerance, atol=tolerance, msg=field
        )
    expected, found = gradients(model, theirs.loss), gradients(model, ours.loss)
    assert found.keys() == expected.keys()
    assert found
    largest = max(float(grad.norm()) for grad in expected.values())
    for name, grad in expected.items():
        difference = float((found[name] - grad).norm())
        assert difference <= 10 * tolerance * float(grad.norm()) + 1e-6 * largest, name


# --- batches with and without shared prompts -----------------------------------------------------------------------


def make_pairs(*lengths: tuple[int, int, int]) -> list[TokenizedPair]:
    """Tokenised pairs of these lengths of prompt, chosen and rejected answer."""
    generator = torch.Generator().manual_seed(3)
    pairs = []
    for length in lengths or ((4, 6, 5), (3, 3, 2), (2, 2, 2)):  # two rows: one pair; two pairs and padding
        prompt, *answers = (torch.randint(3, VOCAB, (size,), generator=generator).tolist() for size in length)
        sides = [(prompt + answer, [-100] * len(prompt) + answer) for answer in answers]
        (chosen, chosen_labels), (rejected, rejected_labels) = sides
        pairs.append(
            TokenizedPair(
                chosen_input_ids=chosen,
                chosen_labels=chosen_labels,
                rejected_input_ids=rejected,
                rejected_labels=rejected_labels,
            )
        )
    return pairs


def assert_sharing_is_exact(model: nn.Module, pairs: list[TokenizedPair], **options: Any) -> None:
    padded = causal_lm_orpo_loss(model, **pad_pairs(pairs, 0), **options)
    shared = causal_lm_orpo_loss(model, **pack_pairs(pairs, 0, capacity=0), **options)
    assert_same(shared, padded, model)


# --- the table -----------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parents[1] / "docs" / "models.md"


def write_table(page: Path, module: str, lines: Iterable[str]) -> None:
    """Put the lines between the marks of the page."""
    begin, end = f"<!-- table: python -m tests.{module} -->", "<!-- end of table -->"
    before, _, rest = page.read_text().partition(begin)
    page.write_text(f"{before}{begin}\n\n" + "\n".join(lines) + f"\n\n{end}{rest.partition(end)[2]}")
    print(page.read_text())


def lines_of(page: Path) -> list[str]:
    """The header and the lines of models of its table."""
    return [line for line in page.read_text().splitlines() if line.startswith("| ")]


def table() -> list[str]:
    lines = ["| model | class | head | loss, gradients | shared prompt |", "|---|---|---|---|---|"]
    return [*lines, *map(row, MODELS | WITH_MORE_THAN_A_HEAD)]


def row(name: str) -> str:
    """The model's line in the table, found out by trying."""
    model = build(name).train()
    found = own_logits(model, make_batch(), by_logits), shared_prompt(model)
    return f"| {' | '.join((name, type(model).__name__, head(model), *found))} |"


def head(model: nn.Module) -> str:
    found = resolve_lm_head(model)
    parts = [
        "tied" if found.weight is model.get_input_embeddings().weight else "",
        "bias" if found.bias is not None else "",
        f"x {found.logit_scale:g}" if found.logit_scale != 1 else "",
        f"soft-cap {found.logit_softcap:g}" if found.logit_softcap is not None else "",
    ]
    return ", ".join(filter(None, parts)) or "linear"


def own_logits(model: nn.Module, batch: dict[str, Tensor], by_logits: Callable[..., ORPOOutput]) -> str:
    """Whether loss and gradients are those that the definition gives on the model's own logits, or who refuses."""
    try:
        ours = causal_lm_orpo_loss(model, **batch, beta=0.5)
    except ValueError as refusal:
        finding = str(refusal).rpartition("the model does more: ")[2]
        return f"refused: {re.sub(' by [0-9].*', '', finding).rstrip('.')}"  # the number is the machine's
    try:
        assert_same(ours, by_logits(model, batch, beta=0.5), model)
    except AssertionError:
        return "**differ**"
    return "equal"


def shared_prompt(model: nn.Module) -> str:
    if reason := refuses_shared_prompt(model):
        return f"refused: {reason.partition('prompts: ')[2].rstrip('.')}"
    try:
        assert_sharing_is_exact(model, make_pairs(), beta=0.5)
    except ValueError:
        return "refused with the head"
    except AssertionError:
        return "**differs**"
    return "exact"


if __name__ == "__main__":
    write_table(PAGE, "models", table())
