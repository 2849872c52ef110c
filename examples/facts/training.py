"""The training loop: everything a fine-tune needs, around one call of `causal_lm_orpo_loss`."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from math import ceil
from typing import Any

import torch

from orpo_kernels.transformers import PreferenceCollator, causal_lm_orpo_loss

from .data import Fact, batches

WARMUP_STEPS = 4
MAX_GRAD_NORM = 1.0


@dataclass(frozen=True)
class Recipe:
    """How to train. `max_steps` ends the run early (None: all epochs); `freeze_head` leaves the lm-head as it is."""

    epochs: int
    batch_size: int
    lr: float
    beta: float
    seed: int
    max_steps: int | None = None
    freeze_head: bool = False

    def steps(self, pairs: int) -> int:
        """Optimizer steps that the recipe makes of so many training pairs."""
        whole = self.epochs * ceil(pairs / self.batch_size)
        return whole if self.max_steps is None else min(whole, self.max_steps)


@dataclass(frozen=True)
class Step:
    """One optimizer step: the batch's loss and metrics before it, and how long it took."""

    step: int
    epoch: int
    loss: float
    nll: float
    log_odds: float
    accuracy: float
    grad_norm: float
    lr: float
    seconds: float


def train(model: Any, collator: PreferenceCollator, facts: Sequence[Fact], recipe: Recipe) -> Iterator[Step]:
    """Fine-tune `model` in place by AdamW, yielding after every step. May be stopped at any step."""
    model.get_output_embeddings().weight.requires_grad_(not recipe.freeze_head)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=recipe.lr, weight_decay=0.0, fused=True)
    total = recipe.steps(len(facts))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: _lr_factor(done, total))
    model.train()
    for step, (epoch, pairs) in enumerate(islice(_epochs(facts, recipe), total), start=1):
        began = time.perf_counter()
        out = causal_lm_orpo_loss(model, **collator([fact.chat for fact in pairs]), prompt_nll=False, beta=recipe.beta)
        out.loss.backward()
        grad_norm = torch.nn.utils.clip_grad_norm_(trained, MAX_GRAD_NORM)
        lr = float(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        yield Step(
            step=step,
            epoch=epoch,
            loss=out.loss.item(),
            nll=out.nll_loss.item(),
            log_odds=out.log_odds.mean().item(),
            accuracy=(out.log_odds > 0).double().mean().item(),
            grad_norm=grad_norm.item(),
            lr=lr,
            seconds=time.perf_counter() - began,
        )


def _epochs(facts: Sequence[Fact], recipe: Recipe) -> Iterator[tuple[int, list[Fact]]]:
    """(epoch, batch) without end."""
    for epoch in count(1):
        for pairs in batches(facts, recipe.batch_size, seed=recipe.seed * 1000 + epoch):
            yield epoch, pairs


def _lr_factor(done: int, total: int) -> float:
    """Linear warm-up, then linear decay to zero behind the last step."""
    return min((done + 1) / (WARMUP_STEPS + 1), max(0.0, (total - done) / max(1, total - WARMUP_STEPS)))
