"""docs/models.md is what the code says today, and what it names is found out by trying, too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from orpo_kernels.transformers import PackedPairs, refuses_shared_prompt, sharing

from .models import MODELS, PAGE, WITH_MORE_THAN_A_HEAD, build, lines_of, row

LINES = lines_of(PAGE)


@pytest.mark.parametrize("name", MODELS | WITH_MORE_THAN_A_HEAD)
def test_the_table_tells_what_is_true(name):
    line = row(name)
    assert "differ**" not in line
    assert "differs**" not in line
    assert line in LINES, "run python -m tests.models"


def test_the_table_holds_no_other_model():
    assert len(LINES) == 1 + len(MODELS | WITH_MORE_THAN_A_HEAD)


# --- sharing prompts: what the trial sees --------------------------------------------------------------------------


# The first two of them take no 4-D mask, so that there is nothing to compare.
@pytest.mark.parametrize(
    "name",
    [
        *("BLOOM: ALiBi", "Falcon: ALiBi", "MPT: ALiBi", "Qwen3-Next", "RecurrentGemma: soft-cap", "LFM2", "Mamba2"),
        *("Jamba", "FalconH1: factor", "RWKV"),
    ],
)
def test_what_is_known_is_found_by_trying_too(name, monkeypatch):
    monkeypatch.setattr(sharing, "_known_obstacle", lambda inner, config: None)
    finding = "fails on a 4-D attention mask" if name in ("BLOOM: ALiBi", "Falcon: ALiBi") else "sequence differ by"
    assert finding in refuses_shared_prompt(build(name))


WITH_WINDOW = [name for name, (_, extra) in MODELS.items() if extra.get("sliding_window")]


@pytest.mark.parametrize("name", WITH_WINDOW)
def test_a_window_left_out_would_be_found(name, monkeypatch):
    model, mask = build(name), PackedPairs.attention_mask
    assert refuses_shared_prompt(model) is None
    monkeypatch.setattr(PackedPairs, "attention_mask", lambda packed, window=None: mask(packed))
    sharing._tried.clear()
    assert "sequence differ by" in refuses_shared_prompt(model)
    assert model.config.sliding_window == 4


@pytest.mark.parametrize("name", ["Llama", "GPT-2: absolute positions, tied", "OPT: absolute positions, tied"])
def test_positions_that_run_on_along_the_row_would_be_found(name, monkeypatch):
    make = sharing.pack_pairs

    def along_the_row(*arguments: Any, **options: Any) -> dict[str, Any]:
        batch = make(*arguments, **options)
        places = torch.arange(batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
        return batch | {"packed": replace(batch["packed"], position_ids=places)}

    monkeypatch.setattr(sharing, "pack_pairs", along_the_row)
    assert "rejected sequence differ by" in refuses_shared_prompt(build(name))


def test_a_mask_that_hides_nothing_would_be_found(monkeypatch):
    def causal(packed: PackedPairs, window: int | None = None) -> torch.Tensor:
        width = packed.segments.shape[1]
        return torch.ones(width, width, dtype=torch.bool).tril().expand(len(packed.segments), 1, -1, -1)

    monkeypatch.setattr(PackedPairs, "attention_mask", causal)
    assert "rejected sequence differ by" in refuses_shared_prompt(build("Llama"))


def test_the_trial_runs_once_and_leaves_no_trace(monkeypatch):
    trials, trial = [], sharing._trial
    monkeypatch.setattr(sharing, "_trial", lambda *arguments: trials.append(1) or trial(*arguments))
    model = build("GPT-2: absolute positions, tied", attn_pdrop=0.3).train()
    model.transformer.h[0].eval()
    modes, state = [module.training for module in model.modules()], torch.get_rng_state()
    for _ in range(3):
        assert refuses_shared_prompt(model) is None
    assert len(trials) == 1
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in model.parameters())
    model.set_attn_implementation("eager")
    assert refuses_shared_prompt(model) is None
    assert len(trials) == 2


def test_attention_without_masks_and_router_losses_are_refused():
    model = build("Llama")
    model.config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2 takes no 4-D attention mask" in refuses_shared_prompt(model)
    assert "its router loss" in refuses_shared_prompt(build("Mixtral", output_router_logits=True))
