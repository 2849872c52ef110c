"""Rows with more than a pair in them: each is used whole, named, or listed as not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_kernels.app.data import Preferences, load_preferences
from orpo_kernels.app.errors import UserError
from orpo_kernels.text.messages import strings

from .chats import assistant, chat, message, system, user

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris"}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}


def load(folder: Path, *rows: Any, **options: Any) -> Preferences:
    """The rows behind a good one, so that there is always something to load; which is left out of the result."""
    path = folder / "pairs.jsonl"
    path.write_text("\n".join(map(json.dumps, ({"prompt": "-", "chosen": "c", "rejected": "r"}, *rows))))
    found = load_preferences(str(path), **options)
    assert found.rows[0] == 1
    return found.without({0: ""})


def loaded(folder: Path, row: Any, **options: Any) -> dict[str, Any]:
    """The one pair of a row in which all is well."""
    found = load(folder, row, **options)
    assert [str(problem) for problem in found.problems[1:]] == []
    [pair] = found.pairs
    return pair


def refusal(folder: Path, row: Any, **options: Any) -> str:
    found = load(folder, row, **options)
    assert found.pairs == []
    return found.problems[-1].reason


# --- columns beside the pair -----------------------------------------------------------------------------------------

ANSWERS = {"chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    ("row", "pair"),
    [
        (
            {"instruction": "Translate into French:", "input": "good morning", "chosen": "bonjour", "rejected": "hola"},
            chat([user("Translate into French:\ngood morning")], "bonjour", "hola"),
        ),
        ({"instruction": "Say it", "input": "", **ANSWERS}, chat([user("Say it")])),
        ({"instruction": "Say a", "input": "a", **ANSWERS}, chat([user("Say a\na")])),
        ({"instruction": "Say:\nfoo", "input": "foo", **ANSWERS}, chat([user("Say:\nfoo")])),
        ({"instruction": "Say it", "input": "Say it", **ANSWERS}, chat([user("Say it")])),
        (
            {"instruction": "And 3?", "history": [["1?", "one"], ["2?", "two"]], "system": "Count.", **ANSWERS},
            chat([system("Count."), user("1?"), assistant("one"), user("2?"), assistant("two"), user("And 3?")]),
        ),
        ({"prompt": "Q", "history": [], **ANSWERS}, {"prompt": "Q", **ANSWERS}),
        ({"prompt": "Q", "history": [user("1?"), assistant("one")], **ANSWERS}, None),
        ({"prompt": "Q", "tools": [TOOL], **ANSWERS}, chat([user("Q")], tools=[TOOL])),
        ({"prompt": [user("Q")], "tools": json.dumps([TOOL]), **ANSWERS}, chat([user("Q")], tools=[TOOL])),
        ({"prompt": [user("Q")], "tools": [json.dumps(TOOL)], **ANSWERS}, chat([user("Q")], tools=[TOOL])),
        ({"prompt": [user("Q")], "tools": [], **ANSWERS}, chat([user("Q")])),
        (
            {"prompt": [user("Q")], "chat_template_kwargs": {"enable_thinking": False}, **ANSWERS},
            chat([user("Q")], chat_template_kwargs={"enable_thinking": False}),
        ),
        (
            {"prompt": "Q", "enable_thinking": False, **ANSWERS},
            chat([user("Q")], chat_template_kwargs={"enable_thinking": False}),
        ),
        ({"prompt": "Q", "weight": 0.5, **ANSWERS}, {"prompt": "Q", **ANSWERS, "weight": 0.5}),
        ({"prompt": "Q", "sample_weight": "2", **ANSWERS}, {"prompt": "Q", **ANSWERS, "weight": 2.0}),
        ({"prompt": "Q", "weight": 0, **ANSWERS}, {"prompt": "Q", **ANSWERS, "weight": 0.0}),
        # Repeats: of the question, of the whole, of the parts from which somebody made a prompt.
        ({"prompt": "Is it so? Yes", "question": "Is it so?", **ANSWERS}, {"prompt": "Is it so? Yes", **ANSWERS}),
        (
            {"prompt": "Context: a b c.\nQuestion: d?", "context": "a b  c.", "question": "d?", **ANSWERS},
            {"prompt": "Context: a b c.\nQuestion: d?", **ANSWERS},
        ),
        (
            {
                "prompt": "<|user|>\nHello you</s>\n<|assistant|>\nHi</s>\n<|user|>\nQ</s>\n",
                "chosen": [user("Hello you"), assistant("Hi"), user("Q"), assistant("A")],
                "rejected": [user("Hello you"), assistant("Hi"), user("Q"), assistant("B")],
            },
            chat([user("Hello you"), assistant("Hi"), user("Q")]),
        ),
        ({"prompt": [system("S"), user("Q")], "system": "S", **ANSWERS}, chat([system("S"), user("Q")])),
        ({"prompt": "Q", "response": "A", **ANSWERS}, {"prompt": "Q", **ANSWERS}),
    ],
)
def test_what_is_beside_the_pair_is_used(row, pair, tmp_path):
    pair = pair or chat([user("1?"), assistant("one"), user("Q")])
    found = load(tmp_path, row)
    assert found.pairs == [pair]
    assert found.ignored == ([] if "response" not in row else ["response"])


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "Summarise:", "input": "a long text", **ANSWERS}, "its column input holds text that is in no part"),
        ({"question": "Is this known?", "context": "own", **ANSWERS}, "its column context"),
        ({"question": "Is this known?", "context": "!!", **ANSWERS}, "its column context"),
        (
            {"question": "Who?", "context": "It is A who did it", "chosen": "It is A who did it", "rejected": "B"},
            "context",
        ),
        ({"prompt": "Q", "instruction": "Be brief", **ANSWERS}, "its column instruction"),
        ({"prompt": "Q", "notice": "to be read as well", **ANSWERS}, "its column notice"),
        ({"prompt": "Q", "注释": "今天天气很好", **ANSWERS}, "its column 注释"),
        ({"prompt": [system("S"), user("Q")], "system": "T", **ANSWERS}, "its column system"),
        ({"prompt": [user("Q")], "history": [["1?", "one"]], **ANSWERS}, "its column history"),
        ({"prompt": "Q", "history": [["1?"]], **ANSWERS}, "its history has a message without a role"),
        ({"prompt": "Q", "videos": ["a.png"], **ANSWERS}, "it has videos, but only text is served"),
        ({"prompt": "Q", "documents": [{"text": "so"}], **ANSWERS}, "its column documents"),
        ({"prompt": "Q", "tools": "[{", **ANSWERS}, "its tools cannot be read"),
        ({"prompt": "Q", "tools": [3], **ANSWERS}, "its tools are not a list of objects"),
        ({"prompt": "Q", "tools": 3, **ANSWERS}, "its tools are not a list of objects"),
        ({"prompt": "Q", "chat_template_kwargs": [3], **ANSWERS}, "its chat_template_kwargs is a list, not an object"),
        ({"prompt": "Q", "enable_thinking": "maybe", **ANSWERS}, "its enable_thinking is neither true nor false"),
        ({"question": "Q", "system": ["S"], **ANSWERS}, "its system is a list, not a string"),
        *(
            ({"prompt": "Q", "weight": weight, **ANSWERS}, "its weight is")
            for weight in (-1, float("nan"), float("inf"), True, "heavy", [1])
        ),
    ],
)
def test_what_would_be_lost_is_refused(row, reason, tmp_path):
    assert reason in refusal(tmp_path, row)


def test_a_column_can_be_left_out(tmp_path):
    row = {"prompt": "Q", "notice": "to be read as well", **ANSWERS}
    assert "--ignore-columns notice" in refusal(tmp_path, row)
    assert loaded(tmp_path, row, ignore_columns=["notice"]) == {"prompt": "Q", **ANSWERS}
    told = {"prompt": "notice"}
    found = load_preferences(str(tmp_path / "pairs.jsonl"), columns=told, ignore_columns=["prompt"])
    assert found.pairs == [{"prompt": "to be read as well", **ANSWERS}]


def test_what_is_not_read_is_listed_once(tmp_path):
    rows = [
        {"prompt": [user(f"Q{i}", id=i, score=0.5)], "id": f"r{i}", "score_chosen": 3.5, "none": None, **ANSWERS}
        for i in range(3)
    ]
    found = load(tmp_path, *rows)
    assert found.pairs == [chat([user(f"Q{i}")]) for i in range(3)]
    assert found.ignored == ["id", "messages' id", "messages' score", "score_chosen"]
    assert "Not read: id, messages' id, messages' score, score_chosen." in found.describe()


def test_text_of_messages_stays(tmp_path):
    answer = [assistant("A", reasoning_content="because", mood="merry indeed", done=True)]
    pair = loaded(tmp_path, {"prompt": [user("Q", name="Bob")], "chosen": answer, "rejected": "B"})
    assert pair["prompt"] == [user("Q", name="Bob")]
    assert pair["chosen"] == [assistant("A", reasoning_content="because", mood="merry indeed")]


# --- data sets that are known ----------------------------------------------------------------------------------------

PAIR = {"chosen": [user("How so?"), assistant("So and so.")], "rejected": [user("How so?"), assistant("Not so.")]}
STRINGS = {"chosen": "So and so.", "rejected": "Not so."}
KNOWN: dict[str, tuple[dict[str, Any], list[str]]] = {
    "HuggingFaceH4/ultrafeedback_binarized": (
        {**PAIR, "prompt": "How so?", "prompt_id": "a1", "messages": PAIR["chosen"], "score_chosen": 8.0},
        ["prompt_id", "score_chosen"],
    ),
    "trl-lib/ultrafeedback_binarized": ({**PAIR, "score_chosen": 8.0, "score_rejected": 5.0}, None),
    "argilla/ultrafeedback-binarized-preferences-cleaned": (
        {**PAIR, "source": "sharegpt", "prompt": "How so?", "chosen-rating": 5.0, "chosen-model": "gpt 4 turbo"},
        ["chosen-model", "chosen-rating", "source"],
    ),
    "argilla/ultrafeedback-binarized-preferences": (
        {
            "source": "evol instruct",
            "instruction": "How so?",
            "chosen_response": "So and so.",
            "rejected_response": "Not so.",
            "chosen_avg_rating": 5.0,
            "chosen_model": "falcon 40b",
        },
        ["chosen_avg_rating", "chosen_model", "source"],
    ),
    "argilla/distilabel-intel-orca-dpo-pairs": (
        {
            **STRINGS,
            "system": "",
            "input": "How so?",
            "generations": ["So and so.", "Another one."],
            "order": ["chosen", "rejected"],
            "labelling_model": "gpt 4",
            "labelling_prompt": [system("You are a judge."), user("Which is better of these?")],
            "raw_labelling_response": "9 7\nThe first one is better.",
            "rating": [9.0, 7.0],
            "rationale": "The first one is better.",
            "status": "unchanged",
            "original_chosen": "An older answer.",
            "original_rejected": "An older one.",
            "chosen_score": 9.0,
            "in_gsm8k_train": False,
        },
        None,
    ),
    "argilla/distilabel-capybara-dpo-7k-binarized": (
        {
            **PAIR,
            "source": "Airoboros",
            "conversation": [{"input": "How so?", "output": "An answer of the original."}],
            "original_response": "An answer of the original.",
            "generation_prompt": ["You are an assistant. How so?"],
            "raw_generation_responses": ["So and so. "],
            "new_generations": ["So and so."],
            "prompt": "How so?",
            "rating_chosen": 5,
            "chosen_model": "notus",
        },
        None,
    ),
    "mlabonne/orpo-dpo-mix-40k": (
        {**PAIR, "source": "Airoboros", "prompt": "How so?", "question": "How so?"},
        ["source"],
    ),
    "Anthropic/hh-rlhf": (
        {f"{name}": f"\n\nHuman: How so?\n\nAssistant: {answer}" for name, answer in STRINGS.items()},
        [],
    ),
    "Intel/orca_dpo_pairs": ({**STRINGS, "system": "", "question": "How so?"}, []),
    "HelpSteer, as pairs": (
        {
            **STRINGS,
            "question": "How so?",
            "helpfulness": 3,
            "preference_strength": 2,
            "preference_statement": "Response 1 is better than Response 2.",
            "domain": "general",
            "language": "english",
        },
        None,
    ),
    "Nectar, as pairs": (
        {
            **STRINGS,
            "question": "How so?",
            "turns": 1,
            "num_responses": 7,
            "source": ["lmsys chat"],
            "good_natured": True,
        },
        None,
    ),
    "PKU-SafeRLHF, as pairs": (
        {
            **STRINGS,
            "question": "How so?",
            "prompt_source": "Alpaca3 70B",
            "response_0": "Not so.",
            "response_1": "So and so.",
            "is_response_0_safe": False,
            "response_0_harm_category": {"Cybercrime": False, "Insulting Behavior": True},
            "better_response_id": 1,
            "response_0_sha256": "ab12",
        },
        ["better_response_id", "is_response_0_safe", "prompt_source", "response_0_harm_category", "response_0_sha256"],
    ),
    "LLaMA-Factory, ShareGPT": (
        {
            "conversations": [{"from": "human", "value": "How so?"}],
            "chosen": {"from": "gpt", "value": "So and so."},
            "rejected": {"from": "gpt", "value": "Not so."},
        },
        [],
    ),
    "axolotl, chat_template.default": (
        {"messages": [user("How so?")], "chosen": assistant("So and so."), "rejected": assistant("Not so.")},
        [],
    ),
    "ms-swift": ({"messages": PAIR["chosen"], "rejected_response": "Not so."}, []),
    "ms-swift, rejected_messages": ({"messages": PAIR["chosen"], "rejected_messages": PAIR["rejected"]}, []),
    "ms-swift, query and response": (
        {"query": "How so?", "response": "So and so.", "rejected_response": "Not so.", "history": []},
        [],
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_data_sets_need_no_options(name, tmp_path):
    row, ignored = KNOWN[name]
    found = load(tmp_path, row)
    assert found.pairs == [chat([user("How so?")], "So and so.", "Not so.")], found.problems
    if ignored is not None:
        assert found.ignored == ignored


@pytest.mark.parametrize(
    "row",
    [
        {
            "prompt": "\n\nHuman: Q\n\nAssistant: ",
            "answers": [{"answer": "A", "rank": 1.0}, {"answer": "B", "rank": 2.0}],
        },
        {"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 0},
        {"prompt": "Q", "response": "A", "helpfulness": 3},
    ],
)
def test_rows_that_say_otherwise_which_answer_is_chosen(row, tmp_path):
    assert refusal(tmp_path, row) == "it has no chosen or chosen_response"


# --- answers ---------------------------------------------------------------------------------------------------------


def test_an_answer_that_is_a_tool_call_alone(tmp_path):
    call = [{"role": "assistant", "content": None, "tool_calls": [CALL]}]
    pair = loaded(tmp_path, {"prompt": [user("Q")], "tools": [TOOL], "chosen": call, "rejected": "I do not know."})
    assert pair == chat([user("Q")], [assistant("", tool_calls=[CALL])], "I do not know.", tools=[TOOL])
    share_gpt = {"from": "function_call", "value": json.dumps(CALL["function"])}
    row = {"conversations": [{"from": "human", "value": "Q"}], "chosen": share_gpt, "rejected": assistant("no")}
    assert loaded(tmp_path, row)["chosen"] == [assistant("", tool_calls=[CALL])]
    assert loaded(tmp_path, {**row, "chosen": [share_gpt]})["chosen"] == [assistant("", tool_calls=[CALL])]


def test_an_answer_of_several_turns(tmp_path):
    answer = [assistant("", tool_calls=[CALL]), message("tool", "rain", tool_call_id="c1"), assistant("It rains.")]
    pair = loaded(tmp_path, {"prompt": [user("Q")], "chosen": answer, "rejected": "B"})
    assert pair == chat([user("Q")], answer)
    with_user = [assistant("Which one?"), user("The first"), assistant("It rains.")]
    assert loaded(tmp_path, {"prompt": [user("Q")], "chosen": with_user, "rejected": "B"}) == chat(
        [user("Q")], with_user
    )
    assert "ends" in refusal(tmp_path, {"prompt": [user("Q")], "chosen": with_user[:2], "rejected": "B"})


def test_conversations_that_differ_from_the_first_answer_on(tmp_path):
    sides = [
        [user("Q"), assistant("A"), user("More"), assistant("A2")],
        [user("Q"), assistant("B"), user("Else"), assistant("B2")],
    ]
    assert loaded(tmp_path, dict(zip(("chosen", "rejected"), sides, strict=True))) == chat(
        [user("Q")], sides[0][1:], sides[1][1:]
    )
    shorter = {"chosen": sides[0], "rejected": sides[0][:2]}
    assert loaded(tmp_path, shorter) == chat([user("Q")], sides[0][1:], sides[0][1:2])
    assert "same question" in refusal(tmp_path, {"chosen": sides[0], "rejected": [user("P"), *sides[1][1:]]})


def test_scores_of_messages_do_not_part_conversations(tmp_path):
    chosen, rejected = [user("Q", score=1), assistant("A")], [user("Q", score=2), assistant("B")]
    found = load(tmp_path, {"chosen": chosen, "rejected": rejected})
    assert (found.pairs, found.ignored) == ([chat([user("Q")])], ["messages' score"])


def test_content_in_parts(tmp_path):
    parts = [{"type": "text", "text": "What is "}, {"type": "text", "text": "it?"}]
    assert loaded(tmp_path, {"prompt": [user(parts)], **ANSWERS}) == chat([user("What is it?")])
    assert "type 'image'" in refusal(tmp_path, {"prompt": [user([*parts, {"type": "image"}])], **ANSWERS})


def test_several_answers_in_a_row(tmp_path):
    found = load(tmp_path, {"prompt": "Q", "chosen": "A", "rejected": ["B", "C", "A", ""]})
    assert found.pairs == [{"prompt": "Q", "chosen": "A", "rejected": side} for side in "BC"]
    assert found.rows == [2, 2]
    assert [str(problem) for problem in found.problems[1:]] == [
        "row 2: its chosen and rejected answers are the same (answer 3 of 4)",
        "row 2: its rejected answer is empty (answer 4 of 4)",
    ]
    found = load(tmp_path, {"prompt": [user("Q")], "chosen": ["A", "C"], "rejected": [[assistant("B")]]})
    assert found.pairs == [chat([user("Q")], chosen) for chosen in "AC"]
    conversations = [[user("Q"), assistant(side)] for side in "BC"]
    found = load(tmp_path, {"messages": [user("Q"), assistant("A")], "rejected_messages": conversations})
    assert found.pairs == [chat([user("Q")], "A", side) for side in "BC"]
    # Messages in a list are one answer.
    one = [assistant("B"), assistant("C")]
    assert loaded(tmp_path, {"prompt": [user("Q")], "chosen": "A", "rejected": one}) == chat([user("Q")], "A", one)
    both = {"prompt": "Q", "chosen": ["A", "D"], "rejected": ["B", "C"]}
    assert "2 chosen and 2 rejected answers" in refusal(tmp_path, both)


def test_swift_takes_the_last_turns_of_messages(tmp_path):
    turns = [system("S"), user("Q"), assistant("one"), user("And?"), assistant("", tool_calls=[CALL])]
    end = [message("tool", "rain"), assistant("It rains.")]
    row = {"messages": turns + end, "rejected_response": "No.", "tools": [TOOL]}
    assert loaded(tmp_path, row) == chat([*turns, end[0]], "It rains.", "No.", tools=[TOOL])


def test_transcripts_behind_a_prompt_that_repeats_them(tmp_path):
    row = {name: f"\n\nHuman: Hi\n\nAssistant: {side}" for name, side in ANSWERS.items()}
    assert loaded(tmp_path, {"prompt": "\n\nHuman: Hi\n\nAssistant:", **row}) == chat([user("Hi")])


# --- chats that arrive as text ---------------------------------------------------------------------------------------

NUMPY = (
    "[{'content': 'It\\'s {a}', 'role': 'user'}\n {'content': \"b} {c\", 'role': 'assistant'}\n"
    " {'content': 'Q', 'role': 'user'}]"
)
WRITTEN = [user("It's {a}"), assistant("b} {c"), user("Q")]


@pytest.mark.parametrize("text", [json.dumps(WRITTEN), f"  {WRITTEN!r}", NUMPY, json.dumps(WRITTEN, indent=1)])
def test_a_prompt_that_is_a_chat_as_text(text, tmp_path):
    assert loaded(tmp_path, {"prompt": text, **ANSWERS}) == chat(WRITTEN)
    sides = {name: repr([assistant(side)]) for name, side in ANSWERS.items()}
    assert loaded(tmp_path, {"prompt": text, **sides}) == chat(WRITTEN)
    whole = {name: json.dumps([*WRITTEN, assistant(side)]) for name, side in ANSWERS.items()}
    assert loaded(tmp_path, {"prompt": "Q", **whole}) == chat(WRITTEN)
    assert loaded(tmp_path, {"prompt": text, **ANSWERS}, layout="text")["prompt"] == text


@pytest.mark.parametrize("role", ["ipython", "knowledge"])
def test_a_chat_as_text_with_a_role_of_its_own(role, tmp_path):
    written = [user("Q"), assistant("look_up()"), message(role, "rain"), user("So?")]
    for text in (json.dumps(written), json.dumps(json.dumps(written))):
        assert loaded(tmp_path, {"prompt": text, **ANSWERS}) == chat(written)


@pytest.mark.parametrize(
    "unknown",
    [
        [{"speaker": "user", "text": "Q"}],
        [{"role": "narrator", "content": "Once"}],
        {"role": "user", "text": "Q"},
        {"messages": [user("Q")]},
    ],
)
def test_a_prompt_that_is_a_chat_in_other_words(unknown, tmp_path):
    for text in (json.dumps(unknown), repr(unknown)):
        assert "its prompt is written like a chat but is none that is" in refusal(tmp_path, {"prompt": text, **ANSWERS})
        assert loaded(tmp_path, {"prompt": text, **ANSWERS}, layout="text")["prompt"] == text


@pytest.mark.parametrize("text", ['{"from": "Bern", "text": "to Basel"}', '"a" from "b"', '["role"]', '{"role": "x"}'])
def test_a_prompt_that_is_json_by_itself(text, tmp_path):
    assert loaded(tmp_path, {"prompt": text, **ANSWERS})["prompt"] == text


def test_history_and_tools_as_text(tmp_path):
    row = {"instruction": "Q", "history": "[['1?', 'one']]", "tools": repr([TOOL]), **ANSWERS}
    assert loaded(tmp_path, row) == chat([user("1?"), assistant("one"), user("Q")], tools=[TOOL])


@pytest.mark.parametrize("text", ['[{"role": "user", "content": "Hi', "[{'content': 'Hi', 'role': 'user'}, array(["])
def test_a_chat_that_was_cut_off(text, tmp_path):
    assert "its prompt is written like a chat but cannot be parsed" in refusal(tmp_path, {"prompt": text, **ANSWERS})
    assert loaded(tmp_path, {"prompt": text, **ANSWERS}, layout="text")["prompt"] == text


def test_answers_that_are_json_by_request(tmp_path):
    for answer in ('{"from": "Berlin", "value": "Paris"}', '[{"role": "admin", "content": "x"}]', "{'role'}"):
        assert loaded(tmp_path, {"prompt": "JSON!", "chosen": answer, "rejected": "no"})["chosen"] == answer
    row = {"prompt": "JSON!", "chosen": json.dumps([assistant("x")]), "rejected": "no"}
    assert "its chosen is written like a chat, its rejected is not" in refusal(tmp_path, row)
    assert loaded(tmp_path, row, layout="text") == row


# --- whatever there is -----------------------------------------------------------------------------------------------

words = st.text(st.characters(codec="utf-8", categories=["L", "N", "P"]), min_size=1, max_size=8)
sentences = st.lists(words, min_size=1, max_size=3).map(" ".join)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | sentences,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=2),
    max_leaves=4,
)
message_keys = st.sampled_from(["name", "id", "score", "mood", "reasoning_content", "tool_calls", "weight", "source"])
messages = st.builds(
    lambda role, content, more: {"role": role, "content": content, **more},
    st.sampled_from(["user", "assistant", "system", "tool"]),
    sentences,
    st.dictionaries(message_keys, values, max_size=2),
)
answers = sentences | messages.map(lambda m: [{**m, "role": "assistant"}]) | st.lists(sentences, min_size=1, max_size=3)
questions = sentences | st.lists(messages, max_size=2).flatmap(lambda ms: sentences.map(lambda q: [*ms, user(q)]))
columns = st.one_of(
    *(st.tuples(st.just(name), sentences) for name in ("context", "system", "input", "question", "instruction")),
    *(st.tuples(st.just(name), values) for name in ("id", "score", "source", "notice", "videos", "mood")),
    st.tuples(st.just("history"), st.lists(st.tuples(sentences, sentences).map(list), max_size=2)),
    st.tuples(st.just("tools"), st.lists(st.fixed_dictionaries({"name": words, "description": sentences}), max_size=2)),
    st.tuples(st.just("messages"), st.lists(messages, max_size=2)),
    st.tuples(st.just("chat_template_kwargs"), st.dictionaries(words, sentences, max_size=2)),
    st.tuples(st.just("weight"), st.floats(0, 9)),
    # Whatever it is.
    st.tuples(st.sampled_from(["history", "tools", "weight", "system", "enable_thinking", "documents"]), values),
)
odd_rows = st.builds(
    lambda more, name, prompt, chosen, rejected: {**dict(more), name: prompt, "chosen": chosen, "rejected": rejected},
    st.lists(columns, max_size=2),
    st.sampled_from(["prompt", "question", "instruction"]),
    questions,
    answers,
    answers,
)


def spoken(value: Any, but: Any = ()) -> list[str]:
    """All strings of a value, but under some keys, with single blanks."""
    if isinstance(value, dict):
        return [text for key, inner in value.items() if key not in but for text in spoken(inner, but)]
    if isinstance(value, list):
        return [text for inner in value for text in spoken(inner, but)]
    return [" ".join(value.split())] if isinstance(value, str) and value.strip() else []


@given(st.lists(odd_rows, min_size=1, max_size=3))
def test_every_row_is_used_whole_or_named(tmp_path_factory, rows):
    found = load(tmp_path_factory.mktemp("odd"), *rows)
    named = {problem.row for problem in found.problems}
    listed = {name.removeprefix("messages' ") for name in found.ignored}
    for number, row in enumerate(rows, start=2):
        own = [pair for at, pair in zip(found.rows, found.pairs, strict=True) if at == number]
        assert own or number in named
        if number not in named:
            said = " \n ".join(spoken(own))
            # These are read as a number and a truth, whatever they are written as.
            texts = spoken(row, but={*listed, "role", "weight", "enable_thinking"})
            assert [text for text in texts if text not in said] == []


def test_nothing_usable_names_the_remedy(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps({"prompt": "Q", "notice": "to be read as well", **ANSWERS}))
    with pytest.raises(UserError, match=r"or leave it out \(--ignore-columns notice\)\.$"):
        load_preferences(str(path))
    assert strings(load_preferences(str(path), ignore_columns=["notice"]).pairs) == ["Q", "A", "B"]


def test_all_unread_columns_are_named_at_once(tmp_path):
    path = tmp_path / "pairs.jsonl"
    row = {"prompt": "Q", "notice": "to be read", "hint": "this as well", "videos": ["a.png"], **ANSWERS}
    other = {"prompt": "Q", "advice": "and so is this", **ANSWERS}
    path.write_text(json.dumps(row) + "\n" + json.dumps(other))
    with pytest.raises(UserError, match="columns notice, hint hold") as raised:
        load_preferences(str(path))
    assert "(--ignore-columns notice,hint,videos)" in str(raised.value)
    assert str(raised.value).endswith("Of all rows: --ignore-columns notice,hint,videos,advice.")
    found = load_preferences(str(path), ignore_columns=["notice", "hint", "videos", "advice"])
    assert found.pairs == [{"prompt": "Q", **ANSWERS}] * 2


@pytest.mark.parametrize(
    ("row", "helps"),
    [({"prompt": "Q", "good": "A"}, True), ({"prompt": "Q", "chosen": "A", "rejected": "A"}, False), ([1], False)],
)
def test_columns_are_a_remedy_where_one_is_missing(row, helps, tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text(json.dumps(row) + "\n{}" * helps)
    with pytest.raises(UserError) as raised:
        load_preferences(str(path))
    assert ("Other columns can be told" in str(raised.value)) == helps


@pytest.mark.parametrize("nothing", ["None", "nan", "NaN", "<NA>", ""])
def test_options_that_pandas_wrote_as_nothing(nothing, tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text(f"prompt,chosen,rejected,system,sys,tools\nQ,A,B,{nothing},{nothing},{nothing}\n")
    assert load_preferences(str(path)).pairs == [{"prompt": "Q", **ANSWERS}]
    told = load_preferences(str(path), columns={"system": "sys"}, ignore_columns=["system"])
    assert told.pairs == [{"prompt": "Q", **ANSWERS}]
