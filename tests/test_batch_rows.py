"""Rows that a batch brings: made once, on the host, and right; and a step that makes none and waits for nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from datasets import Dataset
from transformers import TrainingArguments

from orpo_kernels import Rows
from orpo_kernels.methods import DPO, ORPO, SFT
from orpo_kernels.ops import why_not
from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss, causal_lm_preference_loss
from orpo_kernels.transformers import batches as making
from orpo_kernels.transformers.batches import RowsCollator, batch_rows, with_rows
from orpo_kernels.transformers.packing import PackedPairs
from orpo_kernels.transformers.trainer import PreferenceTrainer

from .batches import assert_known
from .training import chat_examples, settings, tiny, tokenizer

METHODS = [ORPO(), ORPO(prompt_nll=False, nll_reduction="sequence"), DPO(), SFT()]
each_packing = pytest.mark.parametrize("packing", ["padded", "shared"])


def batch_of(packing: Any = "padded", **options: Any) -> dict[str, Any]:
    return PreferenceCollator(tokenizer(), max_length=96, packing=packing, **options)(chat_examples(3))


def entries(rows: Rows) -> list[tuple]:
    columns = (rows.position, rows.target, rows.sequence, rows.scored, rows.nll_weight)
    return sorted(zip(*(column.tolist() for column in columns), strict=True))


# --- the rows of a batch -------------------------------------------------------------------------------------------


@each_packing
@pytest.mark.parametrize("method", METHODS, ids=lambda method: f"{method.name}-{method.nll_reduction}")
def test_they_are_those_of_its_labels_with_all_that_can_be_known(method, packing):
    batch = batch_of(packing, answers="both" if method.is_preference else "chosen")
    made = with_rows(batch, method)
    rows = made["rows"]
    options = {"prompt_nll": method.prompt_nll, "nll_reduction": method.nll_reduction}
    assert entries(rows) == entries(batch_rows(**batch, **options))
    assert set(made) == set(batch) - {"labels"} | {"rows"}
    assert_known(rows)
    assert rows.known.counts is not None
    assert rows.known.offsets is not None
    # A shared prompt's last position has two rows.
    assert rows.known.unique_positions == (packing == "padded" or not method.is_preference)
    assert with_rows(made, method)["rows"] is rows


@each_packing
def test_loss_and_gradients_are_those_of_the_labels(packing):
    weights = torch.tensor([1.0, 0.0, 2.5], dtype=torch.float64)
    results = []
    for batch in (batch_of(packing), with_rows(batch_of(packing), ORPO())):
        model = tiny().double()
        loss = causal_lm_orpo_loss(model, **batch, pair_weights=weights).loss
        loss.backward()
        results.append([loss.detach(), *(parameter.grad for parameter in model.parameters())])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-14)


def test_rows_and_labels_together_are_refused():
    batch = batch_of()
    rows = batch_rows(**batch)
    with pytest.raises(TypeError, match="labels and rows cannot both be given"):
        causal_lm_orpo_loss(tiny(), **batch, rows=rows)
    del batch["labels"]
    with pytest.raises(TypeError, match="rows must be Rows, but is a dict"):
        causal_lm_orpo_loss(tiny(), **batch, rows={})
    with pytest.raises(TypeError, match="labels are missing"):
        causal_lm_orpo_loss(tiny(), **batch)


@pytest.mark.parametrize("batch", [{"input_ids": torch.ones(2, 3)}, {"chosen_labels": [1]}, [1, 2]])
def test_batches_of_another_form_are_left_alone(batch):
    assert RowsCollator(lambda examples: batch, ORPO())([]) == batch


# --- in a step of the trainers -------------------------------------------------------------------------------------


def trainer_of(folder: Any, kind: str, packing: str, method: str = "orpo", **options: Any) -> Any:
    arguments = settings(folder, per_device_eval_batch_size=2, **options)
    if kind == "transformers":
        return PreferenceTrainer(
            tiny(),
            TrainingArguments(**arguments),
            data_collator=PreferenceCollator(tokenizer(), max_length=96, packing=packing),
            train_dataset=chat_examples(8),
            eval_dataset=chat_examples(3),
            method=method,
        )
    pytest.importorskip("trl")
    from orpo_kernels.trl import ORPOConfig, ORPOTrainer

    return ORPOTrainer(
        tiny(),
        ORPOConfig(**arguments, max_length=96),
        train_dataset=Dataset.from_list(chat_examples(8)),
        eval_dataset=Dataset.from_list(chat_examples(3)),
        processing_class=tokenizer(),
        packing=packing,
    )


@pytest.fixture
def makings(monkeypatch) -> list[str]:
    """The names of the functions that make rows, once for each call."""
    calls: list[str] = []

    def counting(name: str, function: Any) -> Any:
        def call(*args: Any, **options: Any) -> Any:
            calls.append(name)
            return function(*args, **options)

        return call

    for name in ("rows_from_labels", "padded_rows"):
        monkeypatch.setattr(making, name, counting(name, getattr(making, name)))
    monkeypatch.setattr(PackedPairs, "rows", counting("PackedPairs.rows", PackedPairs.rows))
    return calls


@pytest.mark.parametrize(
    ("kind", "packing", "method"),
    [
        ("transformers", "padded", "orpo"),
        ("transformers", "shared", "orpo"),
        ("transformers", "padded", "sft"),
        ("trl", "shared", "orpo"),
    ],
)
def test_rows_are_made_once_a_batch_and_by_its_collator(kind, packing, method, makings, tmp_path):
    trainer = trainer_of(tmp_path, kind, packing, method, max_steps=2, gradient_accumulation_steps=2)
    makings.clear()
    batches = list(trainer.get_train_dataloader())
    assert len(makings) == len(batches)
    assert all(isinstance(batch["rows"], Rows) and "labels" not in batch for batch in batches)
    makings.clear()
    trainer.train()
    assert len(makings) == 4  # two steps of two micro-batches
    makings.clear()
    trainer.evaluate()
    assert len(makings) == 2


class NothingIsRead(TorchDispatchMode):
    """Refuses what would wait for a device: numbers read, and results whose size is only known there."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = str(function)
        assert not any(word in name for word in ("_local_scalar_dense", "nonzero", "item", "unique", "masked_select"))
        assert not ("index.Tensor" in name and any(getattr(i, "dtype", None) == torch.bool for i in args[1]))
        return function(*args, **(kwargs or {}))


