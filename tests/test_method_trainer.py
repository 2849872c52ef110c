"""PreferenceTrainer with every method: shared prompts, exact accumulation, metrics, and DPO's reference."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from datasets import Dataset
from transformers import TrainingArguments

from orpo_kernels.methods import METHODS
from orpo_kernels.transformers import (
    ORPOTrainer,
    PreferenceCollator,
    PreferenceTrainer,
    causal_lm_answers,
    causal_lm_preference_loss,
)
from orpo_kernels.transformers import reference_model as reference_module
from orpo_kernels.transformers.metrics import METRICS

from .training import assert_same_logs, chat_examples, collator, losses, settings, tiny, tokenizer, trained, trainer_of
from .versions import keeps_the_order

each_method = pytest.mark.parametrize("method", METHODS)


def lora(**options: Any) -> nn.Module:
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM", **options})
    return peft.get_peft_model(tiny(), config)


def but_noise(trainer: PreferenceTrainer) -> list[dict[str, float]]:
    """The logs without what is a comparison of two roundings of 0: DPO's preferences before the first step."""
    first, *rest = trainer.state.log_history
    assert "loss" in first
    noisy = ("rewards/accuracies",) if trainer.method.needs_reference else ()
    return [{key: value for key, value in first.items() if key not in noisy}, *rest]


@each_method
def test_accumulation_is_exact(method, tmp_path):
    """Loss, gradient and logged means of four micro-batches of one pair are those of one batch of four."""
    options: dict[str, Any] = {"max_steps": 2, "loss_options": {"alpha": 1.0}}
    small = trained(tmp_path, method, per_device_train_batch_size=1, gradient_accumulation_steps=4, **options)
    large = trained(tmp_path, method, per_device_train_batch_size=4, **options)
    assert_same_logs(but_noise(small), but_noise(large))


@each_method
def test_shared_prompts_are_the_same_run(method, tmp_path):
    """And all methods log the same metrics."""
    options: dict[str, Any] = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1}
    options |= {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2}
    shared, padded = (
        trained(tmp_path, method, data_collator=collator(packing), **options) for packing in ("shared", "padded")
    )
    assert_same_logs(but_noise(shared), but_noise(padded))
    step, evaluation, *_ = shared.state.log_history
    assert "nll_loss" in step
    assert (set(METRICS) <= step.keys()) == (method != "sft")
    assert {f"eval_{name}" for name in METRICS} <= evaluation.keys()


def test_orpo_is_the_orpo_trainer(tmp_path):
    arguments = TrainingArguments(**settings(tmp_path))
    own = {"data_collator": collator(), "train_dataset": chat_examples(8)}
    theirs = ORPOTrainer(tiny(), arguments, beta=0.3, **own)
    theirs.train()
    assert_same_logs(trained(tmp_path, "orpo", beta=0.3).state.log_history, theirs.state.log_history)
    with pytest.raises(TypeError, match="method"):
        ORPOTrainer(tiny(), arguments, method="dpo", **own)


@keeps_the_order
@pytest.mark.parametrize("packing", ["padded", "shared"])
def test_sft_trains_on_the_chosen_answers_alone(packing, tmp_path):
    """The rejected answers' tokens are in no batch, and the loss is cross-entropy on the chosen ones."""
    trainer = trainer_of(tmp_path, "sft", data_collator=collator(packing))
    (batch, *_) = trainer.get_train_dataloader()
    chosen = collator("padded")(chat_examples(8)[:2])
    tokens = sum(int(chosen["attention_mask"][row].sum()) for row in range(2))
    held = batch["packed"].segments >= 0 if packing == "shared" else batch["attention_mask"] == 1
    assert int(held.sum()) == tokens
    (evaluated, *_) = trainer.get_eval_dataloader()
    assert "chosen_only" not in evaluated
    logits = tiny()(chosen["input_ids"][:2], attention_mask=chosen["attention_mask"][:2]).logits[:, :-1]
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), chosen["labels"][:2, 1:].flatten())
    loss = causal_lm_preference_loss(tiny(), **batch, method="sft").loss
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
    if packing == "padded":
        with pytest.raises(ValueError, match="chosen answers alone"):
            causal_lm_preference_loss(tiny(), **batch, method="cpo")


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("ppo", {}, "no method 'ppo'"),
        ("orpo", {"loss_options": {"gamma": 1.0}}, "The method orpo has no option gamma"),
        ("dpo", {"loss_options": {"beta": 1.0}}, "an argument of its own"),
    ],
)
def test_options_that_cannot_work(method, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, method, **options)


