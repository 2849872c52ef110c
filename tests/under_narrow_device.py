"""Everything on a device without float64: nothing asks it for any, nothing of the host's meets it, the numbers hold.

`test_narrow_device.py` runs this file in a process of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from torch import Tensor
from transformers import TrainingArguments

from benchmarks.contest import peers
from benchmarks.contest.confidence import SIDES, confident, exact_results, results
from orpo_kernels import (
    PreferenceOutput,
    measured_sparsity,
    orpo_loss,
    preference_loss_from_rows,
    reference,
    token_logps,
)
from orpo_kernels.app import doctor
from orpo_kernels.compat.liger import LigerFusedLinearORPOLoss
from orpo_kernels.devices import KINDS, Kind
from orpo_kernels.methods import METHODS
from orpo_kernels.rows import rows_from_labels
from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss
from orpo_kernels.transformers.batches import batch_on
from orpo_kernels.transformers.trainer import PreferenceTrainer

from . import encoder_decoder
from .batches import PLAIN_OPTIONS, Batch, plain_loss, random_labels, relative_error
from .narrow_device import NARROW, narrow_device
from .training import assert_same_logs, chat_examples, settings, tiny, tokenizer

CPU = torch.device("cpu")
PAIRS, LENGTH, SIZE, VOCAB = 4, 9, 8, 40
BY_GROUPS = 4 * VOCAB * (SIZE + 2 * (LENGTH - 2) + 2)  # bytes, enough for the residual of a pair
SCHEDULES: dict[str, dict[str, Any]] = {
    "single_pass": {"schedule": "single_pass"},
    "resident": {"schedule": "resident"},
    "by groups of pairs": {"schedule": "resident", "memory_budget": BY_GROUPS},
    "recompute": {"schedule": "recompute"},
    "sparse": {"sparse_eps": 2.0**-6},
}


@pytest.fixture(autouse=True)
def _device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(KINDS, NARROW.type, Kind(has_float64=False))
    # A parameter here is what others' quantized ones are: of a class of its own.
    monkeypatch.setattr("orpo_kernels.transformers.lm_head._check_parameter", lambda parameter: None)
    with narrow_device():
        yield


def test_the_device_refuses_float64_and_tensors_of_the_host():
    here = torch.ones(3).to(NARROW)
    with pytest.raises(TypeError, match="float64"):
        here.double()
    with pytest.raises(TypeError, match="float64"):
        torch.ones(3, dtype=torch.float64).to(NARROW)
    with pytest.raises(RuntimeError, match="two devices"):
        here + torch.ones(3)
    assert (here + torch.ones(())).device == NARROW
    assert here.sum().item() == 3


def on(device: torch.device, name: str, **options: Any) -> dict[str, Tensor]:
    """A method's outputs and gradients, made on `device`, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PAIRS * LENGTH, SIZE, generator=generator)
    weight = torch.randn(VOCAB, SIZE, generator=generator)
    labels = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    labels[:, :2] = -100
    logps = -5 - torch.rand(2 * PAIRS, generator=generator)
    pair_weight = torch.tensor([1.0, 0.5, 0.0, 2.0])
    hidden, weight = hidden.to(device).requires_grad_(), weight.to(device)
    weight.requires_grad_(options.get("schedule") != "single_pass")
    pair_weight = pair_weight.to(device) if device == NARROW else pair_weight.double()
    rows = rows_from_labels(labels.to(device), pair_weight=pair_weight)
    method = METHODS[name]()
    given = logps.to(device) if method.needs_reference else None
    denominator = torch.tensor(23.0).to(device)
    out = preference_loss_from_rows(
        hidden, weight, rows, method, reference_logps=given, nll_denominator=denominator, **options
    )
    assert {value.device for value in out} == {device}
    (3 * out.loss).backward()
    grads = {"hidden": hidden.grad, "weight": weight.grad}
    found = out._asdict() | {name: grad for name, grad in grads.items() if grad is not None}
    return {name: value.detach().cpu() for name, value in found.items()}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("name", METHODS)
