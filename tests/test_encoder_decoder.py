"""Encoder-decoder models: loss and gradients against their own logits, one pass of the encoder, collator, trainers."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import transformers
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from orpo_kernels.methods import METHODS
from orpo_kernels.transformers import (
    EncoderDecoderCollator,
    PreferenceCollator,
    ShiftRight,
    causal_lm_answers,
    causal_lm_orpo_loss,
    causal_lm_preference_loss,
    refuses_shared_prompt,
    resolve_lm_head,
)
from orpo_kernels.transformers.batches import with_rows
from orpo_kernels.transformers.packing import pack_pairs
from orpo_kernels.transformers.trainer import PreferenceTrainer
from orpo_kernels.transformers.versions import version_of

from . import training
from .encoder_decoder import MODELS, PAGE, REFUSED, T5, build, by_logits, line, make_batch, own_logits, own_logits_say
from .models import VOCAB, assert_same, gradients, lines_of, make_pairs
from .models import build as build_causal
from .models import make_batch as make_causal_batch
from .test_methods import by_logits as definition
from .versions import keeps_the_order

LINES = lines_of(PAGE)
each_model = pytest.mark.parametrize("name", MODELS)


@each_model
def test_loss_and_all_gradients_are_those_of_the_models_own_logits(name):
    model, batch = build(name).train(), make_batch()
    ours = causal_lm_orpo_loss(model, **batch, beta=0.5)
    assert_same(ours, by_logits(own_logits(model, batch), batch["labels"], beta=0.5), model)
    is_another = name == "mT5: tied" and version_of("transformers") < (5,)  # which scaled
    assert is_another or line(name, model, "equal") in LINES, "run python -m tests.encoder_decoder"


def test_the_page_tells_what_is_refused_and_holds_no_other_model():
    for name in REFUSED:
        assert line(name, build(name), own_logits_say(name)) in LINES, "run python -m tests.encoder_decoder"
    assert len(LINES) == 1 + len(MODELS | REFUSED)


@pytest.mark.parametrize("name", ["T5: tied, scaled", "UMT5: tied, scaled", "BART: bias", "T5Gemma: soft-cap"])
def test_scale_bias_and_soft_cap_matter_in_these_models(name):
    """Otherwise the test above would pass without them."""
    model, batch = build(name), make_batch()
    head = resolve_lm_head(model)
    assert (head.logit_scale, head.logit_softcap, head.bias) != (1.0, None, None)
    logits = own_logits(model, batch)
    inputs: list[Tensor] = []
    hook = model.get_output_embeddings().register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    own_logits(model, batch)
    hook.remove()
    plain = inputs[0] / head.logit_scale @ head.weight.T
    loss = by_logits(logits, batch["labels"]).loss.detach()
    assert abs(float(by_logits(plain, batch["labels"]).loss.detach() - loss)) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", ["T5: tied, scaled", "BART: bias", "T5Gemma: soft-cap"])
def test_the_error_is_at_most_twice_that_of_plain_torch(name, dtype):
    model, batch = build(name, dtype), make_batch()
    exact = copy.deepcopy(model).double()
    truth = by_logits(own_logits(exact, batch), batch["labels"])
    plain = by_logits(own_logits(model, batch), batch["labels"])
    ours = causal_lm_orpo_loss(model, **batch)

    def error(values: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
        return max(float((values[key].double() - value).norm() / value.norm()) for key, value in expected.items())

    def numbers(out: Any) -> dict[str, Tensor]:
        logps = torch.cat((out.chosen_logps, out.rejected_logps)).detach()
        return {"loss": out.loss.detach()[None], "logps": logps}

    rounding = torch.finfo(torch.float32).eps  # of what we return; the plain sums are in float64
    assert error(numbers(ours), numbers(truth)) <= 2 * error(numbers(plain), numbers(truth)) + rounding
    expected = gradients(exact, truth.loss)
    assert error(gradients(model, ours.loss), expected) <= 2 * error(gradients(model, plain.loss), expected)


# --- what is run ---------------------------------------------------------------------------------------------------


def counted(module: nn.Module) -> list[int]:
    """The sequences of every forward of the module, as they come."""
    passes: list[int] = []
    module.register_forward_pre_hook(lambda _, args, kwargs: passes.append(len(kwargs["input_ids"])), with_kwargs=True)
    return passes


@pytest.mark.parametrize("name", ["T5: tied, scaled", "BART: bias"])
def test_the_encoder_runs_once_for_both_answers_of_a_pair(name):
    model, batch = build(name).train(), make_batch()
    causal_lm_orpo_loss(model, **batch)  # whose head is checked once
    encoder, decoder = counted(model.get_encoder()), counted(model.get_decoder())
    causal_lm_orpo_loss(model, **batch).loss.backward()
    pairs = len(batch["input_ids"])
    assert (encoder, decoder) == ([pairs], [2 * pairs])


def test_what_the_decoder_reads_may_be_given():
    model, batch = build("T5: tied, scaled"), make_batch()
    expected = causal_lm_orpo_loss(model, **batch).loss
    shifted = ShiftRight.of(model)(batch["labels"])
    assert torch.equal(causal_lm_orpo_loss(model, **batch, decoder_input_ids=shifted).loss, expected)
    other = causal_lm_orpo_loss(model, **batch, decoder_input_ids=shifted.flip(1)).loss
    assert abs(float((other - expected).detach())) > 1e-4
    by_rows = with_rows({**batch, "decoder_input_ids": shifted}, METHODS["orpo"]())
    assert torch.equal(causal_lm_orpo_loss(model, **by_rows).loss, expected)


@pytest.mark.parametrize("name", ["T5: tied, scaled", "BART: bias", "mBART: bias", "M2M100, NLLB", "T5Gemma: soft-cap"])
def test_the_shift_is_the_models_own_without_its_weights(name):
    model, labels = build(name), make_batch()["labels"]
    read: list[Tensor] = []
    model.get_decoder().register_forward_pre_hook(
        lambda _, args, kwargs: read.append(kwargs["input_ids"]), with_kwargs=True
    )
    own_logits(model, make_batch())
    assert torch.equal(ShiftRight.of(model)(labels), read[0])
    assert torch.equal(ShiftRight.of(model)(torch.where(labels == -100, -7, labels), ignore_index=-7), read[0])


def test_no_mask_and_another_ignore_index():
    model, batch = build("BART: bias"), make_batch()
    whole = {**batch, "input_ids": batch["input_ids"].clamp(min=3), "attention_mask": None}
    ones = torch.ones_like(batch["attention_mask"])
    expected = causal_lm_orpo_loss(model, **{**whole, "attention_mask": ones}).loss
    torch.testing.assert_close(causal_lm_orpo_loss(model, **whole).loss, expected)
    labels = torch.where(batch["labels"] == -100, -7, batch["labels"])
    found = causal_lm_orpo_loss(model, **{**batch, "labels": labels}, ignore_index=-7).loss
    assert torch.equal(found, causal_lm_orpo_loss(model, **batch).loss)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_by_the_same_path(name):
    model, batch, method = build("T5: tied, scaled"), make_batch(), METHODS[name]()
    logits, labels = own_logits(model, batch).double(), batch["labels"]
    ref = -torch.linspace(10, 20, len(labels)).double()
    given = {"reference_logps": ref} if method.needs_reference else {}
    ours = causal_lm_preference_loss(model, **batch, method=method, **given).loss
    theirs = definition(logits, torch.eye(VOCAB, dtype=torch.float64), labels, method, ref)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-5)
    expected = gradients(model, theirs)
    for key, grad in gradients(model, ours).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-3, atol=1e-5)


def test_chosen_answers_alone_and_the_answers_log_probabilities():
    model, batch = build("T5: tied, scaled"), make_batch()
    whole = causal_lm_preference_loss(model, **batch, method="sft").loss
    alone = {**batch, "labels": batch["labels"][:2]}
    torch.testing.assert_close(causal_lm_preference_loss(model, **alone, method="sft", chosen_only=True).loss, whole)
    labels = batch["labels"]
    logps = own_logits(model, batch).log_softmax(-1).gather(2, labels.clamp(min=0)[..., None])[..., 0]
    answers = causal_lm_answers(model, **batch)
    torch.testing.assert_close(answers.logps.float(), logps.where(labels != -100, 0.0).sum(1), rtol=1e-5, atol=1e-5)
    assert answers.tokens.tolist() == [6, 4, 5, 3]


def test_lora_on_every_linear_layer_and_on_the_head():
    peft = pytest.importorskip("peft")
    model, batch = build("BART: bias"), make_batch()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "fc1", "lm_head"], task_type="SEQ_2_SEQ_LM")
    model = peft.get_peft_model(model, config).train()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    ours = causal_lm_orpo_loss(model, **batch)
    assert_same(ours, by_logits(own_logits(model, batch), batch["labels"]), model)
    assert any("lm_head.lora_A" in name for name, p in model.named_parameters() if p.grad is not None)


def test_gradient_checkpointing():
    model, batch = build("T5: tied, scaled").train(), make_batch()
    expected = gradients(model, causal_lm_orpo_loss(model, **batch).loss)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, grad in gradients(model, causal_lm_orpo_loss(model, **batch).loss).items():
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-5)


# --- what is refused -----------------------------------------------------------------------------------------------


def test_what_does_not_fit_together_is_refused():
    model, batch = build("T5: tied, scaled"), make_batch()
    repeated = {**batch, "input_ids": batch["input_ids"].repeat(2, 1), "attention_mask": None}
    with pytest.raises(
        ValueError, match=r"labels has 4 answers and input_ids 4 prompts.*input_ids \(B, S\) and labels"
    ):
        causal_lm_orpo_loss(model, **repeated)
    with pytest.raises(ValueError, match=r"labels and decoder_input_ids must be of one shape \(2B, T\)"):
        causal_lm_orpo_loss(model, **batch, decoder_input_ids=batch["labels"][:, :-1])
    with pytest.raises(TypeError, match="has labels, or rows and decoder_input_ids"):
        causal_lm_orpo_loss(model, **{**batch, "labels": None})
    with pytest.raises(TypeError, match=r"LlamaForCausalLM has a decoder alone.*leave decoder_input_ids out"):
        causal_lm_orpo_loss(build_causal("Llama"), **make_causal_batch(), decoder_input_ids=batch["labels"])


def test_packing_is_refused_for_the_encoder_shares_the_prompt():
    model = build("T5: tied, scaled")
    reason = refuses_shared_prompt(model)
    assert reason is not None
    assert "whose encoder runs once for both answers in any case" in reason
    with pytest.raises(ValueError, match="encoder-decoder model"):
        causal_lm_orpo_loss(model, **pack_pairs(make_pairs(), 0))


def test_models_that_cannot_be_served_are_refused_by_name():
    batch = make_batch()
    with pytest.raises(ValueError, match="T5Model has no body apart from its head"):
        causal_lm_orpo_loss(transformers.T5Model(transformers.T5Config(**T5)), **batch)
    switch = build("Switch", output_router_logits=True, router_aux_loss_coef=0.1)
    with pytest.raises(ValueError, match="SwitchTransformersForConditionalGeneration asks for a router loss"):
        causal_lm_orpo_loss(switch, **batch)
    sizes = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
    whisper = transformers.WhisperConfig(
        **sizes,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        vocab_size=VOCAB,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )
    with pytest.raises(ValueError, match=r"WhisperForConditionalGeneration .* whose encoder takes no input_ids"):
        causal_lm_orpo_loss(transformers.WhisperForConditionalGeneration(whisper), **batch)


def test_a_head_that_does_more_is_found_by_the_probe():
    model = build("BART: bias")
    own = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = own(*args, **kwargs)
        out.logits = out.logits + torch.arange(VOCAB)
        return out

    model.forward = forward
    with pytest.raises(ValueError, match="BartForConditionalGeneration is not supported"):
        causal_lm_orpo_loss(model, **make_batch())


# --- data ----------------------------------------------------------------------------------------------------------


@functools.cache
def tokenizer() -> Any:
    """One that ends every text with </s>, as T5's does."""
    tokens = copy.deepcopy(training.tokenizer())
    tokens.add_special_tokens({"pad_token": "<pad>", "eos_token": "</s>"})
    end = ("</s>", tokens.eos_token_id)
    tokens.backend_tokenizer.post_processor = TemplateProcessing("$A </s>", "$A </s> $B </s>", [end])
    return tokens


