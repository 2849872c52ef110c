"""Held out means never trained on: the side of a prompt does not depend on the other rows."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from orpo_kernels.app.data import prompt_key, split_pairs


def pairs_of(prompts: list[int]) -> list[dict[str, Any]]:
    return [{"prompt": f"{prompt}", "chosen": f"{i}", "rejected": "r"} for i, prompt in enumerate(prompts)]


def held_out_prompts(prompts: list[int], held_out: float, seed: int) -> set[int]:
    return {prompts[i] for i in split_pairs(pairs_of(prompts), held_out, seed)[1]}


prompt_lists = st.lists(st.integers(0, 12), min_size=1, max_size=30)
shares = st.floats(0.01, 0.95)
numbers = st.integers(1, 12)
seeds = st.integers(0, 9)


@given(prompt_lists, shares | numbers | st.just(0), seeds)
def test_no_prompt_is_on_both_sides(prompts, held_out, seed):
    training, evaluation = split_pairs(pairs_of(prompts), held_out, seed)
    assert sorted(training + evaluation) == list(range(len(prompts)))
    assert (training, evaluation) == (sorted(training), sorted(evaluation))
    assert {prompts[i] for i in training}.isdisjoint(prompts[i] for i in evaluation)
    assert bool(evaluation) == bool(held_out)
    if held_out >= 1 and len({prompts[i] for i in evaluation}) > 1:
        assert len(evaluation) <= held_out


@given(prompt_lists, prompt_lists, shares | numbers, seeds)
def test_appended_rows_bring_no_old_prompt_among_those_held_out(prompts, more, held_out, seed):
    before = held_out_prompts(prompts, held_out, seed)
    after = held_out_prompts(prompts + more, held_out, seed)
    assert after <= before | (set(more) - set(prompts))


@given(prompt_lists, st.data(), shares, seeds)
def test_removed_rows_move_no_prompt_of_a_share(prompts, data, share, seed):
    before = held_out_prompts(prompts, share, seed)
    gone = data.draw(st.sets(st.sampled_from(prompts)))
    left = [prompt for prompt in prompts if prompt not in gone]
    assume(before & set(left))  # else the prompt with the smallest hash is held out
    assert held_out_prompts(left, share, seed) == before - gone


@given(prompt_lists, st.randoms(use_true_random=False), shares | numbers, seeds)
def test_the_order_of_rows_does_not_matter(prompts, random, held_out, seed):
    shuffled = random.sample(prompts, len(prompts))
    assert held_out_prompts(shuffled, held_out, seed) == held_out_prompts(prompts, held_out, seed)


def test_prompts_that_differ_are_held_out_to_the_number():
    prompts = list(range(1000))
    assert [len(held_out_prompts(prompts, number, 0)) for number in (0, 1, 7)] == [0, 1, 7]
    assert [round(len(held_out_prompts(prompts, share, 0)), -2) for share in (0.1, 0.5, 0.9)] == [100, 500, 900]
    assert held_out_prompts(prompts, 0.5, 0) != held_out_prompts(prompts, 0.5, 1)


def test_one_prompt_is_held_out_however_many_pairs_it_has():
    assert split_pairs(pairs_of([1, 1, 1]), 2, 0) == ([], [0, 1, 2])


def test_a_key_is_the_prompts_alone_and_the_same_in_every_process():
    pair = {"prompt": "Wie spät?", "chosen": "a", "rejected": "b"}
    chat = {"prompt": [{"content": "Wie spät?", "role": "user"}], "chosen": [], "rejected": [], "weight": 0.5}
    assert prompt_key(pair) == prompt_key(chat) != prompt_key({**chat, "tools": [{"name": "x"}]})
    code = f"from orpo_kernels.app.data import prompt_key; print(prompt_key({pair!r}))"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert said.stdout.strip() == prompt_key(pair) == "b446871d8e12118528de6e3aedf3f40a"
