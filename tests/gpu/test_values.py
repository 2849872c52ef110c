"""Values on a GPU against the definition in float64: every dtype, schedule and backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.contest import peers
from benchmarks.contest.confidence import GAPS, SIDES, confident, exact_results, results
from orpo_kernels import Limits, ORPOOutput, measured_sparsity, orpo_loss, reference
from orpo_kernels.ops import why_not

from ..batches import IGNORE, Batch, answer_logps, batches, plain_loss, relative_error
from ..test_loss import assert_as_good_as_plain, serves, share_fixtures
from ..test_sparse import assert_as_good_as_exact, confident_head
from .inputs import DTYPES, SPARSE, all_of_a_call, on, packed, realistic

ALL_SCHEDULES = ("auto", "single_pass", "resident", "recompute")
TRAINING = ("single_pass", "resident", "recompute")


@share_fixtures
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@given(batch=batches(), schedule=st.sampled_from(ALL_SCHEDULES))
def test_matches_definition(dtype, batch, schedule, device, backend):
    """Ragged batches of every kind; plain torch in the same dtype, on the CPU, is the measure of acceptable error."""
    if not serves(schedule, batch):
        return
    batch = batch.to(dtype)
    out, grads = on(batch, device).run(orpo_loss, schedule=schedule, backend=backend)
    at_home = ORPOOutput(*(value.cpu() for value in out)), {name: grad.cpu() for name, grad in grads.items()}
    assert_as_good_as_plain(batch, at_home, dtype, dtype)


# Many short answers: the errors of a few log-probabilities may cancel.
SIZES = [
    pytest.param({"pairs": 16, "length": 16, "size": 576, "vocab": 49152}, id="SmolLM2"),
    pytest.param({"pairs": 15, "length": 13, "size": 577, "vocab": 50257}, id="odd"),
    pytest.param({"pairs": 16, "length": 8, "size": 2048, "vocab": 128256}, id="Llama-3.2-1B"),
    pytest.param(
        {"pairs": 13, "length": 5, "size": 2304, "vocab": 100003, "logit_softcap": 30.0, "logit_scale": 0.5},
        id="capped",
    ),
]
TINY = 4 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("schedule", TRAINING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_is_at_most_twice_plains(dtype, schedule, sizes, device, backend):
    """err(ours) <= 2 * err(plain torch in the same dtype, on the same GPU) + tiny, at the sizes of real heads."""
    batch = realistic(dtype, device, **sizes)
    batch = replace(batch, train_weight=schedule != "single_pass", train_bias=schedule != "single_pass")
    assert_at_most_twice_plains_error(*batch.run(orpo_loss, schedule=schedule, backend=backend), batch)


def assert_at_most_twice_plains_error(out: ORPOOutput, grads: dict[str, Tensor], batch: Batch) -> None:
    """Plain torch's is that of `batch` in its own dtype."""
    plain_out, plain_grads = batch.run(plain_loss)
    true_out, true_grads = batch.to(torch.float64).run(reference.orpo_loss)
    dtype = batch.hidden.dtype
    assert_logps_at_most_twice_plains_error(out, plain_out, true_out)
    # One number, in which plain's errors may happen to cancel out: it may be as far off as plain's vector is.
    fair = max(relative_error(answer_logps(plain_out), answer_logps(true_out)), torch.finfo(dtype).eps)
    assert relative_error(out.loss.detach(), true_out.loss.detach()) <= 2 * fair + TINY
    assert grads.keys() == true_grads.keys()
    for name, true in true_grads.items():
        ours, plain = relative_error(grads[name], true), relative_error(plain_grads[name], true)
        assert ours <= 2 * plain + TINY, (name, ours, plain)
        assert grads[name].dtype == dtype


def assert_logps_at_most_twice_plains_error(out: ORPOOutput, plain: ORPOOutput, true: ORPOOutput) -> None:
    ours, theirs, exact = map(answer_logps, (out, plain, true))
    assert relative_error(ours, exact) <= 2 * relative_error(theirs, exact) + TINY