def sized(name: str) -> nn.Module:
    """For that tokenizer."""
    special = {"pad_token_id": tokenizer().pad_token_id, "decoder_start_token_id": tokenizer().pad_token_id}
    return build(name, **special, eos_token_id=tokenizer().eos_token_id, vocab_size=len(tokenizer()))


def examples(count: int = 12) -> list[dict[str, str]]:
    chats = training.chat_examples(count)
    answers = ("chosen", "rejected")
    return [{"prompt": row["prompt"][0]["content"], **{a: row[a][0]["content"] for a in answers}} for row in chats]


def collator(model: nn.Module | None = None, **options: Any) -> EncoderDecoderCollator:
    model = sized("T5: tied, scaled") if model is None else model
    return EncoderDecoderCollator(tokenizer(), shift=ShiftRight.of(model), **options)


def test_the_prompt_goes_to_the_encoder_and_the_answers_to_the_decoder():
    pairs, eos, pad = examples(3), tokenizer().eos_token_id, tokenizer().pad_token_id
    batch = collator()(pairs)
    for name, texts in {"input_ids": ["prompt"], "labels": ["chosen", "rejected"]}.items():
        ids = [tokenizer()(pair[text])["input_ids"] for text in texts for pair in pairs]
        assert all(one[-1] == eos and eos not in one[:-1] for one in ids)
        padding = -100 if name == "labels" else pad
        width = max(map(len, ids))
        assert batch[name].tolist() == [one + [padding] * (width - len(one)) for one in ids]
    assert torch.equal(batch["attention_mask"], (batch["input_ids"] != pad).long())
    assert torch.equal(
        batch["decoder_input_ids"][:, 1:], batch["labels"][:, :-1].where(batch["labels"][:, :-1] >= 0, pad)
    )
    assert set(batch["decoder_input_ids"][:, 0].tolist()) == {pad}
    chosen = collator(answers="chosen")(pairs)
    assert torch.equal(chosen["labels"], batch["labels"][:3, : chosen["labels"].shape[1]])
    assert chosen["chosen_only"] is True
    assert collator(aligned=True)(pairs)["labels"].shape[1] % 8 == 0


