"""The drop-in for TRL's ORPOTrainer: TRL's own losses and metrics where TRL is right, and where it is not, right."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("trl.experimental.orpo")

import transformers
from datasets import Dataset
from trl.experimental.orpo import ORPOConfig
from trl.experimental.orpo import ORPOTrainer as TRLORPOTrainer

from benchmarks.contest.workloads import have_real_data, preference_pairs
from orpo_kernels.transformers import tokenize_pairs
from orpo_kernels.transformers.batches import batch_rows
from orpo_kernels.trl import ORPOTrainer

from .training import assert_same_logs, chat_examples, copies, grad_norms, losses, settings, tiny, tokenizer
from .versions import leaves_answers_empty

EVALUATING = {"eval_strategy": "steps", "eval_steps": 2}


def trainer_of(trainer_class: Any, model: nn.Module, folder: Any, **options: Any) -> Any:
    """`options`: of the trainer where they are its own, else of the config."""
    torch.manual_seed(0)  # for LoRA, which TRL before 1.15 does not seed
    own = ("peft_config", "exact_accumulation", "end", "packing", "compute_metrics", "callbacks")
    examples = options.pop("examples", None) or chat_examples()
    # The evaluation set in one batch: of several, TRL averages the means.
    arguments = settings(
        folder,
        **{"max_length": 96, "per_device_eval_batch_size": 5, **{k: v for k, v in options.items() if k not in own}},
    )
    return trainer_class(
        model=model,
        args=ORPOConfig(**arguments),
        train_dataset=Dataset.from_list(examples),
        eval_dataset=Dataset.from_list(examples[:5]),
        processing_class=tokenizer(),
        **{k: v for k, v in options.items() if k in own},
    )


def trained(*args: Any, **options: Any) -> Any:
    trainer = trainer_of(*args, **options)
    trainer.train()
    return trainer


def both_trained(model: nn.Module, folder: Any, **options: Any) -> tuple[Any, Any]:
    """Ours, padded, and TRL's after the same training from the same weights."""
    mine, other = copies(model)
    own = {"exact_accumulation": options.pop("exact_accumulation")} if "exact_accumulation" in options else {}
    ours = trained(ORPOTrainer, mine, folder / "ours", packing="padded", **own, **options)
    return ours, trained(TRLORPOTrainer, other, folder / "theirs", **options)


def but_mean_logits(trainer: Any) -> list[dict[str, float]]:
    names = ("logits/chosen", "logits/rejected")
    return [
        {key: value for key, value in logs.items() if not key.endswith(names)} for logs in trainer.state.log_history
    ]


