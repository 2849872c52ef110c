"""The loss in frameworks (`orpo_kernels.integrations`): the losses that they log themselves. Slow; where installed."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import fields
from functools import partial
from pathlib import Path
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

from .training import chat_examples, losses, settings, tiny, tokenizer

CHATML = (
    "{% for m in messages %}{{'<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{'<|im_start|>assistant\n'}}{% endif %}"
)


def need(framework: str) -> None:
    if importlib.util.find_spec(framework) is None:
        pytest.skip(f"{framework} is not installed")


def logged(arguments: list[str], output: Path) -> list[dict[str, float]]:
    """What a training in a Python of its own logs, step by step."""
    run = subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "AXOLOTL_DO_NOT_TRACK": "1"},
        cwd=Path(__file__).parents[1],
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-6000:]
    state = max(output.rglob("trainer_state.json"), key=lambda path: path.stat().st_mtime)
    return [logs for logs in json.loads(state.read_text())["log_history"] if "loss" in logs]


def assert_same_losses(ours: list[dict[str, float]], theirs: list[dict[str, float]]) -> None:
    assert len(ours) == len(theirs) == 3
    for name, tolerance in (("loss", 1e-5), ("grad_norm", 1e-4)):
        assert [logs[name] for logs in ours] == pytest.approx([logs[name] for logs in theirs], rel=tolerance)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """A saved model, and the pairs beside it in the forms of the frameworks."""
    own = tokenizer()
    own.chat_template = CHATML
    own.save_pretrained(tmp_path / "tiny")
    tiny().save_pretrained(tmp_path / "tiny")
    pairs = [{name: turns[0]["content"] for name, turns in pair.items()} for pair in chat_examples(8)]

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write(
        "sharegpt.jsonl",
        [
            {
                "conversations": [{"from": "human", "value": pair["prompt"]}],
                "chosen": {"from": "gpt", "value": pair["chosen"]},
                "rejected": {"from": "gpt", "value": pair["rejected"]},
            }
            for pair in pairs
        ],
    )
    columns = {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"}
    info = {"file_name": "sharegpt.jsonl", "formatting": "sharegpt", "ranking": True, "columns": columns}
    (tmp_path / "dataset_info.json").write_text(json.dumps({"pairs": info}))
    write(
        "swift.jsonl",
        [
            {
                "messages": [
                    {"role": "user", "content": pair["prompt"]},
                    {"role": "assistant", "content": pair["chosen"]},
                ],
                "rejected_response": pair["rejected"],
            }
            for pair in pairs
        ],
    )
    write(
        "argilla.jsonl",
        [
            {
                side: [{"role": "user", "content": pair["prompt"]}, {"role": "assistant", "content": pair[side]}]
                for side in ("chosen", "rejected")
            }
            for pair in pairs
        ],
    )
    return tmp_path


# --- LLaMA-Factory -------------------------------------------------------------------------------------------------


def llamafactory(folder: Path, name: str, own: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, float]]:
    output = folder / name
    config = {
        "model_name_or_path": str(folder / "tiny"),
        "stage": "dpo",
        "do_train": True,
        "finetuning_type": "full",
        "pref_loss": "orpo",
        "pref_beta": 0.1,
        "dataset": "pairs",
        "dataset_dir": str(folder),
        "template": "chatml",
        "cutoff_len": 256,
        "output_dir": str(output),
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "max_steps": 3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "overwrite_cache": True,
        **changes,
    }
    config |= {} if own is None else {"orpo_kernels": own}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config))
    stock = ["-c", "from llamafactory.train.tuner import run_exp; run_exp()", str(file)]
    return logged(stock if own is None else ["-m", "orpo_kernels.integrations.llamafactory", str(file)], output)


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


def swift(folder: Path, name: str, plugin: str = "", accumulation: int = 1) -> list[dict[str, float]]:
    output = folder / name
    options = {
        "rlhf_type": "orpo",
        "model": folder / "tiny",
        "model_type": "llama",
        "template": "chatml",
        "tuner_type": "full",
        "dataset": folder / "swift.jsonl",
        "torch_dtype": "float32",
        "bf16": "false",
        "fp16": "false",
        "beta": 0.1,
        "max_length": 256,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": accumulation,
        "max_steps": 3,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "warmup_ratio": 0,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "split_dataset_ratio": 0,
        "gradient_checkpointing": "false",
        "seed": 42,
        "check_model": "false",
        "use_hf": "true",
        "output_dir": output,
        **({"external_plugins": plugin} if plugin else {}),
    }
    arguments = [str(part) for key, value in options.items() for part in (f"--{key}", value)]
    run = (
        "import json, pathlib, sys; from swift import rlhf_main; from swift.rlhf_trainers import rlhf_mixin; "
        "from transformers import Trainer; train = Trainer.train\n"
        "def kept(trainer, *args, **options):\n"
        "    result = train(trainer, *args, **options)\n"
        f"    pathlib.Path({str(output)!r}).mkdir(exist_ok=True)\n"
        f"    trainer.state.save_to_json({str(output / 'trainer_state.json')!r})\n"
        "    return result\n"
        "Trainer.train = kept; rlhf_main()"
    )
    return logged(["-c", run, *arguments], output)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_ms_swift_logs_its_own_losses(accumulation, model):
    need("swift")
    theirs = swift(model, "theirs", accumulation=accumulation)
    for packing in ("padded", "shared"):
        plugin = model / f"{packing}.py"
        plugin.write_text(
            "from orpo_kernels.integrations.ms_swift import install\n"
            f"install(packing={packing!r}, exact_accumulation=False)\n"
        )
        ours = swift(model, packing, str(plugin), accumulation)
        assert_same_losses(ours, theirs)
        for name in ("rewards/chosen", "logps/rejected", "log_odds_chosen", "nll_loss"):
            assert ours[0][name] == pytest.approx(theirs[0][name], rel=1e-4, abs=1e-6), name
        assert "logits/chosen" not in ours[0]


@pytest.mark.slow
def test_the_file_that_the_command_prints_is_a_plugin(model):
    need("swift")
    command = [sys.executable, "-m", "orpo_kernels.integrations.ms_swift"]
    plugin = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    ours = swift(model, "ours", plugin.stdout.strip())
    assert_same_losses(ours, swift(model, "theirs"))
    assert "logits/chosen" not in ours[0]


# --- Axolotl -------------------------------------------------------------------------------------------------------


def axolotl(folder: Path, name: str, own: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, float]]:
    output = folder / name
    config = {
        "base_model": str(folder / "tiny"),
        "rl": "orpo",
        "orpo_alpha": 0.1,
        "chat_template": "tokenizer_default",
        "datasets": [{"path": str(folder / "argilla.jsonl"), "ds_type": "json", "type": "chat_template.argilla"}],
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(output),
        "sequence_len": 256,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_steps": 3,
        "num_epochs": 1,
        "learning_rate": 0.001,
        "lr_scheduler": "constant",
        "optimizer": "adamw_torch",
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": 3,
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "gradient_checkpointing": False,
        **changes,
    }
    if own is not None:
        config |= {"plugins": ["orpo_kernels.integrations.axolotl.OrpoKernelsPlugin"], "orpo_kernels": own}
    file = folder / f"{name}.yaml"
    file.write_text(json.dumps(config))
    return logged(["-m", "axolotl.cli.train", str(file)], output)


@pytest.mark.slow
@pytest.mark.parametrize("accumulation", [1, 2])
def test_axolotl_logs_its_own_losses(accumulation, model):
    need("axolotl")
    theirs = axolotl(model, "theirs", gradient_accumulation_steps=accumulation)
    for packing in ("padded", "shared"):
        own = {"packing": packing, "exact_accumulation": False}
        ours = axolotl(model, packing, own, gradient_accumulation_steps=accumulation)
        assert_same_losses(ours, theirs)


# --- TRL -----------------------------------------------------------------------------------------------------------


def test_every_field_of_trls_config_is_in_the_page():
    config = pytest.importorskip("trl.experimental.orpo").ORPOConfig
    from transformers import TrainingArguments

    page = (Path(__file__).parents[1] / "docs" / "frameworks.md").read_text()
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
    trainer.method = ORPO()
    assert trainer.loss_inputs({**text, "pixel_values": None}).keys() == {"input_ids", "attention_mask", "rows"}
    with pytest.raises(ValueError, match="holds pixel_values, position_ids beside input_ids"):
        trainer.loss_inputs({**text, "pixel_values": torch.ones(1), "position_ids": torch.ones(1)})


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
    monkeypatch.setattr(CollatedPairsMixin, "_check_setup", lambda self: None)
    with pytest.raises(ValueError, match=said):
        trainer.serve(None, 0, packing)


def test_the_command_of_ms_swift_needs_no_framework():
    command = [sys.executable, "-m", "orpo_kernels.integrations.ms_swift"]
    run = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    assert Path(run.stdout.strip()).name == "ms_swift.py"
