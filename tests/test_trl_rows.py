"""What the drop-in for TRL's trainer makes of rows: used whole, or named, before the first step."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest

pytest.importorskip("trl.experimental.orpo")

from datasets import Dataset

from orpo_kernels.trl import ORPOConfig, ORPOTrainer

from .chats import assistant, user
from .test_templates import EOT, LLAMA, OPENS, of_template
from .training import chat_examples, settings, tiny, tokenizer
from .versions import leaves_answers_empty

GOOD = {"prompt": [user("hi")], "chosen": [assistant("blue please")], "rejected": [assistant("red")]}


def trainer_of(rows: list[dict[str, Any]], folder: Any, own: Any = None, **options: Any) -> ORPOTrainer:
    own = own or tokenizer()
    args = ORPOConfig(**settings(folder), max_length=options.pop("max_length", 256))
    data = Dataset.from_list(rows)
    return ORPOTrainer(tiny(vocab_size=len(own)), args, train_dataset=data, processing_class=own, **options)


def trained(trainer: ORPOTrainer, side: str = "chosen") -> str:
    """What is trained of the first row."""
    labels = trainer.train_dataset[0][f"{side}_labels"]
    return trainer.processing_class.decode([label for label in labels if label != -100])


@pytest.mark.parametrize(("end", "behind"), [("trl", f"{EOT}<|im_end|>"), ("single", EOT)])
def test_a_template_that_always_opens_the_next_turn(end, behind, tmp_path):
    own = of_template(LLAMA + "{{'<|start_header_id|>assistant<|end_header_id|>\n\n'}}")
    made = trainer_of([GOOD] * 2, tmp_path, own, end=end)
    assert trained(made).lstrip("\n") == f"blue please{behind}"  # TRL's boundary is one token early here
    assert trained(made, "rejected").lstrip("\n") == f"red{behind}"


def test_an_opening_that_a_finished_turn_does_not_have(tmp_path):
    own = of_template(LLAMA + OPENS.replace("\n\n'}}", "\n\n<think>\n'}}"))
    lists = GOOD | {"chosen": [assistant("<ol> one")], "rejected": [assistant("<ul> two")]}
    made = trainer_of([lists] * 2, tmp_path, own)
    assert trained(made).lstrip("\n") == f"<ol> one{EOT}<|im_end|>"
    assert trained(made, "rejected").lstrip("\n") == f"<ul> two{EOT}<|im_end|>"


@pytest.mark.parametrize(
    "row",
    [
        GOOD | {"chosen": "blue please", "rejected": "red"},
        {"prompt": [{"from": "human", "value": "hi"}], "chosen": [{"from": "gpt", "value": "blue please"}]}
        | {"rejected": [{"from": "gpt", "value": "red"}]},
        GOOD | {"prompt": [user([{"type": "text", "text": "hi"}])]},
        {"chosen": [user("hi"), assistant("blue please")], "rejected": [user("hi"), assistant("red")]},
        {"prompt": "hi", "chosen": [user("hi"), assistant("blue please")], "rejected": [user("hi"), assistant("red")]},
        GOOD | {"score_chosen": 3.0, "source": "some web page"},
    ],
    ids=["strings", "ShareGPT", "parts", "conversations", "UltraFeedback", "about the pair"],
)
def test_the_same_pair_however_it_is_written(row, tmp_path):
    expected = trainer_of([GOOD] * 2, tmp_path).train_dataset[0]
    made = trainer_of([row] * 2, tmp_path).train_dataset[0]
    for column in ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels"):
        assert made[column] == expected[column], column


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            GOOD | {"chosen": [assistant("", tool_calls=[{"function": {"name": "get", "arguments": {"x": "1"}}}])]},
            "of its",
        ),
        (
            GOOD | {"chosen": [assistant("blue", reasoning_content="hm hm")]},
            "of its reasoning_content it prints 'blue'",
        ),
        (GOOD | {"system": "You are a pirate king"}, "it has 'system' beside prompt, chosen and rejected"),
        (GOOD | {"tools": [{"type": "function", "function": {"name": "get"}}]}, "does not print its tools"),
        (GOOD | {"chosen": [assistant("a"), user("sure?"), assistant("b")]}, "its chosen answer has several turns"),
        (GOOD | {"chosen": [assistant(" ")]}, "its chosen response is empty"),
        (GOOD | {"weight": -1.0}, "its weight is -1.0"),
    ],
    ids=["tool call", "reasoning", "system", "tools", "turns", "empty", "weight"],
)
def test_what_would_be_lost_is_named(row, reason, tmp_path):
    made = trainer_of([row, *chat_examples(3)], tmp_path)  # the columns of a Dataset are those of its first row
    (refusal,) = made.unusable_pairs["train"]
    assert refusal.index == 0
    assert reason in refusal.reason
    assert len(made.train_dataset) == 3


@leaves_answers_empty
def test_what_length_costs_is_said(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="orpo_kernels.trl"):
        made = trainer_of(chat_examples(12), tmp_path, max_length=64)
    sides = [
        (row[f"{side}_input_ids"], row[f"{side}_labels"])
        for row in made.train_dataset
        for side in ("chosen", "rejected")
    ]
    cut = [any(len(ids) >= 64 for ids, _ in sides[i : i + 2]) for i in range(0, 24, 2)]
    empty = [any(set(labels) == {-100} for _, labels in sides[i : i + 2]) for i in range(0, 24, 2)]
    assert 0 < sum(empty) < sum(cut) < 12
    assert f"{sum(cut)} of 12 rows of train reach max_length=64" in caplog.text
    assert f"{sum(empty)} of them have no answer left" in caplog.text


def test_a_chat_written_as_text_is_a_chat(tmp_path):
    rows = [{name: json.dumps(value) for name, value in row.items()} for row in chat_examples(2)]
    made, expected = trainer_of(rows, tmp_path), trainer_of(chat_examples(2), tmp_path)
    for ours, theirs in zip(made.train_dataset, expected.train_dataset, strict=True):
        assert ours["chosen_labels"] == theirs["chosen_labels"]
        assert ours["rejected_input_ids"] == theirs["rejected_input_ids"]
