"""What a run writes and shows on its way."""

from __future__ import annotations

import math
import resource
import sys
import time
from collections import deque
from statistics import mean
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from ..errors import Diverged
from .folder import RunFolder, mark_complete
from .processes import processes

SHOWN_OVER = 10  # steps; one batch's accuracy is a handful of coin flips
# Our names of what the trainer logs; or_loss is the negative of what it logs.
LOGGED = {
    "loss": "loss",
    "nll_loss": "nll_loss",
    "or_loss": "log_odds_ratio",
    "log_odds": "log_odds_chosen",
    "accuracy": "rewards/accuracies",
    "chosen_logps": "logps/chosen",
    "rejected_logps": "logps/rejected",
}


class Recorder(TrainerCallback):
    """Appends a record to the metrics for each step, and one to the evaluations for each of those; marks checkpoints.

    Of several processes the first one writes.

    A step's record: step, epoch, loss, nll_loss, or_loss, log_odds, accuracy, chosen_logps, rejected_logps (means over
    the step's pairs, None where no pair has both answers), grad_norm, lr, seconds, tokens (that ran through the model,
    padding included, in all processes), tokens_per_second, memory_bytes (the peak so far: of the GPU, or of the
    process).
    """

    def __init__(self, folder: RunFolder) -> None:
        self.folder = folder
        self.latest: dict[str, Any] = {}
        self._began, self._seconds, self._tokens = 0.0, 0.0, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._tokens = state.num_input_tokens_seen

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._seconds = time.perf_counter() - self._began

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "loss" in logs:
            self.latest = self._step(state, logs)
            if self.folder.is_written:
                self.folder.metrics.append(self.latest)
        elif "eval_loss" in logs:
            _check_finite(f"on the held-out pairs behind step {state.global_step}", loss=logs["eval_loss"])
            if self.folder.is_written:
                self.folder.evaluations.append({"step": state.global_step, **renamed(logs, "eval_")})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        processes().wait_for_everyone()  # each writes the state of its random numbers
        if self.folder.is_written:
            checkpoint, logs = self.folder.checkpoints / f"checkpoint-{state.global_step}", self.folder.logs()
            mark_complete(checkpoint, processes().num_processes, logs)
            self.folder.remove_old_checkpoints()

    def _step(self, state: Any, logs: dict[str, float]) -> dict[str, Any]:
        _check_finite(f"of step {state.global_step}", loss=logs["loss"], gradient=logs.get("grad_norm"))
        tokens, self._tokens = state.num_input_tokens_seen - self._tokens, state.num_input_tokens_seen
        return {
            "step": state.global_step,
            "epoch": round(state.epoch, 4),
            **renamed(logs, ""),
            "grad_norm": logs.get("grad_norm"),
            "lr": logs.get("learning_rate"),
            "seconds": self._seconds,
            "tokens": tokens,
            "tokens_per_second": tokens / self._seconds,
            "memory_bytes": peak_memory(),
        }


def _check_finite(where: str, **values: float | None) -> None:
    """Raise `Diverged` for the first that is not."""
    for name, value in values.items():
        if value is not None and not math.isfinite(value):
            raise Diverged(f"The {name} {where} is not finite ({value}): give a smaller --lr.")


def renamed(logs: dict[str, float], prefix: str) -> dict[str, float | None]:
    """The logs of a step or an evaluation under our names."""
    values = {ours: logs.get(prefix + theirs) for ours, theirs in LOGGED.items()}
    if values["or_loss"] is not None:
        values["or_loss"] = -values["or_loss"]
    return values


def peak_memory() -> int:
    """Bytes: the most that was allocated on the GPU, or else that the process had resident."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class ProgressBar(TrainerCallback):
    """A bar with the latest means beside it, while `bar` is open; a line now and then where there is no terminal."""

    def __init__(self, console: Console, recorder: Recorder, steps: int) -> None:
        self.console, self.recorder, self.steps = console, recorder, steps
        self._recent: deque[dict[str, Any]] = deque(maxlen=SHOWN_OVER)
        self.bar = Progress(
            TextColumn("Training"),
            BarColumn(bar_width=16),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[live]}"),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self.bar.add_task("", total=steps, live="")

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float], **_: Any) -> None:
        if "eval_loss" in logs:
            told = _told(renamed(logs, "eval_"))
            self.console.print(f"step {state.global_step}, held out: {told}", soft_wrap=True)
        elif "loss" in logs:
            self._recent.append(self.recorder.latest)
            self._show(state.global_step)

    def _show(self, step: int) -> None:
        means = {name: _mean([one[name] for one in self._recent]) for name in (*LOGGED, "tokens_per_second")}
        memory = f"{self.recorder.latest['memory_bytes'] / 2**30:.1f} GiB"
        live = f"{_told(means)}  {means['tokens_per_second']:,.0f} tokens/s  {memory}"
        self.bar.update(self._task, completed=step, live=live)
        if not self.console.is_terminal and step % max(1, self.steps // 10) == 0:
            self.console.print(f"step {step}/{self.steps}: {live}", soft_wrap=True)


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return mean(known) if known else None


def _told(values: dict[str, float | None]) -> str:
    shown = {
        "loss": "loss {:.3f}",
        "nll_loss": "NLL {:.3f}",
        "log_odds": "log-odds {:+.2f}",
        "accuracy": "accuracy {:.0%}",
    }
    return "  ".join(text.format(values[name]) for name, text in shown.items() if values[name] is not None)
