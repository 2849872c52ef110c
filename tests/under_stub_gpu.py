"""What the wrappers launch on GPUs that are not there: grids, specialisations, resource checks. Nothing is executed.

`test_compiled.py` runs this file in a process of its own: kernels have to be compiled here, not interpreted.
"""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.kernels.compiled import SCHEDULES, inspect, run_labels, run_loss, run_shard
from benchmarks.kernels.stub_gpu import TARGETS, StubGPU, stub_gpu
from benchmarks.shapes import SHAPES
from orpo_kernels.engine.gemm import WeightSlices
from orpo_kernels.ops.triton import project_log_odds

ROWS = (1000, 1001, 4096, 131072)
EVERY_CHUNK = "gather_rows residual scatter_rows"
KERNELS = {  # of a loss whose gradient is taken, by schedule
    "evaluation": "gather_rows split_statistics join_splits",
    "single_pass": EVERY_CHUNK,
    "resident": EVERY_CHUNK,
    "resident by groups": EVERY_CHUNK,
    "recompute": "gather_rows split_statistics join_splits project_residual scatter_rows",
    "sparse": f"{EVERY_CHUNK} column_statistics gather_columns",
}
EVERY_LOSS = {"sequence_sums_kernel", "odds_ratio_kernel"}


def launches_of(gpu: StubGPU, *arguments, **options) -> list:
    first = len(gpu.launches)
    run_loss(*arguments, **options)
    return gpu.launches[first:]


# A small model by every schedule, and a soft-cap and a bias by that with most kernels.
FEW = [("SmolLM2-135M", schedule) for schedule in SCHEDULES] + [("Gemma-2-2B", "recompute"), ("Phi-2", "recompute")]


@pytest.mark.parametrize(
    ("name", "schedule"),
    [
        pytest.param(name, schedule, marks=() if (name, schedule) in FEW else pytest.mark.slow)
        for name in SHAPES
        for schedule in SCHEDULES
    ],
)
def test_grids_and_specialisations_from_1k_to_128k_rows(name, schedule):
    shape = SHAPES[name]
    with stub_gpu("sm_90", compile=False) as gpu, FakeTensorMode():
        by_rows = {}
        for rows in ROWS[: 2 if schedule == "sparse" else 4 if name == "SmolLM2-135M" else 3]:  # more are many launches
            launches = launches_of(gpu, shape, torch.bfloat16, rows, schedule)
            kernels = {f"{name}_kernel" for name in KERNELS[schedule].split()}
            assert {launch.kernel for launch in launches} == kernels | EVERY_LOSS
            for launch in launches:
                x, y, z = launch.grid
                assert 1 <= x < 2**31, launch
                assert 1 <= y <= 65535, launch
                assert 1 <= z <= 65535, launch
            by_rows[rows] = {launch.specialisation for launch in launches}
    if schedule == "resident by groups":
        # Where the gradient of the hidden states is a sum over groups it is in fp32.
        by_rows = {rows: {s for s in found if s.kernel != "scatter_rows_kernel"} for rows, found in by_rows.items()}
    assert all(found == by_rows[ROWS[0]] for found in by_rows.values())


