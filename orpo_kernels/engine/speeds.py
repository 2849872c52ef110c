"""Which way of a forward pass is the fastest on a kind of GPU: what was measured (`speeds.json`), and how it is read.

A record of the file is one head on one kind of GPU, with the times of the ways that were timed there:

    kernel     statistics inside the kernel that makes the logits, of which none is held
    library    the library's product and a pass over its logits, in chunks of rows as `Limits` has them
    1024 ...   the same, in chunks of so many rows

`python -m benchmarks.gpu --write-docs` times them in turns and renews the records of the GPU it runs on.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .work import Work

FILE = Path(__file__).with_name("speeds.json")

KERNEL, LIBRARY = "kernel", "library"
CHUNK_ROWS = (1024, 2048, 4096, 8192)
WAYS = (KERNEL, LIBRARY, *map(str, CHUNK_ROWS))  # in the order of the memory that they take
SCHEDULES = ("evaluation", "single_pass")  # recompute's forward pass is the former's
DTYPES = ("bfloat16", "float32", "tf32")  # fp16 has bfloat16's; tf32 is fp32 where torch may round its operands

WORTH = 1.02  # more memory has to be worth two hundredths of the time
# The time of a product grows with H, that of a pass over its logits does not: a record says nothing of a head half as
# wide, or twice.
NEAR = 2.0
RELATIVES = {"sm_86": "sm_89", "sm_100": "sm_90", "sm_103": "sm_100", "sm_121": "sm_120"}  # to ask where one has none


@dataclass(frozen=True)
class Record:
    """One head on one kind of GPU.

    Attributes:
        target: as `launch.Target.name` has it, "sm_90" or "gfx942".
        dtype: one of `DTYPES`.
        hidden_size, vocab_size, softcap: the head.
        schedule: one of `SCHEDULES`.
        times: by way, all in `unit`.
        unit: "ms", or what else the times are multiples of.
        source: which GPU, when, with which versions, and what was timed.
    """

    target: str
    dtype: str
    hidden_size: int
    vocab_size: int
    softcap: bool
    schedule: str
    times: dict[str, float]
    unit: str
    source: str

    @property
    def key(self) -> tuple[Any, ...]:
        """What a newer record replaces it by."""
        return self.target, self.dtype, self.hidden_size, self.vocab_size, self.softcap, self.schedule

    def __str__(self) -> str:
        times = ", ".join(f"{way} {time:.3g}" for way, time in self.times.items())
        capped = ", soft-capped" if self.softcap else ""
        return f"timed: {times} {self.unit} on {self.target} at H {self.hidden_size}, V {self.vocab_size}{capped}"


class Choice(NamedTuple):
    """A way, None where none was timed; and why, None where there is nothing to choose."""

    way: str | None = None
    why: str | None = None

    @property
    def rows(self) -> int | None:
        """Of a chunk, where its size was timed."""
        return int(self.way) if self.way and self.way.isdecimal() else None


def choose(work: Work, schedule: str, room: int) -> Choice:
    """The fastest way that was timed for `schedule`; `room`: rows of logits that the budget has room for."""
    if work.target is None or not work.has_fused_products or work.given_limits is not None or work.casts:
        return Choice()
    target: str | None = work.target
    while target and not any(record.target == target for record in records()):
        target = RELATIVES.get(target)
    if target is None:
        return Choice(None, f"nothing was timed on {work.target}")
    record = _nearest(work, schedule, target)
    if record is None:
        return Choice(None, f"nothing was timed on {target} near H {work.hidden_size} in {dtype_of(work)}")
    fitting = {way: time for way, time in record.times.items() if _rows(way, work) <= room}
    if not fitting:
        return Choice(None, "the budget has no room for chunks that were timed")
    stands_in = "" if target == work.target else f", its relative as {work.target} was not timed"
    return Choice(_least_memory(fitting), f"{record}{stands_in}")


def _rows(way: str, work: Work) -> int:
    """Rows of logits that a way holds at one time."""
    rows = 0 if way == KERNEL else work.limits.least_rows if way == LIBRARY else int(way)
    return min(rows, work.rows)


def _least_memory(times: dict[str, float]) -> str:
    """Of the ways that are about as fast as the fastest."""
    fastest = min(times.values())
    return next(way for way in WAYS if times.get(way, math.inf) <= WORTH * fastest)


def _nearest(work: Work, schedule: str, target: str) -> Record | None:
    """The record of the head that is most like this one; None where all are much wider or narrower."""

    def differs(record: Record) -> tuple[bool, float, float]:
        width = abs(math.log(record.hidden_size / work.hidden_size))
        return record.softcap != work.softcap, width, abs(math.log(record.vocab_size / work.vocab_size))

    dtype = dtype_of(work)
    found = [r for r in records() if (r.target, r.dtype, r.schedule) == (target, dtype, schedule)]
    near = [r for r in found if differs(r)[1] < math.log(NEAR)]
    return min(near, key=differs, default=None)


def dtype_of(work: Work) -> str:
    """Of the product, as records name it."""
    if work.gemm_dtype != torch.float32:
        return "bfloat16"
    return "tf32" if work.tf32 else "float32"


# ---------------------------------------------------------------------------------------------------------------------
# The file
# ---------------------------------------------------------------------------------------------------------------------


@functools.cache
def records() -> tuple[Record, ...]:
    return read(FILE)


def read(path: Path) -> tuple[Record, ...]:
    """
    Raises:
        ValueError: a file that is no list of records, with what is wrong.
    """
    try:
        content = json.loads(path.read_text())
        if not isinstance(content, list):
            raise ValueError("it must be a list of records")
        return tuple(_checked(f"record {i}", entry) for i, entry in enumerate(content))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def _checked(where: str, entry: Any) -> Record:
    names = [field.name for field in fields(Record)]
    if not isinstance(entry, dict) or set(entry) != set(names):
        raise ValueError(f"{where}: {entry!r} must have {', '.join(names)}")
    for name, allowed in (("dtype", DTYPES), ("schedule", SCHEDULES)):
        if entry[name] not in allowed:
            raise ValueError(f"{where}: {name} is {entry[name]!r}, it must be one of {', '.join(allowed)}")
    for name, kind in (("target", str), ("unit", str), ("source", str), ("softcap", bool)):
        if not isinstance(entry[name], kind) or entry[name] == "":
            raise ValueError(f"{where}: {name} is {entry[name]!r}, it must be a {kind.__name__}")
    for name in ("hidden_size", "vocab_size"):
        if type(entry[name]) is not int or entry[name] < 1:
            raise ValueError(f"{where}: {name} is {entry[name]!r}, it must be a positive whole number")
    times = entry["times"]
    ways = WAYS if entry["schedule"] == "evaluation" else WAYS[1:]  # a gradient needs the logits
    if not isinstance(times, dict) or not times or not set(times) <= set(ways):
        raise ValueError(f"{where}: times is {times!r}, it must have some of {', '.join(ways)}")
    if not all(type(time) in (int, float) and 0 < time < math.inf for time in times.values()):
        raise ValueError(f"{where}: times is {times!r}, all must be positive")
    return Record(**entry)
