"""`packing="measure"`: whether shared prompts or padding are faster is timed before training begins, on its own pairs.

A step of each layout on the same few batches, forward and backward, alternating; the optimizer and the processes'
exchange of gradients, which are the same for both, are left out. Nothing of it remains in the model, the RNG or the
order of the pairs. The choice is kept in the trainer's state: a run that goes on from a checkpoint does not measure.
"""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import nn
from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import ExportableState, TrainerState
from transformers.trainer_utils import get_last_checkpoint

from .engines import is_in_parts
from .pairs import is_stream
from .probe import as_before

logger = logging.getLogger(__name__)

WARM_UP, STEPS = 1, 3  # of each layout
Collators = Mapping[str, Callable[[list], Any]]  # by the name of the packing


class MeasuredPacking(TrainerCallback, ExportableState):
    """Does nothing but carry the choice into `trainer_state.json`."""

    def __init__(self, packing: str):
        self.packing = packing

    def state(self) -> dict[str, Any]:
        return {"args": {"packing": self.packing}, "attributes": {}}


def cannot_measure(trainer: Any) -> str | None:
    """Why the steps of this trainer cannot be timed before it trains, whatever their layout; None where they can."""
    if is_in_parts(trainer.model) or any(
        getattr(trainer, name, False) for name in ("is_fsdp_enabled", "is_deepspeed_enabled")
    ):
        return "the model is sharded when training begins, and not before"
    if trainer.train_dataset is None or is_stream(trainer.train_dataset):
        return "pairs of a stream cannot be looked at before training"
    return None


def chosen_packing(trainer: Any, collators: Collators, checkpoint: str | bool | None) -> str:
    """The packing of the checkpoint, or the faster one; the same in all processes, and kept in the trainer's state."""
    packing, why = _kept(trainer, checkpoint) or "", "so it was when the checkpoint was written"
    if packing not in collators:
        seconds = seconds_of_steps(trainer, collators)
        packing = min(seconds, key=seconds.__getitem__)
        took = ", ".join(f"{name} {1e3 * one:.1f} ms" for name, one in seconds.items())
        why = f"forward and backward took {took} (medians of {STEPS} steps each)"
        agreed = [packing, why]
        broadcast_object_list(agreed)  # of the first process
        packing, why = agreed
    if trainer.is_world_process_zero():
        logger.info('packing="measure" is %r: %s', packing, why)
    trainer.add_callback(MeasuredPacking(packing))
    return packing


def _kept(trainer: Any, checkpoint: str | bool | None) -> str | None:
    folder = get_last_checkpoint(trainer.args.output_dir) if checkpoint is True else checkpoint
    path = Path(folder or "", TRAINER_STATE_NAME)
    if not folder or not path.exists():
        return None
    kept = TrainerState.load_from_json(str(path)).stateful_callbacks.get(MeasuredPacking.__name__)
    return kept and kept["args"]["packing"]


def seconds_of_steps(trainer: Any, collators: Collators) -> dict[str, float]:
    """The median of a step under each of the collators, which take turns at the same batches; inf: out of memory."""
    pairs, args = trainer.train_dataset, trainer.args
    model = trainer.accelerator.unwrap_model(trainer.model)
    if args.gradient_checkpointing:  # as the Trainer is about to do
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs)
    draw, size = random.Random(args.seed), min(args.train_batch_size, len(pairs))
    times: dict[str, list[float]] = {name: [] for name in collators}
    with _unchanged(trainer, model):
        for turn in range(WARM_UP + STEPS):
            batch = [pairs[index] for index in draw.sample(range(len(pairs)), size)]
            for name in list(collators)[:: 1 if turn % 2 else -1]:
                times[name].append(_seconds(trainer, model, collators[name](batch)))
    return {name: median(taken[WARM_UP:]) for name, taken in times.items()}


def _seconds(trainer: Any, model: nn.Module, batch: Any) -> float:
    inputs = trainer.loss_inputs(trainer._prepare_inputs(batch))
    _synchronize(trainer.args.device)
    began = time.perf_counter()
    try:
        loss, _ = trainer.loss_step(model, inputs)
        loss.backward()
        _synchronize(trainer.args.device)
    except torch.OutOfMemoryError:
        return float("inf")
    finally:
        model.zero_grad(set_to_none=True)
    return time.perf_counter() - began


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


@contextmanager
def _unchanged(trainer: Any, model: nn.Module) -> Iterator[None]:
    """Training mode; afterwards modes, gradients, buffers, the RNG and what the trainer has counted are as before."""
    gradients = {parameter: parameter.grad for parameter in model.parameters()}
    buffers = {buffer: buffer.clone() for buffer in model.buffers()}
    sparsity = trainer._sparsity
    with as_before(model):
        try:
            model.train()
            for parameter in gradients:
                parameter.grad = None
            yield
        finally:
            for parameter, gradient in gradients.items():
                parameter.grad = gradient
            with torch.no_grad():
                for buffer, value in buffers.items():
                    buffer.copy_(value)
            trainer._sparsity = sparsity
