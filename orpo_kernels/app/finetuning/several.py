"""Runs side by side, from the same model on the same pairs: what sweeps and comparisons have in common."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rich.console import Console

from ...transformers import TokenizedPair
from ..errors import Diverged, UserError, save_report
from .folder import RunFolder, check_claim, claim
from .inputs import check_inputs, check_unchanged, inputs_of
from .pretrained import load_tokenizer
from .processes import processes
from .remarks import say, silence_transformers
from .settings import TrainSettings
from .setup import load_split
from .train import check_is_ours

S = TypeVar("S", bound=TrainSettings)
T = TypeVar("T")


@dataclass(frozen=True)
class Shared:
    """What all runs have: the tokenizer, the held-out pairs, and the hashes of what they train on."""

    tokenizer: Any
    held_out: list[TokenizedPair]
    inputs: dict[str, Any]


def begin(kind: str, settings: TrainSettings, runs: Sequence[TrainSettings], console: Console) -> Shared:
    """Claim `settings.output` for a `kind` of ours, a folder of the runs.

    Raises `UserError` as `train` does, and if runs there were started with other pairs or another model.
    """
    silence_transformers()
    check_claim(settings.output, kind)
    for run in runs:
        try:
            check_is_ours(run)
        except UserError as error:
            raise UserError(f"The run in {run.output} cannot begin: {error}") from error
    tokenizer = load_tokenizer(settings.model)
    _, training, held_out, _ = load_split(settings, tokenizer, console)
    inputs = inputs_of(settings.model, training, held_out)
    for run in runs:
        check_inputs(RunFolder(run.output), inputs)
    claim(settings.output, kind)
    return Shared(tokenizer, held_out, inputs)


def outcomes(
    runs: Sequence[S], shared: Shared, name: Callable[[S], str], one: Callable[[S], T], console: Console
) -> Iterator[tuple[S, T | None, str]]:
    """Each run with what came of it; of a run that has begun and fails, None and the reason, and the others go on.

    Raises `UserError` at the end if all have failed.
    """
    reasons = []
    for number, run in enumerate(runs, start=1):
        console.print(f"Run {number} of {len(runs)}: {name(run)}")
        outcome, reason = None, ""
        gc.collect()  # the last model, before the next one is loaded
        try:
            outcome = one(run)
        except Exception as error:
            if not _others_go_on(error, run):
                raise
            reason = _reason(error, run)
            reasons.append(reason)
            say(console, f"This run failed: {reason}")
        else:
            check_unchanged(RunFolder(run.output), shared.inputs)
        yield run, outcome, reason
    if len(reasons) == len(runs):
        raise UserError(f"No run came to its end. {reasons[0]}")


def _others_go_on(error: Exception, run: TrainSettings) -> bool:
    """Whether it is this run's own fault, and every process knows of it.

    What has not come to its first evaluation, before the first step, would not elsewhere, either.
    """
    began = bool(RunFolder(run.output).evaluations.read())
    return began and (isinstance(error, Diverged) or processes().num_processes == 1)


def _reason(error: Exception, run: TrainSettings) -> str:
    reason = str(error)
    if not isinstance(error, UserError):
        reason = f"{type(error).__name__}: {error} (what led to it is in {save_report(error, run.output)})"
    return " ".join(reason.split())
