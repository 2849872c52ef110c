"""The command for whoever has a GPU: its parts run end to end on a CPU at tiny sizes, in place of what is not there."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks print with rich: pip install 'orpo-kernels[bench]'")
pytest.importorskip("triton", reason="the command asks for triton as it does for a GPU")

from rich.console import Console

from benchmarks.contest.training_step import OURS, SHARED, TRL
from benchmarks.contest.turns import FLOOR, Measurement
from benchmarks.gpu import __main__ as command
from benchmarks.gpu import goals, heads, host, kernels, page, right, run, sparse_eps, step, tiles, ways
from benchmarks.gpu.cases import Case, Settings, Skip, Step
from benchmarks.gpu.heads import RECOMPUTE
from benchmarks.kernels import autotune
from benchmarks.report.results import Results
from benchmarks.shapes import ModelShape
from orpo_kernels.engine import speeds
from orpo_kernels.ops import torch_ops
from orpo_kernels.ops.triton.launch import INTERPRETER, Target

TINY = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "tie_word_embeddings": True,
}
SMALL = Settings(
    device="cpu",
    backend="torch",
    rounds=2,
    models=(ModelShape("one", 32, 640), ModelShape("capped", 32, 320, logit_softcap=30.0)),
    pairs=2,
    length=8,
    vocabularies=(640,),
    chunk_bytes=2**16,
    steps={"long prompts": Step(TINY, 2, 100)},
    attention=("sdpa",),
)


def records(part: Any, settings: Settings = SMALL) -> dict[str, dict[str, Any]]:
    found = {case.key: run.record_of(case) for case in part.cases(settings)}
    return json.loads(json.dumps(found))


def test_kernels_beside_a_copy_and_beside_products() -> None:
    found = records(kernels)
    keys = [f"kernels/{name}/640" for name in kernels.ROW_WISE]
    keys += [f"kernels/{name}/{model.name}" for model in SMALL.models for name in kernels.PRODUCTS]
    assert list(found) == keys
    logits = 51 * 640 * 2
    assert found["kernels/residual_/640"]["bytes"] == 2 * logits + 16 * 51
    assert found["kernels/statistics/640"]["bytes"] == logits + 24 * 51
    for record in found.values():
        assert record["ours"] > 0
        quotient = record["copy"] / record["ours"] if "bytes" in record else record["ours"] / record["GEMM"]
        assert math.isclose(record.get("share", record.get("ratio")), quotient)


def test_the_row_wise_kernels_are_given_what_they_take() -> None:
    """All of them run on the arguments that are timed, and give what they give elsewhere."""
    source = torch.randn(4, 640).bfloat16()
    logits, target, *transform = kernels._arguments("residual_", source)
    expected = torch_ops.statistics(source, target, *transform)[0]
    torch.testing.assert_close(torch_ops.residual_(logits, target, *transform), expected)
    assert not torch.equal(logits, source)  # the copy that is measured against keeps its own


def test_a_kernel_that_the_backend_lacks_is_named() -> None:
    with pytest.raises(Skip, match="the backend torch has no knot"):
        kernels._operation("knot", SMALL)


def test_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "PEERS", ("plain", "Liger"))
    monkeypatch.setattr("benchmarks.contest.peers.Peer.available", property(lambda peer: peer.name == "plain"))
    found = records(heads, replace(SMALL, models=SMALL.models[:1]))
    assert len(found) == 2 * 3
    trained = found["heads/one/100%/trained"]
    by_name = {one["name"]: one for one in trained["measurements"]}
    assert list(by_name) == [FLOOR, "ours", RECOMPUTE, "plain", "Liger"]
    assert "not installed" in by_name["Liger"]["failure"]
    assert all(len(by_name[name]["forward"]) == 2 for name in (FLOOR, "ours", RECOMPUTE, "plain"))
    assert "32 rows matter (100%)" in trained["work"]
    assert "13 rows matter" in found["heads/one/40%/trained"]["work"]
    assert [name for name in heads.PEERS if heads.serves(name, SMALL.models[1])] == ["plain"]  # Liger takes no soft-cap


def test_inputs_without_room_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def without_room(*_: Any) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(heads, "inputs", without_room)
    assert records(heads)["heads/one/100%/frozen"] == {"skipped": "out of memory: the inputs do not fit"}


def test_ways() -> None:
    """At sizes where all rows are one chunk."""
    found = records(ways)
    assert list(found) == [
        f"ways/{head}/{schedule}"
        for head in ("one/bfloat16", "capped/bfloat16", "one/float32")
        for schedule in speeds.SCHEDULES
    ]
    assert {name: list(record["times"]) for name, record in found.items()} == {
        name: (["kernel"] if "evaluation" in name else []) + ["8" if "float32" in name else "32"] for name in found
    }
    assert [record["softcap"] for record in found.values()] == [False] * 2 + [True] * 2 + [False] * 2
    assert all(record["target"] is None for record in found.values())  # so that nothing of it goes into the table
    assert ways.renewed((), {"cases": found, "machine": MACHINE}) == []
    assert len(page._ways(found).rows) == 6


def test_what_was_measured_replaces_the_tables_records_of_the_same_heads(tmp_path: Path) -> None:
    path = tmp_path / "speeds.json"
    path.write_text(speeds.FILE.read_text())
    before = speeds.read(path)
    assert ways.write({"cases": CASES, "machine": MACHINE}, path) == []
    again = {**asdict(before[0]), "times": {"kernel": 1.00004, "1024": 2.0}, "rows": 8192}
    del again["source"]
    left_out = {"skipped": "out of memory"}
    results = {"cases": {"ways/a": again, "ways/b": again | {"target": "sm_80"}, "ways/c": left_out}}
    assert ways.write({**results, "machine": MACHINE}, path) == [path]
    first, *kept, last = speeds.read(path)
    assert kept == list(before[1:])
    assert (first.key, first.times) == (before[0].key, {"kernel": 1.0, "1024": 2.0})
    assert first.source == "2026-01-02, A GPU; torch 2.0: 8192 rows, in turns"
    assert last == replace(first, target="sm_80")


def test_host() -> None:
    found = records(host)
    assert list(found) == ["host/evaluation", "host/frozen", "host/trained"]
    for record in found.values():
        assert math.isclose(record["ratio"], record["ours"] / record["plain"])
        assert record["operations"] is None  # there is no device to count on


def test_a_step_where_trl_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Padded and shared, by our own trainer; with TRL, `test_training_step.py` has the three of them."""
    pytest.importorskip("accelerate")
    pytest.importorskip("datasets")
    monkeypatch.setattr(step, "BATCHES", 3)
    is_there = step.importlib.util.find_spec
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "trl" else is_there(name))
    (record,) = records(step).values()
    assert list(record["contestants"]) == [OURS, SHARED]
    assert all(one["seconds"] > 0 < one["peak_bytes"] for one in record["contestants"].values())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert records(step) == {"step/long prompts/sdpa": {"skipped": f"{' and '.join(step.NEEDED)} not installed"}}


