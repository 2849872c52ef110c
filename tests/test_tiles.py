"""The chooser of tiles: its table, its rules, and the file that overrides it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed")

from triton.tools.tensor_descriptor import TensorDescriptor

from benchmarks.kernels import autotune
from orpo_kernels.engine.work import COLUMNS_PER_TILE
from orpo_kernels.ops.triton import tiles
from orpo_kernels.ops.triton.launch import INTERPRETER, Target

KIB = 1024
SHARED = {  # bytes that a block may take: CUDA programming guide, AMD's instruction set guides
    "sm_80": 163 * KIB,
    "sm_86": 99 * KIB,
    "sm_89": 99 * KIB,
    "sm_90": 227 * KIB,
    "sm_100": 227 * KIB,
    "sm_103": 227 * KIB,
    "sm_120": 99 * KIB,
    "sm_121": 99 * KIB,
    "gfx942": 64 * KIB,
    "gfx950": 160 * KIB,
    "gfx1100": 64 * KIB,
    "anything else": 48 * KIB,
}
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def target_of(name: str) -> Target:
    return Target("cuda", int(name[3:])) if name.startswith("sm_") else Target("hip", name)


def operand_bytes(tile: tiles.MatmulTile, dtype: torch.dtype, name: str) -> int:
    """Shared memory of a tile's operands: all stages where products read them there, one less where registers hold it.

    `test_compiled.py` has the compiler's own figures.
    """
    in_shared_memory = name in ("sm_90", "sm_100", "sm_103", "gfx950")
    stages = tile.stages if in_shared_memory else tile.stages - 1
    return stages * (tile.rows + tile.columns) * tile.depth * dtype.itemsize


def is_power_of_two(number: int) -> bool:
    return number > 0 and number & (number - 1) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SHARED)
def test_every_tile_fits(name, dtype):
    target = target_of(name)
    for tile in (tiles.matmul_tile(dtype, target), tiles.matmul_tile(dtype, target).narrow(target)):
        assert operand_bytes(tile, dtype, name) <= SHARED[name]
        sizes = (tile.rows, tile.columns, tile.depth, tile.warps)
        assert all(map(is_power_of_two, sizes))
        assert min(tile.rows, tile.columns, tile.depth) >= 16
        assert not tile.tma or name in ("sm_90", "sm_100", "sm_103", "sm_120", "sm_121")


def test_the_table_and_this_test_name_the_same_targets():
    assert set(tiles.MATMUL_TILES) - {"interpreter"} == set(SHARED) - {"anything else"}


def test_targets_are_called_as_their_makers_do():
    assert Target("cuda", 90).name == "sm_90"
    assert Target("hip", "gfx942:sramecc+:xnack-").name == "gfx942"
    assert INTERPRETER.name == "interpreter"


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("vocab_size", [1, 2, 1000, 16384, 16385, 32768, 256000])
def test_rows_of_any_length_have_a_tile(name, vocab_size):
    tile = tiles.row_tile(vocab_size, torch.bfloat16, target_of(name))
    assert is_power_of_two(tile.columns)
    assert tile.columns < 2 * vocab_size or tile.columns == 1
    threads = tile.warps * (64 if name.startswith("gfx9") else 32)
    assert threads <= 1024
    assert tile.columns <= 64 * threads


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize(("vocab_size", "columns"), [(1, 1), (1000, 1024), (4097, 4096), (256000, 4096)])
def test_a_pass_has_a_tile_that_fits_the_registers(name, vocab_size, columns):
    tile = tiles.pass_tile(vocab_size, target_of(name))
    assert (tile.columns, tile.warps) == (min(columns, tiles.PASS_COLUMNS.get(name, 4096)), 8)


@pytest.mark.parametrize("rows", [1, 128, 129, 4096, 131072])
@pytest.mark.parametrize("vocab_size", [1, 255, 256, 257, 49152, 128256, 256000])
@pytest.mark.parametrize("persistent", [False, True])
def test_splits_cover_the_vocabulary_and_none_is_empty(rows, vocab_size, persistent):
    target = Target("cuda", 90)
    tile = replace(tiles.matmul_tile(torch.bfloat16, target), persistent=persistent)
    splits, tiles_per_split = tiles.vocabulary_splits(rows, vocab_size, tile, target)
    columns = tiles_per_split * tile.columns
    assert (splits - 1) * columns < vocab_size <= splits * columns
    assert tiles_per_split == 1 or not persistent


def test_a_plan_counts_the_statistics_of_persistent_programs_tiles():
    of_16_bits = {name: entries[torch.bfloat16] for name, entries in tiles.MATMUL_TILES.items()}
    assert {name: tile.columns for name, tile in of_16_bits.items() if tile.persistent} == COLUMNS_PER_TILE
    assert not any(entries[torch.float32].persistent for entries in tiles.MATMUL_TILES.values())


def test_persistent_programs_are_as_many_as_run_at_one_time():
    target, tile = Target("cuda", 90, 132), tiles.MatmulTile(128, 256, 64, warps=8, stages=4, persistent=True)
    assert [tiles.programs(n, tile, target) for n in (0, 1, 132, 5000)] == [0, 1, 132, 132]
    assert tiles.programs(5000, replace(tile, persistent=False), target) == 5000


def test_fp32_is_multiplied_as_exactly_as_torch_is_set_to():
    before = torch.get_float32_matmul_precision()
    try:
        exact = {}
        for precision in ("highest", "high"):
            torch.set_float32_matmul_precision(precision)
            names = ("sm_75", "sm_90", "gfx942", "gfx1100")
            exact[precision] = [tiles.dot_precision(torch.float32, target_of(name)) for name in names]
            assert tiles.dot_precision(torch.bfloat16, target_of("sm_90")) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
    assert exact == {
        "highest": ["ieee", "tf32x3", "ieee", "bf16x6"],
        "high": ["ieee", "tf32", "ieee", "bf16x6"],
    }


def test_descriptors_need_rows_that_start_at_16_bytes():
    target = target_of("sm_90")
    aligned, odd = torch.zeros(8, 64, dtype=torch.bfloat16), torch.zeros(8, 65, dtype=torch.bfloat16)
    whole = tiles.matmul_tile(torch.bfloat16, target)
    assert whole.tma
    assert tiles.tile_of(aligned, aligned, True, target) == whole
    assert isinstance(tiles.operands(aligned, aligned, whole)[0], TensorDescriptor)
    by_address = replace(
        whole.narrow(target), tma=False, persistent=False
    )  # addresses take the registers of the widest tile
    for x, w in ((aligned, odd), (odd[:, :64], aligned), (aligned.flatten()[1:449].view(7, 64), aligned)):
        assert tiles.tile_of(x, w, True, target) == by_address
    assert tiles.operands(aligned, odd, by_address) == (aligned, odd)


def test_an_epilogue_with_registers_of_its_own_has_a_narrower_tile():
    x = torch.zeros(8, 64, dtype=torch.bfloat16)
    for name, columns in (("sm_90", 128), ("gfx942", 128), ("gfx1100", 64)):
        assert tiles.tile_of(x, x, False, target_of(name)).columns == columns


# --- the file --------------------------------------------------------------------------------------------------------

TILE = {"rows": 64, "columns": 32, "depth": 16, "warps": 2, "stages": 5}


@pytest.fixture
def write(monkeypatch, tmp_path):
    def write(text: str) -> None:
        (tmp_path / "tiles.json").write_text(text)
        monkeypatch.setenv(tiles.TILES_FILE, str(tmp_path / "tiles.json"))
        tiles.tiles_of_file.cache_clear()

    yield write
    tiles.tiles_of_file.cache_clear()


def test_a_file_overrides_what_it_names(write):
    plain = {dtype: tiles.matmul_tile(dtype, target_of("sm_90")) for dtype in DTYPES}
    write(json.dumps({"sm_90": {"bfloat16": {**TILE, "tma": True}}, "gfx942": {"float32": TILE}}))
    ours = tiles.MatmulTile(64, 32, 16, warps=2, stages=5, tma=True)
    assert tiles.matmul_tile(torch.bfloat16, target_of("sm_90")) == ours
    assert tiles.matmul_tile(torch.float16, target_of("sm_90")) == ours
    assert tiles.matmul_tile(torch.float32, target_of("sm_90")) == plain[torch.float32]
    assert tiles.matmul_tile(torch.bfloat16, target_of("sm_100")) != ours
    assert tiles.matmul_tile(torch.float32, target_of("gfx942")) == replace(ours, tma=False)


def of_sm_90(**changes: object) -> str:
    return json.dumps({"sm_90": {"bfloat16": TILE | changes}})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "Expecting property name"),
        ("[]", "it must be {target: {dtype:"),
        ('{"sm_90": 3}', "it must be {target: {dtype:"),
        ('{"sm_90": {"int8": {}}}', "dtype is 'int8', it must be one of bfloat16, float32"),
        ('{"sm_90": {"bfloat16": {"rows": 64}}}', "sm_90, bfloat16: {'rows': 64} must have columns, depth, rows"),
        (of_sm_90(ctas=2), "may have group, persistent, tma"),
        (of_sm_90(rows=96), "rows is 96, it must be a power of two"),
        (of_sm_90(rows="64"), "rows is '64', it must be a power of two"),
        (of_sm_90(depth=8), "depth is 8, it must be a whole number from 16"),
        (of_sm_90(stages=0), "stages is 0, it must be a whole number from 1"),
        (of_sm_90(stages=2.5), "stages is 2.5, it must be a whole number"),
        (of_sm_90(warps=True), "warps is True, it must be a whole number"),
        (of_sm_90(tma=1), "tma is 1, it must be true or false"),
        (of_sm_90(persistent=1), "persistent is 1, it must be true or false"),
        (of_sm_90(group=3), "group is 3, it must be a power of two"),
    ],
)
def test_a_file_that_is_wrong_is_refused_by_name(write, text, reason):
    write(text)
    with pytest.raises(ValueError, match=r"ORPO_KERNELS_TILES=.*tiles\.json: ") as error:
        tiles.matmul_tile(torch.bfloat16, target_of("sm_90"))
    assert reason in str(error.value)


def test_a_file_that_is_missing_is_named(monkeypatch):
    monkeypatch.setenv(tiles.TILES_FILE, "/nowhere/tiles.json")
    tiles.tiles_of_file.cache_clear()
    with pytest.raises(ValueError, match=r"/nowhere/tiles.json: .*No such file"):
        tiles.matmul_tile(torch.bfloat16, target_of("sm_90"))


# --- what writes the file --------------------------------------------------------------------------------------------


def test_autotuning_says_that_it_needs_a_gpu(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert autotune.main([]) == 2
    assert "needs a GPU" in capsys.readouterr().err


def test_autotuning_writes_what_the_chooser_reads(write, tmp_path):
    write(json.dumps({"gfx942": {"float32": TILE}}))
    best = tiles.MatmulTile(128, 64, 32, warps=4, stages=3)
    autotune.write(tmp_path / "tiles.json", target_of("sm_89"), "bfloat16", best)
    assert tiles.matmul_tile(torch.bfloat16, target_of("sm_89")) == best
    assert tiles.matmul_tile(torch.float32, target_of("gfx942")) == tiles.MatmulTile(**TILE)  # is kept


@pytest.mark.parametrize("name", SHARED)
def test_candidates_are_valid_and_begin_with_the_tables_own(name, write):
    target = target_of(name)
    found = autotune.candidates(torch.bfloat16, target)
    assert found[0] == tiles.matmul_tile(torch.bfloat16, target)
    assert len(found) == len(set(found)) > 10
    for tile in found:
        write(json.dumps({name: {"bfloat16": asdict(tile)}}))
        assert tiles.matmul_tile(torch.bfloat16, target) == tile
