"""The gradients that a backward pass makes."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Gradients:
    """Where a backward pass leaves its results; None is not wanted.

    hidden (N, H) and bias (V,) are accumulated into. weight (V, H) is written, or accumulated into if `accumulate`;
    it may have the last columns alone.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    accumulate: bool = False
