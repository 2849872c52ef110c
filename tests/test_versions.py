"""What differs between versions (`transformers/versions.py`), where other versions are not installed."""

from __future__ import annotations

import importlib
import sys
from importlib.metadata import PackageNotFoundError
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from orpo_kernels.transformers import causal_lm_orpo_loss, versions

from .models import assert_same, build, by_logits, make_batch


@pytest.mark.parametrize(
    ("installed", "said"),
    [("0.24.0", "trl 0.24.0 is installed"), ("0.27.2", "trl 0.27.2 is installed"), (None, "no trl is installed")],
)
def test_an_older_trl_is_named(installed, said, monkeypatch):
    def version(package: str) -> str:
        if installed is None:
            raise PackageNotFoundError(package)
        return installed

    monkeypatch.setattr(versions, "version", version)
    monkeypatch.delitem(sys.modules, "orpo_kernels.trl", raising=False)
    with pytest.raises(ImportError, match=rf"needs trl 0\.28 or newer, and {said}: pip install 'trl>=0\.28'"):
        importlib.import_module("orpo_kernels.trl")


@pytest.mark.parametrize("installed", ["0.28.0", "1.16.0", "1.17.0.dev0", "2.0rc1"])
def test_newer_trls_are_taken(installed, monkeypatch):
    monkeypatch.setattr(versions, "version", lambda package: installed)
    versions.check_trl()


def test_a_body_under_another_name_than_the_model_says(monkeypatch):
    """Gemma3ForCausalLM of transformers 4.57."""
    model, batch = build("Gemma3: soft-cap").train(), make_batch()
    monkeypatch.setattr(type(model), "base_model_prefix", "language_model")
    assert model.base_model is model
    assert_same(causal_lm_orpo_loss(model, **batch, beta=0.5), by_logits(model, batch, beta=0.5), model)


@pytest.mark.parametrize(
    ("arguments", "groups"),
    [
        ({"train_sampling_strategy": "group_by_length"}, True),
        ({"train_sampling_strategy": "random"}, False),
        ({"train_sampling_strategy": None, "group_by_length": True}, True),
        ({"group_by_length": True}, True),
        ({"group_by_length": False}, False),
    ],
)
def test_grouping_is_read_as_it_is_said(arguments, groups):
    args: Any = SimpleNamespace(**arguments)
    assert versions.groups_by_length(args) is groups


@pytest.mark.parametrize("strategy", ["random", "group_by_length"])
def test_grouping_is_said_as_it_is_read(strategy, tmp_path):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, **versions.sampling(strategy))
    assert versions.groups_by_length(args) is (strategy == "group_by_length")


def test_a_compilation_that_the_environment_asks_for(monkeypatch):
    """transformers < 5.2: the trainer has no plugin to hand on, and Accelerate has read the environment."""
    pytest.importorskip("accelerate")
    from transformers import Trainer

    accelerator = SimpleNamespace(state=SimpleNamespace(dynamo_plugin=torch))
    monkeypatch.setattr(Trainer, "_build_accelerator_args", None, raising=False)
    assert versions.compilation_by_environment(accelerator) is None
    monkeypatch.delattr(Trainer, "_build_accelerator_args")
    assert versions.compilation_by_environment(accelerator) is torch
