"""What Triton's interpreter (TRITON_INTERPRET=1) lacks as a test bench: right bf16, and a watch over memory.

    correct_bf16()      bfloat16 values instead of arithmetic on their bit patterns
    check_overflow()    integer arithmetic that wraps around raises
    check_memory()      a launch that leaves its tensors raises, and so does one whose programs share an address
    patch_once()        half as long: the language is patched once a launch, not in each call of a device function

All act on every interpreted launch of the process, from when they are called. `TRITON_INTERPRET` has to be set before a
kernel's module is imported, and the checks see only what the interpreter runs: the values and addresses of the kernel's
Python, not the code that a compiler makes of it.
"""

from __future__ import annotations

import dataclasses
import functools
import linecache
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor, InterpreterBuilder, ReduceScanOpInterface, TensorHandle

NOT_ARITHMETIC = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.where)


# ----------------------------------------------------------------------------------------------------------- bfloat16
# The interpreter keeps a bfloat16 as its bits in a uint16. Loads, stores and whatever only moves elements are right so;
# casts to bfloat16 truncate, and arithmetic is done on the bits.


def to_float32(bits: np.ndarray) -> np.ndarray:
    """The values of bfloat16 bits (uint16), exact."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits (uint16) of the nearest bfloat16, ties to even. float64 is rounded to float32 first, as torch does."""
    with np.errstate(over="ignore"):
        bits = values.astype(np.float32).view(np.uint32)
    is_odd = (bits >> 16) & 1
    nearest = (bits + 0x7FFF + is_odd) >> 16  # a carry into the exponent is right: to the next binade, or to infinity
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, TensorHandle) and handle.dtype.scalar == tl.bfloat16


def decoded(handle: Any) -> Any:
    """A bfloat16 handle as float32; anything else as it is."""
    return TensorHandle(to_float32(handle.data), tl.float32) if is_bfloat16(handle) else handle


def encoded(handle: TensorHandle) -> TensorHandle:
    """A float32 handle as bfloat16; the booleans of a comparison as int1."""
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    return TensorHandle(to_bfloat16(handle.data), tl.bfloat16)


def on_values(original: Callable[..., TensorHandle]) -> Callable[..., TensorHandle]:
    """An operation of the builder that computes bfloat16 in float32 and rounds once."""

    def operation(self: InterpreterBuilder, *args: Any) -> TensorHandle:
        if args[-1] in NOT_ARITHMETIC or not any(map(is_bfloat16, args)):
            return original(self, *args)
        return encoded(original(self, *map(decoded, args)))

    return operation


def cast(self: InterpreterBuilder, source: TensorHandle, target: tl.dtype) -> TensorHandle:
    if target.scalar == tl.bfloat16 and not is_bfloat16(source):
        return TensorHandle(to_bfloat16(source.data), tl.bfloat16)
    if is_bfloat16(source) and target.scalar != tl.bfloat16:
        return original_cast(self, decoded(source), target)
    return original_cast(self, source, target)


def dot(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle, accumulator: TensorHandle, *rest: Any) -> Any:
    """Products of bfloat16 are exact in the fp32 that they are added in, as on a tensor core."""
    return original_dot(self, decoded(a), decoded(b), accumulator, *rest)


def reduce_or_scan(self: ReduceScanOpInterface, tensors: tuple[tl.tensor, ...]) -> Any:
    """Refuses bfloat16: a GPU would round after every step, in an order of its own."""
    if any(is_bfloat16(t.handle) for t in (tensors if isinstance(tensors, tuple) else (tensors,))):
        raise NotImplementedError("a reduction or scan of bfloat16: cast it to fp32 first")
    return original_reduce_or_scan(self, tensors)


original_cast = InterpreterBuilder.cast_impl
original_dot = InterpreterBuilder.create_dot
original_reduce_or_scan = ReduceScanOpInterface.apply

CORRECTIONS = (
    mock.patch.multiple(
        InterpreterBuilder,
        cast_impl=cast,
        create_dot=dot,
        unary_op=on_values(InterpreterBuilder.unary_op),
        binary_op=on_values(InterpreterBuilder.binary_op),
        ternary_op=on_values(InterpreterBuilder.ternary_op),
        create_fma=on_values(InterpreterBuilder.create_fma),
    ),
    mock.patch.object(ReduceScanOpInterface, "apply", reduce_or_scan),
)


