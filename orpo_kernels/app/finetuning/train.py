"""One run: a model, preference pairs, and a folder that holds all of it, so that it can be killed and resumed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from math import ceil
from pathlib import Path
from typing import Any

import torch
import yaml
from rich.console import Console
from transformers import PrinterCallback, TrainingArguments, set_seed
from transformers.integrations import TensorBoardCallback, is_tensorboard_available

from ...methods import method_named
from ...transformers import PreferenceCollator, TokenizedPair, freeze_vision
from ...transformers.body import unwrap
from ...transformers.images import tokenizer_of
from ...transformers.lm_head import resolve_lm_head
from ...transformers.probe import verify_lm_head
from ...transformers.trainer import PreferenceTrainer
from ...transformers.versions import sampling, save_where_asked
from ..errors import Diverged, UserError
from . import plots
from .folder import (
    RunFolder,
    check_claim,
    claim,
    note,
    noted,
    processes_of,
    step_of,
    told_when_full,
    whole_folder,
    write_whole,
)
from .inputs import check_inputs, inputs_of
from .pretrained import compute_dtype, load_model, load_tokenizer, not_finite, save_as_it_came, with_adapters
from .processes import of_all, processes, writes
from .progress import ProgressBar, Recorder
from .remarks import say, silence_transformers
from .settings import TrainSettings
from .setup import Split, has_images, load_split

EVALUATIONS, CHECKPOINTS = 4, 10  # in a run, by default
WARMUP = 0.1  # of the steps; the learning rate rises and then falls to 0, both linearly
MAY_CHANGE = ("output", "resume", "save_every")  # when a run goes on


@dataclass(frozen=True)
class Trained:
    """A model at the end of its training, and what belongs to it."""

    model: Any
    tokenizer: Any
    held_out: list[TokenizedPair]
    folder: RunFolder
    settings: TrainSettings


def save_model(trained: Trained) -> None:
    """Into the run folder: the weights in the dtypes they came in, or adapters, merged if asked; and the tokenizer."""
    folder, model, settings = trained.folder, trained.model, trained.settings
    with whole_folder(folder.model) as scratch:
        trained.tokenizer.save_pretrained(scratch)
        if settings.lora:
            model.save_pretrained(scratch)
        else:
            save_as_it_came(model, settings.model, scratch)
    if settings.merge:
        with whole_folder(folder.merged) as scratch:
            trained.tokenizer.save_pretrained(scratch)
            save_as_it_came(model.merge_and_unload(), settings.model, scratch)


def train(settings: TrainSettings, console: Console, keep: Callable[[Trained], None] = save_model) -> dict[str, Any]:
    """Train as the settings say, into `settings.output`; with `resume`, from where a run there was stopped.

    The result does not depend on how often the run was stopped. What was recognised, and a bar, go to `console`. `keep`
    writes what is to be kept of the model, before the run counts as finished.

    Returns:
        The summary, which `summary.json` has too: what was trained on what, steps, seconds of training, tokens a
        second, peak memory, `before` and `after` (the last evaluations on the held-out pairs; None without such).

    Raises `UserError` for what cannot be trained, and for a folder that holds another run.
    """
    silence_transformers()
    state = processes()
    check_is_ours(settings)
    state.wait_for_everyone()  # until all have looked, before anybody writes
    folder = RunFolder(settings.output, writes(settings.output))
    summary = folder.finished()
    is_finished = all(of_all(summary is not None))
    with told_when_full(folder.path):
        checkpoint = None if is_finished else _where_to_go_on(folder, console)
        tokenizer = load_tokenizer(settings.model)
        split = load_split(settings, tokenizer, console)
        with console.status("Hashing the model's files …") if console.is_terminal else nullcontext():
            inputs = inputs_of(settings.model, split.training, split.held_out)
        check_inputs(folder, inputs)
        if is_finished:
            assert summary is not None
            say(console, f"The run in {settings.output} is finished already.")
            for name in folder.changed_results():
                say(console, f"{name} there is no longer what the run wrote.")
            if folder.is_written:
                folder.clean()
            return summary
        claim(folder.path, "run")
        if folder.is_written:
            _begin(folder, settings, inputs, split)
        state.wait_for_everyone()
        recorder = Recorder(folder)
        trainer = _trainer(settings, folder, tokenizer, split, [recorder, *_tensorboard(folder)], console)
        progress = ProgressBar(console, recorder, trainer.args.max_steps)
        trainer.add_callback(progress)
        with progress.bar:
            _run(trainer, folder, checkpoint)
        if folder.is_written:
            keep(Trained(trainer.model, tokenizer, split.held_out, folder, settings))
            plots.curves(folder.metrics.read(), folder.evaluations.read(), folder.curves)
            folder.finish(_summary(settings, folder, split, trainer.reference_seconds))
        state.wait_for_everyone()
        if folder.is_written:
            folder.clean()
        summary = folder.finished()
        assert summary is not None
        return summary


# --- the folder ----------------------------------------------------------------------------------------------------


def check_is_ours(settings: TrainSettings) -> None:
    """Refuse a folder that is no run's, and a run that has got somewhere, but to go on with the same settings."""
    folder = RunFolder(settings.output)
    check_claim(folder.path, "run")
    if not folder.results():
        return
    if not settings.resume:
        raise UserError(f"{folder.path} holds a run already: go on with it (--resume), or choose another --output.")
    ours, theirs = _lasting(_plain(settings)), _settings_of(folder)
    # The run may be older than a setting.
    defaults = {field.name: field.default for field in dataclasses.fields(TrainSettings)}
    for name in sorted(ours.keys() | theirs.keys()):
        began, now = (values.get(name, defaults.get(name)) for values in (theirs, ours))
        if began != now:
            began, now = ("(default)" if value is None else value for value in (began, now))
            raise UserError(
                f"The run in {folder.path} has {name} {began}, but now it is {now}: go on with what it was started "
                f"with (--config {folder.settings}), or choose another --output."
            )


