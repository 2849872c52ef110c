"""Means over pairs and tokens that come batch by batch: the host reads them once, where they are wanted."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..devices import moved, rows_device, statistics_dtype


class Part(NamedTuple):
    """What a batch adds to a mean, both 0-d: a sum, and what that is to be divided by."""

    sum: Tensor
    weight: Tensor


class Averages:
    """The means of what was added, each over all batches and all processes, as if they were one batch."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    def add(self, parts: Mapping[str, Part]) -> None:
        """Nothing is read on the host."""
        for name, part in parts.items():
            own = Part(*(moved(one.detach(), rows_device(one.device), torch.float64) for one in part))
            known = self._parts.get(name)
            self._parts[name] = own if known is None else Part(known.sum + own.sum, known.weight + own.weight)

    def means(self, accelerator: Any) -> dict[str, float]:
        """By name, without what has no weight. All processes call it together, with the same names."""
        if not self._parts:
            return {}
        sums = torch.stack([torch.stack(part) for part in self._parts.values()])
        sums = moved(sums, accelerator.device, statistics_dtype(accelerator.device))  # where processes can gather it
        pairs = zip(self._parts, accelerator.gather(sums[None]).sum(0).tolist(), strict=True)
        return {name: total / weight for name, (total, weight) in pairs if weight}
