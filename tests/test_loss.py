"""The loss against its definition in float64, and everything autograd may ask of it."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from orpo_kernels import Limits, ORPOLoss, ORPOOutput, orpo_loss, orpo_loss_from_rows, reference

from .batches import PLAIN_OPTIONS, Batch, answer_logps, batches, plain_loss, random_labels, random_rows, relative_error
from .thorough import only_thorough

SCHEDULES = ("auto", "single_pass", "resident", "recompute")
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
share_fixtures = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def serves(schedule: str, batch: Batch) -> bool:
    trained = batch.train_weight or (batch.bias is not None and batch.train_bias)
    return not (schedule == "single_pass" and trained)


def magnitudes(batch: Batch) -> tuple[float, dict[str, float]]:
    """max |z|, and the norms of |dz| |W|, |dz|^T |h| and sum |dz|: what a rounded operand can change a gradient by."""
    exact = batch.to(torch.float64)
    z = F.linear(exact.hidden, exact.weight, exact.bias).requires_grad_()
    identity = torch.eye(z.shape[-1], dtype=z.dtype)
    out = reference.orpo_loss(
        z, identity, batch.labels, nll_labels=batch.nll_labels, pair_weight=batch.pair_weight, **batch.options
    )
    (dz,) = torch.autograd.grad(out.loss, z)
    dz = dz.abs().flatten(0, 1)
    return z.abs().max().item() * batch.options["logit_scale"], {
        "hidden": (dz @ exact.weight.abs()).norm().item(),
        "weight": (dz.t() @ exact.hidden.abs().flatten(0, 1)).norm().item(),
        "bias": dz.sum(0).norm().item(),
    }


def assert_as_good_as_plain(batch: Batch, ours, dtype: torch.dtype, gemm_dtype: torch.dtype) -> None:
    """err(ours) <= 2 * err(plain torch in the same dtype) against float64, and one rounding where plain is lucky."""
    (out, grads), (plain_out, plain_grads) = ours, batch.run(plain_loss)
    true_out, true_grads = batch.to(torch.float64).run(reference.orpo_loss)
    largest_logit, scales = magnitudes(batch)
    logit_rounding = torch.finfo(gemm_dtype).eps * (1 + largest_logit)
    for name in set(ORPOOutput._fields) - {"valid_pairs", "preferred"}:
        value, other, true = (getattr(o, name).detach() for o in (out, plain_out, true_out))
        error, allowed = (value - true).norm().item(), finite((other - true).norm().item())
        rounding = (8 * torch.finfo(value.dtype).eps + logit_rounding) * max(true.norm().item(), 1.0)
        assert error <= 2 * allowed + rounding, (name, error, allowed)
    assert torch.equal(out.valid_pairs, true_out.valid_pairs)
    assert grads.keys() == true_grads.keys()
    for name, true in true_grads.items():
        error, allowed = (grads[name] - true).norm().item(), finite((plain_grads[name] - true).norm().item())
        rounding = (torch.finfo(dtype).eps + logit_rounding) * scales[name]
        assert error <= 2 * allowed + rounding, (name, error, allowed)
        assert grads[name].dtype == dtype


def finite(error: float) -> float:
    """0 for NaN: where plain torch has no answer, ours has to be right to one rounding."""
    return error if math.isfinite(error) else 0.0


@share_fixtures
@pytest.mark.parametrize("gemms", ["own dtype", "fp32"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=batches(), schedule=st.sampled_from(SCHEDULES))
def test_matches_definition(dtype, gemms, batch, schedule, small_chunks, backend):
    """Every schedule, option and dtype; with GEMMs in the inputs' own dtype, and in fp32 for 16-bit inputs."""
    only_thorough(backend == "triton" and dtype == torch.float16, "interpreted for long, as bfloat16 is")
    assume(serves(schedule, batch))
    batch = batch.to(dtype)
    gemm_dtype = gemms_in(gemms, dtype, backend)
    ours = batch.run(orpo_loss, schedule=schedule, limits=replace(small_chunks, gemm_dtype=gemm_dtype))
    assert_as_good_as_plain(batch, ours, dtype, gemm_dtype)