def _settings_of(folder: RunFolder) -> dict[str, Any]:
    """What a run was started with, and may not change. Raises `UserError` if the file is not what the run wrote."""
    known, values = noted(folder.path, "settings"), None
    with suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        values = _lasting(yaml.safe_load(folder.settings.read_text(encoding="utf-8")))
    if values is None or values != known:
        raise UserError(
            f"{folder.settings} is damaged: it is not what the run in {folder.path} was started with. Restore it, or "
            "choose another --output."
        )
    return values


def _lasting(values: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name not in MAY_CHANGE}


def _where_to_go_on(folder: RunFolder, console: Console) -> Path | None:
    """The latest sound checkpoint; what was logged behind it is forgotten."""
    state, began = processes(), bool(folder.results())
    if folder.is_written:
        folder.remove_damaged_checkpoints(partial(say, console))
    state.wait_for_everyone()
    checkpoint = _latest_of_all(folder)
    state.wait_for_everyone()  # until all have looked
    if folder.is_written:
        folder.remove_checkpoints_behind(0 if checkpoint is None else step_of(checkpoint))
        folder.rewind(checkpoint)
    state.wait_for_everyone()
    if checkpoint:
        then, now = processes_of(checkpoint), state.num_processes
        if then != now:
            raise UserError(
                f"The run in {folder.path} was started with {then} processes and would go on with {now}, whose steps "
                f"are others: launch {then}, or choose another --output."
            )
        console.print(f"Going on behind step {step_of(checkpoint)}.")
    elif began:
        console.print("There is no checkpoint to go on from: the run begins anew.")
    return checkpoint


