"""What Triton's interpreter (TRITON_INTERPRET=1) lacks as a test bench: right bf16, and a word when an offset wraps.

    correct_bf16()      bfloat16 values instead of arithmetic on their bit patterns
    check_overflow()    integer arithmetic that wraps around raises
    patch_once()        half as long: the language is patched once a launch, not in each call of a device function

All act on every interpreted launch of the process, from when they are called. `TRITON_INTERPRET` has to be set before a
kernel's module is imported. Bounds and races are looked for in the compiler's own IR: `under_ttsem.py`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
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


# -------------------------------------------------------------------------------------------------------------- speed


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
