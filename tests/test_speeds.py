"""Which way of a forward pass is planned: the table of what was measured, and what it must not do to the memory."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch

from orpo_kernels import Limits
from orpo_kernels.engine import speeds
from orpo_kernels.engine.planning import Plan, planned
from orpo_kernels.engine.speeds import Record
from orpo_kernels.engine.work import Work, target_of

GIB = 2**30
WORK = Work(
    rows=8192,
    hidden_size=4096,
    vocab_size=128256,
    dtype=torch.bfloat16,
    weight_dtype=torch.bfloat16,
    device=torch.device("cuda"),
    backend="triton",
    needs_hidden=False,
    needs_weight=False,
    needs_bias=False,
    softcap=False,
    sparse_eps=None,
    target="sm_90",
)
FROZEN = replace(WORK, needs_hidden=True)
TRAINED = replace(FROZEN, needs_weight=True)
FP32 = {"dtype": torch.float32, "weight_dtype": torch.float32}
RECORD = Record("sm_90", "bfloat16", 4096, 128256, False, "evaluation", {"kernel": 2.0, "1024": 1.5}, "ms", "made up")


def planned_for(work: Work, schedule: str = "auto", budget: int = 5 * GIB) -> Plan:
    return planned(work, schedule, budget)


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Puts these records in the place of the table's, through its file."""

    def write(*records: Record) -> None:
        (tmp_path / "speeds.json").write_text(json.dumps([asdict(record) for record in records]))
        monkeypatch.setattr(speeds, "FILE", tmp_path / "speeds.json")
        forget()

    yield write
    monkeypatch.undo()
    forget()


def forget() -> None:
    speeds.records.cache_clear()
    planned.cache_clear()


def test_the_table_itself_is_valid_and_says_where_it_comes_from():
    found = speeds.read(speeds.FILE)
    assert len({record.key for record in found}) == len(found)
    assert all("20" in record.source for record in found)


def test_an_h100_evaluates_inside_the_kernel():
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert planned_for(replace(WORK, dtype=dtype, weight_dtype=dtype)).fused
    text = planned_for(replace(WORK, **FP32)).explain()
    assert "inside a kernel; timed: kernel 0.77, library 1 of the bare GEMM on sm_90 at H 4096, V 128256" in text


def test_fp32_where_tf32_may_serve_is_another_product(table):
    table(replace(RECORD, dtype="tf32"))
    for tf32 in (False, True):
        assert planned_for(replace(WORK, **FP32, tf32=tf32)).fused == (not tf32)


def test_a_new_measurement_changes_what_is_planned(table):
    for times, fused, rows in (
        ({"kernel": 1.0, "1024": 1.1, "4096": 1.2}, True, 4096),
        ({"kernel": 2.0, "1024": 1.1, "4096": 1.2}, False, 1024),
        ({"kernel": 2.0, "1024": 1.3, "4096": 1.2}, False, 4096),
        ({"kernel": 2.0, "1024": 1.21, "4096": 1.2}, False, 1024),  # more memory for less than 2 %
        ({"kernel": 1.01, "1024": 1.0, "4096": 1.0}, True, 4096),
    ):
        table(replace(RECORD, times=times))
        found = planned_for(WORK)
        assert (found.fused, found.row_chunk) == (fused, rows)
    table(replace(RECORD, schedule="single_pass", times={"1024": 1.2, "2048": 1.0, "8192": 1.0}))
    assert planned_for(FROZEN).row_chunk == 2048
    assert planned_for(WORK).fused  # of which the record says nothing


def test_recompute_takes_rounded_logits_in_neither_pass_or_in_both(table):
    """Its backward pass has them in fp32: with statistics of 16-bit logits, probabilities would not sum up to 1."""
    table(RECORD, replace(RECORD, dtype="float32"))
    assert planned_for(TRAINED, "recompute").fused
    assert not planned_for(replace(TRAINED, **FP32), "recompute").fused


def test_the_nearest_head_is_asked_and_none_that_is_much_wider(table):
    table(RECORD, replace(RECORD, hidden_size=3072, times={"kernel": 1.0, "1024": 2.0}))
    fused = {size: planned_for(replace(WORK, hidden_size=size)).fused for size in (1536, 3000, 3584, 5120, 8192)}
    assert fused == {1536: True, 3000: True, 3584: False, 5120: False, 8192: True}
    assert "nothing was timed on sm_90 near H 8192" in planned_for(replace(WORK, hidden_size=8192)).explain()
    table(RECORD, replace(RECORD, softcap=True, times={"kernel": 1.0, "1024": 2.0}))
    assert planned_for(replace(WORK, softcap=True)).fused
    assert not planned_for(WORK).fused


