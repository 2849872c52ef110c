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
from .held_out import NAME, Record, record_of
from .pretrained import model_manifest

COLUMNS = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")


def inputs_of(model: str, training: Sequence[TokenizedPair], held_out: Sequence[TokenizedPair]) -> dict[str, Any]:
    """As JSON can hold it: the pairs to train on and those held out, number and hash; each file of the model."""
    return {"training": _pairs(training), "held_out": _pairs(held_out), "model": model_manifest(model)}


def changed_inputs(before: dict[str, Any] | None, now: dict[str, Any]) -> list[str]:
    """What is not as it was; nothing where it is not known what was."""
    if not isinstance(before, dict):
        return []
    told = {"training": "the pairs to train on", "held_out": "the held-out pairs"}
    changed = [
        f"{told[name]} (then {before[name][0]}, now {now[name][0]})" for name in told if before[name] != now[name]
    ]
    files = sorted(
        name
        for name in before["model"].keys() | now["model"].keys()
        if before["model"].get(name) != now["model"].get(name)
    )
    return changed + ([f"the model's file {files[0]}"] if files else [])


def check_inputs(folder: RunFolder, inputs: dict[str, Any]) -> None:
    """Refuse to go on with a run that was started with something else, where its folder tells with what."""
    before = noted(folder.path, "inputs") if folder.results() else None
    if changed := changed_inputs(before, inputs):
        raise _changed_since(folder, changed)


def check_comparable(folder: RunFolder, inputs: dict[str, Any], record: Record) -> None:
    """Refuse to set a run beside others that train on `inputs`, also by the little that an earlier version has kept."""
    check_inputs(folder, inputs)
    if not folder.results() or noted(folder.path, "inputs") is not None:
        return
    summary, now = folder.finished() or {}, inputs["held_out"][0]
    has_split = (folder.path / NAME).exists()
    if has_split and (found := record_of(str(folder.path))) and found.held_out != record.held_out:
        raise _changed_since(folder, ["the held-out prompts"])
    if (then := summary.get("held_out", now)) != now:
        raise _changed_since(folder, [f"the held-out pairs (then {then}, now {now})"])


def check_unchanged(folder: RunFolder, inputs: dict[str, Any]) -> None:
    """Refuse to set a run that has ended beside those that began with `inputs`, if these were changed meanwhile."""
    if (now := noted(folder.path, "inputs")) and (changed := changed_inputs(inputs, now)):
        raise UserError(
            f"{' and '.join(changed)} changed before the run in {folder.path} began, which cannot be compared with the "
            "others: choose another --output."
        )


def _changed_since(folder: RunFolder, changed: list[str]) -> UserError:
    return UserError(
        f"Since the run in {folder.path} was started, {' and '.join(changed)} changed: go on with what it was started "
        "with, or choose another --output."
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
