"""An evaluation gives the loss and the metrics of its set, whatever its batches, in both trainers."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given
from hypothesis import settings as examples_of
from hypothesis import strategies as st
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")


from orpo_kernels.methods import METHODS
from orpo_kernels.transformers import causal_lm_preference_loss
from orpo_kernels.transformers.metrics import PAIR_METRICS, pair_metrics

from . import runs
from .test_trainer import LAUNCHER, python
from .training import chat_examples, collator, tiny, trainer_of, trl_trainer_of

SIZES = (1, 5, 12)
MIXTURE = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}
each_packing = pytest.mark.parametrize("packing", ["padded", "shared"])


def evaluated(folder: Any, packing: Any, size: int, method: str = "orpo", **options: Any) -> dict[str, float]:
    """The numbers of `PreferenceTrainer` in batches of `size`."""
    options = {"eval_dataset": chat_examples(12), "data_collator": collator(packing, end="trl"), **options}
    return numbers(trainer_of(folder, method, per_device_eval_batch_size=size, **options).evaluate())


def numbers(metrics: dict[str, float], padded: bool = False) -> dict[str, float]:
    """Without timings; of padded batches without the mean logits, which TRL takes over padding as well."""
    timings = ("runtime", "per_second", "preparation_time", "model_preparation_time", "epoch")
    timings += ("logits/chosen", "logits/rejected") if padded else ()
    return {key: value for key, value in metrics.items() if not key.endswith(timings)}


def evaluated_by_trls(folder: Any, packing: Any, size: int, pairs: Any = None, **options: Any) -> dict[str, float]:
    trainer = trl_trainer_of(folder, pairs or chat_examples(12), packing, per_device_eval_batch_size=size, **options)
    return numbers(trainer.evaluate(), padded=packing == "padded")


def of_the_set(pairs: list[dict[str, Any]], method: Any, model: nn.Module | None = None) -> dict[str, float]:
    """The metrics of all pairs in one batch."""
    with torch.no_grad():
        batch = collator("padded", end="trl")(pairs)
        out = causal_lm_preference_loss(tiny() if model is None else model, **batch, method=method)
    means = pair_metrics(out)[out.valid_pairs].mean(0).tolist()
    values = {**dict(zip(PAIR_METRICS, means, strict=True)), "nll_loss": float(out.nll_loss), "loss": float(out.loss)}
    return {f"eval_{name}": value for name, value in values.items()}


@each_packing
@pytest.mark.parametrize("method", [name for name in METHODS if name != "dpo"])
def test_any_batch_size_gives_the_numbers_of_the_set(method, packing, tmp_path):
    expected = of_the_set(chat_examples(12), method)
    for size in SIZES:
        found = evaluated(tmp_path, packing, size, method)
        assert found == pytest.approx(expected, rel=1e-5), size


def test_dpo_too(tmp_path):
    """Its reference is another model, or there would be nothing but zeros."""
    reference = tiny()
    with torch.no_grad():
        reference.lm_head.weight *= 1.5
    found = [evaluated(tmp_path, "padded", size, "dpo", ref_model=reference) for size in SIZES]
    assert abs(found[0]["eval_rewards/margins"]) > 1e-2
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


@each_packing
def test_any_batch_size_gives_the_numbers_of_the_set_in_trls(packing, tmp_path):
    found = [evaluated_by_trls(tmp_path, packing, size) for size in SIZES]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    expected = of_the_set(chat_examples(12), "orpo")
    assert {key: found[0][key] for key in expected} == pytest.approx(expected, rel=1e-5)
    assert ("eval_logits/chosen" in found[0]) == (packing == "shared")


def test_with_weights_of_the_pairs(tmp_path):
    pairs = [{**pair, "weight": [0.0, 1.0, 2.5][index % 3]} for index, pair in enumerate(chat_examples(12))]
    expected = of_the_set(pairs, "orpo")
    assert expected["eval_loss"] != pytest.approx(of_the_set(chat_examples(12), "orpo")["eval_loss"], rel=1e-2)
    for size in SIZES:
        found = evaluated(tmp_path, "shared", size, eval_dataset=pairs)
        assert found == pytest.approx(expected, rel=1e-5)
        theirs = evaluated_by_trls(tmp_path, "shared", size, pairs)
        assert {key: theirs[key] for key in expected} == pytest.approx(expected, rel=1e-5)


def test_pairs_whose_answer_truncation_has_emptied(tmp_path):
    """In TRL's tokenisation: their prompts are in the NLL, and they are in no mean over pairs."""
    found = [evaluated_by_trls(tmp_path, "padded", size, max_length=36) for size in SIZES]
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)
    assert all(value == value for value in found[0].values())