def test_pairs_that_were_tokenised_before_make_the_same_batch():
    pairs = [{**pair, "weight": float(i)} for i, pair in enumerate(examples(3))]
    own = collator(max_length=30)
    expected = own(pairs)
    assert expected["pair_weights"].tolist() == [0.0, 1.0, 2.0]
    tokenised = [own.tokenized(pair) for pair in pairs]
    again = own(tokenised)
    assert again.keys() == expected.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in expected.items())
    tokenised[1]["rejected_input_ids"][0] += 1
    with pytest.raises(ValueError, match=r"Pair 1 of the batch cannot be used: its two sides have different prompts"):
        own(tokenised)
    with pytest.raises(ValueError, match=r"tokenised to \d+ tokens in a part, more than max_length=5"):
        collator(max_length=5)(tokenised[:1])
    with pytest.raises(ValueError, match="its chosen side has no response"):
        own([{**tokenised[0], "chosen_labels": [-100] * len(tokenised[0]["chosen_labels"])}])


def test_a_prompt_loses_its_first_tokens_and_an_answer_its_last():
    pair = {
        "prompt": "one two three four five six " * 4,
        "chosen": "yes it is so " * 9,
        "rejected": "no it is not " * 9,
    }
    whole, cut = collator().tokenized(pair), collator(max_length=12).tokenized(pair)
    parts = [(len(ids), ids) for ids in (tokenizer()(pair[name])["input_ids"] for name in pair)]
    assert cut["cut_tokens"] == sum(length - 12 for length, _ in parts)
    assert cut["chosen_input_ids"] == parts[0][1][-12:] + parts[1][1][:12]
    assert cut["rejected_labels"] == [-100] * 12 + parts[2][1][:12]
    assert cut["chosen_input_ids"][11] == tokenizer().eos_token_id
    assert "cut_tokens" not in whole
    with pytest.raises(ValueError, match=r"Pair 0 .* has \d+ tokens more than max_length=12 leaves its parts"):
        collator(max_length=12, too_long="refuse")([pair])
    with pytest.raises(ValueError, match="the same ids when cut to 3 tokens"):
        collator(max_length=3)([{**pair, "rejected": pair["chosen"] + "!"}])