def test_every_method_by_every_schedule(name, schedule):
    ours = on(NARROW, name, **SCHEDULES[schedule])
    theirs = on(CPU, name, backend="torch", **SCHEDULES[schedule])
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        torch.testing.assert_close(ours[key], value, rtol=2e-6, atol=2e-6, msg=f"{key}: {ours[key]}, {value}")


def moved(loss: Any) -> Any:
    """The loss on the device, of tensors on the CPU."""

    def on_the_device(*tensors: Any, **options: Any) -> PreferenceOutput:
        options = {name: v.to(NARROW) if isinstance(v, Tensor) else v for name, v in options.items()}
        out = loss(*(tensor.to(NARROW) for tensor in tensors), **options)
        return PreferenceOutput(*(value.cpu() for value in out))

    return on_the_device


@pytest.mark.parametrize(
    ("offset", "length", "dtype"),
    [(0, 5, torch.float32), (0, 700, torch.float32), (200, 700, torch.float32), (0, 700, torch.bfloat16)],
    ids=str,
)
def test_errors_are_those_of_plain_torch(offset, length, dtype):
    """At most twice as large, also of long answers, whose sums are long, and of logits that are all large."""
    generator = torch.Generator().manual_seed(length)
    batch = Batch(
        hidden=torch.randn(4, length, SIZE, generator=generator, dtype=torch.float64),
        weight=torch.randn(VOCAB, SIZE, generator=generator, dtype=torch.float64),
        labels=random_labels(generator, (4, length), VOCAB, 0.8),
        bias=torch.randn(VOCAB, generator=generator, dtype=torch.float64) + offset,
        train_bias=False,
        options={**PLAIN_OPTIONS, "beta": 1.0, "shift": True},
    ).to(dtype)
    exact, exact_grads = batch.to(torch.float64).run(reference.orpo_loss)
    ours, grads = batch.run(moved(orpo_loss), schedule="resident")
    plain, plain_grads = batch.run(plain_loss)
    eps = torch.finfo(dtype).eps
    for name in ("loss", "nll_loss", "pair_loss", "chosen_logps", "rejected_logps"):
        own, other = (relative_error(getattr(out, name), getattr(exact, name)) for out in (ours, plain))
        assert own <= 2 * other + eps, (name, own, other)
    for name, true in exact_grads.items():
        own, other = (relative_error(found[name], true) for found in (grads, plain_grads))
        assert own <= 2 * other + eps, (name, own, other)


@pytest.mark.parametrize(("schedule", "offset"), [("single_pass", 0), ("single_pass", 192), ("recompute", 0)])
def test_confident_answers(schedule, offset):
    """Finite, and right to 5e-6, also of large logits: rounding log-odds of 80 to fp32 costs 3.8e-6."""

    def ours(*arguments: Any, **options: Any) -> Tensor:
        tensors = (a.to(NARROW) if isinstance(a, Tensor) else a for a in arguments)
        return peers.ours(*tensors, **options).cpu()

    for side in SIDES:
        for gap in (17, 80):
            logits, *rest = confident(gap, side, "many", torch.float32)
            inputs = logits + offset, *rest
            truth, found = exact_results(*inputs), results(ours, *inputs, schedule=schedule)
            for name, value in found.items():
                error = (value.double() - truth[name]).abs().max() / truth[name].abs().max()
                assert error <= 5e-6, (side, gap, name, error.item())


def test_the_other_faces():
    hidden = torch.randn(2, 4, SIZE).to(NARROW).requires_grad_()
    weight = torch.randn(VOCAB, SIZE).to(NARROW)
    labels = torch.tensor([[-100, 3, 5, 1], [-100, 3, -100, -100]])
    logps = token_logps(hidden, weight, labels.to(NARROW))
    logps.sum().backward()
    assert logps.device == hidden.grad.device == NARROW
    expected = token_logps(hidden.cpu(), weight.cpu(), labels)
    torch.testing.assert_close(logps.cpu(), expected)
    loss, metrics = LigerFusedLinearORPOLoss()(weight, hidden, labels.to(NARROW))
    assert {value.device for value in (loss, *metrics)} == {NARROW}
    with measured_sparsity() as measured:
        orpo_loss(hidden, weight, labels.to(NARROW), sparse_eps=0.1)
    flat = hidden.detach().flatten(0, 1)[:4]
    assert all(bound.device == NARROW for bound in measured.bounds(flat[:, 0], flat, weight))


