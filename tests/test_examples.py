"""The examples run as they stand, but for a tiny random model, two steps and a folder of the test's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import torch

from .training import tiny

ROOT = Path(__file__).resolve().parents[1]
NEEDS = {"trl_trainer": "trl", "lora": "peft"}
EXAMPLES = ("trl_trainer", "transformers_trainer", "accelerate_loop", "pytorch_loop", "lora", "grpo_loop")


def source_of(name: str, **constants: Any) -> str:
    """The example with other values of its constants."""
    source = (ROOT / "examples" / f"{name}.py").read_text()
    for constant, value in constants.items():
        source, found = re.subn(rf"^{constant} = .*$", f"{constant} = {value!r}", source, flags=re.MULTILINE)
        assert found == 1, f"{name} has no constant {constant}"
    return source


def run(name: str, **constants: Any) -> dict[str, Any]:
    """What the example has defined when it has run."""
    namespace: dict[str, Any] = {"__name__": name}
    exec(compile(source_of(name, **constants), name, "exec"), namespace)
    return namespace


def easy_facts(folder: Path) -> str:
    """Questions that a random model answers right now and then: one letter is enough."""
    path = folder / "facts.jsonl"
    facts = [{"prompt": f"{letter}?", "chosen": letter, "rejected": "a whole sentence"} for letter in "aeionrst"]
    path.write_text("".join(json.dumps(fact) + "\n" for fact in facts))
    return str(path)


@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs(name, model, tmp_path, monkeypatch):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    folder = tmp_path / "run"
    constants = {"DATA": easy_facts(tmp_path)} if name == "grpo_loop" else {}
    names = run(name, MODEL=model, FOLDER=str(folder), STEPS=2, **constants)
    before = tiny(initializer_range=0.02).state_dict()
    after = names.get("merged", names["model"]).state_dict()
    assert any(not torch.equal(value.cpu().to(before[key].dtype), before[key]) for key, value in after.items())
    assert all(value.isfinite().all() for value in after.values())
    saved = {path.suffix for path in folder.rglob("*")}
    assert ".safetensors" in saved


def test_a_stopped_run_of_the_trainer_goes_on(model, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")
    constants = {"MODEL": model, "FOLDER": str(tmp_path / "run")}
    run("transformers_trainer", **constants, STEPS=2)
    trainer = run("transformers_trainer", **constants, STEPS=4)["trainer"]
    assert trainer.state.global_step == 4
    assert [logs["step"] for logs in trainer.state.log_history if "eval_loss" in logs][:1] == [1]


@pytest.mark.slow
def test_a_mesh_of_four_processes(model, tmp_path):
    source = source_of("distributed/vocab_parallel", MODEL=model, FOLDER=str(tmp_path / "run"), STEPS=3)
    (tmp_path / "script.py").write_text(source)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "4"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [*command, str(tmp_path / "script.py")], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
    assert len(re.findall(r"^step \d: loss \d+\.\d{4}$", run.stdout, flags=re.MULTILINE)) == 3
    before, after = tiny(initializer_range=0.02), type(tiny()).from_pretrained(tmp_path / "run")
    assert not torch.equal(before.lm_head.weight, after.lm_head.weight)
    assert all(value.isfinite().all() for value in after.state_dict().values())


@pytest.mark.parametrize(
    ("name", "processes", "kind"),
    [
        ("one_gpu", 1, "NO"),
        ("two_gpus_ddp", 2, "MULTI_GPU"),
        ("eight_gpus_fsdp2", 8, "FSDP"),
        ("eight_gpus_zero3", 8, "DEEPSPEED"),
    ],
)
def test_configurations_of_accelerate(name, processes, kind):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(ROOT / "examples" / "distributed" / f"{name}.yaml"))
    assert config.num_processes == processes
    assert str(config.distributed_type.value) == kind


def test_they_are_short():
    """Short enough to copy."""
    for name in (*EXAMPLES, "distributed/vocab_parallel"):
        assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) <= 80, name
