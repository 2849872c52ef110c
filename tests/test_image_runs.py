"""Trainers, commands and the example on pairs with pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", minversion="5.23")
pytest.importorskip("accelerate")
pytest.importorskip("PIL")

from transformers import AutoModelForImageTextToText

from examples.pictures import make_model, make_pairs, make_processor
from examples.pictures import train as train_example
from orpo_kernels.app.data import load_preferences, prompt_key
from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss, freeze_vision
from orpo_kernels.transformers.media import vision_parts
from orpo_kernels.transformers.trainer import PreferenceTrainer

from . import training
from .commands import records, run, write_rows
from .models import build as build_text
from .training import losses, settings
from .vision_models import build


def trainer_of(folder: Any, packing: str = "auto", **options: Any) -> PreferenceTrainer:
    own = {"data_collator": PreferenceCollator(make_processor(), packing=packing)}
    own |= {"train_dataset": make_pairs(8, seed=1), "eval_dataset": make_pairs(5, seed=2)}
    return training.trainer_of(folder, model=make_model(), **{"max_steps": 3, **own, **options})


# --- the trainer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["auto", "padded"])
def test_the_trainer_is_a_plain_loop(packing, tmp_path):
    trainer = trainer_of(tmp_path, packing)
    assert trainer.data_collator.packing == ("shared" if packing == "auto" else "padded")
    trainer.train()
    model, expected = make_model(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    collator = PreferenceCollator(make_processor(), packing="padded")
    for step in range(3):
        out = causal_lm_orpo_loss(model, **collator(make_pairs(8, seed=1)[2 * step : 2 * step + 2]))
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(out.loss.item())
    assert losses(trainer) == pytest.approx(expected, rel=1e-4)


def test_pictures_are_read_in_the_workers_and_accumulated_exactly(tmp_path):
    whole = trainer_of(tmp_path, per_device_train_batch_size=4)
    parts = trainer_of(tmp_path, gradient_accumulation_steps=2, dataloader_num_workers=1, dataloader_pin_memory=False)
    for trainer in (whole, parts):
        trainer.train()
    assert losses(whole) == pytest.approx(losses(parts), rel=1e-4)


def test_an_unusable_pair_is_named_and_left_out(tmp_path):
    broken = [{**make_pairs(1, seed=3)[0], "images": ["gone.png"]}, *make_pairs(2, seed=4)]
    trainer = trainer_of(tmp_path, train_dataset=broken, max_steps=1)
    assert [(one.index, one.reason) for one in trainer.unusable_pairs["train"]] == [
        (0, "its picture 1 is missing: there is no file gone.png")
    ]
    trainer.train()


def test_references_of_pairs_that_differ_in_their_pictures_are_their_own(tmp_path):
    row = make_pairs(1, seed=3)[0]
    pairs = [row, {**row, "images": make_pairs(1, seed=9)[0]["images"]}]

    def logps(pairs: list[dict[str, Any]]) -> list[float]:
        trainer = trainer_of(tmp_path, method="dpo", train_dataset=pairs)
        return [trainer.train_dataset[index]["ref_chosen_logps"] for index in range(len(pairs))]

    first, second = logps(pairs)
    assert first != second
    assert logps(pairs[::-1]) == pytest.approx([second, first])  # and not what was kept of the others


@pytest.mark.parametrize("packing", ["auto", "padded"])
def test_the_drop_in_for_trl_takes_a_processor(packing, tmp_path):
    trl = pytest.importorskip("orpo_kernels.trl")
    from datasets import Dataset, Image

    pairs = make_pairs(9, seed=1)
    rows = Dataset.from_list(pairs).cast_column("images", [Image()])
    broken = Dataset.from_list([{**pairs[0], "images": ["gone.png"]}])
    arguments = trl.ORPOConfig(**settings(tmp_path, max_steps=3), max_length=64, beta=0.1)
    options = {"processing_class": make_processor(), "packing": packing, "end": "single"}
    trainer = trl.ORPOTrainer(make_model(), arguments, train_dataset=rows, eval_dataset=rows, **options)
    trainer.train()
    expected = trainer_of(tmp_path)
    expected.train()
    assert losses(trainer) == pytest.approx(losses(expected), rel=1e-4)
    assert "eval_rewards/accuracies" in trainer.evaluate()
    with pytest.raises(ValueError, match="its picture 1 is missing"):
        trl.ORPOTrainer(make_model(), arguments, train_dataset=broken, **options)


# --- freezing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Llava", "Idefics3", "InternVL", "Mistral 3", "Gemma 3", "Qwen2-VL", "GLM-4V"])
def test_frozen_is_all_but_the_language(name):
    model = build(name)
    frozen = freeze_vision(model)
    assert frozen
    assert set(frozen) == vision_parts(model).keys()
    for parameter, weight in model.named_parameters():
        is_language = "language_model." in parameter or parameter.startswith(("model.text_model.", "lm_head."))
        assert weight.requires_grad == is_language, parameter


def test_a_model_of_text_has_nothing_to_freeze():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no tower for pictures"):
        freeze_vision(build_text("Llama"))


# --- commands --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    make_model().save_pretrained(folder)
    make_processor().save_pretrained(folder)
    return str(folder)


def write_data(folder: Path, count: int = 10) -> str:
    """As LLaMA-Factory and ms-swift write it: marks in the text, paths beside the file; the last row has none."""
    (folder / "pictures").mkdir()
    rows = []
    for number, pair in enumerate(make_pairs(count, seed=5)):
        name = f"pictures/{number}.png"
        if number < count - 1:
            pair["images"][0].save(folder / name)
        question = pair["prompt"][0]["content"][1]["text"]
        rows.append(
            {
                "conversations": [{"from": "human", "value": f"<image>{question}"}],
                "chosen": {"from": "gpt", "value": pair["chosen"][0]["content"]},
                "rejected": {"from": "gpt", "value": pair["rejected"][0]["content"]},
                "images": [name],
            }
        )
    return write_rows(folder / "pairs.jsonl", rows)


FAST = ("--batch-size", "2", "--max-steps", "2", "--eval-split", "3", "--lr", "1e-3")


@pytest.mark.parametrize("lora", [False, True])
def test_train_and_evaluate(lora, model, tmp_path):
    data, output = write_data(tmp_path), tmp_path / "run"
    flags = ("--lora", "--merge") if lora else ()
    summary = run("train", model, data, "--output", output, "--freeze-vision", *flags, *FAST)
    assert (summary["pairs"] + summary["held_out"], summary["problems"]) == (9, 1)
    (problem,) = records(output, "problems")
    assert problem["row"] == 10
    assert "its picture 1 is missing" in problem["reason"]
    trained = AutoModelForImageTextToText.from_pretrained(output / ("merged" if lora else "model"))
    for (name, before), (_, after) in zip(make_model().named_parameters(), trained.named_parameters(), strict=True):
        is_frozen = "vision" in name or "projector" in name
        is_trained = ".q_proj." in name and not is_frozen
        assert before.equal(after) if is_frozen else not is_trained or not before.equal(after), name
    after = run("evaluate", output, data, "--eval-split", "3", "--output", tmp_path / "evaluated")
    assert after["pairs"] == summary["held_out"]
    other = run("evaluate", model, data, "--against", output, "--output", tmp_path / "compared")
    assert other["pairs"] == 9


def test_a_changed_picture_is_another_input(model, tmp_path):
    data, output = write_data(tmp_path), tmp_path / "run"
    run("train", model, data, "--output", output, *FAST)
    make_pairs(1, seed=77)[0]["images"][0].save(tmp_path / "pictures" / "0.png")
    said = run("train", model, data, "--output", output, "--resume", *FAST, status=2)
    assert "changed" in said["error"]


def test_paths_are_relative_to_the_file(tmp_path):
    found = load_preferences(write_data(tmp_path))
    assert found.pairs[0]["images"] == [str(tmp_path / "pictures" / "0.png")]
    assert found.pairs[0]["prompt"][0]["content"].startswith("<image>")


def test_one_question_about_two_pictures_is_two_prompts(tmp_path):
    row = make_pairs(1, seed=3)[0]
    other = {**row, "images": make_pairs(1, seed=9)[0]["images"]}
    text = {key: value for key, value in row.items() if key != "images"}
    assert len({prompt_key(row), prompt_key(other), prompt_key(text)}) == 3


# --- the example -----------------------------------------------------------------------------------------------------


def test_the_example_begins_to_learn(tmp_path):
    metrics = train_example(make_pairs(64, seed=1), make_pairs(32, seed=2), 4, str(tmp_path))
    assert metrics["eval_loss"] < 9
    assert 0 <= metrics["eval_rewards/accuracies"] <= 1


@pytest.mark.slow
def test_the_example_sees():
    from examples.pictures import main

    assert main([]) >= 0.95
    assert main(["--shuffled"]) < 0.7