@pytest.mark.parametrize("target", TARGETS)
def test_every_tile_of_the_product_is_taken_once(target):
    """Rows times columns of the programs' tiles, from the grids alone; a persistent program takes several."""
    shape = SHAPES["Llama-3.2-1B"]
    with stub_gpu(target, compile=False) as gpu, FakeTensorMode():
        launches = launches_of(gpu, shape, torch.bfloat16, 5000, "recompute")
    taken = {"project_residual_kernel": 0, "split_statistics_kernel": 0}
    for launch in launches:
        if launch.kernel in taken:
            constants, arguments = launch.specialisation.constexprs, launch.arguments
            width, rows = arguments["S"], arguments["R"]
            programs = -(-rows // constants["BLOCK_R"]) * arguments.get("num_splits", -(-width // constants["BLOCK_V"]))
            assert constants["PERSISTENT"] == (target == "sm_90")
            assert launch.grid[0] == (min(programs, TARGETS[target].processors) if target == "sm_90" else programs)
            taken[launch.kernel] += width * rows
    assert taken == dict.fromkeys(taken, shape.vocab_size * 5000)


@pytest.mark.parametrize(
    ("change", "persistent"),
    [
        ({}, True),
        ({"vocab": 128 * 1003}, False),
        ({"bias": True}, False),
        ({"scale": 0.5}, False),
        ({"softcap": 30.0}, False),
        ({"weight": torch.float32}, False),
        ({"size": 1001}, False),
    ],
    ids=str,
)
def test_statistics_of_each_tile_are_a_plain_heads(change, persistent):
    """What else the epilogue does costs the widest tile's registers."""
    sizes = {"vocab": 128256, "size": 1024, "bias": False, "scale": 1.0, "softcap": None, "weight": torch.bfloat16}
    sizes |= change
    with stub_gpu("sm_90", compile=False) as gpu, FakeTensorMode():
        x = torch.empty(300, sizes["size"], dtype=torch.bfloat16)
        w = torch.empty(sizes["vocab"], sizes["size"], dtype=sizes["weight"])
        bias = torch.empty(sizes["vocab"], dtype=torch.bfloat16) if sizes["bias"] else None
        target = torch.empty(300, dtype=torch.int64)
        weight = WeightSlices(w, torch.bfloat16, sizes["vocab"])
        project_log_odds(x, weight, bias, target, sizes["scale"], sizes["softcap"], None)
    first = gpu.launches[0]
    assert first.specialisation.constexprs["PERSISTENT"] == persistent
    assert first.arguments["num_splits"] == 501 if persistent else first.arguments["num_splits"] < 100


def test_rows_of_labels_of_any_sizes_are_made_by_the_same_code():
    """A program for each sequence, and one for all rows; lengths and numbers of pairs make no difference."""
    with stub_gpu("sm_90", compile=False) as gpu, FakeTensorMode():
        found = []
        for pairs, length in ((4, 1024), (1, 1), (3, 1000), (7, 16), (5, 131072)):
            first = len(gpu.launches)
            run_labels(pairs, length)
            grids = {launch.kernel: launch.grid for launch in gpu.launches[first:]}
            found.append(len(gpu.specialisations))
            one, of_sequences = (1, 1, 1), (2 * pairs, 1, 1)
            assert grids == {
                "count_labels_kernel": of_sequences,
                "label_rows_kernel": of_sequences,
                "sequence_sums_kernel": of_sequences,
                "count_rows_kernel": one,
                "are_within_kernel": one,
            }
    assert found == [2 * 2 + 3] * 5  # rows are made twice: shifted, with labels of the NLL and its means, and without


@pytest.mark.parametrize("shape", SHAPES.values(), ids=str)
def test_a_shard_of_the_vocabulary(shape):
    """Its kernels, one program a row, are compiled once for any number of rows."""
    with stub_gpu("sm_90", compile=False) as gpu, FakeTensorMode():
        for rows in ROWS:
            run_shard(shape, torch.bfloat16, rows)
    assert [launch.kernel for launch in gpu.launches] == ["statistics_kernel", "recomputed_residual_kernel"] * len(ROWS)
    assert [launch.grid for launch in gpu.launches[::2]] == [(rows, 1, 1) for rows in ROWS]
    assert [launch.grid for launch in gpu.launches[1::2]] == [(rows, 1, 1) for rows in ROWS]
    assert len(gpu.specialisations) == 2


def test_every_entry_of_a_sparse_residual_is_looked_at_once():
    """Rows times columns of the programs' tiles; and one program for each row that columns are gathered of."""
    shape, rows = SHAPES["Llama-3.2-1B"], 1000
    with stub_gpu("sm_90", compile=False) as gpu, FakeTensorMode():
        launches = launches_of(gpu, shape, torch.bfloat16, rows, "sparse")
    looked_at = [launch for launch in launches if launch.kernel == "column_statistics_kernel"]
    gathered = [launch for launch in launches if launch.kernel == "gather_columns_kernel"]
    assert sum(launch.arguments["B"] for launch in looked_at) == sum(launch.grid[0] for launch in gathered) == rows
    for launch in looked_at:
        width = launch.specialisation.constexprs["BLOCK_V"]
        assert (launch.grid[0] - 1) * width < shape.vocab_size <= launch.grid[0] * width


@pytest.mark.parametrize(
    ("schedule", "expected", "most"),
    [("single_pass", 5, 9000), ("resident", 6, 9000), ("recompute", 8, 9000), ("sparse", 9, 200)],
)
@pytest.mark.parametrize("weighted", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_training_run_of_any_lengths_compiles_in_its_first_step(schedule, expected, most, weighted):
    """Four steps, each with its own number of rows and of pairs."""
    lengths = random.Random(0)
    with stub_gpu("sm_90", compile=False) as gpu, FakeTensorMode():
        counts = []
        for _ in range(4):
            rows, pairs = lengths.randint(100, most), lengths.randint(1, 9)
            run_loss(SHAPES["Qwen3-0.6B"], torch.bfloat16, rows, schedule, pairs, weighted)
            counts.append(len(gpu.specialisations))
    assert counts == [expected] * 4


def test_the_stub_tells_specialisations_apart():
    """Otherwise none of the above could fail."""
    with stub_gpu("sm_90", compile=False) as gpu, FakeTensorMode():
        run_loss(SHAPES["Llama-3.2-1B"], torch.bfloat16, 1000, "evaluation")
        before = len(gpu.specialisations)
        run_loss(replace(SHAPES["Llama-3.2-1B"], hidden_size=2047), torch.bfloat16, 1000, "evaluation")
        assert len(gpu.specialisations) > before
        columns = [s.constexprs["EVEN_H"] for s in gpu.specialisations if s.kernel == "split_statistics_kernel"]
    assert columns == [True, False]


def test_a_driver_is_asked_for_its_properties_once(monkeypatch):
    """It takes a millisecond: a frozen head of 8 chunks took 7 of them on the host (H100)."""
    asked = []
    with stub_gpu("sm_90", compile=False) as gpu, FakeTensorMode():
        answer = gpu.utils.get_device_properties
        monkeypatch.setattr(gpu.utils, "get_device_properties", lambda device: asked.append(device) or answer(device))
        for schedule in ("evaluation", "single_pass", "recompute"):
            run_loss(SHAPES["Llama-3-8B"], torch.bfloat16, 20000, schedule)
    assert len(gpu.launches) > 20
    assert len(asked) == 1


@pytest.mark.parametrize("schedule", ["evaluation", "single_pass", "recompute", "sparse"])
@pytest.mark.parametrize("name", ["sm_90", "gfx942"])
def test_without_a_row_nothing_is_multiplied(name, schedule):
    """A tensor descriptor of the tensor memory accelerator refuses a matrix without rows."""
    with stub_gpu(name, compile=False) as gpu, FakeTensorMode():
        run_loss(SHAPES["SmolLM2-135M"], torch.bfloat16, 0, schedule)
    assert {launch.kernel for launch in gpu.launches} <= EVERY_LOSS


def test_a_row_that_fits_the_registers_is_read_once():
    """Of the compiled residual; `test_compiled.py` has one that does not fit, which is read twice."""
    with stub_gpu("gfx942", compile=False) as gpu, FakeTensorMode():
        run_loss(SHAPES["Mistral-7B"], torch.bfloat16, 1000, "single_pass")
    (residual,) = (made for made in gpu.specialisations if made.kernel == "residual_kernel")
    code = inspect(residual)
    assert code.head == "one tile"
    assert (code.row_loads, code.row_stores, code.spilled) == (1, 1, 0)