def test_the_text_of_a_step_is_as_long_as_it_says() -> None:
    pytest.importorskip("transformers")
    size = Step(TINY, 3, 200)
    tokenizer, pairs = step.tokenizer(), step.pairs("long prompts", size)
    assert len(pairs) == 3 * step.BATCHES
    for pair in pairs:
        lengths = {name: len(tokenizer(text, add_special_tokens=False)["input_ids"]) for name, text in pair.items()}
        assert lengths == {name: len(text) for name, text in pair.items()}
        assert lengths["prompt"] >= 0.48 * 200
        assert lengths["prompt"] + max(lengths["chosen"], lengths["rejected"]) < 200


def test_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    own = autotune.tiles.MATMUL_TILES["interpreter"][torch.bfloat16]
    others = [replace(own, warps=8), replace(own, rows=32, columns=16)]
    found_here = [own, *others, replace(own, warps=8, stages=2)]  # the last differs in two things
    monkeypatch.setattr(tiles, "current_target", lambda: INTERPRETER)
    monkeypatch.setattr(autotune, "triton_ops", torch_ops)
    monkeypatch.setattr(autotune, "candidates", lambda *_: found_here)
    found = records(tiles)
    assert [record["fields"] for record in found.values()] == [asdict(tile) for tile in others]
    assert all(record["ratio"] > 0 < record["tile"] for record in found.values())
    monkeypatch.setattr(autotune, "fault_of", lambda *_: "wrong by 1e+00")
    assert list(records(tiles).values()) == [{"skipped": "wrong by 1e+00"}] * 2


def test_a_few_tiles_are_tried_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "current_target", lambda: Target("cuda", 90))
    found = tiles.neighbours()
    own = autotune.tiles.matmul_tile(torch.bfloat16, Target("cuda", 90))
    assert 4 < len(found) < 16
    assert own not in found
    assert {replace(own, persistent=False), replace(own, group=8)} <= set(found)
    assert len({tiles.name_of(tile) for tile in found}) == len(found)


