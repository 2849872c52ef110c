"""Which pairs are held out: a hash of its prompt decides for each, so that the other rows do not matter."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import blake2b
from typing import Any

from ...text.pictures import fingerprint, sources_of


def split_pairs(pairs: Sequence[Mapping[str, Any]], held_out: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the pairs (to train on, held out), both in the order of the pairs.

    The prompts are put in the order of a hash of `seed` and the prompt. `held_out` below 1 is a share: prompts whose
    hash, as a number from 0 to 1, is below it. Otherwise it is a number of pairs: the first prompts, as long as their
    pairs fit into it. At least one prompt is held out, unless `held_out` is 0.

    So all pairs of a prompt are on one side, in whatever order the rows are. Rows that are added later bring no old
    prompt among those held out: what is held out of the longer data was not trained on before.
    """
    prompts: dict[str, list[int]] = {}
    for index, pair in enumerate(pairs):
        prompts.setdefault(prompt_key(pair), []).append(index)
    order = sorted((_place(seed, key), key) for key in prompts)
    held: list[int] = []
    for place, key in order if held_out else ():
        fits = place < held_out if held_out < 1 else len(held) + len(prompts[key]) <= held_out
        if held and not fits:
            break
        held.extend(prompts[key])
        if not fits:
            break
    evaluation = set(held)
    return [i for i in range(len(pairs)) if i not in evaluation], sorted(evaluation)


def prompt_key(pair: Mapping[str, Any]) -> str:
    """A hash of the prompt with its tools and its pictures, as hexadecimal.

    A prompt that is a string counts as a user's message.
    """
    prompt = pair["prompt"]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    pictures = [[fingerprint(source) for source in sources]] if (sources := sources_of(pair)) else []
    text = json.dumps([messages, pair.get("tools") or [], *pictures], sort_keys=True, default=str)
    return blake2b(text.encode(), digest_size=16).hexdigest()


def _place(seed: int, key: str) -> float:
    """A number from 0 to 1."""
    return int.from_bytes(blake2b(f"{seed}:{key}".encode(), digest_size=8).digest(), "big") / 2**64
