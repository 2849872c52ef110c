"""The native CPU kernels beside their eager mirror: same numbers, same bits on any number of threads, any processor.

Both are compared with the mirror in float64 on the same inputs: at most twice the mirror's own error in that dtype.
The whole loss through the kernels is in `test_loss`, `test_edges` and `test_confident`, by their `backend` fixture;
the kernels without Python in `native/tests`, which the last test here builds and runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orpo_kernels import backends, ops, orpo_loss
from orpo_kernels.ops import resolve, torch_ops, why_not

from .batches import relative_error
from .processes import ROOT, python
from .threads import assert_same_bits_on_any_number_of_threads

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
REASON = why_not("native", CPU)

built = pytest.mark.skipif(REASON is not None, reason=str(REASON))
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)

if REASON is None:
    from orpo_kernels import _native
    from orpo_kernels.ops import native


class Chunk:
    """Logits and targets with odd sizes and every option; the rows lie apart and begin anywhere."""

    def __init__(self, draw: st.DrawFn):
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.rows = draw(st.sampled_from([1, 2, 5]))
        self.vocab = draw(st.sampled_from([1, 2, 7, 8, 31, 64, 65, 511, 513, 1200, 5000]))
        self.scale, self.softcap = draw(st.sampled_from([1.0, 0.25])), draw(st.sampled_from([None, 5.0, 30.0]))
        spread, shift = draw(st.sampled_from([(0.1, 0.0), (4.0, 0.0), (40.0, 0.0), (3.0, -1e4), (3.0, 1e4)]))
        self.offset = draw(st.integers(0, 3))
        self.logits = torch.randn(self.rows, self.vocab, generator=generator) * spread + shift
        if draw(st.booleans()):  # tokens that are masked out
            self.logits[torch.rand(self.logits.shape, generator=generator) < 0.2] = -torch.inf
        self.target = torch.randint(self.vocab, (self.rows,), generator=generator)
        self.logits[torch.arange(self.rows), self.target] = torch.randn(self.rows, generator=generator) * spread + shift

    def to(self, dtype: torch.dtype) -> Tensor:
        whole = torch.full((self.rows, self.vocab + self.offset + 3), torch.nan, dtype=dtype)
        return whole[:, self.offset : self.offset + self.vocab].copy_(self.logits)

    @property
    def transform(self) -> tuple[float, float | None]:
        return self.scale, self.softcap

    @property
    def size(self) -> float:
        """Of the logits whose roundings show: those of a soft-cap; without one, they are subtracted as they are."""
        return self.softcap or 1.0


chunks = st.composite(Chunk)()


@pytest.fixture
def threads():
    """Sets how many threads torch, and so the kernels, may use; one again afterwards."""
    yield torch.set_num_threads
    torch.set_num_threads(1)


def assert_as_good(ours: Tensor, mirror: Tensor, true: Tensor, size: float = 1.0) -> None:
    """At most twice the mirror's error; the same as the mirror where no other token is left, or nothing is a number.

    Beside that a few roundings of fp32, for the mirror may be lucky: of the result, and of numbers of `size`, whose
    difference a row of it is.
    """
    assert ours.shape == true.shape
    is_number = true.isfinite() & (true.abs() < 1e30)
    a, b, c = (torch.where(is_number, t.double(), 0.0) for t in (ours, mirror, true))
    assert (a - c).norm() <= 2 * (b - c).norm() + 4e-7 * (c.norm() + size * len(c) ** 0.5)
    torch.testing.assert_close(ours[~is_number], mirror[~is_number], equal_nan=True, rtol=1e-5, atol=0)


# --- values ----------------------------------------------------------------------------------------------------------


@built
@dtypes
@given(chunk=chunks)
def test_residual(dtype, chunk):
    """In place, in rows that lie apart; nothing is written between them."""
    logits, mirror, exact = chunk.to(dtype), chunk.to(dtype), chunk.to(dtype).double()
    log_odds = native.residual_(logits, chunk.target, *chunk.transform)
    assert_as_good(
        log_odds,
        torch_ops.residual_(mirror, chunk.target, *chunk.transform),
        torch_ops.residual_(exact, chunk.target, *chunk.transform),
        chunk.size,
    )
    assert_as_good(logits, mirror, exact)
    after = logits.as_strided((chunk.rows, 3), (logits.stride(0), 1), logits.storage_offset() + chunk.vocab)
    assert after.isnan().all()


@built
@dtypes
@given(chunk=chunks)
def test_statistics_and_recomputed_residual(dtype, chunk):
    """The statistics read the logits; slice by slice, the residual comes back from them."""
    logits, mirror, exact = chunk.to(dtype), chunk.to(dtype), chunk.to(dtype).double()
    log_odds, lse_others = torch.empty(2, chunk.rows, dtype=torch.float64)
    _native.statistics(logits, chunk.target, log_odds, lse_others, *chunk.transform, 1)
    assert torch.equal(logits, mirror)
    cut = chunk.vocab // 3
    for columns in (slice(0, cut), slice(cut, chunk.vocab)):
        target = chunk.target - columns.start
        _native.recomputed_residual_(logits[:, columns], target, lse_others, *chunk.transform, 1)
    assert_as_good(
        log_odds,
        torch_ops.residual_(mirror, chunk.target, *chunk.transform),
        torch_ops.residual_(exact, chunk.target, *chunk.transform),
        chunk.size,
    )
    if chunk.vocab > 1:
        assert_as_good(logits, mirror, exact)


@built
@dtypes
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("strange", [torch.nan, torch.inf])
def test_what_is_not_a_number_is_not_hidden(strange, softcap, dtype):
    """A NaN or +inf among the others, and as the target: as in the mirror. The other rows do not notice."""
    logits = (torch.randn(3, 1300) * 3).to(dtype)
    target = torch.tensor([5, 700, 3])
    logits[0, 900], logits[1, 700] = strange, strange
    mirror = logits.clone()
    log_odds = native.residual_(logits, target, 1.0, softcap)
    expected = torch_ops.residual_(mirror, target, 1.0, softcap)
    torch.testing.assert_close(log_odds, expected, equal_nan=True, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(logits, mirror, equal_nan=True)


@built
@dtypes
@given(seed=st.integers(0, 2**31), size=st.sampled_from([1, 8, 19, 70]), rows=st.sampled_from([0, 1, 5, 40]))
def test_gather_and_scatter(dtype, seed, size, rows):
    """Between all dtypes; repeated positions add up."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(7, size, generator=generator).to(dtype)
    values = torch.randn(rows, size, generator=generator)
    position = torch.randint(7, (rows,), generator=generator)
    coefficient = torch.randn(rows, generator=generator)
    for other in DTYPES:
        for scale in (coefficient, None):
            exact = torch_ops.gather_rows(hidden.double(), position, scale, torch.float64)
            mirror = torch_ops.gather_rows(hidden, position, scale, other)
            assert_as_good(native.gather_rows(hidden, position, scale, other), mirror, exact)
        # Every addition rounds to the dtype of the sum, once: twice for the mirror, which rounds the product as well.
        ours, exact, size = hidden.clone(), hidden.double(), hidden.double().abs()
        native.scatter_rows_(ours, position, values.to(other), coefficient)
        torch_ops.scatter_rows_(exact, position, values.to(other).double(), coefficient)
        torch_ops.scatter_rows_(size, position, values.to(other).double().abs(), coefficient.abs())
        additions = 1 + torch.bincount(position, minlength=7)[:, None]
        assert ((ours.double() - exact).abs() <= additions * torch.finfo(dtype).eps / 2 * size).all()