def test_a_part_that_cannot_be_listed_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Without a driver; and tiles of a file would be in the place of those that are tried."""

    def without_a_driver() -> None:
        raise RuntimeError("0 active drivers")

    monkeypatch.setattr(tiles, "current_target", without_a_driver)
    for name, reason in (("", "0 active drivers"), ("tiles.json", "ORPO_KERNELS_TILES is set")):
        monkeypatch.setenv("ORPO_KERNELS_TILES", name)
        results = Results(tmp_path / name / "results", {})
        run.run(SMALL, results, 60, [run.Part("tiles", 1, tiles.cases)])
        assert results.cases["tiles"]["skipped"].startswith(reason)


def test_sparse_eps(monkeypatch: pytest.MonkeyPatch) -> None:
    sparse_eps.real.cache_clear()
    monkeypatch.setattr("benchmarks.contest.workloads.have_real_data", lambda: False)
    assert "no SmolLM2-135M" in records(sparse_eps)["sparse_eps/frozen"]["skipped"]
    work, _ = heads.inputs(SMALL.models[0], "100%", "cpu", 2, 8)
    monkeypatch.setattr(sparse_eps, "real", lambda _: work)
    found = records(sparse_eps)
    for record in found.values():
        assert {one["name"]: one["failure"] for one in record["measurements"]} == dict.fromkeys(
            [FLOOR, "ours", sparse_eps.SPARSE]
        )
    assert page._sparse(found).rows[0][0] == "frozen"


# --- the tests -------------------------------------------------------------------------------------------------------

LINES = """\
[gw0] [ 20%] PASSED tests/gpu/test_a.py::test_one[hidden states-triton]
[gw1] [ 40%] FAILED tests/gpu/test_a.py::test_two[bf16]
tests/gpu/test_a.py::test_three SKIPPED (no GPU)           [ 60%]
tests/gpu/test_a.py::test_four[a b] PASSED                 [ 80%]
tests/gpu/test_a.py::test_five ERROR                       [100%]
SKIPPED [1] tests/gpu/conftest.py:19: no GPU
FAILED tests/gpu/test_a.py::test_two[bf16] - AssertionError: 2 FAILED
"""


def test_outcomes_are_counted() -> None:
    failed = ["tests/gpu/test_a.py::test_two[bf16]", "tests/gpu/test_a.py::test_five"]
    assert right.outcomes(LINES) == {"passed": 2, "skips": 1, "failed": failed}
    with pytest.raises(Skip, match="no test ran: usage: pytest"):
        right.outcomes("\nusage: pytest [options]\n")


def test_tests_run_in_a_process_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "test_it.py").write_text("def test_a(): pass\ndef test_b(): assert False\n")
    found = right.run([str(tmp_path / "test_it.py")], replace(SMALL, seconds=600))
    assert (found["passed"], found["skips"], found["cut"]) == (1, 0, False)
    assert [test.rpartition("::")[2] for test in found["failed"]] == ["test_b"]


def test_what_the_time_cuts_keeps_what_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert not right._ends_within(command, 0.1, subprocess.DEVNULL)

    def cut(command: list[str], seconds: float, output: Any) -> bool:
        output.write(LINES)
        return False

    monkeypatch.setattr(right, "_ends_within", cut)
    found = right.run(["tests/gpu"], replace(SMALL, seconds=10))
    assert (found["passed"], found["cut"], found["seconds_given"]) == (2, True, 10)


@pytest.mark.parametrize(("free", "count"), [(80, 4), (40, 2), (8, 1)])
def test_as_many_processes_as_have_room(free: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free * 2**30, 0))
    assert right.processes(replace(SMALL, device="cuda")) == count


# --- the run ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "release", lambda device: None)  # which collects the garbage of all the tests before


def parts(ran: list[str], fail: str = "") -> list[run.Part]:
    """Two parts of two cases, of which one may be interrupted."""

    def measure(key: str, settings: Settings) -> dict[str, Any]:
        if key == fail:
            raise KeyboardInterrupt
        ran.append(key)
        return {"seconds": settings.seconds}

    def cases(name: str, settings: Settings) -> Iterator[Case]:
        return (Case(key, partial(measure, key, settings)) for key in (f"{name}/1", f"{name}/2"))

    return [run.Part(name, 0.5, partial(cases, name)) for name in ("a", "b")]


@pytest.mark.usefixtures("fast")
def test_an_interrupted_run_goes_on(tmp_path: Path) -> None:
    ran: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        run.run(SMALL, Results(tmp_path, {}), 100, parts(ran, fail="b/1"))
    assert ran == ["a/1", "a/2"]
    kept = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert list(kept) == ran
    assert kept["a/1"]["seconds"] <= 50 < kept["a/1"]["seconds"] + 1  # half of the time is the first part's
    results = Results(tmp_path, {})
    run.run(SMALL, results, 100, parts(ran))
    assert ran == ["a/1", "a/2", "b/1", "b/2"]
    assert 50 < results.cases["b/2"]["seconds"] <= 100  # and what it leaves is the second's
    assert results.cases["a/1"] == kept["a/1"]


@pytest.mark.usefixtures("fast")
def test_without_time_everything_is_named_and_tried_again(tmp_path: Path) -> None:
    ran: list[str] = []
    results = Results(tmp_path, {})
    run.run(SMALL, results, 0, parts(ran))
    assert not ran
    assert list(results.cases.values()) == [{"skipped": run.TIME_IS_OUT}] * 4
    run.run(SMALL, results, 100, parts(ran))
    assert len(ran) == 4


def test_what_goes_wrong_is_a_reason() -> None:
    def broken() -> dict[str, Any]:
        raise ValueError("no such thing\nand more")

    assert run.record_of(Case("x", broken)) == {"skipped": "ValueError: no such thing"}


def test_the_parts_are_those_of_the_command() -> None:
    assert [part.name for part in run.PARTS] == list(command.NAMES)
    assert math.isclose(sum(part.share for part in run.PARTS), 1)


def test_without_a_gpu_it_refuses_in_a_sentence(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--quick"]) == 2
    assert capsys.readouterr().err.strip() == command.NO_GPU


@pytest.mark.parametrize("missing", ["rich", "triton"])
def test_what_it_needs_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == missing else SimpleNamespace())
    assert f"pip install {missing}" in str(command.refused())


@pytest.mark.usefixtures("fast")
def test_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys) -> None:
    """From the options to the tables, the GPU's place taken by two parts that measure nothing."""
    ran: list[str] = []
    monkeypatch.setattr(command, "refused", lambda: None)
    monkeypatch.setattr(run, "PARTS", [replace(p, name=n) for p, n in zip(parts(ran), ("heads", "host"), strict=True)])
    arguments = ["--output", str(tmp_path), "--only", "host", "--quick"]
    assert command.main(arguments) == 0
    assert ran == ["b/1", "b/2"]
    assert "Goals" in capsys.readouterr().out
    assert command.main([*arguments, "--resume"]) == 0
    assert len(ran) == 2
    assert command.main(["--output", str(tmp_path), "--resume"]) == 2  # not with as few rounds
    assert "start anew without --resume" in capsys.readouterr().err


