"""What a call costs the host: the operations that torch dispatches, and nothing read back."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from orpo_kernels import orpo_loss
from orpo_kernels.ops import why_not

# Views, and memory that nobody fills, do no work.
NO_WORK = ("view", "expand", "slice", "select", "split", "unbind", "detach", "empty", "squeeze", ".t.", "transpose")
PAIRS, LENGTH, HIDDEN, VOCAB = 2, 12, 16, 50
# Of a forward and a backward pass with one product per GEMM in it.
ALLOWED = {"evaluation": 40, "frozen": 50, "trained": 55}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(word in str(function) for word in NO_WORK):
            self.counts[str(function)] += 1
        return function(*args, **(kwargs or {}))


def batch(case: str) -> tuple[Tensor, Tensor, Tensor]:
    hidden = torch.randn(2 * PAIRS, LENGTH, HIDDEN, requires_grad=case != "evaluation")
    weight = torch.randn(VOCAB, HIDDEN, requires_grad=case == "trained")
    labels = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH))
    labels[:, :5] = -100
    return hidden, weight, labels


@pytest.mark.skipif(why_not("native", torch.device("cpu")) is not None, reason="no native kernels")
@pytest.mark.parametrize("case", ALLOWED)
def test_a_call_is_few_operations(case):
    hidden, weight, labels = batch(case)
    with Operations() as operations:
        out = orpo_loss(hidden, weight, labels, shift=True)
        if case != "evaluation":
            out.loss.backward()
    assert operations.counts["aten.mm.out"] == {"evaluation": 1, "frozen": 2, "trained": 3}[case]
    assert operations.counts.total() <= ALLOWED[case], operations.counts.most_common()
    reads = {name for name in operations.counts if "nonzero" in name or "_local_scalar_dense" in name}
    assert not reads, reads