@built
def test_exp_is_exact_to_two_units_of_the_last_place():
    """Every 4099th float; `native/tests/test_vec_math.cpp` does the same for each instruction set."""
    x = torch.arange(-(2**31), 2**31, 4099).to(torch.int32).view(torch.float32)
    y = torch.empty_like(x)
    _native.exp(x, y, 1, 1)
    true = x.double().exp()
    rounded = true.float()
    same = (y == rounded) | (y.isnan() & rounded.isnan())
    spacing = torch.nextafter(rounded, torch.tensor(torch.inf)).double() - rounded.double()
    assert (same | ((y.double() - true).abs() <= 2 * spacing)).all()


# --- threads and processes -------------------------------------------------------------------------------------------


def results(dtype: torch.dtype = torch.float32, softcap: float | None = None) -> list[Tensor]:
    """Loss and gradients of a batch that is large enough for several threads to share it."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 30, 200, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(3000, 200, generator=generator) / 14).to(dtype).requires_grad_()
    labels = torch.randint(3000, (4, 30), generator=generator)
    found = []
    for schedule in ("resident", "recompute"):
        options = {"nll_labels": labels[:2].flip(1), "logit_softcap": softcap}  # positions of two rows
        out = orpo_loss(hidden, weight, labels, **options, schedule=schedule, backend="native")
        found += [out.loss.detach(), *torch.autograd.grad(out.loss, (hidden, weight))]
    return found


@built
@dtypes
def test_a_whole_call_has_the_same_bits_on_any_number_of_threads(dtype):
    """But for the library's products: MKL's and oneDNN's have other bits on more. `test_sparse.py` has the columns'."""
    assert_same_bits_on_any_number_of_threads(lambda: results(dtype))


@built
def test_several_python_threads_at_once(threads):
    threads(2)
    expected = results()
    found: list[list[Tensor]] = []
    workers = [threading.Thread(target=lambda: found.append(results())) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert len(found) == 4
    for values in found:
        for a, b in zip(values, expected, strict=True):
            torch.testing.assert_close(a, b)


@built
def test_other_python_threads_run_meanwhile():
    """The lock of the interpreter is released: somebody else counts while one long call runs."""
    counted, done = 0, threading.Event()

    def call() -> None:
        _native.exp(torch.zeros(2**16), torch.empty(2**16), 4000, 1)
        done.set()

    worker = threading.Thread(target=call)
    worker.start()
    while not done.wait(0.001):
        counted += 1
    worker.join()
    assert counted > 1


@built
def test_after_a_fork(threads):
    """The child of a process whose pool has run gets the same results; the pool's threads did not come along."""
    logits, target = torch.randn(64, 4000), torch.randint(4000, (64,))

    def residual(z: Tensor) -> Tensor:
        _native.residual_(z, target, torch.empty(64, dtype=torch.float64), 1.0, None, 2)
        return z

    threads(2)
    parents, z = residual(logits.clone()), logits.clone()
    child = os.fork()
    if child == 0:
        failed = True
        try:
            torch.set_num_threads(1)  # torch's own operations would wait for the pool's threads forever
            failed = not torch.equal(residual(z), parents)
        finally:
            os._exit(failed)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@built
