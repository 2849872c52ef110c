"""Tiny models and preference data for the tests of the trainers."""

from __future__ import annotations

import copy
import functools
import importlib
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from orpo_kernels.transformers import PreferenceCollator, PreferenceTrainer
from orpo_kernels.transformers.versions import sampling, version_of

from .chats import chat
from .test_collator import byte_level

if version_of("transformers") < (5,):  # it logs losses with four digits
    importlib.import_module("transformers.trainer").round = lambda value, digits: value

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "pad_token_id": 2,
    "bos_token_id": None,
    "eos_token_id": 2,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}
QUESTIONS = ("What is it?", "The cat sat on the mat. Is it so?", "f(x)?", "foo bar, or bar foo? Say one.")
ANSWERS = ("It is so.", "No.", "The dog sat, too. It is so!", "def f(x): return x + 1")


@functools.cache
def tokenizer() -> Any:
    return byte_level()


def tiny(architecture: str = "Llama", **changes: Any) -> nn.Module:
    """A random model of the tokenizer's vocabulary; the same weights at every call."""
    config = getattr(transformers, f"{architecture}Config")(**{**SIZES, "vocab_size": len(tokenizer()), **changes})
    torch.manual_seed(1)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)


def chat_examples(count: int = 24) -> list[dict[str, Any]]:
    """Pairs of different lengths: a micro-batch of them has other numbers of tokens than the next."""
    examples = []
    for i in range(count):
        question, chosen = QUESTIONS[i % 4] * (1 + i % 3), ANSWERS[(i * 3 + 1) % 4] * (1 + i % 2)
        examples.append(chat(question, chosen, ANSWERS[(i + i // 4 + 2) % 4] + f" {i}"))
    return examples


def settings(folder: Any, **changes: Any) -> dict[str, Any]:
    """Training arguments that say everything that matters here."""
    order = sampling(changes.pop("train_sampling_strategy", "sequential"))
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 4,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        **order,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "use_cpu": True,
        **changes,
    }


def collator(packing: Any = "auto", **options: Any) -> PreferenceCollator:
    return PreferenceCollator(tokenizer(), **{"max_length": 96, "packing": packing, **options})


OWN = ("beta", "loss_options", "ref_model", "train_dataset", "eval_dataset", "data_collator", "compute_metrics")


def trainer_of(folder: Any, method: str = "orpo", model: nn.Module | None = None, **options: Any) -> PreferenceTrainer:
    """Over eight pairs; `options`: of the trainer where they are its own, else training arguments."""
    own = {"data_collator": collator(), "train_dataset": chat_examples(8), "eval_dataset": chat_examples(5)}
    own |= {name: options.pop(name) for name in OWN if name in options}
    arguments = transformers.TrainingArguments(**settings(folder, **options))
    return PreferenceTrainer(tiny() if model is None else model, arguments, method=method, **own)


def trained(*args: Any, **options: Any) -> PreferenceTrainer:
    """`trainer_of`, when it has trained."""
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer


def trl_trainer_of(
    folder: Any, pairs: Any, packing: Any = "padded", model: nn.Module | None = None, **options: Any
) -> Any:
    """The drop-in for TRL's trainer, which trains on the pairs and evaluates them; `options`: of its config."""
    pytest.importorskip("trl.experimental.orpo")
    from datasets import Dataset

    from orpo_kernels.trl import ORPOConfig, ORPOTrainer

    data = pairs if isinstance(pairs, Dataset) else Dataset.from_list(pairs)
    return ORPOTrainer(
        tiny() if model is None else model,
        ORPOConfig(**settings(folder, **{"max_length": 96, **options})),
        train_dataset=data,
        eval_dataset=data,
        processing_class=tokenizer(),
        packing=packing,
    )


def without_timings(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """The logs without what differs between any two runs."""
    timings = ("runtime", "per_second", "preparation_time", "total_flos")
    return [{key: value for key, value in logs.items() if not key.endswith(timings)} for logs in history]


def assert_same_logs(ours: list[dict[str, float]], theirs: list[dict[str, float]], tolerance: float = 1e-4) -> None:
    """The same keys, and values to `tolerance`, relative: of metrics near 0, to a hundredth of that, absolute."""
    ours, theirs = without_timings(ours), without_timings(theirs)
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.keys() == other.keys(), mine.keys() ^ other.keys()
        for key, value in other.items():
            difference = abs(mine[key] - value)
            assert difference <= tolerance * max(abs(value), 0.01), (key, mine[key], value)


def losses(trainer: Any) -> list[float]:
    return [logs["loss"] for logs in trainer.state.log_history if "loss" in logs]


def grad_norms(trainer: Any) -> list[float]:
    return [logs["grad_norm"] for logs in trainer.state.log_history if "grad_norm" in logs]


def copies(model: nn.Module, count: int = 2) -> list[nn.Module]:
    return [copy.deepcopy(model) for _ in range(count)]
