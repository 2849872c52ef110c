"""The preference set: questions of fact, the right answer chosen and a plausible wrong one rejected.

`facts.jsonl` was written for this project, one pair a line: topic, prompt, chosen, rejected. Both answers are worded
alike, so that nothing but the fact tells them apart.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

FACTS_FILE = Path(__file__).with_name("facts.jsonl")
HELD_OUT_EVERY = 6
# Short, because every sequence carries it. (Without a system message the model's template puts its own, longer one.)
SYSTEM = "Be brief."


class Fact(NamedTuple):
    """One preference pair."""

    topic: str
    prompt: str
    chosen: str
    rejected: str

    @property
    def chat(self) -> dict[str, Any]:
        """The pair in the chat form that `PreferenceCollator` takes."""
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": self.prompt}]
        return {"prompt": prompt, "chosen": self.chosen, "rejected": self.rejected}


def load_facts(path: Path = FACTS_FILE) -> list[Fact]:
    """All pairs, in the order of the file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [Fact(**json.loads(line)) for line in lines]


def split(facts: Sequence[Fact]) -> tuple[list[Fact], list[Fact]]:
    """(training, held out): of every topic, each sixth pair in the order of the file is held out."""
    by_topic: defaultdict[str, list[Fact]] = defaultdict(list)
    for fact in facts:
        by_topic[fact.topic].append(fact)
    training = [fact for topic in by_topic.values() for i, fact in enumerate(topic) if i % HELD_OUT_EVERY]
    held_out = [fact for topic in by_topic.values() for fact in topic[::HELD_OUT_EVERY]]
    return training, held_out


def batches(facts: Sequence[Fact], size: int, seed: int) -> Iterator[list[Fact]]:
    """One epoch of batches, the last of which may be smaller, in an order that only `seed` decides.

    Pairs of similar length meet in a batch, which saves padding: shuffled, then sorted within a window of several
    batches, whose batches are shuffled again.
    """
    rng = random.Random(seed)
    shuffled = rng.sample(facts, len(facts))
    window = 8 * size
    epoch = []
    for start in range(0, len(shuffled), window):
        similar = sorted(shuffled[start : start + window], key=_length)
        epoch += [similar[i : i + size] for i in range(0, len(similar), size)]
    rng.shuffle(epoch)
    yield from epoch


def _length(fact: Fact) -> int:
    return len(fact.prompt) + max(len(fact.chosen), len(fact.rejected))
