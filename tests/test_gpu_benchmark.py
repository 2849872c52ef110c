"""`python -m benchmarks.gpu`, run on a CPU on tiny shapes: all but the numbers is the same code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks print with rich: pip install 'orpo-kernels[bench]'")

from benchmarks import gpu, peers, shapes
from benchmarks.gpu import FLOOR, Measurement
from benchmarks.head_loss import exact_loss
from benchmarks.shapes import ModelShape
from benchmarks.workloads import synthetic

TINY = ["--device", "cpu", "--dtype", "float32", "--sequences", "4", "--length", "6", "--rounds", "2"]
PHI, GEMMA = ModelShape("a Phi", 8, 53, bias=True), ModelShape("a Gemma", 8, 59, logit_softcap=3.0)


@pytest.fixture(autouse=True)
def models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two models small enough for a test, with a bias and with a soft-cap."""
    for shape in (PHI, GEMMA):
        monkeypatch.setitem(shapes.SHAPES, shape.name, shape)


def run(folder: Path, *arguments: str) -> dict[tuple[str, str, str], dict]:
    """The whole command; its records by shape, head and name."""
    assert gpu.main([*TINY, "--output", str(folder), *arguments]) == 0
    records = json.loads((folder / "results.json").read_text())["results"]
    assert len({(r["shape"], r["head"], r["name"]) for r in records}) == len(records)  # nothing was measured twice
    return {(r["shape"], r["head"], r["name"]): r for r in records}


