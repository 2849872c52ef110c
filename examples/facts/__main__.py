"""Fine-tune SmolLM2-135M with ORPO on questions of fact, and show what it learned.

    python -m examples.facts                # four minutes on two cores, conversion included
    python -m examples.facts --max-steps 10

Into the run folder (`runs/facts`) go `metrics.jsonl`, a line per step as it happens, and `curves.png`. Ctrl-C leaves
what there is of both; the converted model is kept for the next run in any case.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import transformers
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from examples.smollm2 import load_smollm2
from orpo_kernels.transformers import PreferenceCollator

from . import cost, report
from .data import Fact, load_facts, split
from .scoring import Scores, answer, evaluate
from .training import Recipe, Step, train

INTERRUPTED = 130  # what a shell reports of a program that Ctrl-C ended
SHOWN_ANSWERS = 5
MAX_LENGTH = 128


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo; returns the exit status."""
    options = _parse(arguments)
    transformers.utils.logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    console = Console()
    try:
        return _run(options, console, report.RunFolder(options.output))
    except KeyboardInterrupt:
        console.print("[yellow]Interrupted.[/]")
        return INTERRUPTED


def _run(options: argparse.Namespace, console: Console, folder: report.RunFolder) -> int:
    began = time.perf_counter()
    recipe = Recipe(**{field.name: getattr(options, field.name) for field in fields(Recipe)})
    folder.write("recipe", **asdict(recipe))
    with console.status("Loading SmolLM2-135M-Instruct (the first time converts it, half a minute) …"):
        model, tokenizer = load_smollm2(options.cache)
    collator = PreferenceCollator(tokenizer, max_length=MAX_LENGTH)
    training, held_out = split(load_facts())
    held_out = _spread(held_out, options.held_out)
    shown = _spread(held_out, SHOWN_ANSWERS)

    before = _evaluate(model, collator, held_out, console, "before")
    said_before = [answer(model, tokenizer, fact) for fact in shown]
    console.print(report.scores_line(before), report.answers_table(shown, before=said_before))
    folder.write("evaluation", step=0, **before.summary(), answers=said_before)

    steps: list[Step] = []
    try:
        _train(model, collator, training, recipe, console, folder, steps)
    except KeyboardInterrupt:
        console.print(f"[yellow]Interrupted after {len(steps)} steps;[/] the evaluation after training is left out.")
        console.print(f"Left: {folder.metrics} and {folder.curves}")
        return INTERRUPTED
    finally:
        folder.plot(steps, before, after=None)

    after = _evaluate(model, collator, held_out, console, "after")
    said_after = [answer(model, tokenizer, fact) for fact in shown]
    folder.write("evaluation", step=len(steps), **after.summary(), answers=said_after)
    folder.plot(steps, before, after)
    answers = report.answers_table(shown, before=said_before, after=said_after)
    console.print(report.scores_table(before, after), answers)

    with console.status("Measuring what the loss cost …"):
        comparison = cost.compare(model, collator, training[: recipe.batch_size], recipe.beta)
    folder.write("cost", **asdict(comparison))
    console.print(report.cost_table(comparison))
    console.print(f"{time.perf_counter() - began:.0f} s in all. Written: {folder.metrics} and {folder.curves}")
    return 0


def _evaluate(model: Any, collator: PreferenceCollator, facts: Sequence[Fact], console: Console, when: str) -> Scores:
    with _progress(console) as progress:
        task = progress.add_task(f"Held-out pairs, {when}", total=len(facts), live="")
        return evaluate(model, collator, facts, on_batch=lambda pairs: progress.advance(task, pairs))


def _train(
    model: Any,
    collator: PreferenceCollator,
    facts: Sequence[Fact],
    recipe: Recipe,
    console: Console,
    folder: report.RunFolder,
    steps: list[Step],
) -> None:
    """Train, appending to `steps` as they happen, so that the caller has them after an interruption too."""
    with _progress(console) as progress:
        task = progress.add_task("Training", total=recipe.steps(len(facts)), live="")
        for step in train(model, collator, facts, recipe):
            steps.append(step)
            folder.write("step", **asdict(step))
            progress.update(task, advance=1, live=report.live(steps))
            if not console.is_terminal and step.step % 10 == 0:  # a log shows no moving bar
                console.print(f"step {step.step}  {report.live(steps)}")


def _progress(console: Console) -> Progress:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[live]}"),
    )
    return Progress(*columns, console=console)


def _spread(facts: Sequence[Fact], wanted: int | None) -> list[Fact]:
    """`wanted` of the facts, evenly from all of them (None: all): the middle one of each equal share."""
    if wanted is None or wanted >= len(facts):
        return list(facts)
    return [facts[(2 * i + 1) * len(facts) // (2 * wanted)] for i in range(wanted)]


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m examples.facts",
        description="Fine-tune SmolLM2-135M with ORPO on questions of fact.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--epochs", type=_positive, default=1, help="passes over the training pairs")
    parser.add_argument("--batch-size", type=_positive, default=8, help="pairs per step")
    parser.add_argument("--lr", type=float, default=5e-5, help="peak learning rate")
    parser.add_argument("--beta", type=float, default=0.5, help="weight of the odds-ratio loss")
    parser.add_argument("--seed", type=int, default=0, help="order of the training pairs")
    parser.add_argument("--max-steps", type=_positive, help="stop after so many steps")
    parser.add_argument("--freeze-head", action="store_true", help="do not train lm-head and (tied) embeddings")
    parser.add_argument("--held-out", type=_positive, help="evaluate only so many of the held-out pairs")
    parser.add_argument("--output", type=Path, default=Path("runs/facts"), help="run folder")
    parser.add_argument("--cache", type=Path, help="where the converted model is kept (see examples/smollm2.py)")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
