"""The formulas of costs.py, ours and the peers', beside what the code allocates, counted storage by storage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("rich")

from benchmarks.contest import memory, peers
from orpo_kernels import Rows, orpo_loss_from_rows
from orpo_kernels.app import costs
from orpo_kernels.app.gpus import DATA_SHEETS, gpu_named
from orpo_kernels.devices import GPU_KIND, KINDS

from .thorough import only_thorough

GIB = 2**30
SHAPES = [memory.Shape(16, 512), memory.Shape(16, 256, rows=3440), memory.Shape(2, 4096)]
NAMES = {  # in benchmarks.contest.memory, and the formula
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


# --- ours ----------------------------------------------------------------------------------------------------------

CASES = {
    "Llama-3-8B": costs.Case(4096, 128256, 16, 512, 8192),
    "Llama-3-8B, much padding": costs.Case(4096, 128256, 16, 256, 1720, bias=True, softcap=True),
    "Llama-2-7B, many rows": costs.Case(4096, 32000, 64, 1024, 30000),
    "SmolLM2-135M": costs.Case(576, 49152, 4, 2048, 3900),
    "Gemma-2-2B, one pair": costs.Case(2304, 256000, 2, 64, 128, softcap=True),
    "odd": costs.Case(577, 50257, 4, 33, 100, bias=True),
}


def allocated(case: costs.Case, schedule: str, gradient: bool) -> int:
    """The peak of the loss itself, beside hidden states and head."""
    trained = case.trained and gradient
    shape = memory.Shape(case.sequences, case.length, case.rows)
    with FakeTensorMode(allow_non_fake_inputs=True):

        def head(*size: int) -> Tensor:
            return torch.empty(*size, dtype=case.dtype, requires_grad=trained)

        hidden = torch.empty(case.positions, case.hidden_size, dtype=case.dtype, requires_grad=gradient)
        weight, bias = head(case.vocab_size, case.hidden_size), head(case.vocab_size) if case.bias else None
        leaves, rows = [t for t in (hidden, weight, bias) if t is not None], memory.fake_rows(shape)

        def run() -> tuple[Tensor, ...]:
            softcap = 30.0 if case.softcap else None
            with torch.set_grad_enabled(gradient):
                out = orpo_loss_from_rows(hidden, weight, rows, bias=bias, logit_softcap=softcap, schedule=schedule)
            return torch.autograd.grad(out.loss, [t for t in leaves if t.requires_grad]) if gradient else out

        peak = memory.peak_bytes(run, leaves)
    return peak.peak - peak.baseline


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", CASES)
def test_our_bytes_are_what_the_loss_allocates_on_a_gpu(name, trained, dtype, fake_gpu, monkeypatch):
    """To 2 %, or 4 MiB: how many splits a forward pass without logits has depends on the GPU's processors."""
    only_thorough(dtype == torch.float32 and name not in ("Llama-3-8B", "odd"), "as in bfloat16")
    case = replace(CASES[name], trained=trained, dtype=dtype)
    monkeypatch.setattr(Rows, "largest_pair", lambda rows: case.largest_pair)  # which would be read on the host
    for budget in (5 * GIB, GIB // 2):
        monkeypatch.setitem(KINDS, "cpu", replace(GPU_KIND, memory=16 * budget))
        for place, cost in enumerate(costs.ours(case, budget, "sm_90")):
            schedule, gradient = cost.plan.schedule, cost.plan.schedule != "evaluation"
            assert cost.plan.group_rows is None
            found = allocated(case, "auto" if place == 0 or not gradient else schedule, gradient)
            assert cost.bytes == pytest.approx(found, rel=0.02, abs=4 * 2**20), (schedule, budget)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("head", [(4096, 128256), (2304, 256000), (576, 49152)], ids=str)
def test_groups_of_pairs_are_known_and_take_no_more_than_is_said(head, dtype, fake_gpu, monkeypatch):
    """A group may not be full; here it nearly is."""
    budgets = {(4096, 128256): 3 * GIB, (2304, 256000): 4 * GIB, (576, 49152): GIB // 2}
    pairs, length = 32, 256
    case = costs.Case(*head, 2 * pairs, length, pairs * 400, dtype=dtype)
    monkeypatch.setitem(KINDS, "cpu", replace(GPU_KIND, memory=16 * budgets[head]))
    monkeypatch.setattr(Rows, "pair_sizes", lambda rows: [400] * pairs)
    cost = costs.ours(case, budgets[head])[0]
    assert cost.plan.group_rows is not None
    assert cost.gemms == 3
    found = allocated(case, "auto", gradient=True)
    assert found <= 1.001 * cost.bytes
    assert found >= 0.9 * cost.bytes


def test_what_is_recommended_is_the_plans_choice():
    budget = 5 * GIB

    def chosen(sequences: int, length: int, trained: bool = True) -> costs.Cost:
        return costs.ours(case_of(memory.Shape(sequences, length), trained), budget)[0]

    small = case_of(memory.Shape(2, 64), trained=True)
    assert chosen(2, 64).plan.schedule == "resident"
    assert chosen(2, 64).plan.group_rows is None
    assert chosen(16, 4096).plan.group_rows >= 2 * 4096  # room for the largest pair, whatever its rows
    assert chosen(16, 8192).plan.schedule == "recompute"
    assert chosen(8, 256, trained=False).gemms == 2
    assert [cost.gemms for cost in costs.ours(small, budget)] == [3, 4, 1]
    for cost in costs.peers(small) + costs.ours(small, budget):
        assert cost.flops == cost.gemms * 2 * 128 * 4096 * 128256


def test_gpus_by_name_or_size():
    assert gpu_named("h100") is DATA_SHEETS[1]
    assert gpu_named("A100 80GB") is DATA_SHEETS[0]
    assert gpu_named("24GB").memory == 24 * 10**9
    assert gpu_named("1.5gib").memory == 3 * 2**29
    for wrong in ("", "V100", "0GB", "GB", "twelveGB", "-3GB"):
        with pytest.raises(ValueError, match="neither one of A100 80GB"):
            gpu_named(wrong)
