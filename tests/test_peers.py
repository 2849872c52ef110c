"""TRL's, Liger's and Unsloth's own code, in the same process, against ours: the same loss and the same gradients."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.contest import peers
from benchmarks.contest.workloads import Workload, synthetic
from orpo_kernels import reference

from .batches import IGNORE, relative_error

ROOT = Path(__file__).parents[1]
BETA = 0.1
SEEDS = range(8)
# CCE has no bias and compiles.
NAMES = ("plain", "plain fp32", "Liger", "TRL trainer", "Unsloth", "TRL-composed", "torch native")


def batch(seed: int, nll_ids: str = "same") -> tuple[Workload, Tensor]:
    """A ragged fp32 batch in TRL's dialect, and a bias. `nll_ids` "other": NLL ids that are not the odds ratio's."""
    work = synthetic(pairs=3, length=23, hidden_size=48, vocabulary=211, share=0.5, seed=seed)
    bias = torch.randn(211, generator=torch.Generator().manual_seed(seed))
    if nll_ids == "other":
        other = (work.nll_labels + 1 + seed) % 211
        work = replace(work, nll_labels=torch.where(work.nll_labels == IGNORE, IGNORE, other))
    return work, bias


def loss_and_gradients(loss: Callable[..., Tensor], work: Workload, bias: Tensor | None) -> dict[str, Tensor]:
    leaves = {"hidden": work.hidden, "weight": work.weight} | ({} if bias is None else {"bias": bias})
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in leaves.items()}
    value = loss(leaves["hidden"], leaves["weight"], work.labels, work.nll_labels, BETA, bias=leaves.get("bias"))
    gradients = torch.autograd.grad(value, list(leaves.values()))
    return {"loss": value.detach(), **dict(zip(leaves, gradients, strict=True))}


def exact(work: Workload, bias: Tensor | None) -> dict[str, Tensor]:
    """By definition, in float64, on the same fp32 numbers."""

    def loss(
        hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor, beta: float, bias: Tensor | None
    ) -> Tensor:
        return reference.orpo_loss(hidden, weight, labels, nll_labels=nll_labels, bias=bias, beta=beta).loss

    return loss_and_gradients(loss, work.cast(torch.float64), None if bias is None else bias.double())


def peer_named(name: str) -> peers.Peer:
    peer = peers.PEERS[name]
    if not peer.available:
        pytest.skip(f"{name}: the package {peer.package} is not installed")
    return peer


def errors(values: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    return {name: relative_error(values[name], true) for name, true in truth.items()}


@pytest.mark.parametrize("nll_ids", ["same", "other"])
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", NAMES)
def test_equals_ours(name: str, seed: int, nll_ids: str) -> None:
    """Loss and the gradients of hidden states, weight and bias to 1e-6, relative, in fp32."""
    peer = peer_named(name)
    work, bias = batch(seed, nll_ids)
    theirs, ours = (loss_and_gradients(loss, work, bias) for loss in (peer, peers.ours))
    assert max(errors(theirs, ours).values()) <= 1e-6, errors(theirs, ours)


@pytest.mark.parametrize("name", NAMES)
def test_no_entry_is_far_off(name: str) -> None:
    """Each entry is within 2e-6 of the largest of float64's; the worst of thousands is off by up to 1e-6."""
    peer = peer_named(name)
    for seed in SEEDS:
        work, bias = batch(seed)
        truth = exact(work, bias)
        for loss in (peer, peers.ours):
            for key, value in loss_and_gradients(loss, work, bias).items():
                worst = (value.double() - truth[key]).abs().max() / truth[key].abs().max()
                assert worst <= 2e-6, (key, worst, "ours" if loss is peers.ours else name)


@pytest.mark.slow
def test_unsloth_is_called_as_by_its_own_trainer(tmp_path: Path) -> None:
    """A process and a folder of its own: importing Unsloth patches torch, transformers and TRL, and writes a cache."""
    if importlib.util.find_spec("unsloth") is None:
        pytest.skip("unsloth is not installed")
    run = subprocess.run(
        [sys.executable, "-m", "tests.under_unsloth"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "UNSLOTH_ALLOW_CPU": "1", "PYTHONPATH": os.pathsep.join((str(ROOT), *sys.path))},
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-6000:]


def test_rows_of_the_composed_peers() -> None:
    """Both labels of one position are one row if they agree, two if not, and each is used where it belongs."""
    labels = torch.tensor([[IGNORE, 5, 6], [IGNORE, IGNORE, 7]])
    nll_labels = torch.tensor([[4, 5, 9]])
    rows = peers.valid_rows(labels, nll_labels)
    found = sorted(zip(*(column.tolist() for column in rows), strict=True))
    assert found == [
        (0, 4, 0, False, True),  # the prompt
        (1, 5, 0, True, True),  # both, of one target
        (2, 6, 0, True, False),  # the odds ratio's target
        (2, 9, 0, False, True),  # the NLL's target at the same position
        (5, 7, 1, True, False),  # rejected: no NLL
    ]
