"""How calls are timed: on the device's own time line or by the clock, and in turns."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any, TypeVar

import torch

WARM_UP = 2  # calls of each before the timed ones: the first compiles
Name = TypeVar("Name", bound=Hashable)


class Marks:
    """Points on the time line of a device: events in a GPU's queue, or the clock of a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.marks: list[Any] = []
        synchronize(device)

    def add(self) -> None:
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        synchronize(self.device)
        pairs = list(zip(self.marks[:-1], self.marks[1:], strict=True))
        return [a.elapsed_time(b) / 1e3 if self.device.type == "cuda" else b - a for a, b in pairs]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def device_seconds(call: Callable[[], Any], device: torch.device, repeats: int = 1) -> float:
    """Of one call on the device's own time line; several in a row hide the host's share of all but the first."""
    marks = Marks(device)
    marks.add()
    for _ in range(repeats):
        call()
    marks.add()
    return marks.seconds()[0] / repeats


def wall_seconds(call: Callable[[], Any], device: torch.device) -> float:
    """Of one call from an idle device until it is idle again: what the host takes is in it."""
    synchronize(device)
    begin = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - begin


def in_turns(
    names: Iterable[Name],
    rounds: int,
    seconds: Callable[[Name], float],
    warm_up: int = WARM_UP,
) -> dict[Name, list[float]]:
    """`seconds` of every name in every round: all take turns, in a new order each time, behind rounds of warming up."""
    times: dict[Name, list[float]] = {name: [] for name in names}
    order = random.Random(0)
    for _ in range(warm_up + rounds):
        for name in order.sample(list(times), len(times)):
            times[name].append(seconds(name))
    return {name: of_all[warm_up:] for name, of_all in times.items()}


def medians(
    calls: Mapping[str, Callable[[], Any]], rounds: int, clock: Callable[[Callable[[], Any]], float]
) -> dict[str, float]:
    """Of every call's seconds by that clock, in turns."""
    times = in_turns(calls, rounds, lambda name: clock(calls[name]))
    return {name: statistics.median(found) for name, found in times.items()}
