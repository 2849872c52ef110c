"""`transformers.Trainer` with the fused loss; and, of both trainers, what takes a process of its own."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import EvalPrediction, TrainingArguments

from benchmarks.contest.workloads import have_real_data
from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss
from orpo_kernels.transformers.batches import batch_rows
from orpo_kernels.transformers.engines import run_inside
from orpo_kernels.transformers.metrics import METRICS, preference_metrics
from orpo_kernels.transformers.trainer import ORPOTrainer, PreferenceTrainer

from . import runs
from .training import (
    assert_same_logs,
    chat_examples,
    collator,
    grad_norms,
    losses,
    settings,
    tiny,
    tokenizer,
    trained,
    trainer_of,
)
from .versions import keeps_the_order

each_trainer = pytest.mark.parametrize("kind", ["transformers", "trl"])
MIXTURE = {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}


# --- the loss ------------------------------------------------------------------------------------------------------


@keeps_the_order
def test_it_is_a_plain_loop(tmp_path):
    trainer = trained(tmp_path, beta=0.3, max_grad_norm=1.0)
    model, expected = tiny(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    for step in range(4):
        out = causal_lm_orpo_loss(model, **collator()(chat_examples()[2 * step : 2 * step + 2]), beta=0.3)
        out.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(
            {
                "loss": float(out.loss),
                "grad_norm": float(norm),
                "nll_loss": float(out.nll_loss),
                "rewards/chosen": 0.3 * float(out.chosen_logps.mean()),
                "rewards/rejected": 0.3 * float(out.rejected_logps.mean()),
                "rewards/accuracies": float((out.chosen_logps > out.rejected_logps).float().mean()),
                "rewards/margins": 0.3 * float((out.chosen_logps - out.rejected_logps).mean()),
                "logps/rejected": float(out.rejected_logps.mean()),
                "logps/chosen": float(out.chosen_logps.mean()),
                "log_odds_ratio": float(nn.functional.logsigmoid(out.log_odds).mean()),
                "log_odds_chosen": float(out.log_odds.mean()),
            }
        )
    logged = [logs for logs in trainer.state.log_history if "loss" in logs]
    assert_same_logs([{key: logs[key] for key in expected[0]} for logs in logged], expected)


@pytest.mark.parametrize(
    "loss_options",
    [{"prompt_nll": False}, {"nll_reduction": "sequence"}, {"alpha": 0.5}],
    ids=["response", "sequence", "alpha"],
)
def test_accumulation_is_exact_with_options(loss_options, tmp_path):
    """Loss, gradient and logged means of four micro-batches of one pair are those of one batch of four."""
    small = trained(tmp_path, loss_options=loss_options, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    large = trained(tmp_path, loss_options=loss_options, per_device_train_batch_size=4)
    assert_same_logs(small.state.log_history, large.state.log_history)


def test_what_a_sparse_backward_pass_leaves_out_is_logged(tmp_path):
    exact, sparse = trained(tmp_path), trained(tmp_path, loss_options={"sparse_eps": 1e-3})
    assert losses(sparse) == pytest.approx(losses(exact), rel=1e-2)
    for logs in (logs for logs in sparse.state.log_history if "loss" in logs):
        assert 0 < logs["sparse/active_share"] <= 1
        assert 0 <= logs["sparse/dropped_mass"] < 0.1
    assert not any(key.startswith("sparse/") for logs in exact.state.log_history for key in logs)


@keeps_the_order
def test_accumulation_of_a_mixture_of_experts(tmp_path):
    """All but the router's loss is exact; of that, the mean over the micro-batches that a step has is taken."""
    pairs = chat_examples(3)
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "learning_rate": 0.0, "max_steps": 2}
    trainer = trained(tmp_path, model=tiny("Mixtral", **MIXTURE), train_dataset=pairs, **options)
    model = tiny("Mixtral", **MIXTURE)
    router = [float(model(**_inputs([pair])).aux_loss) for pair in pairs]
    model.config.output_router_logits = False
    exact = [float(causal_lm_orpo_loss(model, **collator()(batch)).loss) for batch in (pairs[:2], pairs[2:])]
    expected = [exact[0] + 0.5 * (router[0] + router[1]) / 2, exact[1] + 0.5 * router[2]]
    assert losses(trainer) == pytest.approx(expected, rel=1e-5)


