"""A frozen head with a few trained columns (LoRA's B): the definition's numbers, at the cost of those columns."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from orpo_kernels import Limits, orpo_loss_from_rows, plan, reference
from orpo_kernels.rows import rows_from_labels

PAIRS, LENGTH, SIZE, RANK, VOCAB = 3, 8, 24, 8, 97


def inputs(dtype: torch.dtype = torch.float64) -> tuple[dict[str, Tensor], Tensor]:
    """Leaves: hidden (N, H + r), weight (V, H), low_rank (V, r), bias (V,); and labels (2B, T)."""
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "hidden": (2 * PAIRS * LENGTH, SIZE + RANK),
        "weight": (VOCAB, SIZE),
        "low_rank": (VOCAB, RANK),
        "bias": (VOCAB,),
    }
    leaves = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    labels[:, :3] = -100
    return leaves, labels


def gradients(leaves: dict[str, Tensor], loss: Tensor) -> dict[str, Tensor | None]:
    loss.backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def trained(leaves: dict[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: leaf.detach().clone().requires_grad_(name in names) for name, leaf in leaves.items()}


def ours(leaves: dict[str, Tensor], labels: Tensor, **options) -> Tensor:
    hidden, weight, low_rank, bias = leaves.values()
    rows = rows_from_labels(labels)
    return orpo_loss_from_rows(hidden, weight, rows, low_rank=low_rank, bias=bias, beta=0.5, **options).loss


def definition(leaves: dict[str, Tensor], labels: Tensor, **options) -> Tensor:
    hidden, weight, low_rank, bias = (leaf.double() for leaf in leaves.values())
    hidden, head = hidden.view(2 * PAIRS, LENGTH, -1), torch.cat((weight, low_rank), dim=1)
    return reference.orpo_loss(hidden, head, labels, bias=bias, beta=0.5, **options).loss


def assert_is_the_definition(
    dtype: torch.dtype, names: Sequence[str], schedule: str, limits: Limits | None = None, **transform: float
) -> None:
    leaves, labels = inputs(dtype)
    expected_leaves, found_leaves = trained(leaves, *names), trained(leaves, *names)
    expected = definition(expected_leaves, labels, **transform)
    found = ours(found_leaves, labels, schedule=schedule, limits=limits, **transform)
    tolerance = {"rtol": 1e-6, "atol": 1e-8} if dtype == torch.float64 else {"rtol": 1e-3, "atol": 1e-5}
    torch.testing.assert_close(found.double(), expected, **tolerance)
    expected_gradients = gradients(expected_leaves, expected)
    for name, grad in gradients(found_leaves, found).items():
        assert (grad is not None) == (name in names), name
        if grad is not None:
            torch.testing.assert_close(grad, expected_gradients[name], **tolerance)


TRAINED = ["hidden low_rank", "low_rank", "hidden low_rank bias", "hidden weight low_rank", "hidden"]
each_schedule = pytest.mark.parametrize("schedule", ["auto", "resident", "recompute"])


@pytest.mark.parametrize("names", TRAINED)
@each_schedule
@pytest.mark.parametrize("transform", [{}, {"logit_scale": 0.5, "logit_softcap": 2.0}], ids=["plain", "transform"])
def test_loss_and_gradients_are_the_definitions(names, schedule, transform, small_chunks):
    assert_is_the_definition(torch.float64, names.split(), schedule, limits=small_chunks, **transform)


@each_schedule
def test_the_backends_agree(schedule, backend):
    assert_is_the_definition(torch.float32, ("hidden", "low_rank"), schedule)


def test_adapters_in_float32_on_a_head_in_bfloat16():
    leaves, labels = inputs(torch.float32)
    leaves["weight"], leaves["hidden"], leaves["bias"] = (
        leaves[name].to(torch.bfloat16) for name in ("weight", "hidden", "bias")
    )
    expected_leaves, found_leaves = (trained(leaves, "hidden", "low_rank") for _ in range(2))
    expected = gradients(expected_leaves, definition(expected_leaves, labels))
    found = gradients(found_leaves, ours(found_leaves, labels))
    assert found["low_rank"].dtype == torch.float32
    for name in ("hidden", "low_rank"):
        assert float((found[name] - expected[name]).norm()) < 0.02 * float(expected[name].norm())


def test_where_the_residual_does_not_fit_it_is_made_again_and_not_in_groups():
    """A gradient costs its columns alone; one of the whole head would be accumulated over groups of pairs."""
    leaves, labels = inputs(torch.float32)
    leaves["hidden"], labels = leaves["hidden"].repeat(4, 1), labels.repeat(4, 1)
    rows, largest_pair = int((labels != -100).sum()), 2 * (LENGTH - 3)
    budget = 4 * VOCAB * (SIZE + RANK + 2 * largest_pair)
    sizes = (rows, SIZE + RANK, VOCAB)
    assert plan(*sizes, needs_bias=False, memory_budget=budget, largest_pair=lambda: largest_pair).group_rows
    results = []
    for gemms, options in ((2, {}), (3, {"memory_budget": budget})):
        copies = trained(leaves, "hidden", "low_rank")
        with FlopCounterMode(display=False) as counter:
            results.append(gradients(copies, ours(copies, labels, **options)))
        assert counter.get_total_flops() == 2 * rows * VOCAB * (gemms * (SIZE + RANK) + RANK)
    for name in ("hidden", "low_rank"):
        torch.testing.assert_close(results[0][name], results[1][name])


def test_without_gradient_and_in_a_graph():
    leaves, labels = inputs(torch.float32)
    expected = definition(leaves, labels).float()
    torch.testing.assert_close(ours(leaves, labels), expected)
    leaves = trained(leaves, "hidden", "low_rank")
    rows = rows_from_labels(labels)

    def step(hidden: Tensor, low_rank: Tensor) -> Tensor:
        return orpo_loss_from_rows(
            hidden, leaves["weight"], rows, low_rank=low_rank, bias=leaves["bias"], beta=0.5
        ).loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)(leaves["hidden"], leaves["low_rank"])
    torch.testing.assert_close(compiled, expected)
    compiled.backward()
    again = trained(leaves, "hidden", "low_rank")
    for name, grad in gradients(again, ours(again, labels)).items():
        if grad is not None:
            torch.testing.assert_close(leaves[name].grad, grad)


@pytest.mark.parametrize(
    ("low_rank", "error", "message"),
    [
        (torch.zeros(VOCAB - 1, RANK), ValueError, r"\(96, 8\), but weight \(97, 24\) asks for \(97, r\)"),
        (torch.zeros(VOCAB), ValueError, r"\(97,\), but weight"),
        (torch.zeros(VOCAB, RANK, device="meta"), TypeError, "weight is on cpu, but low_rank is on meta"),
        (torch.zeros(VOCAB, RANK + 1), ValueError, "they are 32 and 33"),
    ],
)
def test_columns_that_do_not_fit_are_refused(low_rank, error, message):
    leaves, labels = inputs(torch.float32)
    with pytest.raises(error, match=message):
        ours({**leaves, "low_rank": low_rank}, labels)
