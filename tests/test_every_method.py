"""What the loss of one method can, that of every method can: groups of pairs, a compiled graph, groups of ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_kernels import PreferenceOutput, plan, preference_loss_from_rows
from orpo_kernels.methods import METHODS, Method
from orpo_kernels.rows import rows_from_labels

from .ranks import Ranks, topology

PAIRS, LENGTH, SIZE, VOCAB = 4, 9, 8, 40
each_method = pytest.mark.parametrize("name", METHODS)


def tensors() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """hidden (2B, T, H), weight, labels (2B, T), a reference's log-probabilities (2B,)."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PAIRS, LENGTH, SIZE, generator=generator)
    weight = torch.randn(VOCAB, SIZE, generator=generator)
    labels = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    labels[:, :2] = -100
    return hidden, weight, labels, -5 - torch.rand(2 * PAIRS, generator=generator, dtype=torch.float64)


def call(
    name: str, hidden: Tensor, weight: Tensor, labels: Tensor, reference: Tensor
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """The arguments of `preference_loss_from_rows`."""
    given = reference if METHODS[name].needs_reference else None
    options = {"rows": rows_from_labels(labels), "method": METHODS[name](), "reference_logps": given}
    return hidden.flatten(0, 1).requires_grad_(), weight.requires_grad_(), options


def inputs(name: str) -> tuple[Tensor, Tensor, dict[str, Any]]:
    return call(name, *tensors())


def gradients(out: PreferenceOutput, hidden: Tensor, weight: Tensor) -> list[Tensor]:
    return [out.loss, *out[1:], *torch.autograd.grad(3 * out.loss, (hidden, weight))]


@each_method
def test_groups_of_pairs(name):
    """A residual that does not fit as a whole: pair by pair, in fp32."""
    hidden, weight, rest = inputs(name)
    rows = rest["rows"]
    budget = 4 * VOCAB * (SIZE + rows.largest_pair() + 2)
    made = plan(len(rows), SIZE, VOCAB, memory_budget=budget, largest_pair=rows.largest_pair)
    assert made.group_rows
    options = {"schedule": "resident", "memory_budget": budget}
    in_groups = gradients(preference_loss_from_rows(hidden, weight, **rest, **options), hidden, weight)
    whole = gradients(preference_loss_from_rows(hidden, weight, **rest), hidden, weight)
    for a, b in zip(in_groups, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@each_method
def test_a_compiled_graph_without_a_break(name):
    hidden, weight, rest = inputs(name)
    compiled = torch.compile(preference_loss_from_rows, fullgraph=True, backend="aot_eager")
    ours = gradients(compiled(hidden, weight, **rest), hidden, weight)
    for a, b in zip(ours, gradients(preference_loss_from_rows(hidden, weight, **rest), hidden, weight), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    torch._dynamo.reset()


@each_method
def test_no_group_is_no_obstacle(name):
    hidden, weight, rest = inputs(name)
    groups = dict.fromkeys(("data_group", "vocab_group", "sequence_group"))
    ours = preference_loss_from_rows(hidden, weight, **rest, **groups)
    assert torch.equal(ours.loss, preference_loss_from_rows(hidden, weight, **rest).loss)


def part(name: str, kind: str) -> list[Tensor]:
    """This rank's share of the batch: loss, and gradients of hidden states and weight, whole, 0 where others are."""
    hidden, weight, labels, reference = tensors()
    rank = torch.distributed.get_rank()
    held = torch.zeros(2 * PAIRS, LENGTH, dtype=torch.bool)  # positions of this rank
    columns = slice(0, VOCAB)
    if kind == "data":
        held.view(2, PAIRS, LENGTH)[:, slice(0, 1) if rank == 0 else slice(1, PAIRS)] = True
        pairs = held[:, 0].nonzero().squeeze(1)
        own = call(name, hidden[pairs], weight, labels[pairs], reference[pairs])
    elif kind == "sequence":
        held[:, slice(0, 5) if rank == 0 else slice(5, LENGTH)] = True
        own = call(name, hidden[:, held[0]], weight, labels[:, held[0]], reference)
    else:
        held[:] = True
        columns = slice(0, 13) if rank == 0 else slice(13, VOCAB)
        own = call(name, hidden, weight[columns], labels, reference)
    groups = {f"{kind}_group": topology().world}
    out = preference_loss_from_rows(*own[:2], **own[2], **groups)
    of_hidden, of_weight = torch.autograd.grad(out.loss, own[:2])
    grads = torch.zeros_like(hidden), torch.zeros_like(weight)
    grads[0][held] = of_hidden
    grads[1][columns] = of_weight
    return [out.loss.detach(), *grads]


@pytest.fixture(scope="module")
def ranks():
    with Ranks(2) as pool:
        yield pool


@pytest.mark.parametrize("kind", ["data", "vocab", "sequence"])
@each_method
def test_two_ranks_are_one_process(name, kind, ranks):
    """Gradients are averaged over data and sequence groups; over a vocabulary, those of hidden states are whole."""
    hidden, weight, rest = inputs(name)
    loss = preference_loss_from_rows(hidden, weight, **rest).loss
    of_hidden, of_weight = torch.autograd.grad(loss, (hidden, weight))
    losses, hiddens, weights = zip(*ranks.run(part, name, kind), strict=True)
    torch.testing.assert_close(sum(losses) / 2, loss.detach(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close((sum(hiddens) / 2).flatten(0, 1), of_hidden, rtol=1e-4, atol=1e-6)
    total = sum(weights) if kind == "vocab" else sum(weights) / 2
    torch.testing.assert_close(total, of_weight, rtol=1e-4, atol=1e-6)


@dataclass(frozen=True)
class Squared(Method):
    """A method of a user's, who gives its pair loss alone."""

    name = "squared"

    def pair_losses(self, scores: Tensor, reference: Tensor | None = None) -> Tensor:
        chosen, rejected = scores.view(2, -1)
        return (1 - self.beta * (chosen - rejected)) ** 2


def test_a_method_of_a_users_has_its_gradient_by_autograd():
    hidden, weight, rest = inputs("simpo")
    rows, method = rest["rows"], Squared(beta=0.3)
    out = preference_loss_from_rows(hidden, weight, rows, method)
    logps = (hidden.double() @ weight.double().t()).log_softmax(-1)[rows.position, rows.target]
    scores = torch.zeros(2 * PAIRS, dtype=torch.float64).index_add(0, rows.sequence, logps)
    expected = method.pair_losses(scores).mean()
    torch.testing.assert_close(out.loss.double(), expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(loss, (hidden, weight)) for loss in (out.loss, expected))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_a_missing_reference_is_named():
    hidden, weight, rest = inputs("dpo")
    with pytest.raises(ValueError, match="DPO needs the reference model's log-probabilities"):
        preference_loss_from_rows(hidden, weight, **{**rest, "reference_logps": None})
