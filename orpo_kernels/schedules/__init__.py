"""When each vocabulary-sized GEMM runs, and what is kept between the passes.

A schedule is a module with two functions over a `Projection`:

    forward(p)                          -> token log-odds (R,), and the tensors to keep
    backward(p, kept, coefficient, grads)
        adds to `grads` the gradients of sum_t coefficient_t * m_t, where coefficient (R,) = dloss/dm

The residual of `ops` is -dm/dz, so `coefficient` enters with its sign turned.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

from torch import Tensor

from ..projection import Projection
from . import evaluation, recompute, resident, single_pass, sparse


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


def schedule_of(p: Projection) -> ModuleType:
    return {
        "evaluation": evaluation,
        "single_pass": single_pass,
        "resident": resident,
        "recompute": recompute,
        "sparse": sparse,
    }[p.plan.schedule]


__all__ = ["Gradients", "evaluation", "recompute", "resident", "schedule_of", "single_pass", "sparse"]
