"""What the trainers do with their data before the first step: unusable pairs, lengths, weights."""

from __future__ import annotations

import collections
import logging
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import IterableDataset

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

import datasets
from datasets import Dataset

from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss, tokenize_pairs
from orpo_kernels.transformers import pairs as pairs_module
from orpo_kernels.transformers.pairs import GroupedByLength, UsablePairs, lengths_of, pair_length
from orpo_kernels.transformers.trainer import PreferenceTrainer

from .test_collator import byte_level
from .training import chat_examples, collator, losses, settings, tiny, tokenizer, trained, trainer_of, trl_trainer_of

EMPTY = [{"role": "assistant", "content": ""}]


def broken(place: int = 2, count: int = 9) -> list[dict[str, Any]]:
    """Pairs of which one has an answer that says nothing."""
    pairs = chat_examples(count)
    pairs[place] = {**pairs[place], "chosen": EMPTY}
    return pairs


def usable(pairs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [pair for pair in pairs if pair["chosen"] != EMPTY]


class Items(TorchDataset):
    """A data set of the user's own."""

    def __init__(self, items: list[Any]) -> None:
        self.items, self.reads = items, 0

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> Any:
        self.reads += 1
        return self.items[index]


class Stream(IterableDataset):
    def __init__(self, items: list[Any]) -> None:
        self.items, self.epochs = items, []

    def __iter__(self) -> Any:
        return iter(self.items)

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


def with_transform(pairs: list[dict[str, Any]]) -> Dataset:
    data = Dataset.from_list(pairs)
    data.set_transform(lambda batch: batch)
    return data


def as_stream(pairs: list[dict[str, Any]]) -> Any:
    return Dataset.from_list(pairs).to_iterable_dataset()


FORMS = {"list": list, "tuple": tuple, "Dataset": Dataset.from_list, "transform": with_transform, "own": Items}
STREAMS = {"stream": Stream, "IterableDataset": as_stream}


# --- unusable pairs ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_one_unusable_pair_is_left_out_before_the_first_step(form, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        trainer = trainer_of(tmp_path, train_dataset=FORMS[form](broken()), eval_dataset=broken(4, 5))
    (refusal,) = trainer.unusable_pairs["train"]
    assert (refusal.index, refusal.reason) == (2, "its chosen response is empty")
    assert [one.index for one in trainer.unusable_pairs["eval"]] == [4]
    said = [record.getMessage() for record in caplog.records]
    assert any("1 of the 9 pairs of the train set" in line and "pair 2: its chosen response" in line for line in said)
    trainer.train()
    assert losses(trainer) == losses(trained(tmp_path, train_dataset=usable(broken())))
    assert len(trainer.get_eval_dataloader().dataset) == 4


@pytest.mark.parametrize("form", STREAMS)
def test_of_a_stream_it_is_left_out_on_the_way(form, tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        trainer = trained(tmp_path, train_dataset=STREAMS[form](broken()), max_steps=8)
    assert losses(trainer) == losses(trained(tmp_path, train_dataset=usable(broken()), max_steps=8))
    assert [(one.index, one.reason) for one in trainer.unusable_pairs["train"]] == [(2, "its chosen response is empty")]
    assert sum("Pair 2 of the train set cannot be used" in record.getMessage() for record in caplog.records) == 1


def test_a_stream_with_many_unusable_pairs_names_a_few(tmp_path, caplog):
    stream = Stream([{"prompt": "What?", "chosen": "", "rejected": "No."}] * 30 + chat_examples(8))
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        trainer = trained(tmp_path, train_dataset=stream)
    assert len(trainer.unusable_pairs["train"]) == 30
    assert sum("of the train set cannot be used" in record.getMessage() for record in caplog.records) == 5
    assert "Of further ones nothing is said" in caplog.text
    assert stream.epochs  # what the data loader asks of the source reaches it


@pytest.mark.parametrize("form", ["list", "Dataset", "own"])
def test_pairs_that_came_tokenised_are_looked_through_as_well(form, tmp_path):
    tokenised, _ = tokenize_pairs(chat_examples(9), tokenizer(), max_length=96)
    long = {**tokenised[3], "chosen_input_ids": [5] * 200, "chosen_labels": [-100] * 4 + [5] * 196}
    mute = {**tokenised[5], "rejected_labels": [-100] * len(tokenised[5]["rejected_labels"])}
    rows = [*tokenised[:3], long, tokenised[4], mute, *tokenised[6:]]
    trainer = trained(tmp_path, train_dataset=FORMS[form](rows))
    assert [one.index for one in trainer.unusable_pairs["train"]] == [3, 5]
    assert "200 tokens, more than max_length=96" in trainer.unusable_pairs["train"][0].reason
    kept = [pair for index, pair in enumerate(chat_examples(9)) if index not in (3, 5)]
    assert losses(trainer) == losses(trained(tmp_path, train_dataset=kept))


def test_nothing_left_is_an_error(tmp_path):
    nothing = [{**pair, "chosen": EMPTY} for pair in chat_examples(7)]
    with pytest.raises(ValueError, match=r"None of the 7 pairs of the train set can be used \(pair 0: its chosen"):
        trainer_of(tmp_path, train_dataset=nothing)
    with pytest.raises(ValueError, match=r"None of the 7 pairs of the eval_second set"):
        trainer_of(tmp_path, eval_dataset={"first": chat_examples(2), "second": Dataset.from_list(nothing)})


def test_sets_given_later_are_looked_through_too(tmp_path):
    trainer = trainer_of(tmp_path, eval_dataset={"one": broken(0, 4), "two": chat_examples(3)})
    assert [one.index for one in trainer.unusable_pairs["eval_one"]] == [0]
    assert trainer.unusable_pairs["eval_two"] == []
    trainer.evaluate()
    expected = trainer_of(tmp_path, eval_dataset=usable(broken(1, 6))).evaluate()
    assert trainer.evaluate(eval_dataset=broken(1, 6))["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-6)
    assert trainer.predict(broken(1, 6)).predictions.shape[0] == 5
    assert [one.index for one in trainer.unusable_pairs["test"]] == [1]
    trainer.evaluate(eval_dataset=Stream(broken(1, 6)))


def test_what_is_cut_is_said(tmp_path, caplog):
    pairs = chat_examples(8)
    whole, _ = tokenize_pairs(pairs, tokenizer())
    cut, _ = tokenize_pairs(pairs, tokenizer(), max_length=40)
    lost = [_tokens(one) - _tokens(other) for one, other in zip(whole, cut, strict=True)]
    assert 0 < sum(1 for tokens in lost if tokens) < 8
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        trainer_of(tmp_path, data_collator=collator(max_length=40), train_dataset=pairs)
    said = f"{sum(1 for tokens in lost if tokens)} of the 8 pairs of the train set are longer than max_length=40"
    assert f"{said} and are cut, by {sum(lost)} tokens in all." in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING, "orpo_kernels"):  # whoever has tokenised them knows
        trainer_of(tmp_path, data_collator=collator(max_length=40), train_dataset=cut, eval_dataset=None)
    assert not caplog.text


def _tokens(pair: Any) -> int:
    return len(pair["chosen_input_ids"]) + len(pair["rejected_input_ids"])


def test_pairs_are_tokenised_once(tmp_path, monkeypatch):
    calls: list[int] = []
    tokenize = PreferenceCollator.tokenized

    def counted(own: PreferenceCollator, example: Any) -> Any:
        calls.append("chosen_input_ids" not in example)
        return tokenize(own, example)

    monkeypatch.setattr(PreferenceCollator, "tokenized", counted)
    trained(tmp_path, eval_dataset=None, max_steps=12)  # three epochs
    assert sum(calls) == 8


def test_a_set_of_the_callers_own_is_read_anew(tmp_path):
    """Its items may change with every epoch: an augmentation."""
    items = Items(chat_examples(8))
    trained(tmp_path, train_dataset=items, max_steps=8)
    assert items.reads == 8 + 2 * 8


def test_an_item_that_has_become_unusable_is_stood_in_for(caplog):
    items = Items(chat_examples(4))
    pairs = UsablePairs(items, collator())
    expected = [pairs[index] for index in range(4)]
    items.items = [items.items[0], {**items.items[1], "chosen": EMPTY}, items.items[2], {"prompt": "Nothing"}]
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        assert [pairs[index] for index in range(4)] == [expected[place] for place in (0, 2, 2, 0)]
    assert "Pair 1 has changed and cannot be used now: its chosen response is empty." in caplog.text
    items.items = [{}] * 4
    with pytest.raises(ValueError, match="None of the 4 pairs can be used any more"):
        pairs[0]


def test_columns_that_may_be_text_are_no_longer_dropped_in_silence(tmp_path):
    """What stands beside prompt and answers and is about the pair is left out, what may be a part of it refuses it."""
    rows = [{**pair, "source": "a book", "score": 3} for pair in chat_examples(8)]
    assert losses(trained(tmp_path, train_dataset=Dataset.from_list(rows))) == losses(trained(tmp_path))
    for index, row in enumerate(rows):
        row["context"] = "The cat has been fed." if index == 3 else None
    trainer = trainer_of(tmp_path, train_dataset=Dataset.from_list(rows))
    (refusal,) = trainer.unusable_pairs["train"]
    assert refusal.index == 3
    assert "'context' beside prompt" in refusal.reason


def test_a_collator_of_the_callers_own_gets_the_examples(tmp_path):
    seen = []

    class Own(PreferenceCollator):
        def __call__(self, examples: Any) -> Any:
            seen.extend(examples)
            return super().__call__(examples)

    trained(tmp_path, data_collator=Own(tokenizer(), max_length=96, packing="padded"), max_steps=1)
    assert seen[:2] == chat_examples(2)


def test_the_reference_goes_through_the_same_pairs(tmp_path):
    trainer = trained(tmp_path / "broken", "dpo", train_dataset=broken(), max_steps=2)
    expected = trained(tmp_path / "whole", "dpo", train_dataset=usable(broken()), max_steps=2)
    assert losses(trainer) == losses(expected)
    assert len(trainer.train_dataset) == 8
    names = [{path.name for path in (tmp_path / run / "reference_logps").iterdir()} for run in ("broken", "whole")]
    assert names[0] == names[1]


def test_a_run_that_goes_on_sees_the_same_pairs(tmp_path):
    options: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "train_sampling_strategy": "random"}
    whole = trained(tmp_path / "whole", train_dataset=broken(), max_steps=6, **options)
    trained(tmp_path / "half", train_dataset=broken(), max_steps=2, **options)
    resumed = trainer_of(tmp_path / "half", train_dataset=broken(), max_steps=6, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


words = st.text("abc .?", max_size=8)
plain = st.fixed_dictionaries({"prompt": words, "chosen": words, "rejected": words})
weights = st.one_of(st.just(None), st.floats(), st.just("much"))
rows = st.one_of(
    plain,
    st.builds(lambda pair, weight: {**pair, "weight": weight}, plain, weights),
    st.builds(lambda pair, missing: {k: v for k, v in pair.items() if k != missing}, plain, st.sampled_from("prompt")),
    st.sampled_from([*chat_examples(4), *broken(0, 1), {}, None, "text", {"chosen_input_ids": [1, 2]}]),
)


@given(st.lists(rows, max_size=6))
def test_every_row_is_used_whole_or_named(drawn):
    """The pairs that a trainer takes are those that the collator takes, each as it is; the others are named."""
    own = collator(packing="padded")
    pairs = UsablePairs(drawn, own)
    refused = {one.index for one in pairs.unusable}
    kept = [index for index in range(len(drawn)) if index not in refused]
    assert len(pairs) == len(kept)
    for place, index in enumerate(kept):
        assert pairs[place] == dict(own.tokenized(drawn[index]))
        weight = pairs[place].get("weight", 1.0)
        assert math.isfinite(weight)
        assert weight >= 0
    if kept:
        assert own([pairs[place] for place in range(len(pairs))])["labels"].shape[0] == 2 * len(kept)
    assert all(one.reason for one in pairs.unusable)


# --- lengths -------------------------------------------------------------------------------------------------------


def test_length_is_that_of_the_prompt_and_both_answers():
    (pair,), _ = tokenize_pairs(chat_examples(1), tokenizer())
    packed = collator(packing="shared", max_length=None)([pair])
    assert pair_length(pair) == int((packed["packed"].segments >= 0).sum())
    assert lengths_of(Stream([pair])) is None
    assert lengths_of(chat_examples(2)) is None
    assert lengths_of([pair, pair]) == [pair_length(pair)] * 2


FORMS_OF_LENGTH = {
    "raw": lambda: chat_examples(24),
    "Dataset": lambda: Dataset.from_list(chat_examples(24)),
    "tokenised": lambda: tokenize_pairs(chat_examples(24), tokenizer(), max_length=96)[0],
    "tokenised Dataset": lambda: Dataset.from_list(tokenize_pairs(chat_examples(24), tokenizer(), max_length=96)[0]),
}


def check_groups(trainer: Any, batch_size: int) -> None:
    """Every pair comes once in an epoch, in batches of similar lengths, and in another order in the next."""
    lengths = lengths_of(trainer.train_dataset)
    sampler = trainer._get_train_sampler()
    assert isinstance(sampler, GroupedByLength)
    first = list(sampler)
    assert sorted(first) == list(range(len(lengths)))

    def spread(order: list[int]) -> int:
        starts = range(0, len(order), batch_size)
        batches = [[lengths[index] for index in order[start : start + batch_size]] for start in starts]
        return sum(max(batch) - min(batch) for batch in batches)

    assert spread(first) < 0.5 * spread(list(range(len(lengths))))
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert list(sampler) != first


@pytest.mark.parametrize("form", FORMS_OF_LENGTH)
def test_groups_of_similar_length(form, tmp_path):
    data = FORMS_OF_LENGTH[form]()
    check_groups(trainer_of(tmp_path, train_dataset=data, train_sampling_strategy="group_by_length"), 2)


def test_an_evaluation_is_not_in_groups(tmp_path):
    data = chat_examples(24)
    trainer = trained(tmp_path, train_dataset=data, eval_dataset=data, train_sampling_strategy="group_by_length")
    assert trainer.evaluate()["eval_loss"] == pytest.approx(
        trainer_of(tmp_path, model=trainer.model, eval_dataset=data).evaluate()["eval_loss"], rel=1e-6
    )
    plain = trainer_of(tmp_path, train_dataset=data, eval_dataset=data)
    assert (trainer.predict(data).label_ids == plain.predict(data).label_ids).all()


def test_groups_of_similar_length_with_a_reference_and_in_trls(tmp_path):
    options: dict[str, Any] = {"train_dataset": chat_examples(24), "train_sampling_strategy": "group_by_length"}
    check_groups(trainer_of(tmp_path, "dpo", **options), 2)
    trainer = trl_trainer_of(tmp_path, chat_examples(24), train_sampling_strategy="group_by_length")
    check_groups(trainer, 2)
    trainer.train()


def test_older_transformers_say_it_otherwise(tmp_path):
    trainer = trainer_of(tmp_path, train_dataset=chat_examples(24))
    assert not isinstance(trainer._get_train_sampler(), GroupedByLength)
    trainer.args.train_sampling_strategy = None
    trainer.args.group_by_length = True
    check_groups(trainer, 2)


def test_a_run_in_groups_goes_on_where_it_was(tmp_path):
    options: dict[str, Any] = {
        "train_dataset": chat_examples(8),
        "save_strategy": "steps",
        "save_steps": 6,
        "train_sampling_strategy": "group_by_length",
    }
    whole = trained(tmp_path / "whole", max_steps=10, **options)  # in the third epoch
    trained(tmp_path / "half", max_steps=6, **options)
    resumed = trainer_of(tmp_path / "half", max_steps=10, **options)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == pytest.approx(losses(whole), rel=1e-5)


def test_the_flag_of_the_command(model, tmp_path, monkeypatch):
    pytest.importorskip("rich")
    from .commands import run, write_chats

    pairs = write_chats(tmp_path / "pairs.jsonl", 24)
    samplers = []
    grouped = PreferenceTrainer._get_train_sampler
    monkeypatch.setattr(
        PreferenceTrainer, "_get_train_sampler", lambda *args: samplers.append(grouped(*args)) or samplers[-1]
    )
    flags = ["--batch-size", "2", "--max-steps", "1", "--eval-split", "0", "--output"]
    for name, more in (("plain", []), ("grouped", ["--group-by-length"])):
        run("train", model, pairs, *flags, tmp_path / name, *more)
    assert [isinstance(sampler, GroupedByLength) for sampler in samplers] == [False, True]


# --- weights -------------------------------------------------------------------------------------------------------


def weighted(count: int = 8) -> list[dict[str, Any]]:
    return [{**pair, "weight": [0.0, 1.0, 2.5][index % 3]} for index, pair in enumerate(chat_examples(count))]


@pytest.mark.parametrize("packing", ["padded", "shared"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("form", ["raw", "Dataset", "tokenised"])
def test_weights_multiply_the_loss_of_their_pairs(form, accumulation, packing, tmp_path):
    pairs: Any = weighted()
    if form != "raw":
        pairs = Dataset.from_list(pairs)
    if form == "tokenised":
        pairs = tokenize_pairs(weighted(), tokenizer(), max_length=96)[0]
    trainer = trained(
        tmp_path,
        train_dataset=pairs,
        data_collator=collator(packing=packing),
        max_steps=1,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
    )
    batch = collator(packing="padded")(weighted(4))
    assert batch["pair_weights"].tolist() == [0.0, 1.0, 2.5, 0.0]
    assert losses(trainer)[0] == pytest.approx(float(causal_lm_orpo_loss(tiny(), **batch).loss), rel=1e-5)


@pytest.mark.parametrize("packing", ["padded", "shared"])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_weights_in_trls(accumulation, packing, tmp_path):
    options = {"per_device_train_batch_size": 4 // accumulation, "gradient_accumulation_steps": accumulation}
    trainer = trl_trainer_of(tmp_path, weighted(), packing, max_steps=1, **options)
    trainer.train()
    batch = PreferenceCollator(tokenizer(), max_length=96, end="trl", packing="padded")(weighted(4))
    assert losses(trainer)[0] == pytest.approx(float(causal_lm_orpo_loss(tiny(), **batch).loss), rel=1e-5)


def test_weights_that_some_pairs_lack(tmp_path):
    rows = weighted()
    rows[1]["weight"] = None
    trainer = trl_trainer_of(tmp_path, rows, "shared")
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(3)])
    assert batch["pair_weights"].tolist() == [0.0, 1.0, 2.5]
    assert "pair_weights" not in trl_trainer_of(tmp_path, chat_examples(4), "shared").data_collator(
        [trainer.train_dataset[1]]
    )


# --- what fits the model -------------------------------------------------------------------------------------------


def trainer_for(kind: str, model: nn.Module, folder: Any) -> Any:
    if kind == "trl":
        return trl_trainer_of(folder, chat_examples(4), model=model)
    return trainer_of(folder, model=model, train_dataset=chat_examples(4), data_collator=collator(end="trl"))


@pytest.mark.parametrize("kind", ["ours", "trl"])
def test_ids_beyond_the_embedding_are_refused_before_the_first_step(kind, tmp_path):
    said = r"The train set has, or is padded with, the token id \d+, but the model's embedding has 200 rows, .* to 199"
    with pytest.raises(ValueError, match=said):
        trainer_for(kind, tiny(vocab_size=200), tmp_path)


def test_a_padding_id_beyond_the_embedding_is_refused(tmp_path):
    larger = byte_level()
    larger.add_special_tokens({"pad_token": "<padding>"})
    with pytest.raises(ValueError, match=f"padded with, the token id {len(larger) - 1}, but"):
        trainer_of(tmp_path, data_collator=PreferenceCollator(larger, max_length=96))


@pytest.mark.parametrize("kind", ["ours", "trl"])
def test_sequences_beyond_the_positions_are_told(kind, tmp_path, caplog):
    pairs, _ = tokenize_pairs(chat_examples(4), tokenizer(), max_length=96, end="trl")
    longest = max(len(pair[f"{side}_input_ids"]) for pair in pairs for side in ("chosen", "rejected"))
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        trainer_for(kind, tiny(max_position_embeddings=longest), tmp_path)
        assert "positions" not in caplog.text
        trainer_for(kind, tiny(max_position_embeddings=24), tmp_path)
    assert f"The train set has a sequence of {longest} tokens, but the model has 24 positions" in caplog.text


# --- rows that TRL is given ----------------------------------------------------------------------------------------


def test_rows_that_trl_cannot_use_are_left_out_and_named(tmp_path, caplog):
    """In TRL one of them ends the run before it begins, or is trained on in silence."""
    rows = chat_examples(9)
    rows[1]["chosen"] = EMPTY
    rows[3]["rejected"] = rows[3]["chosen"]
    rows[5]["prompt"] = [{"role": "assistant", "content": "I?"}, {"role": "nobody", "content": "What is it?"}]
    for index, row in enumerate(rows):
        row["weight"] = -1.0 if index == 7 else 1.0
    with caplog.at_level(logging.WARNING, "orpo_kernels"):
        trainer = trl_trainer_of(tmp_path, rows)
    found = {one.index: one.reason for one in trainer.unusable_pairs["train"]}
    assert list(found) == [1, 3, 5, 7]
    assert found[1] == "its chosen response is empty"
    assert found[3] == "its chosen and rejected responses are the same"
    assert found[5] == "the last message of its prompt is by 'nobody', not by 'user' or 'tool'"
    assert found[7] == "its weight is -1.0, but has to be at least 0"
    assert "4 of the 9 pairs of the train set cannot be used" in caplog.text
    assert "unusable" not in trainer.train_dataset.column_names
    trainer.train()
    kept = [{k: v for k, v in row.items() if k != "weight"} for index, row in enumerate(rows) if index not in found]
    expected = trl_trainer_of(tmp_path, kept)
    expected.train()
    assert losses(trainer) == losses(expected)


def test_a_row_that_trl_cannot_tokenise(tmp_path, monkeypatch):
    from trl.experimental.orpo import ORPOTrainer as TRLORPOTrainer

    tokenize = TRLORPOTrainer.tokenize_row

    def fails(trainer: Any, feature: Any, model: Any = None) -> Any:
        if feature["rejected"].startswith("The dog"):
            raise ValueError("Prompt input ids and answer input ids should have the same length.")
        return tokenize(trainer, feature, model)

    monkeypatch.setattr(TRLORPOTrainer, "tokenize_row", fails)
    rows = [{"prompt": "What?", "chosen": f"It {i}.", "rejected": "The dog" if i == 0 else "No."} for i in range(4)]
    trainer = trl_trainer_of(tmp_path, rows)
    (refusal,) = trainer.unusable_pairs["train"]
    assert (refusal.index, len(trainer.train_dataset)) == (0, 3)
    assert "should have the same length" in refusal.reason
    with pytest.raises(ValueError, match=r"None of the 1 pairs of the train set can be used \(pair 0: TRL cannot"):
        trl_trainer_of(tmp_path, rows[:1])


def test_tools_reach_the_template_of_trls(tmp_path):
    own = tokenizer()
    rows = [{**pair, "tools": [{"name": "look_up"}]} for pair in chat_examples(4)]
    template, own.chat_template = own.chat_template, "{{ tools[0].name if tools }}" + own.chat_template
    try:
        trainer = trl_trainer_of(tmp_path, rows)
        plain = trl_trainer_of(tmp_path, chat_examples(4))
    finally:
        own.chat_template = template
    assert trainer.train_dataset[0]["prompt"].startswith("look_up")
    assert not plain.train_dataset[0]["prompt"].startswith("look_up")


def test_a_dictionary_of_sets_stays_of_its_class():
    sets = collections.defaultdict(list, one=[1])
    made = pairs_module.of_each_set(sets, "eval", lambda pairs, name: (pairs, name))
    assert made == {"one": ([1], "eval_one")}
    assert type(made) is collections.defaultdict
    assert sets == {"one": [1]}


def test_datasets_may_be_a_dictionary_of_sets(tmp_path):
    from orpo_kernels.trl import ORPOConfig, ORPOTrainer

    sets = datasets.DatasetDict(one=Dataset.from_list(broken(1, 4)), two=Dataset.from_list(chat_examples(3)))
    trainer = ORPOTrainer(
        tiny(),
        ORPOConfig(**settings(tmp_path, max_length=96)),
        train_dataset=Dataset.from_list(chat_examples(4)),
        eval_dataset=sets,
        processing_class=tokenizer(),
    )
    assert [one.index for one in trainer.unusable_pairs["eval_one"]] == [1]
    metrics = trainer.evaluate()
    assert {"eval_one_loss", "eval_two_loss", "eval_one_rewards/chosen"} <= metrics.keys()
    assert pairs_module.lengths_of(trainer.eval_dataset["one"]) is not None
    assert torch.isfinite(torch.tensor(metrics["eval_one_loss"]))
