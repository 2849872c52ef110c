"""Exact peak memory at the size of Llama-3-8B's head, by accounting on tensors without data."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("rich", reason="the accounting tool prints with rich: pip install 'orpo-kernels[bench]'")

from benchmarks.contest.memory import GIB, Shape, active_columns, our_case
from orpo_kernels import Limits, orpo_loss, plan

EIGHT_THOUSAND_ROWS = [Shape(16, 512), Shape(8, 1024), Shape(2, 4096)]


def peak(schedule: str, trained: bool, shape: Shape, native: bool, limits: Limits | None = None) -> float:
    """GiB, the 1.041 GiB of hidden states and weight included; N = 8192, H = 4096, V = 128256, bf16."""
    return our_case(schedule, trained, limits=limits, native=native).peak(shape, torch.bfloat16).peak / GIB


MOST = [("single_pass", False, 1.5), ("recompute", True, 2.7)]


@pytest.mark.parametrize("native", [True, False], ids=["bf16-gemms", "fp32-gemms"])
@pytest.mark.parametrize(("schedule", "trained", "most"), MOST)
def test_peak_is_small(schedule, trained, most, native):
    assert peak(schedule, trained, EIGHT_THOUSAND_ROWS[0], native) <= most


@pytest.mark.parametrize(("schedule", "trained", "most"), MOST)
def test_peak_is_small_in_a_gpus_chunks(schedule, trained, most):
    """Fake CPU tensors, taken in the chunks that a GPU gets."""
    assert peak(schedule, trained, EIGHT_THOUSAND_ROWS[0], native=True, limits=Limits()) <= most


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


@pytest.mark.parametrize(("schedule", "keeps"), [("single_pass", False), ("recompute", True)])
def test_a_single_pass_keeps_nothing_of_the_hidden_states(schedule, keeps):
    """u is kept instead of them, so that a caller who lets go of the hidden states frees them."""
    hidden = torch.randn(4, 6, 8, requires_grad=True)
    weight = torch.randn(11, 8, requires_grad=keeps)
    saved = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor.data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        orpo_loss(hidden, weight, torch.randint(11, (4, 6)), schedule=schedule)
    assert (hidden.data_ptr() in saved) == keeps