def test_threads_are_those_of_torch():
    """A second pool would compete with torch's, whose threads spin between two regions."""
    info = torch.__config__.parallel_info()
    if "ATen parallel backend: OpenMP" in info:
        assert "omp" in _native.thread_source()


@built
def test_every_instruction_set_of_this_processor(tmp_path):
    """One binary has them all; what they compute differs by roundings."""
    script = """
import torch
from orpo_kernels import _native
from tests.test_native import results
torch.save((_native.isa(), [results(), results(torch.bfloat16, 5.0), results(torch.float16)]), FILE)
"""
    expected = [results(), results(torch.bfloat16, 5.0), results(torch.float16)]
    assert _native.isa() in _native.isas()
    for isa in set(_native.isas()) - {_native.isa()}:
        python("-c", script.replace("FILE", repr(str(tmp_path / isa))), ORPO_KERNELS_ISA=isa)
        name, found = torch.load(tmp_path / isa)
        assert name == isa
        for ours, true, eps in zip(found, expected, (1e-6, 1e-2, 2e-3), strict=True):
            for a, b in zip(ours, true, strict=True):
                assert relative_error(a, b) <= eps


@built
def test_an_instruction_set_that_is_not_there():
    script = """
import torch, orpo_kernels
print(orpo_kernels.backends()["native"])
print(orpo_kernels.ops.resolve("auto", torch.device("cpu")))
"""
    reason, backend = python("-c", script, ORPO_KERNELS_ISA="mmx").splitlines()
    assert "ORPO_KERNELS_ISA is 'mmx', this processor has" in reason
    assert _native.isas()[-1] in reason
    assert backend == "torch"


