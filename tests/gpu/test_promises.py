"""Determinism, no waiting for the host, few operations on the device, and torch.compile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

from orpo_kernels import Limits, Rows, measured_sparsity, orpo_loss, orpo_loss_from_rows
from orpo_kernels.engine.schedules import sparse
from orpo_kernels.ops import why_not

from ..batches import random_rows, relative_error
from .inputs import DTYPES, SCHEDULES, SPARSE, all_of_a_call, packed

SIZES = {
    "repeated positions": {"positions": 300, "rows": 1500, "size": 577, "vocab": 50257},
    "distinct positions": {"positions": 9000, "rows": 700, "size": 512, "vocab": 32768},
}


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("schedule", [*SCHEDULES, *SPARSE])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_repeatable(dtype, schedule, sizes, device, backend):
    """The same call twice: every bit of the loss, the metrics and all gradients."""
    hidden, weight, rows = packed(dtype, device, **SIZES[sizes])
    bias = torch.randn(weight.shape[0], device=device).to(dtype)
    assert (rows.position.unique().numel() < 0.5 * len(rows)) == (sizes == "repeated positions")
    first, second = (all_of_a_call(hidden, weight, rows, schedule, bias, backend=backend) for _ in range(2))
    assert first["loss"].isfinite()
    assert len(first) == 7 + {"evaluation": 0, "single_pass": 1, "sparse, frozen": 1}.get(schedule, 3)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@contextmanager
def no_host_reads() -> Iterator[None]:
    """Any operation that waits for the GPU raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


DENOMINATORS = {
    "own": lambda device: {},
    "int": lambda device: {"nll_denominator": 100, "pair_denominator": 7},
    "tensor": lambda device: {
        "nll_denominator": torch.full((), 100.0, device=device),
        "pair_denominator": torch.full((), 7, device=device),
    },
}


@pytest.mark.parametrize("denominators", DENOMINATORS)
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_waits_for_the_host(dtype, schedule, softcap, denominators, device, backend):
    """Forward and backward are queued as a whole, once the rows are on the device."""
    hidden, weight, rows = packed(dtype, device, positions=200, rows=333, size=64, vocab=1000)
    bias = torch.zeros(1000, device=device, dtype=dtype)
    options = {"logit_softcap": softcap, "backend": backend, **DENOMINATORS[denominators](device)}
    all_of_a_call(hidden, weight, rows, schedule, bias, **options)  # compiles and loads the kernels
    with no_host_reads():
        all_of_a_call(hidden, weight, rows, schedule, bias, **options)


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("schedule", SPARSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sparse_pass_waits_once_a_chunk(dtype, schedule, softcap, device, backend, monkeypatch):
    """Where it reads how many columns are active; and, forward and backward, nowhere else."""
    hidden, weight, rows = packed(dtype, device, positions=200, rows=600, size=64, vocab=20000)
    bias = torch.zeros(20000, device=device, dtype=dtype)
    limits = Limits(chunk_rows=300, least_rows=300, block_rows=128)
    reads, counted = [], sparse.counted

    def allowed(ranks: torch.Tensor, slices: list[slice]) -> tuple[torch.Tensor, ...]:
        reads.append(len(ranks))
        torch.cuda.set_sync_debug_mode("default")
        found = counted(ranks, slices)
        torch.cuda.set_sync_debug_mode("error")
        return found

    options = {"logit_softcap": softcap, "backend": backend, "limits": limits}
    all_of_a_call(hidden, weight, rows, schedule, bias, **options)  # compiles and loads the kernels
    monkeypatch.setattr(sparse, "counted", allowed)
    with no_host_reads(), measured_sparsity() as measured:
        all_of_a_call(hidden, weight, rows, schedule, bias, **options)
    assert reads == [3, 3]
    assert max(measured.shares) < 0.5


def test_a_host_read_would_be_noticed(device):
    number = torch.ones((), device=device)
    with no_host_reads(), pytest.raises(RuntimeError, match="synchronizing"):
        number.item()


def test_rows_of_a_collator_are_moved_without_waiting(device, backend):
    """Made on the host, in page-locked memory as a DataLoader leaves them: moved, forward and backward."""
    hidden, weight, _ = packed(torch.bfloat16, device, positions=200, rows=1, size=64, vocab=1000)
    rows = random_rows(torch.Generator().manual_seed(0), 200, 1000, 3, 333).pin_memory()
    all_of_a_call(hidden, weight, rows.to(device), "single_pass", backend=backend)  # compiles and loads the kernels
    with no_host_reads():
        found = all_of_a_call(hidden, weight, rows.to(device), "single_pass", backend=backend)
    assert found["loss"].isfinite()
    assert found["hidden.grad"].any()


# A call from labels finds and checks its rows as well. At most 4096 of them, which torch sorts in one kernel.
MOST_OPERATIONS = {"rows": 25, "labels": 28}


@pytest.mark.parametrize("given", MOST_OPERATIONS)
def test_a_call_is_few_operations_on_the_device(given, device):
    """Kernels, copies and fills of one call on a frozen head in one chunk, forward and backward."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    hidden, weight, rows = packed(torch.bfloat16, device, positions=2048, rows=1500, size=512, vocab=32768, pairs=2)
    labels = torch.randint(32768, (4, 512), device=device)
    labels[:, :200] = -100
    hidden.requires_grad_()

    def call() -> None:
        if given == "rows":
            out = orpo_loss_from_rows(hidden, weight, rows, schedule="single_pass", backend="triton")
        else:
            batch = hidden.view(4, 512, 512)
            out = orpo_loss(batch, weight, labels, shift=True, schedule="single_pass", backend="triton")
        torch.autograd.grad(out.loss, hidden)

    call()  # compiles and loads the kernels
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    operations = [event.name for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert operations
    assert len(operations) <= MOST_OPERATIONS[given], "\n".join(operations)


@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
def test_compiles_as_one_graph(schedule, device, backend):
    """A training step of a body and our loss under torch.compile(fullgraph=True): the same loss and gradients."""
    torch.compiler.reset()
    torch.manual_seed(0)
    body = nn.Sequential(nn.Embedding(1000, 64), nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64)).to(device)
    weight = nn.Parameter(torch.randn(1000, 64, device=device) / 8, requires_grad=schedule != "single_pass")
    ids = torch.randint(1000, (200,), device=device)
    _, _, rows = packed(torch.float32, device, positions=200, rows=150, size=64, vocab=1000)

    def step(ids: torch.Tensor, rows: Rows) -> torch.Tensor:
        return orpo_loss_from_rows(body(ids), weight, rows, schedule=schedule, backend=backend).loss

    parameters = [p for p in (*body.parameters(), weight) if p.requires_grad]
    expected = step(ids, rows)
    expected_grads = torch.autograd.grad(expected, parameters)
    loss = torch.compile(step, fullgraph=True)(ids, rows)
    torch.testing.assert_close(loss, expected)
    for grad, true in zip(torch.autograd.grad(loss, parameters), expected_grads, strict=True):
        assert relative_error(grad, true) <= 1e-4
