"""Schedules cost exactly the GEMMs they promise, and the plan says what it chose and why."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from orpo_kernels import Limits, orpo_loss, plan
from orpo_kernels.engine.work import default_budget

PAIRS, LENGTH, SIZE, VOCAB = 3, 10, 24, 97
GEMM = 2 * SIZE * VOCAB


def gemms(needs_hidden: bool, needs_weight: bool, schedule: str, grad: bool = True, **options) -> float:
    """Vocabulary-sized GEMMs over the rows that matter, counted from the operations that ran."""
    hidden = torch.randn(2 * PAIRS, LENGTH, SIZE, requires_grad=needs_hidden)
    weight = torch.randn(VOCAB, SIZE, requires_grad=needs_weight)
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH))
    labels[:, :4] = -100  # prompts
    rows = (labels != -100).sum().item()
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(grad):
        loss = orpo_loss(hidden, weight, labels, schedule=schedule, **options).loss
        if loss.requires_grad:
            loss.backward()
    return counter.get_total_flops() / (GEMM * rows)


@pytest.mark.parametrize(
    ("needs_hidden", "needs_weight", "schedule", "expected"),
    [
        (False, False, "auto", 1),
        (True, False, "auto", 2),
        (True, False, "single_pass", 2),
        (True, False, "resident", 2),
        (True, False, "recompute", 3),
        (True, True, "auto", 3),
        (True, True, "resident", 3),
        (True, True, "recompute", 4),
        (False, True, "auto", 2),
        (False, True, "recompute", 3),
    ],
)
def test_gemm_counts(needs_hidden, needs_weight, schedule, expected, small_chunks):
    assert gemms(needs_hidden, needs_weight, schedule, limits=small_chunks) == expected


@pytest.mark.parametrize("schedule", ["auto", "resident", "recompute"])
def test_evaluation_is_one_gemm(schedule):
    assert gemms(True, True, schedule, grad=False) == 1


def test_groups_of_pairs_are_three_gemms():
    one_pair = 4 * VOCAB * (SIZE + 2 * 6)
    assert gemms(True, True, "resident", memory_budget=one_pair) == 3
    assert gemms(True, True, "auto", memory_budget=one_pair) == 3
    assert gemms(True, True, "auto", memory_budget=one_pair - 4 * VOCAB) == 4


@pytest.mark.parametrize("needs", itertools.product([False, True], repeat=3))
@pytest.mark.parametrize("schedule", ["auto", "resident", "recompute"])
def test_plan_counts_its_own_gemms(needs, schedule):
    needs_hidden, needs_weight, needs_bias = needs
    chosen = plan(
        100, 64, 1000, needs_hidden=needs_hidden, needs_weight=needs_weight, needs_bias=needs_bias, schedule=schedule
    )
    counted = {
        "evaluation": 1,
        "single_pass": 2,
        "resident": 1 + needs_hidden + needs_weight,
        "recompute": 2 + needs_hidden + needs_weight,
    }
    assert chosen.gemms == counted[chosen.schedule]
    assert chosen.flops == chosen.gemms * 2 * 100 * 64 * 1000


def test_plan_follows_the_budget():
    def choose(budget, largest_pair=None):
        return plan(8192, 4096, 128256, memory_budget=budget, largest_pair=largest_pair)

    residual, accumulator = 8192 * 128256 * 4, 4096 * 128256 * 4
    assert choose(residual).schedule == "resident"
    assert choose(residual).group_rows is None
    assert choose(residual - 1).schedule == "recompute"
    grouped = choose(residual - 1, largest_pair=lambda: 1024)
    assert grouped.schedule == "resident"
    assert grouped.group_rows == (residual - 1 - accumulator) // (128256 * 4)
    assert choose(accumulator + 1023 * 128256 * 4, largest_pair=lambda: 1024).schedule == "recompute"


def test_pair_sizes_are_read_only_where_they_decide():
    def unread():
        raise AssertionError("read")

    plan(100, 64, 1000, largest_pair=unread)
    plan(8192, 4096, 128256, memory_budget=4096 * 128256 * 4 - 1, largest_pair=unread)
    plan(8192, 4096, 128256, memory_budget=2**20, needs_weight=False, largest_pair=unread)


def test_forced_schedules_that_cannot_serve_say_why():
    with pytest.raises(ValueError, match=r"weight requires grad.*resident.*recompute"):
        plan(10, 8, 50, schedule="single_pass")
    with pytest.raises(ValueError, match="its bias requires grad"):
        plan(10, 8, 50, schedule="single_pass", needs_weight=False, needs_bias=True)
    with pytest.raises(ValueError, match=r"resident.*cannot serve.*MiB.*budget.*recompute"):
        plan(10_000, 8, 50_000, schedule="resident", memory_budget=2**20)


def test_a_trained_bias_under_a_frozen_weight_is_not_single_pass():
    assert plan(10, 8, 50, needs_weight=False, needs_bias=True).schedule == "resident"


def test_explain_names_schedule_bytes_and_reason():
    text = plan(8192, 4096, 128256, dtype=torch.bfloat16, memory_budget=2**30).explain()
    for part in ("recompute", "4 GEMMs", "does not fit the budget", "GiB", "budget 1 GiB"):
        assert part in text
    assert "frozen" in plan(10, 8, 50, needs_weight=False).explain()


def test_default_budget_is_a_share_of_the_memory():
    assert 2**26 < default_budget(torch.device("cpu")) < 2**40


def gpu_plan(rows: int, hidden: int, vocab: int, **options):
    budget = options.pop("memory_budget", 5 * 2**30)
    return plan(rows, hidden, vocab, dtype=torch.bfloat16, device="cuda", memory_budget=budget, **options)


@pytest.mark.parametrize("vocab", [32768, 128256, 256000])
def test_chunks_of_a_gpu(vocab):
    """cuBLAS gets 1k to 4k rows where the kernels work in place and the budget has room; eager torch may get fewer."""
    pytest.importorskip("triton")
    chosen = gpu_plan(8192, 2304, vocab, needs_weight=False)
    assert (chosen.schedule, chosen.fused) == ("single_pass", False)
    assert 1024 <= chosen.row_chunk <= 4096
    assert gpu_plan(8192, 2304, vocab, needs_weight=False, backend="torch").row_chunk < chosen.row_chunk or vocab < 5e4
    tight = gpu_plan(8192, 2304, vocab, needs_weight=False, memory_budget=2**25)
    assert tight.schedule == "recompute"
    assert "no room for the logits of 256 rows" in tight.explain()
    assert gpu_plan(200, 2304, vocab, needs_weight=False, memory_budget=2**25).schedule == "single_pass"


@pytest.mark.parametrize(("schedule", "fused"), [("single_pass", False), ("resident", False), ("recompute", True)])
def test_the_forward_pass_is_fused_where_nothing_else_needs_the_logits(schedule, fused, monkeypatch):
    """On a GPU that was not timed; `test_speeds.py` has the others."""
    pytest.importorskip("triton")
    monkeypatch.setattr("orpo_kernels.engine.planning.target_of", lambda device: None)
    trained = schedule != "single_pass"
    assert gpu_plan(8192, 4096, 128256, schedule=schedule, needs_weight=trained).fused == fused
    assert not gpu_plan(8192, 4096, 128256, schedule=schedule, needs_weight=trained, backend="torch").fused
    evaluation = gpu_plan(8192, 4096, 128256, needs_hidden=False, needs_weight=False)
    assert evaluation.fused
    assert "inside a kernel" in evaluation.explain()
    assert evaluation.peak_bytes < 2**27


@pytest.mark.parametrize(("trained", "rows"), [(False, 500), (True, 1000)])
def test_16_bits_on_a_cpu_come_in_narrow_chunks_but_where_the_residual_is_held(trained, rows):
    limits = replace(Limits.of(on_cpu=True), gemm_dtype=torch.bfloat16)
    sizes = {"dtype": torch.bfloat16, "backend": "torch", "memory_budget": 2**30}
    assert plan(1000, 64, 2000, needs_weight=trained, limits=limits, **sizes).row_chunk == rows