# --- what is served, and what is said where it is not ----------------------------------------------------------------


@built
def test_auto_is_native_on_a_cpu():
    assert backends()["native"] == "available"
    assert all(resolve("auto", CPU, dtype) == "native" for dtype in DTYPES)
    assert resolve("auto", CPU, torch.float64) == "torch"
    assert resolve("auto", torch.device("meta")) == "torch"
    with pytest.raises(RuntimeError, match="float64 is for checking"):
        resolve("native", CPU, torch.float64)
    with pytest.raises(RuntimeError, match="the tensors are on meta"):
        resolve("native", torch.device("meta"))


def test_without_the_module_there_is_a_reason_and_torch(monkeypatch):
    """As after an install without a compiler."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(ops, "_not_built", ops._not_built.__wrapped__)  # as it is in a new process
    assert "pip install ." in backends()["native"]
    assert "compiler" in backends()["native"]
    assert resolve("auto", CPU) == "torch"
    with pytest.raises(RuntimeError, match=r'compiler.*use backend="auto"'):
        resolve("native", CPU)


@built
def test_wrong_arguments_name_both_sides():
    z, target, m = torch.randn(3, 8), torch.tensor([0, 1, 2]), torch.empty(3, dtype=torch.float64)
    residual, gather = _native.residual_, _native.gather_rows
    for kernel, arguments, error, message in (
        (residual, (z, target[:2], m, 1.0, None, 1), ValueError, r"target has shape \(2\).*\(3\)"),
        (residual, (z[0], target, m, 1.0, None, 1), ValueError, r"logits has shape \(8\).*\(any, any\)"),
        (residual, (z.double(), target, m, 1.0, None, 1), ValueError, "64 bits.*float32"),
        (residual, (z, target, m.float(), 1.0, None, 1), ValueError, "log_odds .*32 bits.* 64"),
        (residual, (z.t(), target, m, 1.0, None, 1), ValueError, "columns of logits are 8 elements apart, they must"),
        (residual, (z, target + 6, m, 1.0, None, 1), IndexError, r"target holds 8.*\[0, 8\)"),
        (gather, (z, target + 1, None, z.clone(), 1), IndexError, r"position holds 3.*\[0, 3\)"),
    ):
        with pytest.raises(error, match=message):
            kernel(*arguments)


# --- the kernels' own tests ------------------------------------------------------------------------------------------

HAS_TOOLS = shutil.which("cmake") is not None and any(map(shutil.which, ("c++", "g++", "clang++")))


@pytest.mark.slow  # minutes of compilation; `make sanitize` and `make test-native` run them as well
@pytest.mark.skipif(not HAS_TOOLS, reason="needs cmake and a C++ compiler")
@pytest.mark.parametrize("preset", ["release", "sanitize"])
def test_ctest(preset: str, tmp_path: Path):
    """The C++ tests, also with AddressSanitizer and UndefinedBehaviorSanitizer."""

    def run(*command: str) -> None:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr

    run("cmake", "--preset", preset, "-B", str(tmp_path))
    run("cmake", "--build", str(tmp_path), "--parallel", "2")
    run("ctest", "--test-dir", str(tmp_path), "--output-on-failure")