# --- goals and documents, of made-up results -------------------------------------------------------------------------


def contest(**seconds: float | None) -> dict[str, Any]:
    """A record of `heads`, every round of a contestant as long; None where it failed."""
    named = {"floor": FLOOR, "recompute": RECOMPUTE}
    found = [
        Measurement(named.get(name, name), failure="out of memory")
        if value is None
        else Measurement(named.get(name, name), [value / 2] * 2, [value / 2] * 2, peak_bytes=2**30)
        for name, value in seconds.items()
    ]
    return {
        "work": "w",
        "dtype": "bfloat16",
        "head": "trained",
        "least_flops": 1,
        "measurements": [*map(asdict, found)],
    }


CASES: dict[str, dict[str, Any]] = {
    "tests": {"passed": 9, "skips": 1, "failed": [], "cut": True},
    "kernels/residual_/640": {"ours": 2e-3, "copy": 1e-3, "bytes": 4 * 10**9, "share": 0.5},
    "kernels/project_log_odds/one": {"ours": 2e-3, "GEMM": 1e-3, "flops": 10**12, "ratio": 2.0},
    "heads/Llama-3-8B/100%/frozen": contest(floor=1.0, ours=1.1, plain=1.3, CCE=1.0),
    "heads/Llama-3-8B/100%/trained": contest(floor=1.0, ours=1.1, recompute=None, plain=1.3),
    "heads/Llama-3-8B/100%/evaluation": {"skipped": "out of memory"},
    "host/frozen": {"ours": 2e-3, "plain": 1e-3, "ratio": 2.0, "operations": 20, "by_name": {}},
    "step/long prompts/sdpa": {
        "contestants": {
            name: {"seconds": value, "body": 1.0, "head_and_loss": 1.0, "optimizer": 1.0, "peak_bytes": 2**30}
            for name, value in {TRL: 3.0, OURS: 1.3, SHARED: 1.0}.items()
        }
    },
    "tiles/64x64": {"tile": 1e-3, "table": 2e-3, "ratio": 0.5},
}


