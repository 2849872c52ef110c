"""One run by several processes, one for each GPU: all of them train, the first one writes.

    torchrun --nproc-per-node 4 -m orpo_kernels train MODEL DATA

Each takes its own pairs of every step (DistributedDataParallel); the loss is that of all of them together. What only
one can do (a file, a line for people) the first one does, and the others wait where they would read it. On several
nodes without a shared file system a folder is written on each, by the first process there (`writes`).
"""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from ..errors import UserError

T = TypeVar("T")


def processes() -> PartialState:
    """This process among those that were launched with it; the only one without a launcher."""
    return PartialState(cpu=not torch.accelerator.is_available())


def of_all(value: T) -> list[T]:
    """What each process has, in all of them."""
    return gather_object([value]) if processes().num_processes > 1 else [value]


def writes(folder: Path) -> bool:
    """Whether this process writes into `folder`; to be called by every process.

    The first of all does, and the first on every node that does not see what that one writes.
    """
    state = processes()
    if int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)) >= state.num_processes:  # all are on one node
        return state.is_main_process
    (token,) = broadcast_object_list([secrets.token_hex(8)])
    probe = folder.absolute().with_name(f".{folder.name}.{token}")
    if state.is_main_process:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.touch()
    state.wait_for_everyone()
    sees_it = probe.exists()
    state.wait_for_everyone()
    if state.is_main_process:
        probe.unlink()
    return state.is_main_process or (state.is_local_main_process and not sees_it)


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
