"""`packing="measure"`: the faster layout is taken, nothing of the measurement remains, and a checkpoint keeps it."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")


from orpo_kernels.transformers import PreferenceTrainer, measuring
from orpo_kernels.transformers.measuring import seconds_of_steps

from .models import build
from .training import chat_examples, collator, losses, tiny, tokenizer, trainer_of, trl_trainer_of


def measuring_trainer(folder: Any, packing: Any = "measure", method: str = "orpo", **options: Any) -> PreferenceTrainer:
    options = {"train_dataset": chat_examples(), "eval_dataset": None, **options}
    return trainer_of(folder, method, data_collator=collator(packing, max_length=None), **options)


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What a step takes, by the layout of its batch; the warm-up takes longest of all."""
    taken = {"padded": 0.002, "shared": 0.001}
    warm: set[str] = set()

    def seconds(trainer: Any, model: Any, batch: Any) -> float:
        name = "shared" if "packed" in batch else "padded"
        cold = name not in warm
        warm.add(name)
        return 60.0 if cold else taken[name]

    monkeypatch.setattr(measuring, "_seconds", seconds)
    return taken


@pytest.mark.parametrize(("shared", "faster"), [(0.001, "shared"), (0.003, "padded")])
def test_the_faster_is_taken_and_said(shared, faster, times, tmp_path, caplog):
    times["shared"] = shared
    trainer = measuring_trainer(tmp_path)
    with caplog.at_level(logging.INFO, logger=measuring.__name__):
        trainer.train()
    assert trainer.data_collator.packing == faster
    (line,) = caplog.messages
    assert f"packing=\"measure\" is '{faster}'" in line
    assert f"padded 2.0 ms, shared {1e3 * shared:.1f} ms (medians of 3 steps each)" in line


def test_a_resumed_run_neither_measures_nor_changes(times, tmp_path):
    measuring_trainer(tmp_path, save_strategy="steps", save_steps=2, max_steps=2).train()
    times["shared"] = 1.0  # would now be the slower
    for checkpoint in (True, str(tmp_path / "checkpoint-2")):
        resumed = measuring_trainer(tmp_path)
        resumed.train(resume_from_checkpoint=checkpoint)
        assert resumed.data_collator.packing == "shared"
    fresh = measuring_trainer(tmp_path)
    fresh.train()
    assert fresh.data_collator.packing == "padded"


@pytest.mark.parametrize("method", ["orpo", "sft", "dpo"])
def test_nothing_of_a_real_measurement_remains(method, tmp_path, monkeypatch):
    """Weights, gradients, modes, the RNG of dropout, and the pairs of every step."""
    model = tiny(attention_dropout=0.1).eval()
    trainer = measuring_trainer(tmp_path / "measured", model=model, method=method)
    weights, rng = [p.clone() for p in model.parameters()], torch.get_rng_state()
    first = next(model.parameters())
    first.grad = torch.ones_like(first)
    seconds = seconds_of_steps(trainer, trainer._to_measure)
    assert seconds.keys() == {"padded", "shared"}
    assert all(one > 0 for one in seconds.values())
    assert not any(module.training for module in model.modules())
    assert torch.equal(first.grad, torch.ones_like(first))
    assert all(p.grad is None for p in list(model.parameters())[1:])
    assert all(map(torch.equal, weights, model.parameters()))
    assert torch.equal(rng, torch.get_rng_state())
    first.grad = None
    trainer.train()
    chosen = trainer.data_collator.packing
    expected = measuring_trainer(tmp_path / "chosen", chosen, method, model=tiny(attention_dropout=0.1))
    expected.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-6)  # DPO's reference was computed by either layout


def test_a_layout_that_runs_out_of_memory_is_not_taken(tmp_path, monkeypatch):
    trainer = measuring_trainer(tmp_path)
    step = trainer.loss_step

    def short_of_memory(model: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        if "packed" not in inputs:
            raise torch.OutOfMemoryError
        return step(model, inputs, *rest, **options)

    monkeypatch.setattr(trainer, "loss_step", short_of_memory)
    trainer.train()
    assert trainer.data_collator.packing == "shared"


def test_the_first_process_decides(times, tmp_path, monkeypatch):
    def broadcast(agreed: list[str]) -> None:
        agreed[:] = ["padded", "the first process found it"]

    monkeypatch.setattr(measuring, "broadcast_object_list", broadcast)
    trainer = measuring_trainer(tmp_path)
    trainer.train()
    assert trainer.data_collator.packing == "padded"


def test_what_cannot_be_measured_is_decided_with_the_reason(tmp_path, caplog, monkeypatch):
    with caplog.at_level(logging.INFO):
        refused = measuring_trainer(tmp_path, model=build("BLOOM: ALiBi", vocab_size=len(tokenizer())))
        assert not refused._to_measure
        assert refused.data_collator.packing == "padded"
        assert "ALiBi measures distances" in caplog.text
        monkeypatch.setattr(measuring, "is_stream", lambda pairs: True)
        stream = measuring_trainer(tmp_path)
        assert not stream._to_measure
        assert stream.data_collator.packing == "shared"  # as "auto" does
        assert "pairs of a stream" in caplog.text


def test_trls_trainer_measures_too(times, tmp_path):
    trainer = trl_trainer_of(tmp_path, chat_examples(), "measure", max_length=64)
    padded = trainer._to_measure["padded"]
    times["shared"] = 1.0
    trainer.train()
    assert trainer.data_collator is padded
