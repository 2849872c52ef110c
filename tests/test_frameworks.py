"""The loss in frameworks (`orpo_kernels.integrations`): the losses that they log themselves. Slow; where installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
import runpy
import subprocess
import sys
from contextlib import nullcontext
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import Trainer, TrainingArguments

from orpo_kernels.integrations.collated import CollatedPairsMixin, packed
from orpo_kernels.methods import ORPO
from orpo_kernels.transformers import PreferenceCollator, tokenize_pairs
from orpo_kernels.transformers.collator import pad_pairs
from orpo_kernels.transformers.trainer import ORPOTrainer

from .frameworks import FRAMEWORKS, axolotl, llamafactory, ms_swift, write_model
from .training import assert_same_logs, chat_examples, losses, settings, tiny, tokenizer

SHARED = {"packing": "shared", "exact_accumulation": False}


def need(framework: str) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")


def assert_same_losses(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) == 3
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [logs[name] for logs in ours] == pytest.approx([logs[name] for logs in theirs], rel=tolerance)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """The folder of a saved model, with the pairs beside it."""
    write_model(tmp_path)
    return tmp_path


# --- LLaMA-Factory -------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2, "pref_ftx": 0.5},
        {"pref_loss": "simpo", "pref_beta": 2.0, "simpo_gamma": 0.5, "pref_ftx": 0.3},
    ],
    ids=["orpo", "accumulation and ftx", "simpo"],
)
def test_llamafactory_logs_its_own_losses(changes, model):
    need("llamafactory")
    theirs = llamafactory(model, "theirs", **changes)
    for packing in ("padded", "shared"):
        own = {"packing": packing, "exact_accumulation": False}
        ours = llamafactory(model, packing, own, **changes)
        assert_same_losses(ours, theirs)
        with_nll = changes.get("pref_ftx")  # which LLaMA-Factory then counts as odds ratio
        same = [
            name for name in theirs[0] if name.startswith(("rewards", "logps", "sft", *(() if with_nll else ("odds",))))
        ]
        assert len(same) >= 6
        for name in same:
            assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4, abs=1e-6), name
    assert "logits/chosen" not in ours[0]  # that is how one knows that it was ours


@pytest.mark.slow
def test_llamafactory_keeps_its_other_losses(model):
    need("llamafactory")
    changes = {"pref_loss": "hinge"}
    ours = llamafactory(model, "ours", {}, **changes)
    assert_same_losses(ours, llamafactory(model, "theirs", **changes))
    assert "logits/chosen" in ours[0]


# --- ms-swift ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ms_swift_logs_its_own_losses(accumulation, model):
    need("swift")
    theirs = ms_swift(model, "theirs", gradient_accumulation_steps=accumulation)
    for packing in ("padded", "shared"):
        own = {"packing": packing, "exact_accumulation": False}
        ours = ms_swift(model, packing, own, gradient_accumulation_steps=accumulation)
        assert_same_losses(ours, theirs)
        for name in ("rewards/chosen", "logps/rejected", "log_odds_chosen", "nll_loss"):
            assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4, abs=1e-6), name
        assert "logits/chosen" not in ours[0]


@pytest.mark.slow
def test_the_file_that_the_command_prints_is_a_plugin(model):
    need("swift")
    command = [sys.executable, "-m", "orpo_kernels.integrations.ms_swift"]
    plugin = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    ours = ms_swift(model, "ours", external_plugins=plugin.stdout.strip())
    assert_same_losses(ours, ms_swift(model, "theirs"))
    assert "logits/chosen" not in ours[0]


# --- Axolotl -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_axolotl_logs_its_own_losses(accumulation, model):
    need("axolotl")
    theirs = axolotl(model, "theirs", gradient_accumulation_steps=accumulation)
    for packing in ("padded", "shared"):
        own = {"packing": packing, "exact_accumulation": False}
        ours = axolotl(model, packing, own, gradient_accumulation_steps=accumulation)
        assert_same_losses(ours, theirs)


# --- all of them ---------------------------------------------------------------------------------------------------


def lora(folder: Path) -> dict[str, dict[str, Any]]:
    return {
        "llamafactory": {"finetuning_type": "lora", "lora_rank": 4, "lora_target": "all"},
        "swift": {"tuner_type": "lora", "lora_rank": 4, "target_modules": "all-linear"},
        "axolotl": {"adapter": "lora", "lora_r": 4, "lora_alpha": 8, "lora_target_linear": True},
    }


def evaluation(folder: Path) -> dict[str, dict[str, Any]]:
    """All pairs in one batch: of several, the frameworks take the mean of means, and we the mean of the set."""
    every = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    argilla = {"path": str(folder / "argilla.jsonl"), "ds_type": "json", "split": "train"}
    return {
        "llamafactory": {"eval_dataset": "pairs", **every},
        "swift": {"val_dataset": folder / "swift.jsonl", **every},
        "axolotl": {
            "test_datasets": [{**argilla, "type": "chat_template.argilla"}],
            "eval_steps": 1,
            "eval_batch_size": 8,
        },
    }


def two_processes(folder: Path) -> dict[str, dict[str, Any]]:
    return {framework: {"processes": 2} for framework in FRAMEWORKS}


@pytest.mark.slow
@pytest.mark.parametrize("situation", [lora, evaluation, two_processes], ids=lambda situation: situation.__name__)
@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_framework_logs_the_same(framework, situation, model):
    """Losses and metrics of every step, and of every evaluation."""
    need(framework)
    train, changes = FRAMEWORKS[framework], situation(model)[framework]
    ours, theirs = train(model, "ours", SHARED, **changes), train(model, "theirs", **changes)
    evaluations = ["eval_loss" in logs for logs in theirs]
    assert sum(evaluations) >= 3 if situation is evaluation else not any(evaluations)
    assert ["eval_loss" in logs for logs in ours] == evaluations
    assert_same_logs(*map(without_logits, (ours, theirs)))
    ours, theirs = ([logs for logs in run if "loss" in logs] for run in (ours, theirs))
    assert_same_losses(ours, theirs)
    assert ours[0].get("logits/chosen") != theirs[0]["logits/chosen"]  # that is how one knows that it was ours


def without_logits(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Their means take in those of the padding, and only Axolotl's trainer has any of ours."""
    return [{name: value for name, value in logs.items() if "logits/" not in name} for logs in history]


