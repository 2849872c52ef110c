"""Messages as people write them, and as chat templates take them."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orpo_kernels.text.messages import (
    BadMessages,
    carries_text,
    is_message,
    normalised,
    role_of,
    says_something,
    strings,
    texts_of,
    without_marks,
)

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Paris", "day": None}}}


@pytest.mark.parametrize(
    ("written", "role"),
    [
        *((written, "user") for written in ("User", "human", "prompter")),
        *((written, "assistant") for written in ("gpt", "model", "ASSISTANT", "function_call")),
        ("observation", "tool"),
        ("system", "system"),
        ("narrator", "narrator"),
        (" ", None),
        (3, None),
    ],
)
def test_roles(written, role):
    assert role_of({"role": written}) == role_of({"from": written}) == role
    assert is_message({"from": written, "value": "x"}) == (role is not None)
    assert not is_message({"role": written})


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"from": "human", "value": "Hi"}, {"role": "user", "content": "Hi"}),
        ({"role": "user", "content": ["a", {"type": "text", "text": "b"}]}, {"role": "user", "content": "ab"}),
        (
            {"role": "user", "content": "Hi", "name": "Bob", "tool_calls": None},
            {"role": "user", "content": "Hi", "name": "Bob"},
        ),
        (
            {"role": "assistant", "content": None, "reasoning": "so"},
            {"role": "assistant", "content": "", "reasoning": "so"},
        ),
        (
            {"role": "assistant", "tool_calls": json.dumps([CALL["function"]])},
            {"role": "assistant", "content": "", "tool_calls": [CALL]},
        ),
        (
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", "index": None, **CALL}]},
            {"role": "assistant", "content": "", "tool_calls": [{"id": "1", **CALL}]},
        ),
        (
            {"from": "function_call", "value": json.dumps(CALL["function"]), "reasoning": "so", "weight": None},
            {"role": "assistant", "content": "", "tool_calls": [CALL], "reasoning": "so"},
        ),
    ],
)
def test_normalised(message, expected):
    assert normalised("prompt", message) == normalised("prompt", [message]) == [expected]
    assert normalised("prompt", expected) == [expected]


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("Hi", "its prompt is a string, neither"),
        ([], "its prompt has no message"),
        ([{"content": "Hi"}], "a message without a role and a content"),
        ([{"role": "user", "content": 3}], "a message without a role and a content"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a part of type 'image', but only text is served"),
        ([{"role": "assistant", "tool_calls": "[{"}], "tool calls that are a string, not a list"),
        ([{"role": "assistant", "tool_calls": [{"function": {}}]}], "a tool call without the name"),
    ],
)
def test_what_is_no_message_is_named(value, reason):
    with pytest.raises(BadMessages, match=reason):
        normalised("prompt", value)


def test_what_a_message_says():
    said = normalised("chosen", [{"role": "assistant", "tool_calls": [CALL]}, {"role": "user", "content": " "}])
    assert list(map(says_something, said)) == [True, False]
    assert [text for text in texts_of(said) if text.strip()] == ["function", "weather", "Paris"]


@pytest.mark.parametrize(
    ("name", "value", "carries"),
    [
        ("context", "no", True),
        ("context", " ", False),
        ("history", [["a", "b"]], True),
        ("tools", [{"name": "f"}], True),
        ("notice", "read this", True),
        ("notice", "read", False),
        ("notice", {"en": ["read this"]}, True),
        ("说明", "今天天气", True),
        ("dims", "[1, 2]", False),
        ("chosen_model", "gpt 4 turbo", False),
        ("preference_statement", "the first one is better", False),
        ("labelling_prompt", "which is better", False),
        ("helpfulness", 3, False),
        *(
            (name, "some words", False)
            for name in ("severity", "vulnerability", "country", "principle", "judge_output")
        ),
        *((name, "some words", False) for name in ("chosen_reasoning", "rejected_policy", "gen_input_configs")),
        *((name, "some words", True) for name in ("policy", "analysis", "chosen_thinking", "chosenness")),
        ("response_0_harm_category", {"Insulting Behavior": True}, False),
    ],
)
def test_what_may_be_a_part_of_the_conversation(name, value, carries):
    assert carries_text(name, value) == carries


def test_marks_are_left_out_and_named():
    message = {"role": "tool", "content": "x", "tool_call_id": "c1", "name": "f", "mood": "merry", "thinking": "so"}
    marks = {"id": "m1", "score": 3, "done": True, "model_name": "gpt 4", "date": "today", "tags": []}
    assert without_marks([message, {**message, **marks}]) == ([message, message], set(marks))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
keys = st.sampled_from(["role", "from", "content", "value", "tool_calls", "reasoning", "name", "score", "mood"])


@given(st.dictionaries(keys, values | st.sampled_from(["user", "gpt", "function_call"])))
def test_whatever_a_message_holds_is_kept_or_refused(message: dict[str, Any]):
    try:
        [found] = normalised("prompt", message)
    except BadMessages:
        return  # refused
    said = " ".join(json.dumps(text) for text in strings(found))
    for key, value in message.items():
        if key not in ("role", "from", "tool_calls"):
            parts = value if key in ("content", "value") and isinstance(value, list) else [value]
            shown = [part.get("text", "") if isinstance(part, dict) and part is not value else part for part in parts]
            assert all(json.dumps(text)[1:-1] in said for text in strings(shown)), key
    assert isinstance(found["content"], str)
    assert normalised("prompt", found) == [found]