def _latest_of_all(folder: RunFolder) -> Path | None:
    """The latest checkpoint that every process finds: a node may have been stopped before it had written its own."""
    found = {step_of(checkpoint): checkpoint for checkpoint in folder.complete_checkpoints()}
    of_each = of_all(set(found))
    common = set.intersection(*of_each)
    if any(of_each) and not common:
        raise UserError(
            f"{folder.path} has checkpoints on some nodes alone, none of a step that all have: launch the nodes that "
            "the run was started with, or choose another --output."
        )
    return found[max(common)] if common else None


def _begin(folder: RunFolder, settings: TrainSettings, inputs: dict[str, Any], split: Split) -> None:
    """From here on the folder holds a run. (Until it has got somewhere, it is not in the way of the next try.)"""
    values = _plain(settings)
    note(folder.path, inputs=inputs, settings=_lasting(values))
    write_whole(folder.settings, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    write_whole(folder.problems, split.pairs.preferences.problem_lines())
    split.record.write(folder.path)


def _plain(settings: TrainSettings) -> dict[str, Any]:
    """What a configuration file takes."""
    names = [field.name for field in dataclasses.fields(TrainSettings) if field.name != "resume"]
    values = {name: value for name in names if (value := getattr(settings, name)) is not None}
    return {**values, "output": str(settings.output)}


def _summary(settings: TrainSettings, folder: RunFolder, split: Split, reference_seconds: float) -> dict[str, Any]:
    steps, evaluations = folder.metrics.read(), folder.evaluations.read()
    seconds, tokens = (sum(step[name] for step in steps) for name in ("seconds", "tokens"))
    return {
        "model": settings.model,
        "data": settings.data,
        "method": settings.method,
        "beta": method_named(settings.method, beta=settings.beta).beta,
        "lr": settings.peak_lr,
        "pairs": len(split.training),
        "held_out": len(split.held_out),
        "problems": len(split.pairs.preferences.problems),
        "processes": processes().num_processes,
        "steps": len(steps),
        "seconds": round(seconds, 3),
        "tokens_per_second": round(tokens / seconds, 1),
        "peak_memory_bytes": max(step["memory_bytes"] for step in steps),
        "before": evaluations[0] if evaluations else None,
        "after": evaluations[-1] if evaluations else None,
        "output": str(folder.path),
        "reference_seconds": round(reference_seconds, 3),
    }


# --- the trainer ---------------------------------------------------------------------------------------------------


def _trainer(
    settings: TrainSettings,
    folder: RunFolder,
    tokenizer: Any,
    split: Split,
    callbacks: list,
    console: Console,
) -> PreferenceTrainer:
    training, held_out = split.training, split.held_out
    dtype = compute_dtype(settings.dtype)
    set_seed(settings.seed)
    # Weights that are trained stay float32, or steps as small as a fine-tune's would round to nothing.
    model = load_model(settings.model, dtype if settings.lora else torch.float32, console)
    if folder.is_written:
        save_where_asked(model)
    try:
        frozen = freeze_vision(model) if settings.freeze_vision else []
        trainer = PreferenceTrainer(
            with_adapters(model, settings.lora_rank, without=frozen) if settings.lora else model,
            _arguments(settings, folder, len(training), bool(held_out)),
            data_collator=PreferenceCollator(
                tokenizer if has_images((*training, *held_out)) else tokenizer_of(tokenizer),
                max_length=settings.max_length,
                packing=settings.packing,
            ),
            train_dataset=training,
            eval_dataset=held_out or None,
            method=settings.method,
            beta=settings.beta,
            loss_options=settings.loss_options(),
            callbacks=callbacks,
        )
        _try(trainer, training[0])
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"{settings.model} cannot be trained so. {error}") from error
    trainer.remove_callback(PrinterCallback)
    return trainer


def _try(trainer: PreferenceTrainer, pair: TokenizedPair) -> None:
    """What the loss refuses, it refuses here, and not behind the first evaluation."""
    inner = unwrap(trainer.model)
    ids = torch.tensor([pair["chosen_input_ids"]], device=inner.device)
    with trainer.accelerator.autocast():
        verify_lm_head(trainer.model, inner, resolve_lm_head(trainer.model), ids)


