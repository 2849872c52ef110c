"""`orpo-kernels plan`: the costs of a real configuration, what fits and what is recommended."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

pytest.importorskip("typer")
pytest.importorskip("transformers")

from orpo_kernels.app import costs
from orpo_kernels.app.cli import main

from .training import tiny


def run(capsys: Any, *arguments: str) -> tuple[int, str, str]:
    status = main(["plan", *arguments])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def planned(capsys: Any, *arguments: str) -> dict[str, Any]:
    status, out, _ = run(capsys, *arguments, "--json")
    assert status == 0
    return json.loads(out)


def test_a_models_own_configuration(tmp_path, capsys):
    model = tiny(final_logit_softcapping=30.0, architecture="Gemma2")
    model.config.save_pretrained(tmp_path)
    found = planned(capsys, str(tmp_path), "--batch", "2", "--length", "10", "--share", "0.5")
    assert (found["hidden_size"], found["vocab_size"]) == tuple(reversed(model.lm_head.weight.shape))
    assert found["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert found["training_state_bytes"] == 2 * 4 * found["parameters"]
    assert found["softcap"]
    assert found["rows"] == 20
    assert planned(capsys, str(tmp_path / "config.json"))["vocab_size"] == found["vocab_size"]


def test_what_fits_depends_on_the_gpu_and_on_what_is_trained(capsys):
    large, small = (planned(capsys, "4096x128256", "--batch", "8", "--gpu", gpu) for gpu in ("H200", "24GB"))
    frozen = planned(capsys, "4096x128256", "--batch", "8", "--gpu", "24GB", "--lora")
    assert large["recommended"] == "resident"
    assert small["recommended"] == "recompute"
    assert frozen["recommended"] == "single_pass"
    fits = [{cost["name"]: cost["fits"] for cost in found["costs"]} for found in (large, small)]
    assert all(fits[0].values())
    assert not fits[1]["plain PyTorch, fp32 log-softmax"]
    assert fits[1]["ours, recompute"]
    assert "fits the budget" in large["why"]
    names = {cost["name"]: cost for cost in large["costs"]}
    assert names["ours, resident"]["seconds_at_least"] == pytest.approx(3 * 2 * 16384 * 4096 * 128256 / 989.5e12)
    assert {cost["seconds_at_least"] for cost in small["costs"]} == {None}


def test_people_get_a_table_and_a_sentence(capsys):
    status, out, _ = run(capsys, "576x49152", "--gpu", "A100", "--batch", "4", "--length", "256")
    assert status == 0
    assert "Recommended" in out
    assert "memory_budget=" not in out
    assert "Liger ORPO" in out
    _, out, _ = run(capsys, "4096x128256", "--gpu", "24GB")
    (budget,) = re.findall(r"memory_budget=(\d+)", out)
    chosen = costs.ours(costs.Case(4096, 128256, 16, 1024, 16384), int(budget))[0].plan
    assert chosen.schedule == "resident"
    status, out, _ = run(capsys, "16384x256000", "--gpu", "4GB")
    assert "nothing for a loss" in out.replace("\n", " ")
    assert status == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-folder"], "no configuration of a causal language model"),
        (["4096x128256", "--gpu", "V100"], "neither one of A100 80GB"),
        (["4096x128256", "--share", "0"], "--share is 0"),
    ],
)
def test_bad_input_is_a_sentence(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    status, _, err = run(capsys, *arguments)
    assert status == 2
    assert message in err
    assert "Traceback" not in err


def test_its_help_names_every_flag(capsys):
    status, out, _ = run(capsys, "--help")
    assert status == 0
    assert all(flag in out for flag in ("--batch", "--length", "--share", "--gpu", "--lora", "--dtype", "--json"))