def lora() -> dict[str, Any]:
    peft = pytest.importorskip("peft")
    return {"peft_config": peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")}


def batch_of(trainer: Any, rows: range = range(4)) -> dict[str, Any]:
    return trainer.data_collator([trainer.train_dataset[row] for row in rows])


# --- as TRL --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_step_and_every_metric_is_trls(with_lora, accumulation, tmp_path):
    """With shared prompts, all but the mean logits, which TRL takes over padding as well."""
    options = {"gradient_accumulation_steps": accumulation, **EVALUATING, **(lora() if with_lora else {})}
    exact = {} if accumulation == 1 else {"exact_accumulation": False}  # by default it is, and TRL's is not
    padded, theirs = both_trained(tiny(), tmp_path, **exact, **options)
    assert len(losses(theirs)) == 4
    assert_same_logs(padded.state.log_history, theirs.state.log_history)
    shared = trained(ORPOTrainer, tiny(), tmp_path, packing="auto", **exact, **options)
    assert "packed" in batch_of(shared)
    assert_same_logs(but_mean_logits(shared), but_mean_logits(theirs))


def test_mean_logits_of_shared_prompts_are_over_all_tokens_of_each_side(tmp_path):
    trainer = trainer_of(ORPOTrainer, tiny(), tmp_path, packing="shared")
    _, metrics = trainer.get_batch_loss_metrics(trainer.model, batch_of(trainer))
    for side in ("chosen", "rejected"):
        ids = [torch.tensor([trainer.train_dataset[row][f"{side}_input_ids"]]) for row in range(4)]
        logits = torch.cat([trainer.model(one).logits[0] for one in ids])
        assert metrics[f"logits/{side}"] == pytest.approx(float(logits.mean()), rel=1e-4)


def test_prompts_are_shared_only_where_that_is_exact(tmp_path):
    assert "packed" in batch_of(trainer_of(ORPOTrainer, tiny(), tmp_path))
    assert "packed" not in batch_of(trainer_of(ORPOTrainer, tiny(), tmp_path, packing="padded"))
    alibi = {"head_dim": None, "num_key_value_heads": None}
    assert "packed" not in batch_of(trainer_of(ORPOTrainer, tiny("Bloom", **alibi), tmp_path))
    with pytest.raises(ValueError, match=r'BloomForCausalLM cannot share prompts: its ALiBi .* Use packing="padded"'):
        trainer_of(ORPOTrainer, tiny("Bloom", **alibi), tmp_path, packing="shared")
    with pytest.raises(ValueError, match="packing must be one of 'auto', 'measure', 'padded', 'shared'; got 'tight'"):
        trainer_of(ORPOTrainer, tiny(), tmp_path, packing="tight")


@pytest.mark.parametrize(
    ("architecture", "changes"),
    [
        ("Phi", {"head_dim": None}),
        ("Cohere", {"logit_scale": 0.25, "tie_word_embeddings": True}),
        ("Mixtral", {"num_local_experts": 4, "output_router_logits": True, "router_aux_loss_coef": 0.5}),
        ("Qwen3Moe", {"num_experts": 4, "num_experts_per_tok": 2, "output_router_logits": True}),
    ],
    ids=["bias", "scale", "mixture of experts", "another mixture"],
)
def test_heads_and_routers(architecture, changes, tmp_path):
    model = tiny(architecture, **{key: value for key, value in changes.items() if value is not None})
    if model.get_output_embeddings().bias is not None:
        nn.init.normal_(model.get_output_embeddings().bias)
    ours, theirs = both_trained(model, tmp_path, **EVALUATING, max_steps=2)
    assert_same_logs(ours.state.log_history, theirs.state.log_history)


def test_lora_on_the_head(tmp_path):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    ours, theirs = both_trained(tiny(), tmp_path, peft_config=config, **EVALUATING)
    assert_same_logs(ours.state.log_history, theirs.state.log_history)


def test_the_router_loss_is_in_the_loss(tmp_path):
    router = {"num_local_experts": 4, "output_router_logits": True}
    with_it, without = (
        trained(ORPOTrainer, tiny("Mixtral", **router, router_aux_loss_coef=coefficient), tmp_path, max_steps=1)
        for coefficient in (0.5, 0.0)
    )
    assert losses(with_it)[0] > losses(without)[0] + 0.1
    assert with_it.model.config.output_router_logits  # the config is as it was


def test_the_mean_of_soft_capped_logits_is_left_out(tmp_path):
    model = tiny("Gemma2", final_logit_softcapping=2.0)
    ours, theirs = both_trained(model, tmp_path, **EVALUATING, max_steps=2)
    assert but_mean_logits(theirs) != theirs.state.log_history
    assert_same_logs(ours.state.log_history, but_mean_logits(theirs))


def test_bfloat16_autocast(tmp_path):
    ours, theirs = both_trained(tiny(), tmp_path, bf16=True, **EVALUATING)
    assert losses(ours) == pytest.approx(losses(theirs), rel=1e-2)
    mine, other = ([logs["eval_loss"] for logs in t.state.log_history if "eval_loss" in logs] for t in (ours, theirs))
    assert mine == pytest.approx(other, rel=1e-2)


def test_gradient_checkpointing(tmp_path):
    ours, theirs = both_trained(tiny(), tmp_path, gradient_checkpointing=True)
    assert_same_logs(ours.state.log_history, theirs.state.log_history)


def test_compute_metrics_gets_what_trl_gives(tmp_path):
    def mean(prediction: Any) -> dict[str, float]:
        return {"mean_logit": float(prediction.predictions.mean())}

    ours, theirs = (
        trainer_of(trainer_class, tiny(), tmp_path, compute_metrics=mean, **options).evaluate()
        for trainer_class, options in ((ORPOTrainer, {"packing": "padded"}), (TRLORPOTrainer, {}))
    )
    assert ours["eval_mean_logit"] == pytest.approx(theirs["eval_mean_logit"], rel=1e-4)


# --- better than TRL -----------------------------------------------------------------------------------------------


def test_accumulation_is_exact(tmp_path):
    """Four micro-batches of one pair are one batch of four, also in an epoch's last step, which has three.

    In TRL they are not.
    """
    few = {"examples": chat_examples(7)}
    small = {**few, "per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    ours, theirs = both_trained(tiny(), tmp_path, **small)
    large = trained(ORPOTrainer, tiny(), tmp_path, **few, per_device_train_batch_size=4)
    assert losses(ours) == pytest.approx(losses(large), rel=1e-5)
    assert grad_norms(ours) == pytest.approx(grad_norms(large), rel=1e-4)
    assert losses(theirs) != pytest.approx(losses(large), rel=1e-3)


@pytest.mark.parametrize("exact", [True, False])
def test_accumulation_where_trl_and_transformers_are_older(exact, tmp_path, monkeypatch):
    """TRL before 1.15 says that its loss takes no counts; transformers before 5.19 then divides it once more."""
    init, step = TRLORPOTrainer.__init__, transformers.Trainer.training_step

    def older_init(trainer: Any, *args: Any, **options: Any) -> None:
        init(trainer, *args, **options)
        trainer.model_accepts_loss_kwargs = False

    def older_step(trainer: Any, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        switch = trainer.loss_is_scaled_for_ga
        trainer.loss_is_scaled_for_ga = trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
        try:
            return step(trainer, model, inputs, num_items_in_batch)
        finally:
            trainer.loss_is_scaled_for_ga = switch

    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "exact_accumulation": exact}
    expected = trained(ORPOTrainer, tiny(), tmp_path, **options)
    monkeypatch.setattr(TRLORPOTrainer, "__init__", functools.wraps(init)(older_init))
    monkeypatch.setattr(transformers.Trainer, "training_step", older_step)
    older = trained(ORPOTrainer, tiny(), tmp_path, **options)
    assert losses(older) == losses(expected)
    assert grad_norms(older) == grad_norms(expected)


@leaves_answers_empty
def test_a_prompt_that_fills_max_length(tmp_path):
    """TRL's metrics are NaN from then on, and so are its weights."""
    ours, theirs = both_trained(tiny(), tmp_path, max_length=36, **EVALUATING)
    lengths = [(label != -100).sum() for label in batch_of(theirs, range(8))["chosen_labels"]]
    assert min(lengths) == 0
    assert max(lengths) > 0
    assert not all(parameter.isfinite().all() for parameter in theirs.model.parameters())
    assert all(parameter.isfinite().all() for parameter in ours.model.parameters())
    for logs in ours.state.log_history:
        assert all(value == value for value in logs.values())
    assert {"rewards/chosen", "logps/chosen", "log_odds_ratio"} <= ours.state.log_history[0].keys()


@leaves_answers_empty
def test_a_batch_without_any_valid_pair_logs_what_there_is(tmp_path):
    trainer = trained(ORPOTrainer, tiny(), tmp_path, max_length=8, max_steps=1)
    logs = trainer.state.log_history[0]
    assert "rewards/chosen" not in logs
    assert logs["loss"] == pytest.approx(logs["nll_loss"], rel=1e-6)


@pytest.mark.parametrize("sure_of", ["chosen", "rejected"])
def test_answers_that_the_model_is_sure_of(sure_of, tmp_path):
    ours = trainer_of(ORPOTrainer, tiny(), tmp_path, packing="padded")
    theirs = trainer_of(TRLORPOTrainer, tiny(), tmp_path)
    with torch.no_grad():
        for trainer in (ours, theirs):
            trainer.model.lm_head.weight.mul_(1e4)
    batch = batch_of(ours)
    make_certain(ours.model, batch, sure_of)
    gradients = []
    for trainer in (ours, theirs):
        loss, _ = trainer.get_batch_loss_metrics(trainer.model, batch)
        loss.backward()
        gradients.append([parameter.grad for parameter in trainer.model.parameters()])
    assert all(grad.isfinite().all() for grad in gradients[0])
    assert not all(grad.isfinite().all() for grad in gradients[1])


@torch.no_grad()
def make_certain(model: nn.Module, batch: dict[str, Any], side: str) -> None:
    """Replace the answers by what the model itself says, whose probability is 1 after a large weight."""
    ids, labels = batch[f"{side}_input_ids"], batch[f"{side}_labels"]
    for row in range(len(ids)):
        for position in (labels[row] != -100).nonzero().flatten().tolist():
            ids[row, position] = labels[row, position] = model(ids[row : row + 1, :position]).logits[0, -1].argmax()


# --- options -------------------------------------------------------------------------------------------------------


def test_one_end_token(tmp_path):
    double, single = (
        trainer_of(ORPOTrainer, tiny(), tmp_path, end=end, max_length=1000).train_dataset for end in ("trl", "single")
    )
    expected, refused = tokenize_pairs(chat_examples(), tokenizer(), end="single")
    assert not refused
    for twice, once, pair in zip(double, single, expected, strict=True):
        assert {column: once[column] for column in pair} == pair
        assert tokenizer().decode(twice["chosen_input_ids"]).endswith("<|im_end|>\n<|im_end|>")
        assert len(once["chosen_attention_mask"]) == len(once["chosen_input_ids"])


@pytest.mark.parametrize("max_length", range(16, 40))
def test_truncated_answers_get_no_end_token(max_length, tmp_path):
    class Tokenising(ORPOTrainer):
        """As much of a trainer as tokenising reads."""

        def __init__(self) -> None:
            self.processing_class, self.max_length, self.is_encoder_decoder = tokenizer(), max_length, False

    trainer = Tokenising()
    feature = {"prompt": "Is it so?", "chosen": "It is so.<|im_end|>\n", "rejected": "The dog.<|im_end|>\n"}
    trainer.end = "single"
    once = trainer.tokenize_row(feature)
    trainer.end = "trl"
    twice = trainer.tokenize_row(feature)
    for side in ("chosen", "rejected"):
        ids, whole = once[f"{side}_input_ids"], twice[f"{side}_input_ids"]
        assert ids == whole[: len(ids)]
        ends = [place for place, token in enumerate(whole) if token == tokenizer().eos_token_id]
        assert len(ids) == (ends[0] + 1 if ends else len(whole))


def test_a_model_by_its_name(tmp_path):
    tiny().save_pretrained(tmp_path / "model")
    arguments = ORPOConfig(**settings(tmp_path, max_length=96, model_init_kwargs={"dtype": "float32"}))
    data = Dataset.from_list(chat_examples())
    trainer = ORPOTrainer(str(tmp_path / "model"), arguments, train_dataset=data, processing_class=tokenizer())
    trainer.train()
    assert losses(trainer) == pytest.approx(losses(trained(ORPOTrainer, tiny(), tmp_path)), rel=1e-5)


def test_torch_compile_compiles_the_body(tmp_path, monkeypatch):
    for name in ("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_DYNAMO_MODE"):
        monkeypatch.setenv(name, "no")
    options = {"max_steps": 2, **EVALUATING}
    plain = trained(ORPOTrainer, tiny(num_hidden_layers=1), tmp_path, **options)
    torch._dynamo.reset()
    frames = torch._dynamo.utils.counters["frames"]
    before = frames["ok"]
    compiled = trained(ORPOTrainer, tiny(num_hidden_layers=1), tmp_path, **options, torch_compile_backend="eager")
    assert frames["ok"] > before
    assert_same_logs(compiled.state.log_history, plain.state.log_history)


def test_a_body_compiled_by_its_owner(tmp_path):
    """Its hidden states may not be seen: what is logged is right, or left out."""
    model = tiny(num_hidden_layers=1)
    options = {"max_steps": 3, "examples": chat_examples(2) * 4}
    plain = trained(ORPOTrainer, copies(model)[0], tmp_path, **options)
    torch._dynamo.reset()
    model.model.compile(backend="eager")
    compiled = trained(ORPOTrainer, model, tmp_path, **options)
    for mine, other in zip(compiled.state.log_history, plain.state.log_history, strict=True):
        assert other.keys() - mine.keys() <= {"logits/chosen", "logits/rejected"}
        assert_same_logs([mine], [{key: other[key] for key in mine}])


def test_what_cannot_be_served_is_refused(tmp_path):
    sizes = {"vocab_size": len(tokenizer()), "d_model": 16, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2}
    t5 = transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, decoder_start_token_id=0))
    with pytest.raises(ValueError, match=r'T5ForConditionalGeneration cannot share prompts: .* Use packing="padded"'):
        trainer_of(ORPOTrainer, t5, tmp_path, packing="shared")
    with pytest.raises(ValueError, match="label smoothing"):
        trainer_of(ORPOTrainer, tiny(), tmp_path, label_smoothing_factor=0.1)
    with pytest.raises(ValueError, match="end must be one of 'single', 'trl'; got 'double'"):
        trainer_of(ORPOTrainer, tiny(), tmp_path, end="double")
    hooked = tiny()
    hooked.lm_head.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="lm head has hooks"):
        trainer_of(ORPOTrainer, hooked, tmp_path)


