"""The examples run as they stand, but for a tiny random model, two steps and a folder of the test's."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch

from .training import tiny, tokenizer

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"trl_trainer": "trl", "lora": "peft"}
EXAMPLES = ("trl_trainer", "transformers_trainer", "accelerate_loop", "pytorch_loop", "lora", "grpo_loop")


@pytest.fixture
def model_folder(tmp_path) -> Path:
    folder = tmp_path / "model"
    tiny(initializer_range=0.02).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def run(name: str, **constants: Any) -> dict[str, Any]:
    """Execute the example with other values of its constants; what it has defined then."""
    source = (ROOT / "examples" / f"{name}.py").read_text()
    for constant, value in constants.items():
        source, found = re.subn(rf"^{constant} = .*$", f"{constant} = {value!r}", source, flags=re.MULTILINE)
        assert found == 1, f"{name} has no constant {constant}"
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source, name, "exec"), namespace)
    return namespace


def easy_facts(folder: Path) -> str:
    """Questions that a random model answers right now and then: one letter is enough."""
    path = folder / "facts.jsonl"
    facts = [{"prompt": f"{letter}?", "chosen": letter, "rejected": "a whole sentence"} for letter in "aeionrst"]
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return str(path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs(name, model_folder, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "run"
    constants = {"DATA": easy_facts(tmp_path)} if name == "grpo_loop" else {}
    names = run(name, MODEL=str(model_folder), FOLDER=str(folder), STEPS=2, **constants)
    before = tiny(initializer_range=0.02).state_dict()
    after = names.get("merged", names["model"]).state_dict()
    assert any(not torch.equal(value.cpu().to(before[key].dtype), before[key]) for key, value in after.items())
    assert all(value.isfinite().all() for value in after.values())
    saved = {path.suffix for path in folder.rglob("*")}
    assert ".safetensors" in saved


def test_a_stopped_run_of_the_trainer_goes_on(model_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    constants = {"MODEL": str(model_folder), "FOLDER": str(tmp_path / "run")}
    run("transformers_trainer", **constants, STEPS=2)
    trainer = run("transformers_trainer", **constants, STEPS=4)["trainer"]
    assert trainer.state.global_step == 4
    assert [logs["step"] for logs in trainer.state.log_history if "eval_loss" in logs][:1] == [1]


def test_they_are_short():
    """Short enough to copy."""
    for name in EXAMPLES:
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 80, name