def _arguments(settings: TrainSettings, folder: RunFolder, pairs: int, has_held_out: bool) -> TrainingArguments:
    # transformers means to rename it, and warns whenever it is given.
    checkpointing = {"gradient_checkpointing": True} if settings.gradient_checkpointing else {}
    batches = ceil(pairs / (settings.batch_size * processes().num_processes))  # of each process
    steps = settings.max_steps or settings.epochs * ceil(batches / settings.grad_accum)
    return TrainingArguments(
        output_dir=str(folder.checkpoints),
        max_steps=steps,
        per_device_train_batch_size=settings.batch_size,
        per_device_eval_batch_size=settings.batch_size,
        gradient_accumulation_steps=settings.grad_accum,
        learning_rate=settings.peak_lr,
        lr_scheduler_type="linear",
        warmup_steps=int(WARMUP * steps),  # with any, the first step has a learning rate of 0
        weight_decay=0.0,
        bf16=compute_dtype(settings.dtype) is torch.bfloat16,
        seed=settings.seed,
        **sampling("group_by_length" if settings.group_by_length else "random"),
        logging_steps=1,
        logging_nan_inf_filter=False,
        include_num_input_tokens_seen="all",
        eval_strategy="steps" if has_held_out else "no",
        eval_steps=settings.eval_every or ceil(steps / EVALUATIONS),
        save_strategy="steps",
        save_steps=settings.save_every or ceil(steps / CHECKPOINTS),
        save_on_each_node=folder.is_written and not processes().is_main_process,
        report_to="none",
        disable_tqdm=True,
        use_cpu=not torch.accelerator.is_available(),
        dataloader_pin_memory=torch.accelerator.is_available(),
        **checkpointing,
    )


def _tensorboard(folder: RunFolder) -> list[Any]:
    if not is_tensorboard_available() or not processes().is_main_process:
        return []
    from torch.utils.tensorboard import SummaryWriter

    return [TensorBoardCallback(SummaryWriter(str(folder.tensorboard)))]


def _run(trainer: PreferenceTrainer, folder: RunFolder, checkpoint: Path | None) -> None:
    """Train, and evaluate before and behind it; what a checkpoint has seen of this is not done again."""
    evaluates = trainer.eval_dataset is not None
    try:
        if evaluates and not folder.evaluations.read():
            trainer.evaluate()
        if checkpoint is not None and step_of(checkpoint) == trainer.args.max_steps:  # `train` would do one step more
            trainer._load_from_checkpoint(str(checkpoint))
            trainer.state.global_step = trainer.args.max_steps
        else:
            trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        processes().wait_for_everyone()  # until the first one has logged
        if evaluates and folder.evaluations.read()[-1]["step"] < trainer.state.global_step:
            trainer.evaluate()
        _check_finite(trainer)
    except torch.OutOfMemoryError as error:
        raise UserError(
            "The GPU's memory is full: halve --batch-size and double --grad-accum, which is the same training, or give "
            "--gradient-checkpointing, --lora, or a smaller --max-length."
        ) from error


def _check_finite(trainer: PreferenceTrainer) -> None:
    """Refuse a model that the last step has made useless, which no loss of a step shows any more."""
    bad = not_finite(trainer.model)
    pairs = min(len(trainer.train_dataset), trainer.args.per_device_eval_batch_size)
    batch = trainer.data_collator([trainer.train_dataset[index] for index in range(pairs)])
    loss, *_ = trainer.prediction_step(trainer.model, batch, prediction_loss_only=True)
    if bad or not bool(loss.isfinite()):
        what = f"The weight {bad[0]}" if bad else "The loss"
        raise Diverged(f"{what} is not finite behind step {trainer.state.global_step}: give a smaller --lr.")