@pytest.mark.parametrize("keep", ["1.0", "0.5"])
def test_the_command(keep: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["plain", "TRL-composed"] if peers.PEERS["TRL-composed"].available else ["plain"]
    records = run(tmp_path, "--shape", PHI.name, GEMMA.name, "16x97", "--keep", keep, "--peer", *names)
    assert len(records) == 3 * 3 * (3 + len(names))
    for (_, head, name), record in records.items():
        assert record["failure"] is None, record
        assert len(record["forward"]) == 2
        assert len(record["backward"]) == (0 if head == "evaluation" else 2)
        assert record["peak_bytes"] is None  # no GPU, no such number
        assert (record["loss_error"] is None) == (name == FLOOR)
        both = records[record["shape"], head, "ours"]["median"]
        assert record["to_ours"] == pytest.approx(record["median"] / both)
        assert record["to_gemms"] == pytest.approx(record["median"] / records[record["shape"], head, FLOOR]["median"])
    assert (tmp_path / "time.png").stat().st_size > 10_000
    assert (tmp_path / "memory.png").stat().st_size > 5_000
    printed = " ".join(capsys.readouterr().out.split())
    assert gpu.NOT_A_GPU in printed
    assert "head trained: resident, 3 GEMMs" in printed
    assert ("50% of them matter" if keep == "0.5" else "100% of them matter") in printed


def test_a_failing_peer_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    """No room, a wrong loss, no bias, no soft-cap, not installed: each is named and everybody else is timed."""

    def no_room(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for peer in (
        peers.Peer("plain", no_room, "", softcap=True),
        peers.Peer("plain fp32", lambda *args, **_: peers.plain(*args) * 1.01, "", softcap=True),
        peers.Peer("TRL-composed", peers.plain, ""),
        peers.Peer("CCE", peers.plain, "", package="no_such_package"),
    ):
        monkeypatch.setitem(peers.PEERS, peer.name, peer)
    monkeypatch.setattr(gpu, "_peers", lambda options: options.peer)
    arguments = ("--shape", GEMMA.name, "--head", "frozen", "--peer", "plain", "plain fp32", "TRL-composed", "CCE")
    records = run(tmp_path, *arguments)
    failures = {name: record["failure"] for (_, _, name), record in records.items()}
    assert failures["plain"] == "out of memory"
    assert failures["plain fp32"].startswith("its loss is off by")
    assert failures["TRL-composed"] == "takes no soft-cap"
    assert "no_such_package" in failures["CCE"]
    assert failures["ours"] is failures["ours, torch"] is failures[FLOOR] is None
    assert "plain, head frozen: out of memory" in capsys.readouterr().out


def test_a_peer_that_fails_later_is_a_result_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails_at_the_third_call(*args: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:  # the second is the one for memory, the third is in the rounds
            raise torch.OutOfMemoryError
        return peers.plain(*args, **options)

    monkeypatch.setitem(peers.PEERS, "plain", peers.Peer("plain", fails_at_the_third_call, "", softcap=True))
    records = run(tmp_path, "--shape", "16x97", "--head", "trained", "--peer", "plain")
    assert records["16x97", "trained", "plain"]["failure"] == "out of memory"
    assert len(calls) == 3


def test_a_model_without_room_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(gpu, "exact_loss", no_room)
    records = run(tmp_path, "--shape", "16x97", "--head", "trained", "--peer", "plain")
    assert len(records) == 4
    assert all("do not fit" in record["failure"] for record in records.values())


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, measure = [], gpu.measure

    def until_interrupted(shape, work, exact, head, *rest):
        if len(measured) == 2:
            raise KeyboardInterrupt
        measured.append(head)
        return measure(shape, work, exact, head, *rest)

    monkeypatch.setattr(gpu, "measure", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, "--shape", "16x97", "--peer", "plain")
    before = json.loads((tmp_path / "results.json").read_text())["results"]
    assert {record["head"] for record in before} == {"evaluation", "frozen"}

    measured.clear()
    records = run(tmp_path, "--shape", "16x97", "--peer", "plain")
    assert measured == ["trained"]
    assert [records["16x97", record["head"], record["name"]] for record in before] == before  # as they were


def test_results_of_other_options_or_machines_are_not_mixed(tmp_path: Path, capsys) -> None:
    arguments = ("--shape", "16x97", "--head", "evaluation", "--peer", "plain")
    run(tmp_path, *arguments)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *arguments, "--rounds", "3")
    assert stopped.value.code == 2
    assert "another options (rounds differ)" in capsys.readouterr().err
    path = tmp_path / "results.json"
    path.write_text(path.read_text().replace('"packages": {', '"packages": {"another": "1.0",'))
    with pytest.raises(SystemExit):
        run(tmp_path, *arguments)
    assert "another machine (packages differ)" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(capsys) -> None:
    assert gpu.main([]) == 2
    assert "needs a GPU that torch can use" in capsys.readouterr().err


@pytest.mark.parametrize(("shape", "head"), [(PHI, "trained"), (GEMMA, "frozen")], ids=str)
def test_every_peer_that_takes_part_computes_this_head(shape: ModelShape, head: str) -> None:
    """Bias and soft-cap reach those that take them: their losses, uncompiled, are the float64 one's."""
    work = synthetic(2, 6, shape.hidden_size, shape.vocab_size, bias=shape.bias, logit_softcap=shape.logit_softcap)
    exact, contest = exact_loss(work), gpu.Contest(work, head)
    without = exact_loss(synthetic(2, 6, shape.hidden_size, shape.vocab_size))
    assert abs(exact - without) > 1e-3 * exact  # the bias, or the cap, matters
    fit = [p.name for p in peers.PEERS.values() if p.available and not p.compiled]
    fit = [name for name in fit if shape.bias or peers.PEERS[name].softcap]
    assert {"plain", "plain fp32"} <= set(fit)
    for name in (*gpu.OURS, *fit):
        assert contest.contestant(name).forward().item() == pytest.approx(exact, rel=1e-5), name


def test_median_is_of_the_sums() -> None:
    """Not the sum of the medians: a slow forward and a slow backward pass may be of different rounds."""
    m = Measurement("", "", "", forward=[1.0, 9.0, 2.0], backward=[8.0, 1.0, 1.0])
    assert m.median == 9.0
    assert Measurement("", "", "", forward=[1.0, 9.0, 2.0], backward=[]).median == 2.0


def test_named_shapes() -> None:
    assert shapes.named("Gemma-2-2B").logit_softcap == 30.0
    assert shapes.named("4096x32000") == ModelShape("4096x32000", 4096, 32000)
    for text in ("Gemma", "4096", "x5", "4x5x6"):
        with pytest.raises(ValueError, match="neither one of SmolLM2-135M"):
            shapes.named(text)