def test_evaluation_runs_one_gemm_of_the_head(tmp_path):
    trainer = trainer_of(ORPOTrainer, tiny(), tmp_path, packing="padded")
    model, batch = trainer.model.eval(), batch_of(trainer)
    trainer.prediction_step(model, batch, True)  # the probe runs in the first call
    inputs = trainer.loss_inputs(batch)

    def flops(run: Any) -> int:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    def body() -> None:
        with torch.no_grad():
            model.model(inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)

    rows = batch_rows(**inputs).live()
    head = flops(lambda: trainer.prediction_step(model, batch, True)) - flops(body)
    of_a_row = 2 * model.lm_head.weight.numel()
    assert len(rows) * of_a_row <= head < (len(rows) + 3) * of_a_row  # and the mean logits, by the mean hidden states


# --- a real model --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(not have_real_data(), reason="needs LLMBar ($ORPO_KERNELS_DATA) and SmolLM2")
@pytest.mark.parametrize("with_lora", [False, True], ids=["full", "lora"])
def test_twenty_steps_of_a_real_model(with_lora, tmp_path):
    from examples.smollm2 import load_smollm2

    model, own = load_smollm2()
    fields = ("prompt", "chosen", "rejected")
    examples = [{field: pair[field] for field in fields} for pair in preference_pairs()]
    random.Random(0).shuffle(examples)

    def logged(trainer_class: Any, model: nn.Module, **options: Any) -> list[float]:
        arguments = settings(tmp_path, max_steps=20, max_length=256, learning_rate=2e-5)
        trainer = trainer_class(
            model=model,
            args=ORPOConfig(**arguments),
            train_dataset=Dataset.from_list(examples[:40]),
            processing_class=own,
            **options,
            **(lora() if with_lora else {}),
        )
        trainer.train()
        return losses(trainer)

    one, two, three = copies(model, 3)
    theirs = logged(TRLORPOTrainer, one)
    assert len(theirs) == 20
    assert logged(ORPOTrainer, two, packing="padded") == pytest.approx(theirs, rel=1e-4)
    assert logged(ORPOTrainer, three, packing="shared") == pytest.approx(theirs, rel=1e-3)