def _inputs(examples: list[dict[str, Any]]) -> dict[str, Any]:
    batch = collator()(examples)
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def test_gradient_checkpointing_and_autocast(tmp_path):
    plain = trained(tmp_path)
    assert_same_logs(trained(tmp_path, gradient_checkpointing=True).state.log_history, plain.state.log_history)
    assert losses(trained(tmp_path, bf16=True)) == pytest.approx(losses(plain), rel=1e-2)
    frozen = tiny()
    frozen.lm_head.requires_grad_(False)
    assert losses(trained(tmp_path, model=frozen, bf16=True, gradient_checkpointing=True))[-1] < losses(plain)[0]


def test_torch_compile_compiles_the_body(tmp_path, monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")
    plain = trained(tmp_path, model=tiny(num_hidden_layers=1), max_steps=2)
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    compiled = trained(tmp_path, model=tiny(num_hidden_layers=1), max_steps=2, torch_compile_backend="eager")
    assert frames["ok"] > before
    assert_same_logs(compiled.state.log_history, plain.state.log_history)
    assert compiled.model.state_dict().keys() == plain.model.state_dict().keys()


def test_lora(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = trained(tmp_path, model=peft.get_peft_model(tiny(), config), learning_rate=1e-2, max_steps=8)
    assert losses(trainer)[0] == pytest.approx(losses(trained(tmp_path, max_steps=1))[0], rel=1e-5)
    trainer.save_model(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_config.json").exists()


# --- evaluation ----------------------------------------------------------------------------------------------------


def test_other_metrics_get_every_pair(tmp_path):
    def worst(prediction: EvalPrediction) -> dict[str, float]:
        assert prediction.predictions.shape == (5, len(METRICS))
        assert prediction.label_ids.tolist() == [1] * 5
        return {"worst": float(prediction.predictions[:, METRICS.index("log_odds_chosen")].min())}

    trainer = trainer_of(tmp_path, compute_metrics=worst)
    assert np.isfinite(trainer.evaluate()["eval_worst"])
    assert "eval_logps/chosen" not in trainer.evaluate()
    assert trainer_of(tmp_path, compute_metrics=None).evaluate().keys() >= {"eval_loss"}
    assert trainer_of(tmp_path).predict(chat_examples(3)).predictions.shape == (3, len(METRICS))


def test_pairs_with_an_empty_answer_are_not_averaged():
    values = np.arange(18, dtype=np.float32).reshape(2, 9)
    values[1] = np.nan
    metrics = preference_metrics(EvalPrediction(values, np.array([1, 0])))
    assert metrics == {name: float(column) for column, name in enumerate(METRICS)}
    assert preference_metrics(EvalPrediction([values[:1], values[1:]], np.array([1, 0]))) == metrics
    assert preference_metrics(EvalPrediction(values[1:], np.array([0]))) == {}


def test_evaluation_runs_one_gemm_of_the_head(tmp_path):
    trainer = trainer_of(tmp_path)
    model, batch = trainer.model.eval(), collator()(chat_examples(4))
    trainer.prediction_step(model, batch, False)  # the probe runs in the first call

    def flops(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def body() -> None:
        with torch.no_grad():
            model.model(batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)

    rows = batch_rows(**batch).live()
    head = flops(lambda: trainer.prediction_step(model, batch, False)) - flops(body)
    assert head == 2 * len(rows) * model.lm_head.weight.numel()


def test_prompts_are_shared_where_the_model_allows_it(tmp_path):
    pairs = chat_examples(4)
    for model, packing in ((tiny(), "auto"), (tiny(), "padded"), (tiny("Mixtral", **MIXTURE), "auto")):
        own = PreferenceCollator(tokenizer(), max_length=96, packing=packing)
        trainer = trainer_of(tmp_path, model=model, data_collator=own)
        shared = packing == "auto" and "output_router_logits" not in vars(model.config)
        assert ("packed" in trainer.data_collator(pairs)) == shared, (type(model).__name__, packing)
        assert own.packing == packing  # the caller's collator is as it was


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_collator": None}, "give PreferenceCollator"),
        ({"loss_options": {"nll_denominator": 3}}, "the trainer counts"),
        ({"loss_options": {"beta": 3}}, "an argument of its own"),
        ({"label_smoothing_factor": 0.1}, "label smoothing"),
    ],
)
def test_options_that_cannot_work(options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        trainer_of(tmp_path, **options)


def test_a_loss_function_is_refused(tmp_path):
    with pytest.raises(ValueError, match="compute_loss_func"):
        ORPOTrainer(
            tiny(), TrainingArguments(**settings(tmp_path)), data_collator=collator(), compute_loss_func=lambda *_: 0
        )


def test_models_that_cannot_be_served(tmp_path):
    hooked = tiny()
    hooked.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="lm head has hooks"):
        trainer_of(tmp_path, model=hooked)


def test_a_router_whose_loss_is_not_known_is_refused(tmp_path):
    model = tiny("Mixtral", **MIXTURE)
    del model.num_experts_per_tok
    with pytest.raises(ValueError, match="MixtralForCausalLM asks for a router loss"):
        trained(tmp_path, model=model)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("is_fsdp_enabled", "FSDP version 1 .*fsdp_config={'version': 2, .*fsdp_version: 2"),
        ("parallelism_config", "sequence parallelism"),
        ("n_gpu", "DataParallel"),
    ],
)
def test_shards_and_replicas_are_refused(name, found, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    if name == "parallelism_config":
        enabled = SimpleNamespace(tp_enabled=False, cp_enabled=True, sp_enabled=False)
        monkeypatch.setattr(type(trainer.accelerator), name, enabled)
    elif name == "n_gpu":
        trainer.args._n_gpu = 2
    else:
        setattr(trainer, name, True)
    with pytest.raises(ValueError, match=found):
        trainer._check_setup()


def test_fsdp2_is_let_through(tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path)
    trainer.is_fsdp_enabled = True
    monkeypatch.setattr(trainer.accelerator.state, "fsdp_plugin", SimpleNamespace(fsdp_version=2), raising=False)
    trainer._check_setup()


def at_stage(stage: int, trainer: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(type(trainer.accelerator.state), "deepspeed_plugin", SimpleNamespace(zero_stage=stage))
    return trainer


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_every_stage_of_zero_is_let_through(stage, tmp_path, monkeypatch):
    at_stage(stage, trainer_of(tmp_path), monkeypatch)._check_setup()


def test_zero3_with_trained_tokens_is_refused(tmp_path, monkeypatch):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2], task_type="CAUSAL_LM")
    trainer = trainer_of(tmp_path, model=peft.get_peft_model(tiny(tie_word_embeddings=True), config))
    at_stage(2, trainer, monkeypatch)._check_setup()
    with pytest.raises(ValueError, match="trainable_token_indices"):
        at_stage(3, trainer, monkeypatch)._check_setup()


