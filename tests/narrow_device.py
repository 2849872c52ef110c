"""A device without float64 that is not there: "narrow_gpu". The CPU computes, and Python watches what.

It refuses what such a device refuses: an operation that takes or gives float64, and one on tensors of two devices (a
number of the host's, 0-d, is no obstacle). It takes PyTorch's place for other people's devices, of which a process has
one, and some code asks for the best device there is: hence in a process of its own (`test_narrow_device.py`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

MOVES = ("aten._to_copy.", "aten.copy_.")  # what tensors of two devices may meet in


class Backend(backend_registration._DummyBackendModule):
    """`torch.narrow_gpu`. Its random numbers are the CPU's."""

    def get_rng_state(self, device: Any = None) -> Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("narrow_gpu", backend_module=Backend())
NARROW = torch.device("narrow_gpu", 0)


class NarrowTensor(Tensor):
    """What `held`, on the CPU, is on the device."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> NarrowTensor:
        tensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=NARROW,
        )
        tensor.held = held
        return tensor

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function} outside of `narrow_device`")


class Operations(TorchDispatchMode):
    """Every operation, on the CPU, if the device could do it."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        own = [tensor for tensor in tensors if isinstance(tensor, NarrowTensor)]
        is_narrow = bool(own)
        if kwargs.get("device") is not None:
            is_narrow = torch.device(kwargs["device"]).type == NARROW.type
            kwargs["device"] = torch.device("cpu")
        is_move = str(function).startswith(MOVES)
        if own and not is_move and any(tensor.dim() and not isinstance(tensor, NarrowTensor) for tensor in tensors):
            raise RuntimeError(f"{function} of tensors on two devices")
        if is_narrow and kwargs.get("dtype") == torch.float64:
            raise TypeError(f"{function} in float64, which the device has not")
        known = {id(tensor.held): tensor for tensor in own}

        def on_cpu(value: Any) -> Any:
            return value.held if isinstance(value, NarrowTensor) else value

        def on_device(value: Any) -> Any:
            if not isinstance(value, Tensor):
                return value
            if id(value) in known:
                return known[id(value)]
            if is_narrow and value.dtype == torch.float64:
                raise TypeError(f"{function} gives float64, which the device has not")
            return NarrowTensor(value) if is_narrow else value

        found = function(*tree_map(on_cpu, args), **tree_map(on_cpu, kwargs))
        return tree_map(on_device, found)


class Literals(TorchFunctionMode):
    """What PyTorch does without an operation: numbers of Python and NumPy become tensors, and the other way round."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if function is torch.tensor and kwargs.get("device") is not None:
            device = kwargs.pop("device")
            return function(*args, **kwargs).to(device)
        if function in (Tensor.tolist, Tensor.numpy):
            args = (args[0].cpu(), *args[1:])
        return function(*args, **kwargs)


@contextmanager
def narrow_device() -> Iterator[torch.device]:
    """Inside, tensors can be on the device."""
    with Literals(), Operations():
        yield NARROW