def test_goals() -> None:
    found = {verdict.goal: verdict for verdict in goals.verdicts(CASES)}
    words = {
        "tests that fail": "met",
        "residual_ at V = 640, of the copy's bandwidth": "MISSED",
        "Llama-3-8B, frozen, ours: over the bare GEMMs": "met",
        "Llama-3-8B, trained, ours: over the bare GEMMs": "MISSED",
        "Llama-3-8B, trained, ours, recompute: over the bare GEMMs": "not measured",
        "Llama-3-8B, evaluation, ours: over the bare GEMMs": "not measured",
        "Qwen3-0.6B, frozen, ours: over the bare GEMMs": "not measured",
        "Llama-3-8B, 100%, frozen: the fastest peer over ours": "MISSED",
        "Llama-3-8B, 100%, trained: the fastest peer over ours": "met",
        "host, frozen: over plain": "MISSED",
        "device operations, frozen, one chunk": "met",
        "step, long prompts, sdpa: TRL over ours": "met",
        "step, long prompts, sdpa: padded over shared": "met",
    }
    assert {goal: found[goal].word for goal in words} == words
    assert found["Llama-3-8B, 100%, frozen: the fastest peer over ours"].note == "CCE"
    assert found["Llama-3-8B, trained, ours, recompute: over the bare GEMMs"].note == f"{RECOMPUTE}: out of memory"
    assert found["Llama-3-8B, evaluation, ours: over the bare GEMMs"].note == "out of memory"
    assert found["tests that fail"].note == "9 passed, 1 skipped, the others cut by the time"
    assert [verdict.met for verdict in found.values()].count(False) == 4


def test_a_test_that_fails_misses_the_goal() -> None:
    cases = {"tests": {"passed": 9, "skips": 1, "failed": ["tests/gpu/test_a.py::test_two"], "cut": False}}
    assert goals.verdicts(cases)[0].met is False
    assert page.sheets(cases)[-1].rows == [["tests/gpu/test_a.py::test_two", "failed"]]


def test_without_trl_its_goal_is_not_measured() -> None:
    ours = {name: one for name, one in CASES["step/long prompts/sdpa"]["contestants"].items() if name != TRL}
    found = goals.verdicts({"step/long prompts/sdpa": {"contestants": ours}})
    assert [verdict.note for verdict in found if "TRL" in verdict.goal] == [f"{TRL} did not run"]


def test_tables() -> None:
    shown = io.StringIO()
    found = {sheet.title: sheet for sheet in page.sheets(CASES)}
    for sheet in found.values():
        Console(file=shown, width=250).print(sheet.rich())
    assert found["Goals"].rows[0][3] == "MISSED"
    (frozen, _) = found["Head and loss in bf16: ms, and over the bare GEMMs"].rows
    assert frozen[:3] == ["Llama-3-8B, 100%, frozen", "1e+03", "1.1e+03 (1.10)"]
    assert "2000 GB/s" in shown.getvalue()
    assert "500 TFLOP/s" in shown.getvalue()
    assert ["heads/Llama-3-8B/100%/trained: ours, recompute", "out of memory"] in found["Left out, or failed"].rows


MACHINE = {
    "date": "2026-01-02T03:04:05",
    "gpu": {"name": "A GPU"},
    "bf16_gemm_hardware": True,
    "packages": {"torch": "2.0", "trl": None},
}


def test_docs_are_written_from_results(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for name, block in (("README.md", "figures"), ("docs/gpu.md", "measured")):
        path = tmp_path / name
        path.write_text(f"before\n<!-- gpu: {block} -->\nold\n<!-- end of gpu: {block} -->\nbehind\n")
    page.write({"machine": MACHINE, "cases": CASES}, tmp_path)
    for path in (tmp_path / "README.md", tmp_path / "docs/gpu.md"):
        text = path.read_text()
        assert text.startswith("before\n<!-- gpu")
        assert text.endswith("-->\nbehind\n")
        assert "old" not in text
        assert "2026-01-02, A GPU; torch 2.0" in text
    assert "MISSED" in (tmp_path / "docs/gpu.md").read_text()


def test_both_documents_have_their_block() -> None:
    project = Path(__file__).parents[1]
    for name, block in (("README.md", "figures"), ("docs/gpu.md", "measured")):
        text = (project / name).read_text()
        assert page.with_blocks(text, {"machine": MACHINE, "cases": CASES}) != text
        assert f"<!-- end of gpu: {block} -->" in text
