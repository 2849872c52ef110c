"""Hashes of what a run trains on: they tell whether a run that goes on still has the same pairs and the same model.

The pairs are hashed as tokens, so that a changed tokenizer is seen as well; the model is hashed by its files, before
they are loaded.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from typing import Any

from ...text.pictures import fingerprint
from ...transformers import TokenizedPair
from ..errors import UserError
from .folder import RunFolder, noted
from .pretrained import model_manifest

COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def inputs_of(model: str, training: Sequence[TokenizedPair], held_out: Sequence[TokenizedPair]) -> dict[str, Any]:
    """As JSON can hold it: the pairs to train on and those held out, number and hash; each file of the model."""
    return {"training": _pairs(training), "held_out": _pairs(held_out), "model": model_manifest(model)}


def _changed(before: dict[str, Any], now: dict[str, Any]) -> str:
    """What is not as it was."""
    told = {"training": "the pairs to train on", "held_out": "the held-out pairs"}
    changed = [
        f"{told[name]} (then {before[name][0]}, now {now[name][0]})" for name in told if before[name] != now[name]
    ]
    then, files = before["model"], now["model"]
    if others := sorted(name for name in then.keys() | files.keys() if then.get(name) != files.get(name)):
        changed.append(f"the model's file {others[0]}")
    return " and ".join(changed)


def check_inputs(folder: RunFolder, inputs: dict[str, Any]) -> None:
    """Refuse to go on with a run, or to set it beside others, that was started with something else."""
    if folder.results() and (changed := _changed(noted(folder.path, "inputs"), inputs)):
        raise UserError(
            f"Since the run in {folder.path} was started, {changed} changed: go on with what it was started with, or "
            "choose another --output."
        )


def check_unchanged(folder: RunFolder, inputs: dict[str, Any]) -> None:
    """Refuse to set a run that has ended beside those that began with `inputs`, if these were changed meanwhile."""
    if changed := _changed(inputs, noted(folder.path, "inputs")):
        raise UserError(
            f"{changed} changed before the run in {folder.path} began, which cannot be compared with the "
            "others: choose another --output."
        )


def _pairs(pairs: Sequence[TokenizedPair]) -> list:
    found = hashlib.blake2b(digest_size=16)
    for pair in pairs:
        for column in COLUMNS:
            ids = array("q", pair[column])  # type: ignore[literal-required]
            found.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        found.update(repr(pair.get("weight")).encode())
        for picture in pair.get("images", ()):
            found.update(fingerprint(picture).encode())
    return [len(pairs), found.hexdigest()]