@pytest.mark.parametrize("schedule", ["single_pass", "recompute"])
def test_the_doctor_passes_it(schedule):
    check = doctor._check(NARROW, "torch", torch.float32, schedule)
    assert check.passed, check
    assert check.error is not None
    assert check.error > 0


def test_labels_on_the_device_and_batches_of_a_collator():
    """A loop of one's own: a padded batch with weights, moved there."""
    examples = [{**one, "weight": 0.5 + i} for i, one in enumerate(chat_examples(3))]
    batch = PreferenceCollator(tokenizer(), max_length=96, packing="padded")(examples)
    expected = causal_lm_orpo_loss(tiny(), **batch).loss
    model = tiny().to(NARROW)
    out = causal_lm_orpo_loss(model, **batch_on(batch, NARROW))
    out.loss.backward()
    torch.testing.assert_close(out.loss.cpu(), expected, rtol=1e-5, atol=0)
    assert all(parameter.grad.device == NARROW for parameter in model.parameters() if parameter.grad is not None)


@pytest.mark.parametrize("name", ["T5: tied, scaled", "BART: bias"])
def test_an_encoder_decoder_model(name):
    """Labels of the host or of the device; the shift to what the decoder reads is the model's own."""
    batch = encoder_decoder.make_batch()
    expected = causal_lm_orpo_loss(encoder_decoder.build(name).eval(), **batch).loss
    model = encoder_decoder.build(name).eval().to(NARROW)
    out = causal_lm_orpo_loss(model, **{key: tensor.to(NARROW) for key, tensor in batch.items()})
    out.loss.backward()
    torch.testing.assert_close(out.loss.cpu(), expected, rtol=1e-5, atol=0)


def train(
    make: Callable[..., Any], config: Callable[..., Any], data: Callable[..., Any], folder: Path, device: torch.device
) -> list[dict[str, float]]:
    """The logs of two steps of weighted pairs, and of an evaluation, by the trainer that `make` makes."""
    changes = {"max_steps": 2, "gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    arguments = config(**settings(folder, dataloader_pin_memory=False, **changes))
    assert arguments.device == CPU
    examples = [{**one, "weight": 0.5 + i % 3} for i, one in enumerate(chat_examples(8))]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingArguments, "device", device)
        patch.setitem(PartialState._shared_state, "device", device)
        trainer = make(model=tiny(), args=arguments, train_dataset=data(examples), eval_dataset=data(examples[:3]))
        assert trainer.accelerator.device == device
        trainer.train()
    assert next(trainer.model.parameters()).device == device
    return trainer.state.log_history


def test_the_trainer(tmp_path):
    """Losses, metrics and the evaluation of DPO, its reference with them, on shared prompts are those of the CPU."""
    collator = PreferenceCollator(tokenizer(), max_length=96, packing="shared")
    make = partial(PreferenceTrainer, method="dpo", data_collator=collator)
    ours, theirs = (train(make, TrainingArguments, list, tmp_path / device.type, device) for device in (NARROW, CPU))
    for logs in (*ours, *theirs):
        for name in [name for name in logs if "rewards" in name and logs["step"] == 1]:
            del logs[name]  # the model is the reference still: 0 but for roundings
    assert_same_logs(ours, theirs)


def test_trls_trainer(tmp_path):
    """ORPO, padded."""
    pytest.importorskip("trl")
    from datasets import Dataset

    from orpo_kernels.trl import ORPOConfig, ORPOTrainer

    make = partial(ORPOTrainer, processing_class=tokenizer(), packing="padded")
    config = partial(ORPOConfig, max_length=96)
    ours, theirs = (train(make, config, Dataset.from_list, tmp_path / device.type, device) for device in (NARROW, CPU))
    assert_same_logs(ours, theirs)
