"""What a call costs the host: the operations that torch dispatches, the kernels launched, and what is read back.

A GPU is stood in for: its rows, checks and operations, with tensors on the CPU and interpreted kernels. One operation
of torch can be several kernels there (the sort is); `tests/gpu/test_promises.py` counts those.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from orpo_kernels import orpo_loss
from orpo_kernels.devices import GPU_KIND, KINDS
from orpo_kernels.ops import is_interpreted, why_not

# Views, and memory that nobody fills, do no work.
NO_WORK = "view expand as_strided slice select split unbind detach empty squeeze .t. transpose alias"
PAIRS, LENGTH, HIDDEN, VOCAB = 2, 12, 16, 50
# Of a forward and a backward pass with one product per GEMM in it.
ALLOWED = {"evaluation": 8, "frozen": 14, "trained": 15}
ON_A_GPU = {"evaluation": 18, "frozen": 25, "trained": 27}


class Operations(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not any(word in str(function) for word in NO_WORK.split()):
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


@pytest.fixture
def operations_of_a_gpu(monkeypatch) -> Operations:
    """Those of calls as on a GPU; the kernels that are launched count among them, by their names."""
    if why_not("triton", torch.device("cpu")) or not is_interpreted():
        pytest.skip("no interpreted Triton kernels here")
    from triton.runtime.interpreter import InterpretedFunction

    operations, run = Operations(), InterpretedFunction.run

    def launched(kernel: Any, *arguments: Any, **options: Any) -> Any:
        operations.counts[kernel.fn.__name__] += 1
        with _disable_current_modes():  # what the interpreter does to run it is no work of the host's
            return run(kernel, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", launched)
    monkeypatch.setitem(KINDS, "cpu", GPU_KIND)
    return operations


@pytest.mark.parametrize("case", ON_A_GPU)
def test_a_call_is_few_launches_on_a_gpu(case, operations_of_a_gpu):
    """From labels to gradients; the host reads one number, that of the rows."""
    hidden, weight, labels = batch(case)
    with operations_of_a_gpu:
        out = orpo_loss(hidden, weight, labels, shift=True)
        if case != "evaluation":
            out.loss.backward()
    counts = operations_of_a_gpu.counts
    assert counts.total() <= ON_A_GPU[case], counts.most_common()
    assert {"count_labels_kernel", "label_rows_kernel", "are_within_kernel", "count_rows_kernel"} <= set(counts)
    assert counts["aten._local_scalar_dense.default"] == 1
    assert not any("nonzero" in name for name in counts)
    expected = orpo_loss(hidden, weight, labels, shift=True, backend="torch").loss
    torch.testing.assert_close(out.loss, expected)
