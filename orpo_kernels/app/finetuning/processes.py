"""One run by several processes, one for each GPU: all of them train, the first one writes.

    torchrun --nproc-per-node 4 -m orpo_kernels train MODEL DATA

Each takes its own pairs of every step (DistributedDataParallel); the loss is that of all of them together. What only
one can do (a file, a line for people) the first one does, and the others wait where they would read it.
"""

from __future__ import annotations

import os

import torch
from accelerate import PartialState

from ..errors import UserError


def processes() -> PartialState:
    """This process among those that were launched with it; the only one without a launcher."""
    return PartialState(cpu=not torch.accelerator.is_available())


def check_alone(command: str) -> None:
    """Raise `UserError` in one of several processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(f"{command} runs in one process: start it without torchrun or accelerate launch.")


def leave() -> None:
    """To be called at the end: one that leaves early makes the others fail."""
    state = processes()
    if state.num_processes > 1:
        state.wait_for_everyone()
        state.destroy_process_group()