@pytest.mark.skipif(why_not("native", torch.device("cpu")) is not None, reason="no native kernels")
@pytest.mark.parametrize("method", ["orpo", "simpo"])
def test_a_step_reads_nothing(method, tmp_path):
    """A micro-batch as the Trainer runs it, from the counts of its step to the gradients."""
    trainer = trainer_of(tmp_path, "transformers", "shared", method)
    batches = list(trainer.get_train_dataloader())[:2]
    trainer.current_gradient_accumulation_steps = 2
    model = trainer.model.train()
    trainer.compute_loss(model, batches[0])  # the checks of a model run once
    with NothingIsRead():
        counts = trainer._get_num_items_in_batch(batches, torch.device("cpu"))
        for batch in batches:
            trainer.compute_loss(model, batch, num_items_in_batch=counts).backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_batches_that_accelerate_concatenates_hold_tensors_alone(tmp_path):
    trainer = trainer_of(tmp_path, "transformers", "padded", max_steps=1, accelerator_config={"dispatch_batches": True})
    assert all("labels" in batch for batch in trainer.get_train_dataloader())
    trainer.train()


def test_what_a_batch_lacks_is_named(tmp_path):
    trainer = trainer_of(tmp_path, "transformers", "padded", max_steps=1)
    trainer.data_collator = lambda examples: {"input_ids": torch.ones(2, 3, dtype=torch.int64)}
    with pytest.raises(TypeError, match="labels are missing"):
        trainer.train()


def test_a_step_without_rows_of_its_own_makes_the_same(tmp_path):
    """Of batches that come past the trainer's own data loader."""
    trainer = trainer_of(tmp_path, "transformers", "padded")
    trainer.current_gradient_accumulation_steps = 1
    pairs = [trainer.train_dataset[index] for index in range(3)]
    plain = trainer.data_collator(pairs)
    losses = []
    for batch in (plain, with_rows(plain, trainer.method)):
        counts = trainer._get_num_items_in_batch([batch], torch.device("cpu"))
        losses.append(trainer.compute_loss(trainer.model, batch, num_items_in_batch=counts))
    assert torch.equal(*losses)


def test_chosen_answers_alone_are_refused_where_two_are_compared():
    with pytest.raises(ValueError, match="chosen answers alone"):
        causal_lm_preference_loss(tiny(), **with_rows(batch_of(answers="chosen"), SFT()), method=ORPO())
