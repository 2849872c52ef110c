"""The README's code runs as it stands there."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers

from .test_collator import byte_level

BLOCKS = re.findall(r"```python\n(.*?)```", Path(__file__).parents[1].joinpath("README.md").read_text(), re.DOTALL)


def test_the_code_blocks_run():
    tokenizer = byte_level()
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    labels = torch.randint(len(tokenizer), (4, 9))
    labels[:, :4] = -100
    names = {
        "model": transformers.LlamaForCausalLM(config),
        "tokenizer": tokenizer,
        "input_ids": torch.randint(len(tokenizer), (4, 9)),
        "attention_mask": torch.ones(4, 9, dtype=torch.int64),
        "labels": labels,
        "examples": [{"prompt": "2 + 2 = ", "chosen": "four", "rejected": "five"}] * 2,
    }
    assert len(BLOCKS) == 2
    for block in BLOCKS:
        exec(block, names)
    assert names["model"].lm_head.weight.grad.isfinite().all()
    assert names["loss"].isfinite()
