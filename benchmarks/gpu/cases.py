"""What the parts of a run have in common: sizes, a case, the reason that one is left out, and how calls are timed."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.contest.turns import Marks
from benchmarks.shapes import SHAPES, ModelShape

WARM_UP = 2  # calls of each before the timed ones: the first compiles
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


def device_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Of one call on the device's own time line; several in a row hide the host's share of all but the first."""
    marks = Marks(device)
    marks.add()
    for _ in range(repeats):
        call()
    marks.add()
    return marks.seconds()[0] / repeats


def wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call from an idle device until it is idle again: what the host takes is in it."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def alternate(
    calls: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[Callable[[], Any]], float]
) -> dict[str, list[float]]:
    """Seconds of every call in every round: all take turns, in a new order each time."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    for i_round in range(WARM_UP + rounds):
        for name in order.sample(list(calls), len(calls)):
            seconds = clock(calls[name])
            if i_round >= WARM_UP:
                times[name].append(seconds)
    return times


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