def test_the_router_loss_is_the_mean_over_batches_by_their_tokens(tmp_path):
    model, pairs = tiny("Mixtral", **MIXTURE).eval(), chat_examples(5)
    found = evaluated(tmp_path, "padded", 3, model=model, eval_dataset=pairs)
    batches = [collator("padded", end="trl")(part) for part in (pairs[:3], pairs[3:])]
    tokens = [float(batch["attention_mask"].sum()) for batch in batches]
    with torch.no_grad():
        losses = [
            float(model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).aux_loss)
            for batch in batches
        ]
    router = sum(n * loss for n, loss in zip(tokens, losses, strict=True)) / sum(tokens)
    model.config.output_router_logits = False
    expected = of_the_set(pairs, "orpo", model)
    assert found["eval_nll_loss"] == pytest.approx(expected["eval_nll_loss"], rel=1e-5)
    assert found["eval_loss"] == pytest.approx(expected["eval_loss"] + 0.5 * router, rel=1e-5)


def test_several_sets_and_predictions(tmp_path):
    sets = {"short": chat_examples(4), "long": chat_examples(12)}
    trainer = trainer_of(tmp_path, data_collator=collator("padded", end="trl"), eval_dataset=sets)
    metrics = trainer.evaluate()
    for name, pairs in sets.items():
        expected = {f"eval_{name}_{key[5:]}": value for key, value in of_the_set(pairs, "orpo").items()}
        assert {key: metrics[key] for key in expected} == pytest.approx(expected, rel=1e-5)
    expected = {f"test_{key[5:]}": value for key, value in of_the_set(chat_examples(7), "orpo").items()}
    assert numbers(trainer.predict(chat_examples(7)).metrics) == pytest.approx(expected, rel=1e-5)
    losses = evaluated(tmp_path, "padded", 5, compute_metrics=None)
    assert losses == pytest.approx({"eval_loss": of_the_set(chat_examples(12), "orpo")["eval_loss"]}, rel=1e-5)


def test_an_evaluation_leaves_nothing_to_the_next_log(tmp_path):
    trainer = trl_trainer_of(tmp_path, chat_examples(12), "shared")
    trainer.predict(trainer.eval_dataset)
    assert not trainer._stored_metrics["eval"]
    assert trainer._evaluation is None


@each_packing
@examples_of(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=5)
@given(left_out=st.sets(st.integers(0, 5), max_size=5))
def test_pairs_that_fill_up_the_last_batch_do_not_count(packing, left_out, tmp_path, monkeypatch):
    """What several processes do in the last batch, here in two batches of three with any pairs that fill up."""
    kept = torch.tensor([index not in left_out for index in range(6)])
    trainer = trainer_of(
        tmp_path,
        data_collator=collator(packing, end="trl"),
        eval_dataset=chat_examples(6),
        per_device_eval_batch_size=3,
        compute_metrics=None,
    )
    masks = iter(kept.split(3))
    monkeypatch.setattr(trainer, "_counted", lambda inputs: next(masks))
    monkeypatch.setattr(trainer, "_logs_all_metrics", True)
    expected = of_the_set([pair for index, pair in enumerate(chat_examples(6)) if kept[index]], "orpo")
    assert numbers(trainer.evaluate()) == pytest.approx(expected, rel=1e-5)


def test_which_pairs_fill_up_the_last_batch(tmp_path, monkeypatch):
    """Seven pairs over two processes in batches of two: in the second round the second process has one of its own."""
    trainer = trainer_of(tmp_path)
    batch, padded = (
        trainer.loss_inputs(collator(packing, end="trl")(chat_examples(2))) for packing in ("shared", "padded")
    )
    assert trainer._counted(batch) is None
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    state = trainer.accelerator.gradient_state
    monkeypatch.setattr(type(state), "end_of_dataloader", True)
    monkeypatch.setattr(type(state), "remainder", 3)
    for process, expected in enumerate(([True, True], [True, False])):
        monkeypatch.setattr(type(trainer.accelerator), "process_index", process)
        assert trainer._counted(batch).tolist() == expected
        assert trainer._counted(padded).tolist() == expected
    monkeypatch.setattr(type(state), "end_of_dataloader", False)
    assert trainer._counted(batch) is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_two_processes_give_the_numbers_of_one(kind, tmp_path):
    if kind == "trl":
        pytest.importorskip("trl.experimental.orpo")
    run = python(*LAUNCHER, "-m", "tests.runs", "evaluated", kind, tmp_path)
    assert run.returncode == 0, run.stderr
    alone = runs.make_trainer(kind, tmp_path / "alone", tiny(), evaluates=True)
    found = json.loads((tmp_path / "metrics.json").read_text())
    expected = numbers(alone.evaluate(), padded=True)
    assert {key: found[key] for key in expected} == pytest.approx(expected, rel=1e-5)