def correct_bf16() -> None:
    if InterpreterBuilder.cast_impl is not cast:
        for correction in CORRECTIONS:
            correction.start()


def leave_bf16() -> None:
    """The interpreter as it comes."""
    for correction in CORRECTIONS:
        correction.stop()


# ----------------------------------------------------------------------------------------------------------- overflow


def check_overflow() -> None:
    """int32 index arithmetic that passes 2^31 raises, as it does in a kernel compiled with debug=True."""
    builder = interpreter.interpreter_builder
    builder.options = dataclasses.replace(builder.options, debug=True)


# ------------------------------------------------------------------------------------------------------------- memory


class MemoryFault(Exception):
    """An access outside of every tensor that the kernel was given, or one that makes the order of programs matter."""


NOBODY, SEVERAL = 0, -1  # else a program's number, from 1


@dataclasses.dataclass
class Extent:
    """The bytes from a tensor's first to its last element, and which programs of this launch have touched each."""

    name: str
    start: int
    stop: int
    itemsize: int

    # Not filled with anything but zeros, so that an array costs only the memory of the pages that are used.
    @functools.cached_property
    def writer(self) -> np.ndarray:
        return np.zeros((self.stop - self.start) // self.itemsize, np.int32)

    @functools.cached_property
    def reader(self) -> np.ndarray:
        return np.zeros((self.stop - self.start) // self.itemsize, np.int32)

    def elements(self, addresses: np.ndarray, itemsize: int) -> np.ndarray:
        """The numbers of the elements that accesses of `itemsize` bytes touch."""
        return ((addresses - self.start)[:, None] + np.arange(0, itemsize, self.itemsize)).ravel() // self.itemsize

    def read(self, element: np.ndarray, program: int) -> None:
        self.refuse_others(self.writer[element], element, program, "reads what program {} writes")
        before = self.reader[element]
        self.reader[element] = np.where((before == NOBODY) | (before == program), program, SEVERAL)

    def write(self, element: np.ndarray, program: int) -> None:
        self.refuse_others(self.writer[element], element, program, "writes what program {} writes")
        self.refuse_others(self.reader[element], element, program, "writes what program {} reads")
        self.writer[element] = program

    def refuse_others(self, owner: np.ndarray, element: np.ndarray, program: int, doing: str) -> None:
        is_other = (owner != NOBODY) & (owner != program)
        if is_other.any():
            k = np.argmax(is_other)
            other = "another" if owner[k] == SEVERAL else owner[k] - 1
            what = f"program {program - 1} {doing.format(other)}"
            raise MemoryFault(f"race: {what}, element {element[k]} of {self.name}, at {kernel_line()}")


def extents(tensors: Iterable[tuple[str, Any]]) -> list[Extent]:
    """The memory of a launch. Tensors that overlap, as an output in place of its input, become one extent."""
    found: list[Extent] = []
    for name, tensor in sorted(tensors, key=lambda item: item[1].data_ptr()):
        start, itemsize = tensor.data_ptr(), tensor.element_size()
        last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        stop = start + ((last + 1) * itemsize if tensor.numel() else 0)
        if found and start < found[-1].stop:
            before = found.pop()
            name = f"{before.name}/{name}"
            start, stop, itemsize = before.start, max(before.stop, stop), min(before.itemsize, itemsize)
        found.append(Extent(name, start, stop, itemsize))
    return found


def watch(memory: list[Extent], kind: str, pointers: np.ndarray, mask: np.ndarray, itemsize: int, program: int) -> None:
    """Raise if these accesses are out of bounds, or race with those before them."""
    addresses = np.broadcast_to(pointers, mask.shape)[mask].astype(np.int64)
    for extent in memory:
        inside = (addresses >= extent.start) & (addresses + itemsize <= extent.stop)
        if inside.any():
            getattr(extent, kind)(extent.elements(addresses[inside], itemsize), program)
            addresses = addresses[~inside]
    if addresses.size:
        where = nearest(memory, int(addresses[0]))
        raise MemoryFault(f"out of bounds: {kind} of {addresses.size} elements {where}, at {kernel_line()}")


def nearest(memory: list[Extent], address: int) -> str:
    extent = min(memory, key=lambda e: max(e.start - address, address - e.stop))
    if address < extent.start:
        return f"before {extent.name}, by {extent.start - address} bytes"
    return f"past the end of {extent.name}, by {address - extent.stop} bytes"


def kernel_line() -> str:
    """The line of the kernel that is being interpreted: the innermost frame that is neither Triton's nor ours."""
    ours = (str(Path(triton.__file__).parent), __file__)
    frame = sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith(ours):
        frame = frame.f_back
    path, line = frame.f_code.co_filename, frame.f_lineno
    return f"{Path(path).name}:{line}: {linecache.getline(path, line).strip()}"


def tensors_of(name: str, argument: Any) -> Iterator[tuple[str, Any]]:
    """The tensors of a kernel's argument with their names: itself, a descriptor's base, the members of a tuple."""
    if isinstance(argument, tuple):
        for i, member in enumerate(argument):
            yield from tensors_of(f"{name}[{i}]", member)
    elif hasattr(argument, "block_shape"):
        yield from tensors_of(name, argument.base)
    elif hasattr(argument, "data_ptr"):
        yield name, argument


def patch_once() -> None:
    """Within a launch `tl` stays as it was patched; the interpreter looks for every builtin in each call anew."""
    original_call, original_patch = GridExecutor.__call__, interpreter._patch_lang
    patched: set[int] = set()

    @functools.cache
    def languages(fn: Any) -> frozenset[int]:
        return frozenset(id(value) for value in fn.__globals__.values() if value is tl or value is tl.core)

    def patch(fn: Any) -> Any:
        if languages(fn) <= patched:
            return interpreter._LangPatchScope()
        patched.update(languages(fn))
        return original_patch(fn)

    def call(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        patched.clear()
        try:
            original_call(self, *args, **kwargs)
        finally:
            patched.clear()

    if hasattr(interpreter, "_LangPatchScope"):  # Triton 3.5 and newer
        GridExecutor.__call__, interpreter._patch_lang = call, patch


def check_memory() -> None:
    """Watch every launch. The bounds are those of the tensors that it was given, not those of their storages.

    Two programs may read the same element. Anything else that two programs do to one element is a race, also where both
    write the same value. Atomic operations are refused: what they leave behind depends on the order of the programs.
    """
    builder = InterpreterBuilder
    original_call = GridExecutor.__call__
    original_load, original_store = builder.create_masked_load, builder.create_masked_store
    memory: list[Extent] = []

    def call(self: GridExecutor, *args: Any, **kwargs: Any) -> None:
        arguments = [*zip(self.arg_names, args, strict=False), *kwargs.items()]
        memory[:] = extents(pair for name, argument in arguments for pair in tensors_of(name, argument))
        try:
            original_call(self, *args, **kwargs)
        finally:
            memory.clear()

    def program(self: InterpreterBuilder) -> int:
        return 1 + int(np.ravel_multi_index(self.grid_idx, self.grid_dim))

    def load(self: InterpreterBuilder, pointers: TensorHandle, mask: TensorHandle, *rest: Any, **options: Any) -> Any:
        itemsize = interpreter._get_np_dtype(pointers.get_element_ty()).itemsize
        watch(memory, "read", pointers.data, mask.data, itemsize, program(self))
        return original_load(self, pointers, mask, *rest, **options)

    def store(self: InterpreterBuilder, pointers: TensorHandle, values: TensorHandle, mask: TensorHandle, *rest: Any):
        watch(memory, "write", pointers.data, mask.data, values.data.itemsize, program(self))
        return original_store(self, pointers, values, mask, *rest)

    def atomic(self: InterpreterBuilder, *_: Any) -> None:
        raise MemoryFault(f"race: an atomic operation, at {kernel_line()}")

    GridExecutor.__call__ = call
    builder.create_masked_load, builder.create_masked_store = load, store
    builder.create_atomic_rmw = builder.create_atomic_cas = atomic
