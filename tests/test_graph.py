"""`torch.compile` of a training step: no graph break, the same numbers, no graph for every length."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from orpo_kernels import Limits, ORPOOutput, orpo_loss, orpo_loss_from_rows, token_logps
from orpo_kernels.engine.graph import orpo_loss_op

from .batches import IGNORE, random_rows, relative_error

VOCAB, SIZE = 61, 16


@pytest.fixture(autouse=True)
def _fresh_graphs():
    torch._dynamo.reset()


class TinyModel(nn.Module):
    """A body and a tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, SIZE)
        self.layer = nn.Linear(SIZE, SIZE)
        self.bias = nn.Parameter(torch.randn(VOCAB))

    def forward(self, ids: Tensor) -> Tensor:
        return torch.tanh(self.layer(self.embedding(ids)))


def batch(length: int) -> tuple[Tensor, Tensor]:
    ids = torch.randint(VOCAB, (4, length))
    return ids, torch.where(torch.rand(4, length) < 0.6, ids, IGNORE)


def train(model: TinyModel, **options):
    """A step of body and loss: ids and labels to the loss' output."""

    def step(ids: Tensor, labels: Tensor) -> ORPOOutput:
        return orpo_loss(model(ids), model.embedding.weight, labels, bias=model.bias, shift=True, **options)

    return step


def assert_same(model: nn.Module, eager, compiled, *inputs: Tensor, tolerance: float = 1e-6) -> None:
    results = []
    for step in (eager, compiled):
        model.zero_grad()
        out = step(*inputs)
        out.loss.backward()
        assert [value.requires_grad for value in out] == [True] + [False] * (len(out) - 1)
        results.append([*out, *(p.grad.clone() for p in model.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        assert relative_error(b, a) <= tolerance


@pytest.mark.parametrize("schedule", ["resident", "recompute"])
def test_a_step_is_one_graph(schedule, backend):
    model = TinyModel()
    step = train(model, schedule=schedule)
    assert_same(model, step, torch.compile(step, fullgraph=True, backend="aot_eager"), *batch(9))


def test_a_frozen_head(backend):
    model = TinyModel()
    model.embedding.weight.requires_grad_(False)
    model.bias.requires_grad_(False)
    step = train(model)
    assert_same(model, step, torch.compile(step, fullgraph=True, backend="aot_eager"), *batch(9))


def test_lengths_share_a_graph():
    model, counter = TinyModel(), CompileCounterWithBackend("aot_eager")
    step = train(model)
    compiled = torch.compile(step, fullgraph=True, backend=counter)
    for length in (9, 10, 13, 24, 31):
        assert_same(model, step, compiled, *batch(length))
    assert counter.frame_count <= 2  # one for the first length, one for any


@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor needs a C++ compiler")
def test_inductor():
    model = TinyModel()
    step = train(model, logit_softcap=5.0, logit_scale=0.5)
    assert_same(model, step, torch.compile(step, fullgraph=True), *batch(9), tolerance=1e-5)


def test_autocast():
    model = TinyModel()

    def step(ids: Tensor, labels: Tensor) -> ORPOOutput:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return train(model)(ids, labels)

    # The gradient of the loss waits in bf16 rather than as a row's coefficient: one rounding apart.
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert_same(model, step, compiled, *batch(9), tolerance=torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_a_collator(weighted):
    """Rows enter a graph as tensors; denominators of a larger batch too."""
    generator = torch.Generator().manual_seed(0)
    rows = random_rows(generator, 20, VOCAB, pairs=2, num_rows=25, weighted=weighted)
    hidden = torch.randn(20, SIZE, generator=generator, requires_grad=True)
    weight = torch.randn(VOCAB, SIZE, generator=generator, requires_grad=True)

    def gradients(function):
        loss = function(hidden, weight, rows, nll_denominator=7, pair_denominator=torch.tensor(3)).loss
        return loss, *torch.autograd.grad(3 * loss, (hidden, weight))

    compiled = torch.compile(orpo_loss_from_rows, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(orpo_loss_from_rows), gradients(compiled), strict=True):
        assert relative_error(b, a) <= 1e-6


@pytest.mark.parametrize("needs", [[True, True, True], [True, False, False], [False, True, False], [False] * 3])
@pytest.mark.parametrize(("dtype", "weighted"), [(torch.float64, False), (torch.bfloat16, True)], ids=str)
def test_opcheck(dtype, needs, weighted):
    generator = torch.Generator().manual_seed(0)
    rows = random_rows(generator, 20, VOCAB, pairs=2, num_rows=25, weighted=weighted)
    shapes = ((20, SIZE), (VOCAB, SIZE), (VOCAB,))
    hidden, weight, bias = (
        torch.randn(*shape, generator=generator).to(dtype).requires_grad_(needed)
        for shape, needed in zip(shapes, needs, strict=True)
    )
    vectors = (rows.position, rows.target, rows.sequence, rows.scored, rows.nll_weight)
    count = torch.tensor(3.0, dtype=torch.float64)
    method = ("orpo", [0.1, 1.0], None)  # beta, alpha; no reference
    limits = Limits(chunk_rows=7, gemm_dtype=dtype).numbers if weighted else None
    chosen = (1.0, None, "auto", None, "torch", None)  # scale and cap of logits, schedule, budget, backend, sparse_eps
    options = (True, rows.pair_weight, None, count, *method, *chosen, limits, dtype, needs)
    torch.library.opcheck(orpo_loss_op, (hidden, weight, bias, *vectors, rows.num_pairs, *options))


def test_bad_labels_are_refused_inside_a_graph():
    model = TinyModel()
    compiled = torch.compile(train(model), fullgraph=True, backend="aot_eager")
    ids, labels = batch(9)
    with pytest.raises(ValueError, match="weight has 61 rows"):
        compiled(ids, torch.where(labels == IGNORE, labels, labels + VOCAB))


def test_token_logps_breaks_the_graph_and_nothing_else():
    model = TinyModel()
    ids, labels = batch(9)

    def step(ids: Tensor, labels: Tensor) -> Tensor:
        return token_logps(model(ids), model.embedding.weight, labels).sum() * 2

    torch.testing.assert_close(torch.compile(step, backend="aot_eager")(ids, labels), step(ids, labels))
    torch._dynamo.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="as many rows as labels ask for"):
        torch.compile(step, fullgraph=True, backend="aot_eager")(ids, labels)
