"""What the trainers log: metrics of pairs, and their means over batches, which the host reads once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import EvalPrediction

from .. import PreferenceOutput
from ..devices import moved, rows_device, statistics_dtype

PAIR_METRICS = (
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/rejected",
    "logps/chosen",
    "log_odds_ratio",
    "log_odds_chosen",
)
METRICS = (*PAIR_METRICS, "nll_loss")


class Part(NamedTuple):
    """What a batch adds to a mean, both 0-d: a sum, and what that is to be divided by."""

    sum: Tensor
    weight: Tensor


class Averages:
    """The means of what was added, each over all batches and all processes, as if they were one batch."""

    def __init__(self) -> None:
        self._parts: dict[str, Part] = {}

    def add(self, parts: Mapping[str, Part]) -> None:
        """Nothing is read on the host."""
        for name, part in parts.items():
            own = Part(*(moved(one.detach(), rows_device(one.device), torch.float64) for one in part))
            known = self._parts.get(name)
            self._parts[name] = own if known is None else Part(known.sum + own.sum, known.weight + own.weight)

    def means(self, accelerator: Any) -> dict[str, float]:
        """By name, without what has no weight. All processes call it together, with the same names."""
        if not self._parts:
            return {}
        sums = torch.stack([torch.stack(part) for part in self._parts.values()])
        sums = moved(sums, accelerator.device, statistics_dtype(accelerator.device))  # where processes can gather it
        pairs = zip(self._parts, accelerator.gather(sums[None]).sum(0).tolist(), strict=True)
        return {name: total / weight for name, (total, weight) in pairs if weight}


def averaged_metrics(out: PreferenceOutput, valid: Tensor, nll_count: Tensor) -> dict[str, Part]:
    """What a batch adds to `METRICS`: the pairs that are `valid` (B,) bool, and its NLL, a mean over `nll_count`."""
    device = nll_count.device
    valid = valid.to(device)
    sums = moved(pair_metrics(out), device, torch.float64).masked_fill(~valid[:, None], 0).sum(0)
    pairs = valid.sum()
    parts = {name: Part(total, pairs) for name, total in zip(PAIR_METRICS, sums, strict=True)}
    return parts | {"nll_loss": Part(out.nll_loss.to(device) * nll_count, nll_count)}


def pair_metrics(out: PreferenceOutput) -> Tensor:
    """(B, 8) fp32: `PAIR_METRICS` of every pair, as TRL defines them; NaN for a pair with an empty answer."""
    chosen, rejected = out.chosen_rewards, out.rejected_rewards
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": out.preferred.to(chosen.dtype),
        "rewards/margins": chosen - rejected,
        "logps/rejected": out.rejected_logps,
        "logps/chosen": out.chosen_logps,
        "log_odds_ratio": F.logsigmoid(out.log_odds),
        "log_odds_chosen": out.log_odds,
    }
    metrics = torch.stack([values[name].detach().float() for name in PAIR_METRICS], 1)
    return metrics.masked_fill(~out.valid_pairs[:, None], torch.nan)


def preference_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The means of `METRICS` over the valid pairs, for `compute_metrics`. (For nll_loss the trainer puts the set's.)"""
    values = prediction.predictions
    values = np.concatenate(values) if isinstance(values, list) else np.asarray(values)
    valid = ~np.isnan(values)
    sums, counts = np.where(valid, values, 0).sum(0, dtype=np.float64), valid.sum(0)
    return {name: float(s / n) for name, s, n in zip(METRICS, sums, counts, strict=True) if n}
