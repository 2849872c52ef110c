"""A GPU that is not there: wrappers run, and every launch is specialised, compiled and recorded, but not executed.

    with stub_gpu("sm_90") as gpu, FakeTensorMode():
        orpo_loss_from_rows(hidden, weight, rows, backend="triton").loss.backward()     # fake cpu tensors of any size
    gpu.launches                            # kernel, grid, specialisation and arguments of each
    gpu.specialisations                     # the distinct ones: what a real GPU would have compiled

Triton's own launch path does the work: it specialises arguments by their alignment, compiles for the target with the
real compiler, and refuses a kernel that takes more shared memory than the target has (`OutOfResources`). Tensors are
not touched. `compile=False` leaves the compiler out, for thousands of launches in seconds.
"""

from __future__ import annotations

import contextlib
import importlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from orpo_kernels import ops
from orpo_kernels.devices import GPU_KIND, KINDS

KIB = 1024


@dataclass(frozen=True)
class GPU:
    """What a launch can run out of, and what it is planned by.

    Sources: CUDA C++ programming guide, table "technical specifications per compute capability"; AMD's CDNA 3, CDNA 4
    and RDNA 3 instruction set guides.
    """

    product: str  # the one whose number of processors is given
    backend: str  # this and the next two are Triton's name of the target
    arch: int | str
    warp_size: int
    shared: int  # bytes of shared memory (LDS) that one block may take
    processors: int  # streaming multiprocessors, compute units or workgroup processors
    processor_shared: int = 0  # of one processor, for all blocks on it; NVIDIA's alone, as the next
    processor_warps: int = 0

    @property
    def target(self) -> GPUTarget:
        return GPUTarget(self.backend, self.arch, self.warp_size)


TARGETS = {
    "sm_80": GPU("A100", "cuda", 80, 32, 163 * KIB, 108, 164 * KIB, 64),
    "sm_89": GPU("L40S", "cuda", 89, 32, 99 * KIB, 142, 100 * KIB, 48),
    "sm_90": GPU("H100", "cuda", 90, 32, 227 * KIB, 132, 228 * KIB, 64),
    "sm_100": GPU("B200", "cuda", 100, 32, 227 * KIB, 148, 228 * KIB, 64),
    "sm_120": GPU("RTX 5090", "cuda", 120, 32, 99 * KIB, 170, 100 * KIB, 48),
    "gfx942": GPU("MI300X", "hip", "gfx942", 64, 64 * KIB, 304),
    "gfx950": GPU("MI355X", "hip", "gfx950", 64, 160 * KIB, 256),
    "gfx1100": GPU("RX 7900 XTX", "hip", "gfx1100", 32, 64 * KIB, 48),
}


@dataclass(frozen=True)
class Specialisation:
    """What makes a kernel's machine code: plain data, so that it can be compared, and sent to another process."""

    module: str
    kernel: str
    target: str  # a name in `TARGETS`
    signature: tuple[tuple[str, Any], ...]  # (argument, type) of every argument
    constants: tuple[tuple[tuple[int, ...], Any], ...]  # (path of the argument, value) of the compile-time constants
    attributes: tuple[tuple[tuple[int, ...], Any], ...]  # (path, what is known about it), 16-byte alignment
    options: tuple[tuple[str, Any], ...]  # the compiler's, as (name, value)

    @classmethod
    def of(cls, source: ASTSource, options: dict[str, Any], target: str) -> Specialisation:
        return cls(
            source.fn.module,
            source.fn.fn.__name__,
            target,
            tuple(source.signature.items()),
            tuple(source.constants.items()),
            tuple((path, tuple(map(tuple, facts))) for path, facts in source.attrs.items() if facts),
            tuple((name, _hashable(options[name])) for name in OPTIONS if options.get(name) is not None),
        )

    @property
    def constexprs(self) -> dict[str, Any]:
        """The compile-time constants by name; also arguments that are None or 1."""
        names = [name for name, _ in self.signature]
        return {names[path[0]]: value for path, value in self.constants}

    @property
    def types(self) -> dict[str, str]:
        return dict(self.signature)

    @property
    def warps(self) -> int:
        return dict(self.options)["num_warps"]

    def compile(self) -> CompiledKernel:
        """The real compiler's result."""
        source = ASTSource(
            getattr(importlib.import_module(self.module), self.kernel),
            dict(self.signature),
            dict(self.constants),
            {path: [list(fact) for fact in facts] for path, facts in self.attributes},
        )
        return triton.compile(source, TARGETS[self.target].target, dict(self.options))


OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "enable_fp_fusion", "waves_per_eu", "matrix_instr_nonkdim")


@dataclass(frozen=True)
class Launch:
    """One launch: tensors among the arguments are given as (dtype, shape, strides)."""

    specialisation: Specialisation
    grid: tuple[int, int, int]
    arguments: dict[str, Any]
    shared: int | None  # bytes of a block; None where it was not compiled

    @property
    def kernel(self) -> str:
        return self.specialisation.kernel


class StubGPU:
    """Triton's driver of a GPU that is not there."""

    indices = itertools.count(1)

    def __init__(self, name: str) -> None:
        self.name, self.gpu = name, TARGETS[name]
        self.launches: list[Launch] = []
        # Triton caches compiled kernels by the device's index: a stub has one of its own, and so starts afresh.
        self.index = next(self.indices)
        properties = {
            "max_shared_mem": self.gpu.shared,
            "multiprocessor_count": self.gpu.processors,
            "warpSize": self.gpu.warp_size,
            "max_num_regs": 65536,
        }
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: properties,
            load_binary=lambda name, kernel, shared, device: (1, 1, 0, 0, 1024),
            unload_module=lambda module: None,
        )

    @property
    def specialisations(self) -> list[Specialisation]:
        """The distinct ones, in the order of their first launch."""
        return list(dict.fromkeys(launch.specialisation for launch in self.launches))

    def launcher_cls(self, source: ASTSource, metadata: Any) -> Any:
        """What runs a compiled kernel."""
        options = metadata._asdict() if hasattr(metadata, "_asdict") else vars(metadata)
        specialisation = Specialisation.of(source, options, self.name)
        names, shared = source.fn.arg_names, options.get("shared")

        def record(x: int, y: int, z: int, *others: Any) -> None:
            arguments = dict(zip(names, map(_described, others[-len(names) :]), strict=True))
            self.launches.append(Launch(specialisation, (x, y, z), arguments, shared))

        return record

    def specialise_only(self, jit: JITFunction, key: str, signature: dict, device: int, *rest: Any) -> Any:
        """In place of `JITFunction._do_compile`."""
        constants, options, attrs, _ = rest
        record = self.launcher_cls(ASTSource(jit, signature, constants, attrs), options)
        kernel = SimpleNamespace(
            run=record, function=None, packed_metadata=None, launch_metadata=lambda grid, stream, *arguments: None
        )
        jit.device_caches[device][0][key] = kernel
        return kernel

    def get_current_target(self) -> GPUTarget:
        return self.gpu.target

    def get_current_device(self) -> int:
        return self.index

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def stub_gpu(name: str, compile: bool = True) -> Iterator[StubGPU]:
    """A GPU of this name (a key of `TARGETS`) for tensors on the CPU, real ones or fake.

    Raises:
        RuntimeError: where kernels are interpreted, which is decided when they are imported.
    """
    if ops.is_interpreted():
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted in this process and cannot be compiled")
    gpu = StubGPU(name)
    before = driver._active
    driver.set_active(gpu)
    with contextlib.ExitStack() as patches:
        # CPU tensors are this GPU's.
        patches.enter_context(mock.patch.dict(KINDS, cpu=GPU_KIND))
        # A fake tensor has no address, only the alignment of its place in its storage.
        patches.enter_context(mock.patch.object(FakeTensor, "data_ptr", _fake_address))
        if not compile:
            only = lambda jit, *arguments: gpu.specialise_only(jit, *arguments)  # noqa: E731 - bound as a method
            patches.enter_context(mock.patch.object(JITFunction, "_do_compile", only))
        try:
            yield gpu
        finally:
            driver._active = before


def _fake_address(tensor: Tensor) -> int:
    return int(tensor.storage_offset()) * tensor.element_size()


def _described(value: Any) -> Any:
    if isinstance(value, TensorDescriptor):
        value = value.base
    return (value.dtype, tuple(value.shape), value.stride()) if isinstance(value, torch.Tensor) else value


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
