"""What the parts of a run have in common: sizes, a case, and the reason that one is left out."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.shapes import SHAPES, ModelShape

QUICK_ROUNDS = 3
MODELS = ("Llama-3-8B", "Llama-3.2-1B", "Qwen3-0.6B", "SmolLM2-135M", "Gemma-2-2B")


class Skip(Exception):
    """A case that cannot be measured here; its text is the reason, which stands in the results."""


@dataclass(frozen=True)
class Case:
    """One record of the results."""

    key: str
    run: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Step:
    """What a whole step is of: a Llama's configuration, and batches of pairs of at most `max_length` bytes each."""

    config: Mapping[str, Any]
    pairs: int
    max_length: int


LLAMA_1B = {  # Llama-3.2-1B's
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
STEPS = {"long prompts": Step(LLAMA_1B, 4, 1024), "short prompts": Step(LLAMA_1B, 8, 256)}


@dataclass(frozen=True)
class Settings:
    """Where it runs and at which sizes: a GPU's, unless a test makes them small."""

    device: str = "cuda"
    seconds: float = 60.0  # that the part has
    backend: str = "triton"  # of the kernels that are timed one by one
    rounds: int = 7
    models: tuple[ModelShape, ...] = tuple(SHAPES[name] for name in MODELS)
    pairs: int = 4
    length: int = 1024
    vocabularies: tuple[int, ...] = (128256, 49152)
    chunk_bytes: int = 2**28  # of the row-wise kernels: several times an L2 cache
    steps: Mapping[str, Step] = field(default_factory=lambda: STEPS)
    attention: tuple[str, ...] = ("sdpa", "flex_attention", "orpo_varlen")
