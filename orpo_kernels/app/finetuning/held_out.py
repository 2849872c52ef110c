"""What a run has trained on and what it has held out: held out means never trained on.

The prompts of all pairs of the data decide which side a pair is on, before a tokenizer or a length refuses some of
them. The run's folder keeps the two sides as `split.json`; an evaluation of the run goes by this file, not by the rule.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from ..data import prompt_key, split_pairs
from ..errors import UserError
from .folder import RunFolder, write_whole
from .remarks import say

NAME = "split.json"


@dataclass(frozen=True)
class Record:
    """Keys of prompts (`data.prompt_key`): those that a run, or the model that it began with, has been trained on, and
    those that it has held out. No prompt is both."""

    trained: frozenset[str]
    held_out: frozenset[str]

    def write(self, folder: Path) -> None:
        record = {"held_out": sorted(self.held_out), "trained": sorted(self.trained)}
        write_whole(folder / NAME, json.dumps(record, indent=0) + "\n")


def keys(pairs: Iterable[dict[str, Any]]) -> list[str]:
    return [prompt_key(pair) for pair in pairs]


def held_out_prompts(pairs: Sequence[dict[str, Any]], held_out: float, seed: int, source: str) -> frozenset[str]:
    """The keys of the prompts that are held out of all `pairs` of a source.

    Raises `UserError` where so many cannot be held out.
    """
    check_number(held_out, len(pairs), source)
    return frozenset(keys(pairs[i] for i in split_pairs(pairs, held_out, seed)[1]))


def check_number(held_out: float, pairs: int, source: str) -> None:
    """Raise `UserError` where so many cannot be held out of the pairs of a source."""
    if not 0 <= held_out < pairs:
        fewer = f"a share below 1, a number up to {pairs - 1}" if pairs > 1 else "0, to hold out none"
        raise UserError(
            f"--eval-split {held_out:.12g} cannot be held out of {pairs} pairs of {source}: give {fewer}, or (to "
            "train) a split of the data set or a file."
        )


def record_of(model: str) -> Record | None:
    """Of the run whose folder `model` is, or whose model it is; None for a model that is no run's.

    Raises `UserError` where its record is gone or damaged.
    """
    folder = _run_of(Path(model).expanduser())
    if folder is None:
        return None
    path = folder / NAME
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return Record(frozenset(found["trained"]), frozenset(found["held_out"]))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is gone or damaged, so that no pair can be called held out.") from error


def known_record(model: str, console: Console) -> Record | None:
    """`record_of`; also None, with a remark, where that is gone or damaged."""
    try:
        return record_of(model)
    except UserError as unknown:
        say(console, str(unknown))
        return None


def _run_of(model: Path) -> Path | None:
    """The run folder that is `model`, or that the folder `model` (the result, or a checkpoint) lies in."""
    if not model.is_dir():
        return None
    for folder in (model, model.resolve().parent, model.resolve().parent.parent):
        run = RunFolder(folder)
        models = (run.path, run.model, run.merged, *run.checkpoints.glob("checkpoint-*"))
        if run.settings.exists() and model.resolve() in [path.resolve() for path in models]:
            return folder
    return None