def test_an_answer_ends_once_also_where_the_tokenizer_ends_nothing():
    bare, pair = training.tokenizer(), examples(1)[0]
    assert bare(pair["chosen"])["input_ids"][-1] != bare.eos_token_id
    shift = ShiftRight.of(sized("T5: tied, scaled"))
    ended = EncoderDecoderCollator(bare, shift=shift)([pair])["labels"][0]
    as_trl = EncoderDecoderCollator(bare, shift=shift, end="trl")([pair])["labels"][0]
    assert ended[ended >= 0].tolist() == [*as_trl[as_trl >= 0].tolist(), bare.eos_token_id]


def test_chats_by_the_template_and_one_turn_alone():
    pair = training.chat_examples(1)[0]
    tokenised = collator().tokenized(pair)
    prompt = tokenizer().apply_chat_template(pair["prompt"], tokenize=False, add_generation_prompt=True)
    start = tokenised["chosen_labels"].count(-100)
    assert tokenised["chosen_input_ids"][:start] == tokenizer()(prompt)["input_ids"]
    assert tokenised["chosen_labels"][start:] == tokenizer()(pair["chosen"][0]["content"])["input_ids"]
    turns = [*pair["chosen"], {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    with pytest.raises(ValueError, match="its chosen answer has several turns"):
        collator()([{**pair, "chosen": turns}])


def test_a_collator_of_no_model_and_one_that_packs_are_refused():
    with pytest.raises(ValueError, match=r"give shift=ShiftRight.of\(model\)"):
        EncoderDecoderCollator(tokenizer())
    with pytest.raises(ValueError, match='packing is "shared", but the model is an encoder-decoder model'):
        collator(packing="shared")
    with pytest.raises(ValueError, match="LlamaForCausalLM does not say what its decoder reads"):
        ShiftRight.of(build_causal("Llama"))


def test_the_collator_goes_to_other_processes_without_the_model():
    own = collator(sized("BART: bias"))
    copied = pickle.loads(pickle.dumps(own.shift))
    labels = own(examples(2))["labels"]
    assert torch.equal(copied(labels), own.shift(labels))
    assert len(pickle.dumps(own.shift)) < 20_000


# --- trainers ------------------------------------------------------------------------------------------------------


def trained(folder: Any, model: nn.Module, method: str = "orpo", **options: Any) -> PreferenceTrainer:
    own = {"data_collator": PreferenceCollator(tokenizer(), max_length=96), "train_dataset": examples()}
    return training.trained(folder, method, model, **{**own, "eval_dataset": examples(5), **options})


@keeps_the_order
def test_the_trainer_is_a_plain_loop_over_the_models_own_logits(tmp_path):
    model = sized("T5: tied, scaled")
    plain = copy.deepcopy(model).train()
    passes = counted(model.get_encoder())
    trainer = trained(tmp_path, model, max_grad_norm=1.0)
    assert passes[-4:] == [2, 2, 2, 2]
    optimizer, expected = torch.optim.AdamW(plain.parameters(), lr=1e-3, weight_decay=0.0), []
    for step in range(4):
        batch = collator(plain)(examples()[2 * step : 2 * step + 2])
        loss = by_logits(own_logits(plain, batch), batch["labels"]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        expected.append(float(loss.detach()))
    assert training.losses(trainer) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["orpo", "sft", "dpo"])
def test_a_method_trains_and_evaluates(method, tmp_path):
    trainer = trained(tmp_path, sized("BART: bias"), method, max_steps=2, gradient_accumulation_steps=2)
    assert len(training.losses(trainer)) == 2
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_rewards/accuracies"] <= 1
    whole = collator(trainer.model)(examples(5))
    ref = {"reference_logps": torch.zeros(10).double()} if method == "dpo" else {}
    out = causal_lm_preference_loss(trainer.model.eval(), **whole, method=trainer.method, **ref)
    if method != "dpo":
        assert metrics["eval_loss"] == pytest.approx(float(out.loss.detach()), rel=1e-4)
    assert metrics["eval_nll_loss"] == pytest.approx(float(out.nll_loss), rel=1e-4)


def test_unusable_pairs_are_left_out_and_named(tmp_path):
    pairs = examples(6)
    pairs[2]["rejected"] = pairs[2]["chosen"]
    trainer = trained(tmp_path, sized("T5: tied, scaled"), max_steps=1, train_dataset=pairs)
    assert [(one.index, one.reason) for one in trainer.unusable_pairs["train"]] == [
        (2, "its chosen and rejected responses are the same")
    ]


def trl_trained(trainer_class: Any, model: nn.Module, folder: Any, rows: Any = None, **options: Any) -> Any:
    from trl.experimental.orpo import ORPOConfig

    config = {"max_length": 96, "max_completion_length": 20, "per_device_eval_batch_size": 5, "eval_strategy": "steps"}
    trainer = trainer_class(
        model=copy.deepcopy(model),
        args=ORPOConfig(**training.settings(folder, eval_steps=2, **config)),
        train_dataset=Dataset.from_list(rows or examples()),
        eval_dataset=Dataset.from_list(examples(5)),
        processing_class=tokenizer(),
        **options,
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("name", ["T5: tied, scaled", "BART: bias"])
def test_every_step_and_every_metric_is_trls(name, tmp_path):
    trl = pytest.importorskip("trl.experimental.orpo")
    from orpo_kernels.trl import ORPOTrainer

    model = sized(name)
    ours = trl_trained(ORPOTrainer, model, tmp_path / "ours", exact_accumulation=False)
    theirs = trl_trained(trl.ORPOTrainer, model, tmp_path / "theirs")
    assert len(training.losses(theirs)) == 4
    training.assert_same_logs(ours.state.log_history, theirs.state.log_history)


def test_trls_rows_that_cannot_be_used_are_left_out_and_named(tmp_path):
    pytest.importorskip("trl.experimental.orpo")
    from orpo_kernels.trl import ORPOTrainer

    pairs = examples(6)
    pairs[2]["rejected"] = " "
    trainer = trl_trained(ORPOTrainer, sized("T5: tied, scaled"), tmp_path, rows=pairs)
    assert [one.index for one in trainer.unusable_pairs["train"]] == [2]
    assert len(trainer.train_dataset) == 5


# --- the command line ----------------------------------------------------------------------------------------------


def test_train_evaluate_and_inspect(tmp_path):
    pytest.importorskip("typer")
    pytest.importorskip("matplotlib")
    from .commands import run, write_rows

    folder, trained_folder = str(tmp_path / "model"), str(tmp_path / "run")
    sized("T5: tied, scaled").save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    data = write_rows(tmp_path / "pairs.jsonl", examples())
    fast = ("--batch-size", 2, "--lr", "1e-3", "--eval-split", 4, "--max-length", 64)
    summary = run("train", folder, data, "--output", trained_folder, *fast, "--max-steps", 2)
    assert summary["after"]["loss"] < summary["before"]["loss"]
    rated = run("evaluate", trained_folder, data, "--against", folder, "--max-length", 64, "--output", tmp_path / "e")
    batch = collator()(examples())
    for name, source in ((folder, folder), (trained_folder, f"{trained_folder}/model")):
        model = transformers.AutoModelForSeq2SeqLM.from_pretrained(source, dtype=torch.float64)
        log_odds = by_logits(own_logits(model, batch), batch["labels"]).log_odds.mean()
        assert rated["models"][name]["log_odds"]["value"] == pytest.approx(float(log_odds.detach()), rel=1e-3)
    lengths = run("inspect", data, "--model", folder, "--output", tmp_path / "i")["lengths"]
    assert lengths["prompt"]["most"] == max(len(tokenizer()(pair["prompt"])["input_ids"]) for pair in examples())
    assert "is an encoder-decoder model, which nobody plans for yet" in run("plan", folder, status=2)["error"]


def test_the_adapters_of_the_command_line():
    pytest.importorskip("peft")
    from orpo_kernels.app.finetuning.pretrained import with_adapters

    model, batch = with_adapters(build("BART: bias"), rank=2).train(), make_batch()
    assert_same(causal_lm_orpo_loss(model, **batch), by_logits(own_logits(model, batch), batch["labels"]), model)
