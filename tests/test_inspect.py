"""`orpo-kernels inspect` and `PreferenceCollator.show`: data as the model will see it."""

from __future__ import annotations

import io
import re

import pytest

pytest.importorskip("transformers")
pytest.importorskip("rich")
pytest.importorskip("typer")
pytest.importorskip("matplotlib")

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from orpo_kernels.app.cli import main
from orpo_kernels.app.cli.inspect import BINS, _histogram
from orpo_kernels.transformers import PreferenceCollator, tokenize_pair
from orpo_kernels.transformers.showing import STYLES, tokens_of

from .chats import assistant
from .commands import records, run, write_rows
from .test_templates import CALL, EOT, RESULT, TOOLS, WITH_TOOLS, of_template, pair
from .training import chat_examples, tokenizer


@pytest.fixture
def data(tmp_path) -> str:
    rows = [*chat_examples(8), {"prompt": "alone"}, {"prompt": "p", "chosen": "same", "rejected": "same"}]
    rows[3]["source"] = "a page"
    return write_rows(tmp_path / "pairs.jsonl", rows)


@pytest.mark.draws
def test_what_there_is_in_a_file(model, data, tmp_path):
    found = run("inspect", data, "--model", model, "--max-length", 48, "--output", tmp_path / "out")
    kept = [tokenize_pair(example, tokenizer(), max_length=48) for example in chat_examples(8)]
    whole = [tokenize_pair(example, tokenizer()) for example in chat_examples(8)]
    lost = [own.get("cut_tokens", 0) for own in kept]
    assert {name: found[name] for name in ("pairs", "layouts", "ignored", "cut_pairs", "cut_tokens")} == {
        "pairs": 8,
        "layouts": {"chat": 8},
        "ignored": ["source"],
        "cut_pairs": sum(map(bool, lost)),
        "cut_tokens": sum(lost),
    }
    assert 0 < found["cut_pairs"] < 8
    longest = [max(len(own["chosen_input_ids"]), len(own["rejected_input_ids"])) for own in whole]
    assert found["lengths"]["pair"]["most"] == max(longest)
    assert found["lengths"]["pair"]["least"] == min(longest)
    problems = records(tmp_path / "out", "problems")
    assert problems == found["problems"]
    assert [problem["row"] for problem in problems] == [9, 10]
    assert (tmp_path / "out" / "lengths.png").read_bytes().startswith(b"\x89PNG")


@given(st.lists(st.integers(0, 300), min_size=1, max_size=30))
def test_each_length_is_in_the_bar_that_names_it(lengths):
    bars = [re.fullmatch(r" *(\d+) to +(\d+) (#*) *(\d+)", line) for line in _histogram(np.array(lengths)).split("\n")]
    assert len(bars) <= BINS
    for bar in bars:
        low, high, count = (int(bar[group]) for group in (1, 2, 4))
        assert count == sum(low <= length <= high for length in lengths)
        assert bool(bar[3]) == bool(count)
    assert sum(int(bar[4]) for bar in bars) == len(lengths)


def test_pairs_that_are_too_long_can_be_left_out(model, data, tmp_path):
    arguments = (data, "--model", model, "--max-length", 48, "--output", tmp_path / "out")
    cut, left_out = run("inspect", *arguments), run("inspect", *arguments, "--too-long", "leave-out")
    assert (left_out["cut_pairs"], left_out["pairs"]) == (0, 8 - cut["cut_pairs"])
    assert len(left_out["problems"]) == 2 + cut["cut_pairs"]
    assert any("tokens, more than max_length=48" in problem["reason"] for problem in left_out["problems"])
    assert left_out["lengths"] == cut["lengths"]  # of all, before any cut


def test_what_people_are_shown(capsys, model, data, tmp_path):
    arguments = ["inspect", data, "--model", model, "--output", str(tmp_path / "out"), "--max-length", "48"]
    assert main([*arguments, "--rows", "2,5"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "row 2 ",
        "row 5 ",
        "8 pairs (8 as chat)",
        "Not read: source.",
        "2 rows cannot be used",
        "trained on",
    ):
        assert words in shown
    assert "row 1 " not in shown
    assert shown.count("\nchosen: ") == shown.count("\nrejected: ") == 2
    assert main([*arguments, "--show", "0"]) == 0
    assert "chosen: " not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--rows", "9"), "Row 9 of .* cannot be used: it has no chosen"),
        (("--rows", "99"), "Row 99 of .* is not there"),
        (("--rows", "0"), "--rows is '0'; write numbers of rows, from 1"),
        (("--show", "-1"), "--show is -1"),
        (("--columns", "prompt"), "--columns is 'prompt'"),
    ],
)
def test_what_cannot_be_shown(flags, message, model, data, tmp_path):
    found = run("inspect", data, "--model", model, "--output", tmp_path / "out", *flags, status=2)
    assert re.search(message, found["error"]), found


def test_what_is_read_and_what_is_trained():
    template = of_template(WITH_TOOLS)
    made = tokenize_pair(pair([CALL, RESULT, assistant("Cold")], "no", tools=TOOLS), template)
    tokens = tokens_of(made, "chosen", template)
    assert {token.kind for token in tokens} == {"prompt", "answer", "end", "between"}
    for kind, labelled in (("prompt", False), ("between", False), ("answer", True), ("end", True)):
        at = [index for index, token in enumerate(tokens) if token.kind == kind]
        assert all((made["chosen_labels"][index] != -100) is labelled for index in at)
    said = {kind: "".join(token.text for token in tokens if token.kind == kind) for kind in STYLES}
    assert said["answer"].endswith("Cold")
    assert said["end"] == EOT * 2
    assert "twenty below" in said["between"]
    assert "".join(token.text for token in tokens) == template.decode(made["chosen_input_ids"])
    padding = [token.kind for token in tokens_of(made, "rejected", template)].count("padding")
    assert padding == len(made["chosen_input_ids"]) - len(made["rejected_input_ids"])


def test_show_prints_pairs_and_reasons():
    file = io.StringIO()
    collator = PreferenceCollator(tokenizer(), max_length=16)
    unusable = {"prompt": "a", "chosen": "b", "rejected": "b"}
    collator.show([chat_examples(1)[0] | {"weight": 2.0}, unusable], console=Console(file=file, width=200))
    shown = file.getvalue()
    for words in ("pair 0", "its loss is multiplied by 2", "were cut", "It cannot be used: its chosen and rejected"):
        assert words in shown
