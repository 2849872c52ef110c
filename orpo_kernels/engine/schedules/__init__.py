"""When each vocabulary-sized GEMM runs, and what is kept between the passes: a schedule a file.

A schedule is a module with, over a `Projection`,

    forward(p)                          -> token log-odds (R,), and the tensors to keep
    backward(p, kept, coefficient, grads)
        adds to `grads` the gradients of sum_t coefficient_t * m_t, where coefficient (R,) = dloss/dm

and, for `planning`, over the sizes of a call (`Work`),

    gemms(work)                         -> vocabulary-sized products of forward and backward
    memory(work, chunks, budget)        -> the bytes that it takes (`Memory`)
    NEEDS_NO_LOGITS                     whether its forward pass can take its statistics inside a kernel
    NOTE                                what there is to know about it, in half a sentence

The residual of `ops` is -dm/dz, so `coefficient` enters with its sign turned. A new schedule is a new file and a line
in `TABLE`.
"""

from __future__ import annotations

from types import ModuleType

from . import evaluation, recompute, resident, single_pass, sparse

TABLE: dict[str, ModuleType] = {
    "evaluation": evaluation,
    "single_pass": single_pass,
    "resident": resident,
    "recompute": recompute,
    "sparse": sparse,
}

__all__ = ["TABLE", "evaluation", "recompute", "resident", "single_pass", "sparse"]
