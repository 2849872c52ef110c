"""`orpo-kernels train MODEL DATA`."""

from __future__ import annotations

import shlex
from typing import Any

from ..finetuning.settings import TrainSettings
from .console import Output, table
from .flags import command


@command(TrainSettings)
def train(settings: TrainSettings, output: Output) -> None:
    """Fine-tune a language model on preference data.

    MODEL is a folder or a name on the Hugging Face hub, DATA a JSON Lines, Parquet or CSV
    file or the name of a data set.

        orpo-kernels train HuggingFaceTB/SmolLM2-135M-Instruct pairs.jsonl --output runs/first

    Into the run folder go settings, metrics, curves and the model. A run that was stopped goes on with --resume.

    On several GPUs:

        torchrun --nproc-per-node 4 -m orpo_kernels train MODEL DATA
    """
    with output.loading():
        from ..finetuning.processes import leave
        from ..finetuning.train import train
    try:
        summary = train(settings, output.console)
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_how_to_go_on(settings)) from None
    output.result(summary, *_told(summary))
    leave()


def _how_to_go_on(settings: TrainSettings) -> str:
    from ..finetuning.folder import RunFolder

    folder = RunFolder(settings.output)
    if not folder.results():
        return "Nothing was trained yet: give the same command again."
    return f"To go on: {shlex.join(['orpo-kernels', 'train', '--config', str(folder.settings), '--resume'])}"


def _told(summary: dict[str, Any]) -> list[Any]:
    title = f"{summary['held_out']} held-out pairs, before and after {summary['steps']} steps"
    shown_in = table(title, "", "before", "after")
    before, after = summary["before"], summary["after"]
    shown = {"accuracy": "{:.1%}", "log_odds": "{:+.3f}", "nll_loss": "{:.3f}", "or_loss": "{:.3f}", "loss": "{:.3f}"}
    for name, form in shown.items() if before else ():
        values = [form.format(one[name]) for one in (before, after) if one[name] is not None]
        shown_in.add_row(name.replace("_", " "), *values)
    folder = summary["output"]
    written = (
        f"{summary['seconds']:.0f} s of training. The model is in {folder}/model, the curves are {folder}/curves.png"
    )
    return [shown_in, written] if before else [written]