def test_a_gpu_that_was_not_timed_has_its_relatives_times_or_the_rule(table):
    table(RECORD)
    for target, fused, text in (
        ("sm_103", False, "its relative as sm_103 was not timed"),
        ("sm_80", True, "nothing was timed on sm_80"),
        ("gfx942", True, "nothing was timed on gfx942"),
        (None, True, "inside a kernel): nothing requires grad"),
    ):
        found = planned_for(replace(WORK, target=target))
        assert found.fused == fused
        assert text in found.explain()


def test_what_cannot_take_the_ways_keeps_the_rule(table):
    table(RECORD)
    for work in (
        replace(WORK, given_limits=Limits()),
        replace(WORK, weight_dtype=torch.float32),  # its cast slices would be cast again for every chunk
    ):
        assert planned_for(work).fused
    assert not planned_for(replace(WORK, backend="torch")).fused


@pytest.mark.parametrize("rows", [1, 100, 1000, 8192, 100_000])
@pytest.mark.parametrize("vocab", [32768, 128256, 256000])
def test_no_measurement_takes_more_memory_than_is_promised(rows, vocab, table):
    """A chunk has a quarter of the budget, whatever would be faster; the rest of a plan is as without a table."""
    ways = dict.fromkeys(speeds.WAYS, 3.0) | {"8192": 1.0, "2048": 2.0}
    frozen = {way: time for way, time in ways.items() if way != speeds.KERNEL}
    fp32 = replace(RECORD, times=ways, dtype="float32")
    table(replace(RECORD, times=ways), replace(RECORD, schedule="single_pass", times=frozen), fp32)
    for work, schedule in ((WORK, "auto"), (FROZEN, "auto"), (replace(TRAINED, **FP32), "recompute")):
        sized = replace(work, rows=rows, vocab_size=vocab)
        for budget in (2**20, 2**26, 2**28, 2**30, 2**32, 2**35):
            found = planned_for(sized, schedule, budget)
            without = planned_for(replace(sized, target=None), schedule, budget)
            most = found.held_bytes + sized.statistics_bytes + budget // 4
            assert found.forward_bytes <= max(without.forward_bytes, most)
            assert (found.held_bytes, found.backward_bytes) == (without.held_bytes, without.backward_bytes)
        assert found.row_chunk == -(-rows // -(-rows // 8192))  # with room it is as was the fastest


def test_a_device_that_is_not_here_has_no_kind():
    assert target_of(torch.device("cpu")) is None


def test_a_gpu_is_asked_for_its_kind_once(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: asked.append(d) or SimpleNamespace(major=9, minor=0)
    )
    monkeypatch.setattr(torch.version, "hip", None)
    target_of.cache_clear()
    try:
        assert [target_of(torch.device("cuda:0")) for _ in range(3)] == ["sm_90"] * 3
    finally:
        target_of.cache_clear()
    assert asked == [torch.device("cuda:0")]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"dtype": "float16"}, "dtype is 'float16', it must be one of bfloat16, float32, tf32"),
        ({"schedule": "resident"}, "schedule is 'resident', it must be one of evaluation, single_pass"),
        ({"source": ""}, "source is '', it must be a str"),
        ({"softcap": 1}, "softcap is 1, it must be a bool"),
        ({"hidden_size": 0}, "hidden_size is 0, it must be a positive whole number"),
        ({"times": {}}, "it must have some of kernel, library, 1024"),
        ({"times": {"1000": 1.0}}, "it must have some of kernel, library, 1024"),
        ({"times": {"kernel": 0}}, "all must be positive"),
        ({"schedule": "single_pass"}, "it must have some of library, 1024"),
        ({"more": 1}, "must have target, dtype"),
    ],
)
def test_a_record_that_is_wrong_is_refused_by_name(change, reason, tmp_path):
    path = tmp_path / "speeds.json"
    path.write_text(json.dumps([asdict(RECORD), asdict(RECORD) | change]))
    with pytest.raises(ValueError, match=r"speeds\.json: record 1: ") as error:
        speeds.read(path)
    assert reason in str(error.value)
    path.write_text("{}")
    with pytest.raises(ValueError, match="it must be a list of records"):
        speeds.read(path)