def gemms_in(gemms: str, dtype: torch.dtype, backend: str) -> torch.dtype:
    """The dtype of the GEMMs, without running the same case twice."""
    if gemms == "fp32" and (dtype.itemsize > 2 or backend == "triton"):
        pytest.skip("16-bit GEMMs are emulated in fp32 on a CPU alone")
    if dtype == torch.float64 and backend != "torch":
        pytest.skip("float64 is eager torch on every device")
    return torch.float32 if gemms == "fp32" else dtype


@pytest.mark.parametrize("gemms", ["own dtype", "fp32"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
def test_error_is_at_most_twice_plains(schedule, dtype, gemms, backend):
    """The same without any slack, on many answers: of a few, plain's errors may cancel."""
    only_thorough(backend == "triton" and dtype == torch.float16, "interpreted for long, as bfloat16 is")
    only_thorough(backend == "triton" and schedule == "resident", "interpreted for long, by the kernels of single_pass")
    gemm_dtype = gemms_in(gemms, dtype, backend)
    options = {"schedule": schedule, "limits": Limits(gemm_dtype=gemm_dtype)}
    batch = a_batch(dtype, pairs=16, length=3, size=48, vocab=307, **PLAIN_OPTIONS)
    batch = replace(batch, train_weight=schedule != "single_pass")
    (out, grads), (plain_out, plain_grads) = batch.run(orpo_loss, **options), batch.run(plain_loss)
    true_out, true_grads = batch.to(torch.float64).run(reference.orpo_loss)
    for name, true in true_grads.items():
        assert relative_error(grads[name], true) <= 2 * relative_error(plain_grads[name], true)
    ours, plain, true = map(answer_logps, (out, plain_out, true_out))
    assert relative_error(ours, true) <= 2 * relative_error(plain, true)


@share_fixtures
@given(batch=batches(), spare=st.integers(0, 40))
def test_groups_of_pairs(batch, spare, small_chunks):
    """A residual too large as a whole is taken by groups of pairs, down to one pair at a time."""
    batch = replace(batch, train_weight=True, train_bias=True)
    shift = batch.options["shift"]
    length = batch.labels.shape[1] - shift
    vocab, size = batch.weight.shape
    rows_of_a_pair = 3 * length  # a chosen position may be two rows
    budget = 8 * vocab * (size + rows_of_a_pair + spare)
    out, grads = batch.run(orpo_loss, schedule="resident", memory_budget=budget, limits=small_chunks)
    true_out, true_grads = batch.run(reference.orpo_loss)
    for value, true in zip((*out, *grads.values()), (*true_out, *true_grads.values()), strict=True):
        torch.testing.assert_close(value, true, rtol=1e-9, atol=1e-12)


@share_fixtures
@given(
    seed=st.integers(0, 2**31),
    pairs=st.integers(1, 4),
    num_rows=st.integers(0, 30),
    num_positions=st.integers(1, 12),
    weighted=st.booleans(),
    schedule=st.sampled_from(("auto", "resident", "recompute")),
)
def test_packed_rows(seed, pairs, num_rows, num_positions, weighted, schedule, small_chunks):
    """Rows in any order whose positions repeat, as with a shared prompt, of pairs with weights and without."""
    generator = torch.Generator().manual_seed(seed)
    rows = random_rows(generator, num_positions, 23, pairs, num_rows, weighted)
    hidden = torch.randn(num_positions, 6, generator=generator, dtype=torch.float64)
    weight = torch.randn(23, 6, generator=generator, dtype=torch.float64)

    def run(loss, **options):
        leaves = [t.clone().requires_grad_() for t in (hidden, weight)]
        out = loss(*leaves, rows, beta=0.3, **options)
        out.loss.backward()
        return (*out, *(leaf.grad for leaf in leaves))

    for value, true in zip(
        run(orpo_loss_from_rows, schedule=schedule, limits=small_chunks),
        run(reference.orpo_loss_from_rows),
        strict=True,
    ):
        torch.testing.assert_close(value, true, rtol=1e-9, atol=1e-12)


def a_batch(dtype=torch.float32, pairs=3, length=8, size=16, vocab=61, **options) -> Batch:
    generator = torch.Generator().manual_seed(7)
    return Batch(
        hidden=torch.randn(2 * pairs, length, size, generator=generator).to(dtype),
        weight=torch.randn(vocab, size, generator=generator).to(dtype) / 4,
        labels=random_labels(generator, (2 * pairs, length), vocab, 0.6),
        nll_labels=random_labels(generator, (pairs, length), vocab, 0.9),
        options=options,
    )


@pytest.mark.parametrize("schedule", ["resident", "recompute"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_bitwise_repeatable(schedule, dtype, small_chunks, backend):
    only_thorough(backend == "triton" and dtype == torch.bfloat16, "interpreted for long, as float32 is")
    batch = a_batch(dtype)
    first, second = (batch.run(orpo_loss, schedule=schedule, limits=small_chunks) for _ in range(2))
    for a, b in zip((*first[0], *first[1].values()), (*second[0], *second[1].values()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("nll_reduction", ["token", "sequence"])
@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("pair_weight", [None, torch.tensor([0.5, 0.0, 2.0, 1.0], dtype=torch.float64)], ids=str)
def test_micro_batches_add_up(nll_reduction, as_tensor, pair_weight):
    """With the whole batch's counts, which know no weights, micro-batches of one pair give its loss and gradient."""
    batch = replace(a_batch(torch.float64, pairs=4, nll_reduction=nll_reduction), pair_weight=pair_weight)
    whole, whole_grads = batch.run(orpo_loss)
    rows = (batch.nll_labels != -100).sum().item()
    counts = {"nll_denominator": rows if nll_reduction == "token" else 4, "pair_denominator": 4}
    if as_tensor:
        counts = {name: torch.tensor(count) for name, count in counts.items()}
    loss, grads = 0.0, None
    for pair in range(4):
        both = [pair, 4 + pair]
        of_pair = {
            "nll_labels": batch.nll_labels[[pair]],
            "pair_weight": None if pair_weight is None else pair_weight[[pair]],
        }
        micro = replace(batch, hidden=batch.hidden[both], labels=batch.labels[both], **of_pair)
        out, micro_grads = micro.run(orpo_loss, **counts)
        loss += out.loss.item()
        grads = micro_grads["weight"] if grads is None else grads + micro_grads["weight"]
        assert relative_error(micro_grads["hidden"], whole_grads["hidden"][both]) < 1e-6
    assert loss == pytest.approx(whole.loss.item(), rel=1e-6)
    assert relative_error(grads, whole_grads["weight"]) < 1e-6


@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute", "grouped"])
def test_retain_graph_and_accumulation(schedule):
    """A second backward pass gives the same gradient once more, on top of what `.grad` held."""
    batch = a_batch(torch.float64)
    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight.clone().requires_grad_(schedule != "single_pass")
    grouped = {"schedule": "resident", "memory_budget": 8 * 61 * (16 + 24)}
    options = grouped if schedule == "grouped" else {"schedule": schedule}
    loss = orpo_loss(hidden, weight, batch.labels, **options).loss
    loss.backward(retain_graph=True)
    once = hidden.grad.clone()
    (2 * loss).backward()
    torch.testing.assert_close(hidden.grad, 3 * once)


@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
def test_second_derivative_is_refused(schedule):
    batch = a_batch()
    hidden = batch.hidden.clone().requires_grad_()
    loss = orpo_loss(
        hidden, batch.weight.requires_grad_(schedule != "single_pass"), batch.labels, schedule=schedule
    ).loss
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(loss, hidden, create_graph=True)


def test_without_gradient_is_detached():
    batch = a_batch()
    with torch.no_grad():
        out = orpo_loss(batch.hidden.requires_grad_(), batch.weight, batch.labels)
    assert not out.loss.requires_grad
    out = orpo_loss(batch.hidden.detach(), batch.weight, batch.labels)
    assert not any(value.requires_grad for value in out)


def test_module_is_the_function():
    batch = a_batch()
    options = {"beta": 0.4, "alpha": 0.5, "nll_reduction": "sequence", "shift": True, "logit_softcap": 9.0}
    module = ORPOLoss(**options)
    ours = module(batch.hidden, batch.weight, batch.labels, nll_labels=batch.nll_labels, pair_denominator=2)
    function = orpo_loss(
        batch.hidden, batch.weight, batch.labels, nll_labels=batch.nll_labels, pair_denominator=2, **options
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, function, strict=True))
    assert "beta=0.4" in repr(module)


@pytest.mark.parametrize("schedule", ["resident", "recompute"])
def test_non_contiguous_inputs(schedule, backend):
    only_thorough(backend == "triton" and schedule == "resident", "interpreted for long")
    batch = a_batch(torch.float32)
    expected, expected_grads = batch.run(orpo_loss, schedule=schedule)
    strange = replace(
        batch,
        hidden=batch.hidden.permute(2, 0, 1).contiguous().permute(1, 2, 0),
        weight=batch.weight.t().contiguous().t(),
        labels=batch.labels.t().contiguous().t(),
        nll_labels=batch.nll_labels.repeat_interleave(2, 1)[:, ::2],
    )
    assert not strange.hidden.is_contiguous()
    out, grads = strange.run(orpo_loss, schedule=schedule)
    torch.testing.assert_close(out.loss, expected.loss)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad)


@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute"])
def test_autocast(schedule, backend):
    """fp32 parameters under autocast: gradients in fp32, as accurate as an autocast nn.Linear's."""
    only_thorough(backend == "triton" and schedule != "recompute", "interpreted for long")
    batch = replace(a_batch(pairs=16, length=3, **PLAIN_OPTIONS), train_weight=schedule != "single_pass")
    truth = batch.to(torch.float64).run(reference.orpo_loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, plain = batch.run(orpo_loss, schedule=schedule), batch.run(plain_loss)
    for name, true in truth[1].items():
        assert ours[1][name].dtype == torch.float32
        assert relative_error(ours[1][name], true) <= 2 * relative_error(plain[1][name], true)
    # In the loss, one number, plain's errors may happen to cancel: it may be as far off as plain's vector is.
    fair = relative_error(answer_logps(plain[0]), answer_logps(truth[0]))
    assert relative_error(answer_logps(ours[0]), answer_logps(truth[0])) <= 2 * fair
    assert relative_error(ours[0].loss.detach(), truth[0].loss.detach()) <= 2 * fair


def test_autocast_takes_a_head_of_another_dtype(backend):
    batch = a_batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = orpo_loss(batch.hidden.bfloat16(), batch.weight, batch.labels)
    assert mixed.loss.item() == pytest.approx(orpo_loss(batch.hidden, batch.weight, batch.labels).loss.item(), rel=1e-2)


@pytest.mark.parametrize("emulated", [True, False], ids=["gemm-fp32", "gemm-fp16"])
@pytest.mark.parametrize("schedule", ["resident", "recompute"])
def test_fp16_does_not_underflow(schedule, emulated, backend):
    """Coefficients of 1e-6 and less, as of a million-token batch, under a GradScaler."""
    limits = Limits(gemm_dtype=torch.float32 if emulated else torch.float16)
    batch = replace(a_batch(torch.float16), bias=torch.randn(61).half())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    leaves = [t.clone().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
    exact = [t.double().requires_grad_() for t in (batch.hidden, batch.weight, batch.bias)]
    counts = {"nll_denominator": 10**6, "pair_denominator": 10**6}
    options = {"schedule": schedule, "limits": limits, **counts}
    loss = orpo_loss(*leaves[:2], batch.labels, bias=leaves[2], **options).loss
    scaler.scale(loss).backward()
    true = reference.orpo_loss(*exact[:2], batch.labels, bias=exact[2], **counts).loss * 2.0**16
    true.backward()
    for ours, leaf in zip(leaves, exact, strict=True):
        assert relative_error(ours.grad, leaf.grad) < 2e-3
