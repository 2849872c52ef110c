"""Models that an engine wraps or shards: run inside the calls in which it does its work.

The loss calls a model's body and multiplies by its head's weight; it never calls the model itself. But
DistributedDataParallel synchronises in its own forward, FSDP2 (`fully_shard`) gathers the parameters of a module in
hooks around that module's forward and reduces their gradients behind it, and so does DeepSpeed's ZeRO-3. So a function
of ours stands in for the forward of a module for one call, with everything around it in place: gathering, mixed
precision, averaging and scattering of gradients, and tied embeddings are all the engine's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

ENGINES = ("torch.distributed.fsdp", "deepspeed")  # whose hooks on a head do nothing to its logits


def run_inside(wrapper: nn.Module, inner: nn.Module, function: Callable[..., Any], inputs: dict[str, Any]) -> Any:
    """`function(**inputs)` as the forward of `wrapper`, which does its work (DistributedDataParallel) around it.

    `wrapper` calls `inner`, whose forward is `function` for this one call.
    """
    if wrapper is inner:
        return function(**inputs)
    with _standing_in(inner, function):
        return wrapper(**inputs)


def through(module: nn.Module, function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function(*inputs)` as the forward of `module`, if an engine (FSDP2, ZeRO-3) shards that; else as it is."""
    if not (is_fsdp2(module) or any(map(_is_zero3, module.parameters(recurse=False)))):
        return function(*inputs)
    with _standing_in(module, function):
        return module(*inputs)


def is_in_parts(model: nn.Module) -> bool:
    """Whether ZeRO-3 has spread the model over the processes: so is one that was loaded under its config."""
    return any(map(_is_zero3, model.parameters()))


@contextmanager
def whole(module: nn.Module) -> Iterator[None]:
    """Inside, what ZeRO-3 has spread of the module's parameters is whole, to be read; in all processes at once."""
    parameters = list(filter(_is_zero3, module.parameters()))
    if not parameters:
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parameters):
        yield


def _is_zero3(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_id")


def is_fsdp2(module: nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return isinstance(module, FSDPModule)


def class_of(module: nn.Module) -> type:
    """The module's own class, under what FSDP2 mixes into it."""
    return type(module).__bases__[-1] if is_fsdp2(module) else type(module)


def hooks_of_engine(hooks: Any) -> bool:
    """Whether all of a module's hooks are those by which an engine gathers its parameters."""
    return all((getattr(hook, "__module__", None) or "").startswith(ENGINES) for hook in hooks.values())


@contextmanager
def _standing_in(module: nn.Module, function: Callable[..., Any]) -> Iterator[None]:
    """Inside, the next call of `module` calls `function` in place of its forward."""
    own = vars(module).get("forward")  # Accelerate's autocast; usually the class has it

    def restore() -> None:
        if own is None:
            vars(module).pop("forward", None)
        else:
            module.forward = own

    def forward(*args: Any, **inputs: Any) -> Any:
        restore()  # `function` may call the module's own forward
        return function(*args, **inputs)

    module.forward = forward
    try:
        yield
    finally:
        restore()
