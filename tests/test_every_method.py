"""What the loss of one method can, that of every method can: groups of pairs, a compiled graph, groups of ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from orpo_kernels import PreferenceOutput, plan, preference_loss_from_rows
from orpo_kernels.methods import METHODS
from orpo_kernels.rows import rows_from_labels

PAIRS, LENGTH, SIZE, VOCAB = 4, 9, 8, 40
each_method = pytest.mark.parametrize("name", METHODS)


def inputs(name: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(2 * PAIRS * LENGTH, SIZE, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(VOCAB, SIZE, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (2 * PAIRS, LENGTH), generator=generator)
    labels[:, :2] = -100
    reference = -5 - torch.rand(2 * PAIRS, generator=generator, dtype=torch.float64)
    options = {"method": METHODS[name](), "reference_logps": reference if METHODS[name].needs_reference else None}
    return hidden, weight, {"rows": rows_from_labels(labels), **options}


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


def test_a_missing_reference_is_named():
    hidden, weight, rest = inputs("dpo")
    with pytest.raises(ValueError, match="DPO needs the reference model's log-probabilities"):
        preference_loss_from_rows(hidden, weight, **{**rest, "reference_logps": None})