# --- TRL -----------------------------------------------------------------------------------------------------------


def test_every_field_of_trls_config_is_in_the_page():
    config = pytest.importorskip("trl.experimental.orpo").ORPOConfig
    root = Path(__file__).parents[1]
    own = f"trl=={importlib.metadata.version('trl')}"
    if own not in (root / "constraints.txt").read_text().split():
        pytest.skip(f"the page is of the TRL that constraints.txt names, not of {own}")
    page = (root / "docs" / "frameworks.md").read_text()
    table = re.findall(r"^\| `(\w+)` \|", page.partition("\n## TRL\n")[2].partition("\nAnd of those")[0], re.MULTILINE)
    assert set(table) == {field.name for field in fields(config)} - {field.name for field in fields(TrainingArguments)}


# --- what is refused, without any framework ------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["padded", "shared"])
def test_a_trainer_that_makes_its_own_batches(packing, tmp_path):
    """The losses are those of the trainer of this package, on the same pairs."""

    class Collated(CollatedPairsMixin, Trainer):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            self.serve(ORPO(prompt_nll=False), 0, packing)

        def store_metrics(self, metrics: dict[str, float], train_eval: str) -> None:
            stored.append(metrics)

        def batch_metrics(self, out: Any) -> dict[str, float]:
            return {"accuracy": out.preferred.float().mean().item()}

    stored: list[dict[str, float]] = []
    pairs, _ = tokenize_pairs(chat_examples(8), tokenizer())
    args = TrainingArguments(
        **settings(tmp_path, max_steps=3, gradient_accumulation_steps=2), remove_unused_columns=False
    )
    theirs = Collated(tiny(), args, train_dataset=pairs, data_collator=partial(pad_pairs, padding_id=0))
    theirs.train()
    assert len(stored) == 6
    collator, options = PreferenceCollator(tokenizer(), packing="padded"), {"prompt_nll": False}
    ours = ORPOTrainer(tiny(), args, train_dataset=pairs, data_collator=collator, loss_options=options)
    ours.train()
    assert losses(theirs) == pytest.approx(losses(ours), rel=1e-5)


def test_batches_with_more_than_text_are_refused_by_name():
    text = {name: torch.ones(2, 3, dtype=torch.int64) for name in ("input_ids", "attention_mask", "labels")}
    trainer: Any = CollatedPairsMixin()
    assert trainer.batch_inputs({**text, "pixel_values": None}) == text
    with pytest.raises(ValueError, match="holds pixel_values, position_ids beside input_ids"):
        trainer.batch_inputs({**text, "pixel_values": torch.ones(1), "position_ids": torch.ones(1)})


def test_pairs_with_more_than_text_are_refused_by_name():
    pair = {f"{side}_{field}": [3, 4, 5] for side in ("chosen", "rejected") for field in ("input_ids", "labels")}
    batch = packed([{**pair, "images": None, "videos": []}], padding_id=0)
    assert batch["input_ids"].shape == (1, 3)  # the answers are the same
    with pytest.raises(ValueError, match="Pair 1 of the batch holds images, chosen_pixel_values"):
        packed([pair, {**pair, "images": ["a.png"], "chosen_pixel_values": torch.ones(1)}], padding_id=0)


@pytest.mark.parametrize(("packing", "said"), [("tight", "must be one of 'auto'"), ("shared", 'Use packing="padded"')])
def test_a_packing_that_cannot_be(packing, said, monkeypatch):
    trainer: Any = CollatedPairsMixin()
    trainer.model = tiny("Mixtral", num_local_experts=4, output_router_logits=True)
    trainer.accelerator = SimpleNamespace(autocast=nullcontext)
    monkeypatch.setattr(CollatedPairsMixin, "_check_setup", lambda self: None)
    with pytest.raises(ValueError, match=said):
        trainer.serve(None, 0, packing)


def test_the_command_of_ms_swift_needs_no_framework(capsys):
    runpy.run_module("orpo_kernels.integrations.ms_swift", run_name="__main__")
    assert Path(capsys.readouterr().out.strip()).name == "ms_swift.py"
