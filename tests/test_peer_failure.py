"""A rank that fails makes the others stop, with an error that says so."""

from __future__ import annotations

import os
import signal

import pytest
import torch
import torch.distributed as dist

from orpo_kernels import orpo_loss

from .ranks import RankError, Ranks, topology

if not dist.is_available():
    pytest.skip("torch.distributed is not in this build of torch", allow_module_level=True)

SECONDS = 5  # the groups' timeout, which bounds how long a rank waits for one that is alive but elsewhere


def step(failure: str | None) -> None:
    """One forward and backward pass, in which rank 1 may fail."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(4, 5, 8, generator=generator, requires_grad=True)
    weight = torch.randn(20, 8, generator=generator, requires_grad=True)
    labels = torch.randint(20, (4, 5), generator=generator)
    fails = failure is not None and dist.get_rank() == 1
    if fails and failure == "raises":
        raise MemoryError("as much as there is")
    loss = orpo_loss(hidden, weight, labels, vocab_group=topology().world).loss
    if fails and failure == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()


@pytest.mark.parametrize(
    ("failure", "exchanged"),
    [("killed", "the gradient of the hidden states"), ("raises", "the sizes of the lm-head's shards")],
)
def test_the_others_stop(failure, exchanged):
    with Ranks(3, timeout=SECONDS) as ranks:
        ranks.run(step, None)
        with pytest.raises(RankError) as found:
            ranks.run(step, failure)
    said = str(found.value)
    assert ("rank 1: the process has died" if failure == "killed" else "MemoryError: as much as there is") in said
    for rank in (0, 2):
        assert f"PeerError: rank {rank} of 3 of vocab_group lost the others while it exchanged {exchanged}" in said