def test_the_code_of_the_docs_runs(tmp_path):
    text = (Path(__file__).parents[1] / "docs" / "methods.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(blocks) == 2
    names = {
        "tokenizer": tokenizer(),
        "model": tiny(),
        "reference_model": tiny(),
        "args": TrainingArguments(**settings(tmp_path, max_steps=1)),
        "pairs": chat_examples(4),
        "batch": collator("padded")(chat_examples(2)),
    }
    for block in blocks:
        exec(block, names)
    assert names["trainer"].state.global_step == 1
    assert names["out"].loss.isfinite()


# --- DPO's reference -----------------------------------------------------------------------------------------------


def answers(model: nn.Module, examples: list[dict[str, Any]]) -> np.ndarray:
    return causal_lm_answers(model, **collator("padded")(examples)).logps.view(2, -1).T.numpy()


def files(folder: Path) -> set[str]:
    return {path.name for path in (folder / "reference_logps").iterdir()}


@pytest.mark.parametrize("form", ["list", "dataset"])
def test_the_reference_is_the_model_before_training(form, tmp_path):
    data = chat_examples(8) if form == "list" else Dataset.from_list(chat_examples(8))
    trainer = trainer_of(tmp_path, "dpo", train_dataset=data)
    np.testing.assert_allclose(trainer.train_dataset.logps, answers(tiny(), chat_examples(8)), rtol=1e-5)
    trainer.train()
    history = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert history[0]["loss"] == pytest.approx(np.log(2), rel=1e-5)
    assert history[0]["rewards/margins"] == pytest.approx(0, abs=1e-4)
    assert abs(history[-1]["rewards/margins"]) > 1e-2
    assert trainer.evaluate()["eval_rewards/chosen"] != 0


def test_it_is_computed_once(tmp_path, monkeypatch):
    """A second run over the same model and data reads it; another model, other data or another length do not."""
    trainer_of(tmp_path, "dpo")
    first = files(tmp_path)
    assert len(first) == 2  # of training and evaluation

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("the reference was run again")

    with monkeypatch.context() as patch:
        patch.setattr(reference_module, "causal_lm_answers", refuse)
        again = trained(tmp_path, "dpo", max_steps=1, per_device_eval_batch_size=3)
        assert losses(again)[0] == pytest.approx(np.log(2), rel=1e-5)
        other = tiny()
        with torch.no_grad():
            other.lm_head.weight[0, 0] += 1e-3
        for changed in (
            {"model": other},
            {"train_dataset": chat_examples(9)},
            {"data_collator": PreferenceCollator(tokenizer(), max_length=24)},
        ):
            with pytest.raises(AssertionError, match="was run again"):
                trainer_of(tmp_path, "dpo", **changed)
    assert files(tmp_path) == first
    trainer_of(tmp_path, "dpo", other)
    assert len(files(tmp_path)) == 4


def counted(monkeypatch: pytest.MonkeyPatch, stop_at: int = 0) -> list[int]:
    """The pairs of every batch that the reference runs on from here; batch `stop_at` is interrupted."""
    sizes: list[int] = []

    def run(model: nn.Module, **batch: Any) -> Any:
        sizes.append(batch["packed"].answers.num_pairs)
        if len(sizes) == stop_at:
            raise KeyboardInterrupt
        return causal_lm_answers(model, **batch)

    monkeypatch.setattr(reference_module, "causal_lm_answers", run)
    return sizes


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stop the reference in the third batch of eight; the file of those that are done."""
    counted(monkeypatch, stop_at=3)
    with pytest.raises(KeyboardInterrupt):
        trainer_of(folder, "dpo", train_dataset=chat_examples(16))
    (lines,) = (folder / "reference_logps").iterdir()
    return lines


def test_it_goes_on_where_it_was_interrupted(tmp_path, monkeypatch):
    whole = trainer_of(tmp_path / "whole", "dpo", train_dataset=chat_examples(16)).train_dataset.logps
    interrupted(tmp_path / "run", monkeypatch)
    rest = counted(monkeypatch)
    resumed = trainer_of(tmp_path / "run", "dpo", train_dataset=chat_examples(16), eval_dataset=None)
    assert rest == [2] * 6
    assert np.array_equal(resumed.train_dataset.logps, whole)
    assert files(tmp_path / "run") < files(tmp_path / "whole")


@pytest.mark.parametrize("torn", ["in a number", "before the end", "zeros of a disk"])
def test_a_batch_that_was_half_written_is_computed_again(torn, tmp_path, monkeypatch):
    whole = trainer_of(tmp_path / "whole", "dpo", train_dataset=chat_examples(16)).train_dataset.logps
    lines = interrupted(tmp_path / "run", monkeypatch)
    written = lines.read_bytes()
    cut = {"in a number": written[:-8], "before the end": written[:-2], "zeros of a disk": written[:-30] + bytes(30)}
    lines.write_bytes(cut[torn])
    counted(monkeypatch, stop_at=2)
    with pytest.raises(KeyboardInterrupt):  # one more behind the torn line
        trainer_of(tmp_path / "run", "dpo", train_dataset=chat_examples(16))
    rest = counted(monkeypatch)
    resumed = trainer_of(tmp_path / "run", "dpo", train_dataset=chat_examples(16), eval_dataset=None)
    assert rest == [2] * 6
    assert np.array_equal(resumed.train_dataset.logps, whole)


def test_what_is_done_is_kept_if_batches_change(tmp_path, monkeypatch):
    interrupted(tmp_path, monkeypatch)
    rest = counted(monkeypatch)
    options: dict[str, Any] = {"train_dataset": chat_examples(16), "eval_dataset": None}
    found = trainer_of(tmp_path, "dpo", per_device_eval_batch_size=5, **options).train_dataset.logps
    assert rest == [5, 5, 2]
    np.testing.assert_allclose(found, answers(tiny(), chat_examples(16)), rtol=1e-5)


def test_numbers_of_another_precision_are_not_read(tmp_path):
    trainer_of(tmp_path, "dpo", eval_dataset=None)
    trainer_of(tmp_path, "dpo", eval_dataset=None, bf16=True)
    assert len(files(tmp_path)) == 2


@pytest.mark.parametrize("target", ["q_proj", "lm_head"])
def test_the_reference_of_lora_is_the_model_without_it(target, tmp_path):
    model = lora(target_modules=[target], init_lora_weights=False)
    trainer = trainer_of(tmp_path, "dpo", model, learning_rate=1e-2)
    np.testing.assert_allclose(trainer.train_dataset.logps, answers(tiny(), chat_examples(8)), rtol=1e-5)
    assert abs(answers(model, chat_examples(8)) - trainer.train_dataset.logps).max() > 1e-2
    trainer.train()
    new = [{**example, "chosen": "Something else."} for example in chat_examples(3)]
    trainer.evaluate(new)  # also when it has been trained
    loader = trainer.get_eval_dataloader(new)
    np.testing.assert_allclose(loader.dataset.logps, answers(tiny(), new), rtol=1e-5)


def test_another_reference_model(tmp_path):
    other = tiny()
    with torch.no_grad():
        other.lm_head.weight *= 1.5
    trainer = trained(tmp_path, "dpo", ref_model=other, max_steps=1)
    np.testing.assert_allclose(trainer.train_dataset.logps, answers(other, chat_examples(8)), rtol=1e-5)
    new = chat_examples(5)
    np.testing.assert_allclose(trainer.get_eval_dataloader(new).dataset.logps, answers(other, new), rtol=1e-5)


def test_a_trained_model_is_no_reference(tmp_path):
    trainer = trained(tmp_path, "dpo", max_steps=1)
    trainer.evaluate()
    with pytest.raises(ValueError, match="with that DPO's reference is gone"):
        trainer.evaluate(chat_examples(5))


def test_a_run_that_goes_on_keeps_its_reference(tmp_path):
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2}
    whole = trained(tmp_path / "whole", "dpo", **options)
    trained(tmp_path / "half", "dpo", max_steps=2, **options)
    resumed = trainer_of(tmp_path / "half", "dpo", **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


@keeps_the_order
def test_pairs_may_bring_their_reference(tmp_path):
    """Under TRL's names; a stream has to."""
    columns = ("ref_chosen_logps", "ref_rejected_logps")
    logps = answers(tiny(), chat_examples(8))
    pairs = [
        {**example, **dict(zip(columns, row, strict=True))}
        for example, row in zip(chat_examples(8), logps.tolist(), strict=True)
    ]

    class Stream(IterableDataset):
        def __init__(self, examples: Any) -> None:
            self.examples = examples

        def __iter__(self) -> Any:
            return iter(self.examples)

    expected = losses(trained(tmp_path / "own", "dpo"))
    for form in (pairs, Dataset.from_list(pairs), Stream(pairs)):
        found = losses(trained(tmp_path / "theirs", "dpo", train_dataset=form, eval_dataset=None))
        assert found == pytest.approx(expected, rel=1e-5)
    assert not (tmp_path / "theirs" / "reference_logps").exists()
    with pytest.raises(ValueError, match="DPO needs the reference model's log-probabilities"):
        trained(tmp_path, "dpo", train_dataset=Stream(chat_examples(8)))


def test_a_pair_that_cannot_be_used_is_named(tmp_path):
    broken = [*chat_examples(2), {**chat_examples(1)[0], "rejected": ""}]
    trainer = trainer_of(tmp_path, "dpo", train_dataset=broken)
    assert [(one.index, one.reason) for one in trainer.unusable_pairs["train"]] == [
        (2, "its rejected response is empty")
    ]
    assert len(trainer.train_dataset.logps) == 2
    with pytest.raises(ValueError, match="Pair 2 of the data cannot be used: its rejected response is empty"):
        reference_module.reference_logps(tiny(), broken, collator(), trainer.accelerator, folder=tmp_path, batch_size=2)