def test_zero3_does_not_train_what_it_has_evaluated(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.deepspeed = trainer.model  # as an evaluation leaves it
    with pytest.raises(ValueError, match="eval_on_start"):
        trainer.train()


def test_a_model_in_parts_is_not_run_before_training(tmp_path):
    """ZeRO-3 has its parameters in parts, each with an id, as soon as it is loaded."""
    model = tiny()
    for number, parameter in enumerate(model.parameters()):
        parameter.ds_id, parameter.data = number, torch.empty(0)
    trainer = trainer_of(tmp_path, model=model)
    assert trainer.data_collator.packing == "padded"
    with pytest.raises(ValueError, match="reference is in parts"):
        PreferenceTrainer(
            model, trainer.args, data_collator=trainer.data_collator, train_dataset=chat_examples(), method="dpo"
        )


def test_batches_that_the_main_process_slices_are_refused(tmp_path, monkeypatch):
    """It would give each process a part of the 2B sequences."""

    class Stream(IterableDataset):
        def __iter__(self) -> Any:
            return iter(chat_examples())

    trainer = trainer_of(tmp_path, train_dataset=Stream())
    monkeypatch.setattr(type(trainer.accelerator), "num_processes", 2)
    with pytest.raises(ValueError, match="dispatch_batches"):
        trainer.get_train_dataloader()


# --- wrappers ------------------------------------------------------------------------------------------------------


class Wrapper(nn.Module):
    """As DistributedDataParallel: does something before and after the forward of what it wraps."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, **inputs: Any) -> Any:
        self.calls += 1
        return self.module(**inputs)


@pytest.mark.parametrize("patched", [False, True], ids=["", "forward of its own"])
def test_a_function_runs_inside_the_wrapper(patched):
    inner = nn.Linear(2, 2)
    if patched:
        inner.forward = nn.Linear.forward.__get__(inner)  # as Accelerate does
    before, wrapper = dict(vars(inner)), Wrapper(inner)
    x = torch.ones(2)
    assert torch.equal(run_inside(wrapper, inner, lambda x: 2 * inner(x), {"x": x}), 2 * inner(x))
    assert wrapper.calls == 1
    with pytest.raises(ZeroDivisionError):
        run_inside(wrapper, inner, lambda x: 1 / 0, {"x": x})
    assert vars(inner) == before


# --- processes -----------------------------------------------------------------------------------------------------


def python(*arguments: Any) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)


@each_trainer
def test_a_killed_run_goes_on_where_it_was(kind, tmp_path):
    if kind == "trl":
        pytest.importorskip("trl.experimental.orpo")
    killed = runs.forked(lambda: runs.interrupted(kind, tmp_path / "killed", [runs.Kill()]).train())
    assert os.waitstatus_to_exitcode(os.waitpid(killed, 0)[1]) == -signal.SIGKILL
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]

    resumed = runs.interrupted(kind, tmp_path / "killed")
    resumed.train(resume_from_checkpoint=True)
    whole = runs.interrupted(kind, tmp_path / "whole")
    whole.train()
    assert len(losses(whole)) == runs.STEPS
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-6)
    assert grad_norms(resumed) == pytest.approx(grad_norms(whole), rel=1e-5)
    assert len(set(losses(whole))) == runs.STEPS


LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2)


@pytest.mark.slow
@pytest.mark.parametrize("engine", runs.ENGINES)
@each_trainer
def test_two_processes_are_one_large_batch(kind, engine, tmp_path):
    if engine.startswith("zero"):
        pytest.importorskip("deepspeed")
    run = python(*LAUNCHER, "-m", "tests.runs", engine, kind, tmp_path)
    assert run.returncode == 0, run.stderr
    together = json.loads((tmp_path / "logs.json").read_text())
    evaluation = {} if kind == "trl" else {"eval_strategy": "steps", "eval_steps": 2}
    sizes = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    alone = runs.make_trainer(
        kind, tmp_path / "alone", tiny(), train_sampling_strategy="sequential", **sizes, **evaluation
    )
    alone.train()
    assert_same_logs(_but_logits(together), _but_logits(alone.state.log_history))
    if engine == "fsdp2":
        saved = type(alone.model).from_pretrained(tmp_path / "model").state_dict()
        for name, parameter in alone.model.state_dict().items():
            torch.testing.assert_close(saved[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@each_trainer
def test_zero3_is_one_large_batch(kind, tmp_path):
    """DeepSpeed ZeRO-3, where the head's weight lies in parts on both processes, a tied one too, and LoRA on it."""
    pytest.importorskip("deepspeed")
    tiny().save_pretrained(tmp_path / "initial")
    run = python(*LAUNCHER, "-m", "tests.runs", "zero3", kind, tmp_path)
    assert run.returncode == 0, run.stderr
    changes = {"train_sampling_strategy": "sequential", "gradient_accumulation_steps": 2}
    changes |= {"per_device_train_batch_size": 4, **({} if kind == "trl" else runs.EVALUATING)}
    for case, others in {"whole": ("parts", "resumed"), "tied": (), "lora": ()}.items():
        alone = runs.make_trainer(kind, tmp_path / "alone", runs.zero3_model(case), **changes)
        alone.train()
        for name in (case, *others):
            logs = [json.loads((tmp_path / f"{name}.json").read_text()), alone.state.log_history]
            if name == "resumed":  # which evaluates once more, and whose last record begins where it went on
                logs = [[record for record in history if "loss" in record] for history in logs]
            assert_same_logs(*map(_but_logits, logs))
        if case == "whole":
            saved = type(alone.model).from_pretrained(tmp_path / "model").state_dict()
            for name, parameter in alone.model.state_dict().items():
                torch.testing.assert_close(saved[name], parameter, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(not have_real_data(), reason="needs LLMBar ($ORPO_KERNELS_DATA) and SmolLM2")
def test_ten_steps_of_a_real_model_by_two_processes(tmp_path):
    def logged(engine: str, *launcher: Any) -> list[float]:
        run = python(*launcher, "-m", "tests.runs", "smollm2", engine, tmp_path)
        assert run.returncode == 0, run.stderr
        history = json.loads((tmp_path / f"{engine}.json").read_text())
        return [logs["loss"] for logs in history if "loss" in logs]

    alone = logged("alone")
    assert len(alone) == 10
    for engine in ("ddp", "fsdp2"):
        assert logged(engine, *LAUNCHER) == pytest.approx(alone, rel=1e-4), engine


def _but_logits(history: list[dict[str, float]]) -> list[dict[str, float]]:
    """Without what is a mean of each process's own mean: mean logits and TRL's NLL."""
    uneven = ("logits/chosen", "logits/rejected", "nll_loss")
    return [{key: value for key, value in logs.items() if key not in uneven} for logs in history]
