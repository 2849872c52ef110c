"""Exact peak memory at the size of Llama-3-8B's head, by accounting on tensors without data; and the accounting."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("rich", reason="the accounting tool prints with rich: pip install 'orpo-kernels[bench]'")

from benchmarks.contest.memory import GIB, PeakBytes, Shape, active_columns, our_case, peer_case
from benchmarks.contest.peers import PEERS
from orpo_kernels import Limits, orpo_loss, plan

from .thorough import only_thorough

EIGHT_THOUSAND_ROWS = [Shape(16, 512), Shape(8, 1024), Shape(2, 4096)]


def peak(schedule: str, trained: bool, shape: Shape, native: bool) -> float:
    """GiB, the 1.041 GiB of hidden states and weight included; N = 8192, H = 4096, V = 128256, bf16."""
    return our_case(schedule, trained, native=native).peak(shape, torch.bfloat16).peak / GIB


MOST = [("single_pass", False, 1.5), ("recompute", True, 2.7)]


@pytest.mark.parametrize("native", [True, False], ids=["bf16-gemms", "fp32-gemms"])
@pytest.mark.parametrize(("schedule", "trained", "most"), MOST)
def test_peak_is_small(schedule, trained, most, native):
    only_thorough((schedule, native) == ("single_pass", False), "thousands of chunks")
    assert peak(schedule, trained, EIGHT_THOUSAND_ROWS[0], native) <= most


@pytest.mark.parametrize(("schedule", "trained", "most"), MOST)
def test_peak_does_not_depend_on_the_length(schedule, trained, most):
    peaks = [peak(schedule, trained, shape, native=True) for shape in EIGHT_THOUSAND_ROWS]
    assert max(peaks) - min(peaks) < 1e-3


def test_padding_costs_only_its_hidden_states():
    """Ever more padding around the same rows adds its own hidden states and their gradient, nothing V-wide."""
    short, long = Shape(16, 256, rows=3440), Shape(16, 2048, rows=3440)
    padding = 2 * (long.positions - short.positions) * 4096 * 2 / GIB
    for schedule, trained in (("single_pass", False), ("recompute", True)):
        growth = peak(schedule, trained, long, True) - peak(schedule, trained, short, True)
        assert growth <= padding + 1e-3


@pytest.mark.parametrize(("schedule", "trained"), [("single_pass", False), ("recompute", True), ("resident", True)])
def test_the_plan_predicts_its_peak(schedule, trained):
    """What `plan` says it will allocate is what is allocated, to a tenth."""
    shape = EIGHT_THOUSAND_ROWS[1]
    measured = our_case(schedule, trained, native=True).peak(shape, torch.bfloat16)
    options = {"schedule": schedule, "limits": replace(Limits.of(on_cpu=True), gemm_dtype=torch.bfloat16)}
    chosen = plan(shape.positions, 4096, 128256, dtype=torch.bfloat16, needs_weight=trained, **options)
    gradients = (shape.positions + trained * 128256) * 4096 * 2
    predicted = measured.baseline + max(chosen.forward_bytes, chosen.backward_bytes + gradients)
    assert measured.peak <= 1.02 * predicted
    assert measured.peak >= 0.8 * predicted


@pytest.mark.parametrize(
    ("schedule", "trained", "most"), [*MOST, ("resident", True, 4.2), ("evaluation", False, 1.125)]
)
def test_peak_of_the_triton_kernels(schedule, trained, most, fake_gpu):
    """No logits in fp32 anywhere, and in an evaluation none at all. (`test_costs.py`: the plan knows.)"""
    name = "auto" if schedule == "evaluation" else schedule
    case = our_case(name, trained, gradient=schedule != "evaluation")
    assert case.peak(EIGHT_THOUSAND_ROWS[1], torch.bfloat16).peak / GIB <= most


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("share", [0.13, pytest.param(0.5, marks=pytest.mark.slow), 0.9])
def test_the_sparse_schedule_stays_below_its_plan(share, trained, fake_gpu):
    """Few active columns, as many as a sparse chunk may have, dense. The host reads once a chunk: more would raise."""
    shape = EIGHT_THOUSAND_ROWS[1]
    with active_columns(share) as reads:
        measured = our_case("sparse", trained).peak(shape, torch.bfloat16)
    chosen = plan(shape.positions, 4096, 128256, dtype=torch.bfloat16, needs_weight=trained, sparse_eps=2**-14)
    assert len(reads) == -(-shape.positions // chosen.row_chunk)
    assert sum(reads) == shape.positions // Limits().block_rows
    gradients = (shape.positions + trained * 128256) * 4096 * 2
    assert measured.peak <= measured.baseline + max(chosen.forward_bytes, chosen.backward_bytes + gradients)


@pytest.mark.parametrize(
    ("options", "keeps"),
    [({"schedule": "single_pass"}, False), ({"sparse_eps": 1e-3}, False), ({"schedule": "recompute"}, True)],
    ids=str,
)
def test_a_frozen_head_keeps_nothing_of_the_hidden_states(options, keeps):
    """u is kept instead of them, so that a caller who lets go of the hidden states frees them."""
    hidden = torch.randn(4, 6, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=keeps)
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        orpo_loss(hidden, weight, torch.randint(11, (4, 6)), **options)
    assert (hidden.data_ptr() in saved) == keeps


# --- the accounting --------------------------------------------------------------------------------------------------


def test_counts_what_is_alive_at_once():
    with PeakBytes() as memory:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = b.view(10, 100) * 2  # a view is no memory; 8000
        del b
        d = c.sum()  # 4004
    assert (memory.peak, memory.live) == (8000, 4004)
    del c, d
    assert memory.live == 0


def test_what_existed_before_does_not_count_unless_it_is_named():
    before, named = torch.zeros(1000), torch.zeros(500)
    with PeakBytes([named]) as memory:
        before.add_(1)
        named.mul_(2)
        before + before
    assert (memory.baseline, memory.live, memory.peak) == (2000, 2000, 6000)


def test_a_host_read_raises_unless_it_is_answered():
    with FakeTensorMode():
        with pytest.raises(Exception, match="local_scalar_dense"), PeakBytes():
            torch.zeros(()).item()
        with PeakBytes(host_reads=False):
            assert not bool(torch.zeros(()) != 1)


def test_fake_and_real_tensors_give_the_same_bytes():
    def run():
        hidden, weight = torch.zeros(4, 8, 16, requires_grad=True), torch.zeros(97, 16, requires_grad=True)
        labels = torch.zeros(4, 8, dtype=torch.int64)
        with PeakBytes([hidden, weight]) as memory:
            PEERS["plain"](hidden, weight, labels, labels[:2], 0.1).backward()
        return memory

    real = run()
    with FakeTensorMode():
        fake = run()
    assert (real.baseline, real.peak) == (fake.baseline, fake.peak)


def test_reproduces_what_is_known_of_the_peers():
    """1.041 GiB of inputs and weight; plain 12.78 GiB; Liger 6.00 GiB at 8 x 1024 and 4.29 GiB at 16 x 512."""
    plain = peer_case("plain fp32", trained=True).peak(Shape(8, 1024))
    assert plain.baseline / GIB == pytest.approx(1.041, abs=1e-3)
    assert plain.peak / GIB == pytest.approx(12.78, abs=0.01)
    if PEERS["Liger"].available:
        for shape, known in ((Shape(8, 1024), 6.00), (Shape(16, 512), 4.29)):
            assert peer_case("Liger", trained=True).peak(shape).peak / GIB == pytest.approx(known, abs=0.01)
