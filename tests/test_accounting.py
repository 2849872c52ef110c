"""The accounting of bytes: what counts and what does not, and that it reproduces what is known of the peers."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

pytest.importorskip("rich", reason="the accounting tool prints with rich: pip install 'orpo-kernels[bench]'")

from benchmarks.contest.memory import GIB, Case, PeakBytes, Shape, peer_case
from benchmarks.contest.peers import PEERS

SHAPE = Shape(sequences=8, length=1024)  # 8192 rows, H = 4096, V = 128256


def gib(case: Case, shape: Shape = SHAPE) -> float:
    return case.peak(shape).peak / GIB


# --- the tracker -----------------------------------------------------------------------------------------------------


def test_counts_what_is_alive_at_once() -> None:
    with PeakBytes() as memory:
        a = torch.zeros(1000)  # 4000 bytes
        b = a + 1  # 8000
        del a
        c = b.view(10, 100) * 2  # a view is no memory; 8000
        del b
        d = c.sum()  # 4004
    assert (memory.peak, memory.live) == (8000, 4004)
    del c, d
    assert memory.live == 0


def test_what_existed_before_does_not_count_unless_it_is_named() -> None:
    before, named = torch.zeros(1000), torch.zeros(500)
    with PeakBytes([named]) as memory:
        before.add_(1)
        named.mul_(2)
        before + before
    assert (memory.baseline, memory.live, memory.peak) == (2000, 2000, 6000)


def test_backward_counts_gradients_and_what_is_saved() -> None:
    weight, x = torch.zeros(50, 40, requires_grad=True), torch.zeros(30, 40)
    with PeakBytes() as memory:
        (x @ weight.t()).exp().sum().backward()
    assert memory.live == 50 * 40 * 4  # .grad
    assert memory.peak >= 50 * 40 * 4 + 30 * 50 * 4


def test_a_host_read_raises_unless_it_is_answered() -> None:
    with FakeTensorMode():
        with pytest.raises(Exception, match="local_scalar_dense"), PeakBytes():
            torch.zeros(()).item()
        with PeakBytes(host_reads=False):
            assert not bool(torch.zeros(()) != 1)


def test_fake_and_real_tensors_give_the_same_bytes() -> None:
    def run() -> PeakBytes:
        hidden, weight = torch.zeros(4, 8, 16, requires_grad=True), torch.zeros(97, 16, requires_grad=True)
        labels = torch.zeros(4, 8, dtype=torch.int64)
        with PeakBytes([hidden, weight]) as memory:
            PEERS["plain"](hidden, weight, labels, labels[:2], 0.1).backward()
        return memory

    real = run()
    with FakeTensorMode():
        fake = run()
    assert (real.baseline, real.peak) == (fake.baseline, fake.peak)


def test_reproduces_what_is_known_of_the_peers() -> None:
    """1.041 GiB of inputs and weight; plain 12.78 GiB; Liger 6.00 GiB at 8 x 1024 and 4.29 GiB at 16 x 512."""
    assert peer_case("plain fp32", trained=True).peak(SHAPE).baseline / GIB == pytest.approx(1.041, abs=1e-3)
    assert gib(peer_case("plain fp32", trained=True)) == pytest.approx(12.78, abs=0.01)
    if PEERS["Liger"].available:
        liger = peer_case("Liger", trained=True)
        assert gib(liger) == pytest.approx(6.00, abs=0.01)
        assert gib(liger, Shape(16, 512)) == pytest.approx(4.29, abs=0.01)