@pytest.mark.parametrize("softcap", [None, 8.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_error_of_a_sparse_backward_pass(dtype, softcap, device, backend):
    """Three blocks, an odd vocabulary: beside the definition of what is left out, as in `test_sparse`."""
    limits = Limits(block_rows=128, dense_share=1.0)
    head = confident_head(rows=300, vocab=5003)
    head = replace(head, logit_softcap=softcap, bias=torch.linspace(-1, 1, 5003, dtype=torch.float64))
    tensors = ("hidden", "weight", "bias", "target", "upstream")
    head = replace(head, **{name: getattr(head, name).to(device) for name in tensors})
    assert_as_good_as_exact(head, dtype, backend, [100, 100, 100], limits)


@pytest.mark.parametrize("schedule", SPARSE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sparse_kernels_beside_eager_torch(dtype, schedule, device):
    """The same call through our kernels and through their mirror."""
    if reason := why_not("triton", device):
        pytest.skip(reason)
    hidden, weight, rows = packed(dtype, device, positions=500, rows=700, size=577, vocab=50257)
    with measured_sparsity() as measured:
        ours = all_of_a_call(hidden, weight, rows, schedule, backend="triton")
    torchs = all_of_a_call(hidden, weight, rows, schedule, backend="torch")
    assert max(measured.shares) < 0.5
    for name in ("loss", "hidden.grad", "weight.grad"):
        if name in ours:
            assert relative_error(ours[name], torchs[name]) <= 4 * max(torch.finfo(dtype).eps, 1e-6), name


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_evaluation(dtype, sizes, device, backend):
    batch = realistic(dtype, device, **sizes)
    with torch.no_grad():
        out, plain_out = batch.run(orpo_loss, backend=backend)[0], batch.run(plain_loss)[0]
        true_out = batch.to(torch.float64).run(reference.orpo_loss)[0]
    assert not out.loss.requires_grad
    assert_logps_at_most_twice_plains_error(out, plain_out, true_out)


@pytest.mark.parametrize("schedule", TRAINING)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_confident_answers(dtype, side, schedule, device, backend):
    """Logit gaps of 5 to 80: the loss to 1e-6, gradients to the roundings of their dtype."""
    for gap in GAPS:
        inputs = confident(gap, side, "many", dtype)
        truth = exact_results(*inputs)
        found = results(peers.ours, *(t.to(device) for t in inputs), schedule=schedule, backend=backend)
        found = {name: value.cpu() for name, value in found.items()}
        assert relative_error(found["loss"], truth["loss"]) <= 1e-6, gap
        for name in found.keys() - {"loss"}:
            true = truth[name]
            subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the last bit of the smallest
            allowed = max(torch.finfo(dtype).eps, 1e-5) * true.norm() + subnormal * true.numel() ** 0.5
            assert (found[name] - true).norm() <= allowed, (gap, name)


@pytest.mark.parametrize("schedule", ALL_SCHEDULES)
@pytest.mark.parametrize("empty", ["no valid row", "no sequence", "an empty answer"])
def test_empty_batches(empty, schedule, device, backend):
    """Nothing to do is 0 with zero gradients, attached; an empty answer takes its pair out of the odds ratio."""
    hidden = torch.randn(4, 7, 40, device=device, requires_grad=True)
    weight = torch.randn(101, 40, device=device, requires_grad=schedule in ("resident", "recompute"))
    labels = torch.randint(101, (4, 7), device=device)
    if empty == "no sequence":
        hidden, labels = hidden.detach()[:0].requires_grad_(), labels[:0]
    else:
        labels[2 if empty == "an empty answer" else slice(None)] = IGNORE
    out = orpo_loss(hidden, weight, labels, schedule=schedule, backend=backend)
    out.loss.backward()
    grads = [t.grad for t in (hidden, weight) if t.requires_grad]
    if empty == "an empty answer":
        true = reference.orpo_loss(hidden.double(), weight.double(), labels)
        assert out.valid_pairs.tolist() == true.valid_pairs.tolist() == [False, True]
        assert out.loss.item() == pytest.approx(true.loss.item(), rel=1e-5)
        assert all(grad.isfinite().all() and grad.any() for grad in grads)
    else:
        assert out.loss.item() == 0
        assert not any(grad.any() for grad in grads)


@pytest.mark.parametrize("schedule", TRAINING)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_contiguous_inputs(dtype, schedule, device, backend):
    """Strided hidden states and a transposed weight: as exact as contiguous ones, though not by the same GEMM."""
    batch = realistic(dtype, device, pairs=16, length=5, size=72, vocab=1001)
    batch = replace(batch, train_weight=schedule != "single_pass", train_bias=schedule != "single_pass")
    strange = replace(
        batch,
        hidden=batch.hidden.repeat_interleave(2, 2)[..., ::2],
        weight=batch.weight.t().contiguous().t(),
        labels=batch.labels.repeat_interleave(2, 1)[:, ::2],
    )
    leaves = [t.detach().requires_grad_(schedule != "single_pass") for t in (strange.weight, strange.bias)]
    hidden = strange.hidden.detach().requires_grad_()
    assert not hidden.is_contiguous()
    assert not leaves[0].is_contiguous()
    out = orpo_loss(
        hidden, leaves[0], strange.labels, bias=leaves[1], schedule=schedule, backend=backend, **strange.options
    )
    out.loss.backward()
    found = {"hidden": hidden.grad, "weight": leaves[0].grad, "bias": leaves[1].grad}
    grads = {name: grad for name, grad in found.items() if grad is not None}
    assert_at_most_twice_plains_error(out, grads, batch)
