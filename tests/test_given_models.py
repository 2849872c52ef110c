"""The models that people give: what is not whole is refused by name, and what is trained comes back as it came."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from orpo_kernels.app.errors import Diverged, UserError
from orpo_kernels.app.finetuning.pretrained import (
    companions,
    load_model,
    load_tokenizer,
    model_manifest,
    not_finite,
    stored_dtypes,
)
from orpo_kernels.transformers import causal_lm_orpo_loss
from orpo_kernels.transformers.fitting import positions_of

from .commands import command, run, write_chats
from .test_collator import byte_level
from .test_run_folder import contents
from .training import tiny, tokenizer

STEPS = ("--max-steps", 2, "--batch-size", 2, "--max-length", 48, "--eval-split", 2)
some = settings(max_examples=max(8, settings().max_examples // 3))


def saved(folder: Path, architecture: str = "Llama", dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    tiny(architecture, **{"initializer_range": 0.02, **changes}).to(dtype).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path) -> Path:
    return saved(tmp_path / "given")


@pytest.fixture
def data(tmp_path) -> Path:
    return Path(write_chats(tmp_path / "pairs.jsonl", 8))


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any], file: str = "model.safetensors") -> None:
    weights = load_file(folder / file)
    weights = change(weights) or weights
    save_file(weights, folder / file, metadata={"format": "pt"})


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    return lambda weights: {key: value for key, value in weights.items() if not any(name in key for name in names)}


# --- whole, or refused ---------------------------------------------------------------------------------------------


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])


def filled(name: str, value: float) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder, lambda weights: weights[name][3, 4].fill_(value) and None)


def a_layer_too_many(folder: Path) -> None:
    saved(folder, num_hidden_layers=3)
    edit(folder / "config.json", num_hidden_layers=2)


WEIGHTS = "model.safetensors"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 160984\n"
FAULTS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no head": (
        lambda folder: rewrite(folder, without("lm_head")),
        "is incomplete: of a LlamaForCausalLM it lacks lm_head.weight, which would be random",
    ),
    "no layer": (
        lambda folder: rewrite(folder, without("layers.1.")),
        "it lacks model.layers.1.input_layernorm.weight and 8 more",
    ),
    "a layer too many": (
        a_layer_too_many,
        "has weights of layers that its config.json leaves out, such as model.layers.2.input_layernorm",
    ),
    "another task": (
        lambda folder: AutoModelForSequenceClassification.from_config(tiny().config).save_pretrained(folder),
        "it lacks lm_head.weight, which would be random. It has score.weight instead",
    ),
    "another width": (
        lambda folder: edit(folder / "config.json", intermediate_size=64),
        "do not fit its config.json: model.layers.0.mlp.down_proj.weight is 32 x 48, and by the config 32 x 64",
    ),
    "cut off": (
        lambda folder: cut(folder / WEIGHTS, 80_492),
        "model.safetensors is cut off: it has 80,492 bytes of 160,984",
    ),
    "cut in the header": (
        lambda folder: cut(folder / WEIGHTS, 100),
        "model.safetensors is cut off: it has 100 bytes of",
    ),
    "a pointer": (lambda folder: (folder / WEIGHTS).write_text(POINTER), "model.safetensors is a pointer of Git LFS"),
    "a pointer for a tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text(POINTER),
        "tokenizer.json is a pointer of Git LFS",
    ),
    "not a number": (
        filled("model.layers.1.mlp.up_proj.weight", torch.nan),
        "not finite (NaN or infinite) in model.layers.1.mlp.up_proj.weight",
    ),
    "infinite": (filled("lm_head.weight", -torch.inf), "not finite (NaN or infinite) in lm_head.weight"),
    "no config": (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded as"),
    "strange config": (lambda folder: edit(folder / "config.json", num_attention_heads="two"), "cannot be loaded as"),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("word", ["train", "evaluate"])
def test_a_model_that_is_not_whole_is_refused_by_name(word, fault, model, data, tmp_path):
    harm, named = FAULTS[fault]
    harm(model)
    said = run(word, model, data, "--output", tmp_path / "out", *(STEPS if word == "train" else ()), status=2)
    assert named in said["error"]
    assert str(model) in said["error"]


@some
@given(
    file=st.sampled_from(["model.safetensors", "config.json", "tokenizer.json", "tokenizer_config.json"]),
    how=st.sampled_from(["cut", "overwrite", "remove"]),
    share=st.floats(0, 1),
)
def test_whatever_is_wrong_with_its_files_is_a_sentence(file, how, share, tmp_path_factory):
    folder = saved(tmp_path_factory.mktemp("harmed") / "given")
    content = (folder / file).read_bytes()
    at = int(share * (len(content) - 1))
    if how == "remove":
        (folder / file).unlink()
    else:
        (folder / file).write_bytes(content[:at] + (b"" if how == "cut" else b"\xff" * 5 + content[at + 5 :]))
    with contextlib.suppress(UserError):
        lm = load_model(str(folder), torch.float32)
        assert file != "model.safetensors" or how == "overwrite"  # of a weight, by another finite number
        assert all(bool(weight.isfinite().all()) for weight in lm.parameters())
    with contextlib.suppress(UserError):
        load_tokenizer(str(folder))


@pytest.mark.parametrize("name", ["train", "evaluate", "inspect", "plan"])
def test_code_that_comes_with_a_model_is_not_asked_about_where_nobody_answers(name, model, data, tmp_path):
    edit(model / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config"})
    (model / "mine.py").write_text("raise SystemExit('it ran')\n")
    arguments = {"inspect": (data, "--model", model), "plan": (model,)}.get(name, (model, data))
    output = () if name == "plan" else ("--output", tmp_path / "out")
    status, said, told = command(name, *arguments, *output)
    assert status == 2
    assert "contains custom code" in said["error"]
    assert "[y/N]" not in told


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
def test_a_tied_head_is_not_missing(architecture, tmp_path):
    folder = saved(tmp_path / "given", architecture, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    lm = load_model(str(folder), torch.float32)
    assert lm.lm_head.weight is lm.model.embed_tokens.weight


def test_more_than_a_causal_language_model_is_told(model, data, tmp_path):
    rewrite(model, lambda weights: {**weights, "v_head.weight": torch.ones(1, 32)})
    status, _, told = command("train", model, data, *STEPS, "--output", tmp_path / "run")
    assert status == 0
    assert "has more than a LlamaForCausalLM: v_head.weight." in told


def test_adapters_that_are_not_whole(model, data, tmp_path):
    pytest.importorskip("peft")
    output = tmp_path / "run"
    run("train", model, data, *STEPS, "--lora", "--lora-rank", 2, "--output", output)
    adapters = output / "model"
    whole = (adapters / "adapter_model.safetensors").read_bytes()
    assert load_model(str(output), torch.float32) is not None

    rewrite(adapters, without("layers.1.mlp.up_proj.lora_B"), "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"incomplete: of its adapters it lacks .*layers\.1\.mlp\.up_proj\.lora_B"):
        load_model(str(output), torch.float32)
    (adapters / "adapter_model.safetensors").write_bytes(whole[:-8])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors is cut off"):
        load_model(str(output), torch.float32)
    (adapters / "adapter_model.safetensors").write_bytes(whole)
    saved(model, num_hidden_layers=1)
    with pytest.raises(UserError, match=r"has adapters for what its base does not have, such as .*layers\.1\."):
        load_model(str(output), torch.float32)
    rewrite(model, without("lm_head"))
    with pytest.raises(UserError, match=f"{model} is incomplete: .* lacks lm_head"):
        load_model(str(output), torch.float32)
    edit(adapters / "adapter_config.json", base_model_name_or_path=None)
    with pytest.raises(UserError, match="names no base"):
        load_model(str(output), torch.float32)


def test_the_loss_tells_a_model_that_is_not_finite_from_one_that_it_does_not_serve():
    lm = tiny()
    with torch.no_grad():
        lm.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    ids = torch.tensor([[1, 2, 3], [1, 2, 4]])
    with pytest.raises(ValueError, match=r"not finite: its weight model\.layers\.1\.mlp\.up_proj\.weight has NaN"):
        causal_lm_orpo_loss(lm, input_ids=ids, labels=ids, attention_mask=torch.ones_like(ids))


# --- what does not fit it ------------------------------------------------------------------------------------------


def more_tokens(count: int) -> Any:
    larger = byte_level()
    larger.add_tokens([f"<{index}>" for index in range(count)])
    return larger


@pytest.mark.parametrize("word", ["train", "evaluate", "sweep", "compare"])
def test_ids_beyond_the_embedding(word, model, data, tmp_path):
    rows = len(tokenizer())
    more_tokens(2).save_pretrained(model)
    assert command("train", model, data, *STEPS, "--output", tmp_path / "unused")[0] == 0, "no pair has them"
    with data.open("a") as file:
        file.write(json.dumps({"prompt": "Which?", "chosen": "<1>", "rejected": "<0>"}) + "\n")
    said = run(word, model, data, "--output", tmp_path / "out", *(STEPS if word == "train" else ()), status=2)
    assert f"has the token '<1>' with the id {rows + 1}, but the model's embedding has {rows} rows" in said["error"]


def test_a_padding_token_beyond_the_embedding(model, data, tmp_path):
    larger = byte_level()
    larger.add_special_tokens({"pad_token": "<padding>"})
    larger.save_pretrained(model)
    said = run("train", model, data, *STEPS, "--output", tmp_path / "out", status=2)
    assert "has the token '<padding>' with the id" in said["error"]


@pytest.mark.parametrize("architecture", ["Llama", "GPT2"])
def test_pairs_are_cut_to_the_positions_and_it_is_said(architecture, data, tmp_path):
    names = {"n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2}
    folder = saved(
        tmp_path / "given", architecture, max_position_embeddings=24, **(names if architecture == "GPT2" else {})
    )
    arguments = (folder, data, "--output")
    status, _, told = command("train", *arguments, tmp_path / "run", *STEPS[:4], "--eval-split", 2)
    assert status == 0
    assert "have more than 24 tokens and were cut" in told
    assert f"{folder} has 24 positions, fewer than --max-length 1024." in told
    status, _, told = command("evaluate", *arguments, tmp_path / "e")
    assert (status, "has 24 positions" in told) == (0, True)
    assert "positions" not in command("evaluate", *arguments, tmp_path / "e", "--max-length", 24)[2]


@pytest.mark.parametrize(
    ("architecture", "changes", "positions"),
    [
        ("mpt", {"max_seq_len": 24}, 24),
        ("roberta", {"max_position_embeddings": 24, "pad_token_id": 1}, 22),  # the first two are the padding's
        ("opt", {"max_position_embeddings": 24}, 24),  # its table has two more
        ("bloom", {}, None),
    ],
)
def test_positions_by_other_names_and_with_an_offset(architecture, changes, positions):
    assert positions_of(AutoConfig.for_model(architecture, **changes)) == positions


def test_a_roberta_takes_as_many_positions_as_we_say():
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.for_model("roberta", vocab_size=9, max_position_embeddings=24, pad_token_id=1, **sizes)
    model, longest = AutoModel.from_config(config), positions_of(config)
    assert model(torch.full((1, longest), 5)).last_hidden_state.shape[1] == longest
    with pytest.raises((IndexError, RuntimeError)):
        model(torch.full((1, longest + 1), 5))


# --- a run that diverges -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "held_out"), [(1, 2), (2, 0), (2, 2), (5, 0)])
def test_a_run_that_diverges_says_where(steps, held_out, model, data, tmp_path):
    arguments = ("train", model, data, *STEPS, "--lr", 1e30, "--max-steps", steps, "--eval-split", held_out)
    arguments += ("--save-every", 100, *(("--eval-every", 100) if held_out else ()))
    said = run(*arguments, "--output", tmp_path / "run", status=2)
    assert "not finite" in said["error"]
    assert "give a smaller --lr" in said["error"]
    assert "step" in said["error"]
    assert not (tmp_path / "run" / "model").exists()
    assert issubclass(Diverged, UserError)


def test_what_the_last_step_made_useless_is_not_saved(model, data, tmp_path, monkeypatch):
    def spoil(lm: torch.nn.Module) -> list[str]:
        torch.nn.init.constant_(lm.lm_head.weight, torch.nan)
        return not_finite(lm)

    monkeypatch.setattr("orpo_kernels.app.finetuning.train.not_finite", spoil)
    said = run("train", model, data, *STEPS, "--output", tmp_path / "run", status=2)
    assert said["error"] == "The weight lm_head.weight is not finite behind step 2: give a smaller --lr."
    assert not (tmp_path / "run" / "model").exists()


# --- as it came ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_model_comes_back_in_its_dtype(dtype, data, tmp_path):
    folder, output = saved(tmp_path / "given", dtype=dtype), tmp_path / "run"
    run("train", folder, data, *STEPS, "--lr", 1e-2, "--output", output)
    before, after = load_file(folder / "model.safetensors"), load_file(output / "model" / "model.safetensors")
    assert {name: weight.dtype for name, weight in after.items()} == dict.fromkeys(before, dtype)
    assert any(not torch.equal(after[name], before[name]) for name in before)
    assert AutoModelForCausalLM.from_pretrained(output / "model").dtype == dtype


def test_each_weight_has_its_own_dtype(data, tmp_path):
    folder, output = saved(tmp_path / "given", dtype=torch.bfloat16), tmp_path / "run"
    norm = "model.layers.0.input_layernorm.weight"
    rewrite(folder, lambda weights: {**weights, norm: weights[norm].float()})
    run("train", folder, data, *STEPS, "--output", output)
    assert stored_dtypes(str(output)) == stored_dtypes(str(folder))
    assert stored_dtypes(str(output))[norm] == torch.float32


def test_the_dtype_of_weights_in_pytorchs_format(data, tmp_path):
    folder, output = saved(tmp_path / "given", dtype=torch.bfloat16), tmp_path / "run"
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    run("train", folder, data, *STEPS, "--output", output)
    assert set(stored_dtypes(str(output)).values()) == {torch.bfloat16}


def test_training_is_in_float32_whatever_the_dtype(data, tmp_path):
    """Steps as small as these would round to nothing in bfloat16."""
    half = saved(tmp_path / "half", dtype=torch.bfloat16)
    whole = tmp_path / "whole"
    shutil.copytree(half, whole)
    rewrite(whole, lambda weights: {name: weight.float() for name, weight in weights.items()})
    for name in ("half", "whole"):
        assert (
            command("train", tmp_path / name, data, *STEPS, "--lr", 1e-4, "--output", tmp_path / f"run-{name}")[0] == 0
        )
    ours, theirs = (load_file(tmp_path / f"run-{name}" / "model" / "model.safetensors") for name in ("half", "whole"))
    assert all(torch.equal(ours[name], theirs[name].bfloat16()) for name in theirs)


def test_merged_adapters_come_back_in_the_dtype_of_their_base(data, tmp_path):
    pytest.importorskip("peft")
    folder, output = saved(tmp_path / "given", dtype=torch.bfloat16), tmp_path / "run"
    (folder / "processor_config.json").write_text("{}")
    run("train", folder, data, *STEPS, "--lora", "--merge", "--lora-rank", 2, "--output", output)
    assert set(stored_dtypes(str(output / "merged")).values()) == {torch.bfloat16}
    assert (output / "merged" / "processor_config.json").exists()
    assert {weight.dtype for weight in load_file(output / "model" / "adapter_model.safetensors").values()} == {
        torch.float32
    }
    # Trained further, the adapters are merged into their base, whose dtype and files the result has.
    run("train", output, data, *STEPS, "--output", tmp_path / "further")
    assert set(stored_dtypes(str(tmp_path / "further")).values()) == {torch.bfloat16}
    assert (tmp_path / "further" / "model" / "processor_config.json").exists()


def test_every_file_that_belongs_to_the_model_comes_along(model, data, tmp_path):
    belonging = {
        "preprocessor_config.json": '{"size": 3}',
        "processor_config.json": "{}",
        "chat_template.jinja": tokenizer().chat_template,
        "generation_config.json": '{"temperature": 0.6, "max_new_tokens": 7}',
        "modeling_mine.py": "# code",
        "tokenizer.model": "pieces",
        "LICENSE": "free",
    }
    foreign = dict.fromkeys(["README.md", "optimizer.pt", "trainer_state.json", "events.log", "data.csv"], "{}")
    for name, content in {**belonging, **foreign}.items():
        (model / name).write_text(content)
    run("train", model, data, *STEPS, "--output", tmp_path / "run")
    result = contents(tmp_path / "run" / "model")
    assert {name: result[name].decode() for name in belonging} == belonging
    assert result.keys().isdisjoint(foreign)
    assert companions(str(model)).keys() >= belonging.keys()


# --- hashes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"])
def test_the_manifest_of_a_model_tells_what_has_changed(file, model):
    before = model_manifest(str(model))
    (model / "README.md").write_text("whatever")
    assert model_manifest(str(model)) == before
    (model / file).write_bytes((model / file).read_bytes() + b" ")
    after = model_manifest(str(model))
    assert [name for name in after if after[name] != before[name]] == [file]
