"""The peers' formulas of costs.py beside what their code allocates, counted storage by storage."""

from __future__ import annotations

import pytest

pytest.importorskip("rich")

from benchmarks import memory, peers
from orpo_kernels import costs
from orpo_kernels.gpus import GPUS, gpu_named

GIB = 2**30
SHAPES = [memory.Shape(16, 512), memory.Shape(16, 256, rows=3440), memory.Shape(2, 4096)]
NAMES = {  # in benchmarks.memory, and the formula
    "plain": lambda case: costs.plain(case, case.itemsize),
    "plain fp32": lambda case: costs.plain(case, 4),
    "TRL trainer": costs.trl_trainer,
    "Liger": costs.liger,
    "TRL-composed": costs.trl_chunked_torch,
}


def case_of(shape: memory.Shape, trained: bool) -> costs.Case:
    return costs.Case(
        shape.hidden, shape.vocabulary, shape.sequences, shape.length, shape.rows or shape.positions, trained=trained
    )


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_a_peers_bytes_are_what_its_code_allocates(name, trained):
    if not peers.PEERS[name].available:
        pytest.skip(f"{name} is not installed")
    run = memory.trl_composed_case(trained) if name == "TRL-composed" else memory.peer_case(name, trained)
    for shape in SHAPES:
        peak = run.peak(shape)
        assert NAMES[name](case_of(shape, trained)) == pytest.approx(peak.peak - peak.baseline, rel=0.02), str(shape)


def test_what_is_recommended_is_the_plans_choice():
    small = case_of(memory.Shape(2, 64), trained=True)
    large = case_of(memory.Shape(16, 4096), trained=True)
    budget = 5 * GIB
    assert costs.ours(small, budget)[0].plan.schedule == "resident"
    assert costs.ours(large, budget)[0].plan.schedule == "recompute"
    assert costs.ours(case_of(memory.Shape(8, 256), trained=False), budget)[0].gemms == 2
    assert [cost.gemms for cost in costs.ours(small, budget)] == [3, 4, 1]
    for cost in costs.peers(small) + costs.ours(small, budget):
        assert cost.flops == cost.gemms * 2 * 128 * 4096 * 128256


def test_gpus_by_name_or_size():
    assert gpu_named("h100") is GPUS[1]
    assert gpu_named("A100 80GB") is GPUS[0]
    assert gpu_named("24GB").memory == 24 * 10**9
    assert gpu_named("1.5gib").memory == 3 * 2**29
    for wrong in ("", "V100", "0GB", "GB", "twelveGB", "-3GB"):
        with pytest.raises(ValueError, match="neither one of A100 80GB"):
            gpu_named(wrong)
