"""A whole training step (`contest/training_step.py`) of a model with random weights, on made-up text, token for byte.

Nothing is downloaded: the model is built from its configuration, the tokenizer from the 256 bytes. What it learns is of
no interest; the work is that of a model of this shape on pairs of these lengths.
"""

from __future__ import annotations

import importlib.util
import random
import string
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.contest import training_step
from benchmarks.contest.training_step import PARTS, TRL, Bench
from benchmarks.contest.turns import release
from benchmarks.gpu.cases import Case, Settings, Skip, Step
from benchmarks.report.tables import step_medians

NEEDED = ("transformers", "accelerate", "datasets")
BATCHES = 12
PARTS_OF_A_PAIR = {"long prompts": ((0.5, 0.75), (0.05, 0.2)), "short prompts": ((0.1, 0.4), (0.1, 0.5))}
PAD, END = "<pad>", "<end>"


def cases(settings: Settings) -> Iterator[Case]:
    for attention in settings.attention:
        for name, size in settings.steps.items():
            key = f"step/{name}/{attention}"
            yield Case(key, partial(measure, name, size, attention, settings))


def measure(name: str, size: Step, attention: str, settings: Settings) -> dict[str, Any]:
    """Medians of every contestant's step and of its parts, in seconds, and its peak bytes; bf16 by autocast."""
    if missing := [package for package in NEEDED if importlib.util.find_spec(package) is None]:
        raise Skip(f"{' and '.join(missing)} not installed")
    from orpo_kernels.transformers import refuses_shared_prompt

    device = torch.device(settings.device)
    made = model(size, attention, device)
    if reason := refuses_shared_prompt(made):
        raise Skip(reason)
    dtype = "bfloat16" if device.type == "cuda" else "float32"
    batches = training_step.Case(name, "made up", size.max_length, size.pairs)
    try:
        bench = Bench(made, tokenizer(), pairs(name, size), batches, dtype)
        if attention != "sdpa":  # what TRL has by default, and where it runs without a doubt
            bench.names = [one for one in bench.names if one != TRL]
        found = training_step.measure(bench, dtype, settings.rounds, Progress(disable=True))
        peaks = {one: training_step.peak_of_steps(bench, one) for one in bench.names}
    except torch.OutOfMemoryError as error:
        raise Skip("out of memory") from error
    finally:
        bench = made = None  # type: ignore[assignment] # the model is to go before the next one comes
        release(device)
    whole, of_parts = step_medians(found), {part: step_medians(found, part) for part in PARTS}
    return {
        "case": str(batches),
        "dtype": dtype,
        "attention": attention,
        "contestants": {
            name: {"seconds": whole[name], **{part: of_parts[part][name] for part in PARTS}, "peak_bytes": peaks[name]}
            for name in whole
        },
    }


def model(size: Step, attention: str, device: torch.device) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    tokens = tokenizer()
    config = LlamaConfig(**size.config, pad_token_id=tokens.pad_token_id, eos_token_id=tokens.eos_token_id)
    with torch.device(device):
        made = LlamaForCausalLM(config)
    made.set_attn_implementation(attention)
    return made.to(torch.bfloat16) if device.type == "cuda" else made


def tokenizer() -> Any:
    """A token for every byte, one that pads, and one that ends."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = [PAD, END, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token=PAD, eos_token=END, bos_token=END)


def pairs(name: str, size: Step) -> list[dict[str, str]]:
    """As many as fill the batches, of lengths drawn from `PARTS_OF_A_PAIR`, shares of `max_length`."""
    draw = random.Random(0)

    def text(share: tuple[float, float]) -> str:
        length = max(2, int(draw.uniform(*share) * size.max_length) - 2)
        return "".join(draw.choices(string.ascii_letters, k=length))

    prompt, answer = PARTS_OF_A_PAIR[name]
    return [
        {"prompt": text(prompt), "chosen": text(answer), "rejected": text(answer)} for _ in range(BATCHES * size.pairs)
    ]
