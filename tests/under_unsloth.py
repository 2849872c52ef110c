"""Unsloth's own step from hidden states to the ORPO loss beside the peer of that name: the same loss and gradients.

    UNSLOTH_ALLOW_CPU=1 python -m tests.under_unsloth    # leaves Unsloth's cache where it runs

A process of its own (`test_peers.py` starts it): importing Unsloth patches torch, transformers and TRL.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
import torch.nn.functional as F
import unsloth  # noqa: F401  (before what is in it)
from torch import Tensor
from unsloth.models.rl_replacements import _unsloth_pref_chunked_forward

from benchmarks.contest import peers

from .test_peers import IGNORE, batch, errors, exact, loss_and_gradients


def of_its_trainer(
    hidden: Tensor, weight: Tensor, labels: Tensor, nll_labels: Tensor, beta: float, bias: Tensor | None
) -> Tensor:
    """What its ORPO trainer makes of the body's hidden states; labels as TRL gives them, unshifted."""
    pairs = nll_labels.shape[0]
    ids = F.pad(torch.cat([nll_labels, labels[pairs:]]), (1, 0), value=IGNORE)
    batch = {
        "concatenated_input_ids": ids.clamp(min=0),
        "concatenated_attention_mask": (ids != IGNORE).long(),
        "concatenated_labels": F.pad(labels, (1, 0), value=IGNORE),
    }
    trainer = SimpleNamespace(accelerator=SimpleNamespace(unwrap_model=lambda model: model))
    model, head = SimpleNamespace(config=SimpleNamespace()), SimpleNamespace(weight=weight, bias=bias)
    states = F.pad(hidden, (0, 0, 0, 1))
    result, _ = _unsloth_pref_chunked_forward(trainer, model, head, batch, pairs, states, "orpo")
    chosen, rejected, _, _, nll = result
    return nll + beta * peers.odds_ratio(chosen, rejected)


def main() -> None:
    for nll_ids in ("same", "other"):
        for seed in range(3):
            work, bias = batch(seed, nll_ids)
            theirs, peer = (loss_and_gradients(loss, work, bias) for loss in (of_its_trainer, peers.PEERS["Unsloth"]))
            for truth in (theirs, exact(work, bias)):
                found = errors(peer, truth)
                assert max(found.values()) <= 1e-6, (nll_ids, seed, found)


if __name__ == "__main__":
    main()
