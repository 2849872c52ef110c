"""The loss in trainers of frameworks that make their own batches: (2B, T), the B chosen sequences first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ..methods import Method
from ..transformers.batches import RowsCollator, with_rows
from ..transformers.causal_lm import CausalLMOutput
from ..transformers.mixin import PreferenceLossMixin
from ..transformers.packing import SIDES, Packing, pack_pairs
from ..transformers.sharing import automatic_packing, refuses_before_training
from ..transformers.versions import loss_takes_counts

OPTIONS = ("packing", "sparse_eps", "exact_accumulation")
_BATCH = ("input_ids", "attention_mask", "labels")
_PACKED = ("input_ids", "packed", "rows")
_OF_IMAGES = ("pixel", "image", "video", "audio", "input_features")


class CollatedPairsMixin(PreferenceLossMixin):
    """Put it in front of the framework's trainer; call `serve` behind the `__init__` of that.

    Refused by name, in the first batch, is what the loss would drop: pixel_values, position_ids, ...
    """

    data_collator: Any
    store_metrics: Any

    def serve(
        self, method: Method, padding_id: int, packing: Packing = "auto", sparse_eps: float | None = None
    ) -> None:
        """Train by `method`. `packing` and `sparse_eps` are those of `orpo_kernels.trl.ORPOTrainer`."""
        choices = [choice for choice in get_args(Packing) if choice != "measure"]
        if packing not in choices:
            raise ValueError(f"packing must be one of {', '.join(map(repr, choices))}; got {packing!r}.")
        loss_takes_counts(self)
        self.method = method
        self.loss_options = {"sparse_eps": sparse_eps}
        self._check_setup()
        if packing == "shared" and (reason := refuses_before_training(self.model)):
            raise ValueError(f'{reason} Use packing="padded".')
        if packing == "auto":
            packing, _ = automatic_packing(self.model, self.args.device)
        if packing == "shared":
            collator = partial(packed, padding_id=padding_id, aligned=self.aligns_widths)
            self.data_collator = RowsCollator(collator, self.method, device=self.args.device)

    def loss_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if "packed" in batch:
            return with_rows({name: batch[name] for name in _PACKED if name in batch}, self.method)
        if others := [name for name, value in batch.items() if name not in _BATCH and value is not None]:
            raise ValueError(
                f"The batch holds {', '.join(others)} beside {', '.join(_BATCH)}, which the loss would drop: it serves "
                "text alone. Train this model and these pairs by the framework's own trainer."
            )
        return with_rows({name: batch[name] for name in _BATCH}, self.method)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        loss, metrics = self.get_batch_loss_metrics(model, inputs, "train", num_items_in_batch)
        self.store_metrics(metrics, train_eval="train")
        return (loss, metrics) if return_outputs else loss

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train", step_counts: Tensor | None = None
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, 0-d, and `batch_metrics` of it."""
        inputs = self.loss_inputs(batch)
        if train_eval == "eval":
            loss, out = self.evaluation_step(model, inputs)
        else:
            loss, out = self.loss_step(model, inputs, step_counts)
        prefix = "eval_" if train_eval == "eval" else ""
        return loss, {prefix + name: value for name, value in self.batch_metrics(out).items()}

    def batch_metrics(self, out: CausalLMOutput) -> dict[str, float]:
        """What the framework logs, without the means of logits that nobody has made."""
        raise NotImplementedError


def packed(pairs: Sequence[Mapping[str, Any]], padding_id: int, aligned: bool = False) -> dict[str, Any]:
    """The batch of the frameworks' tokenised pairs with shared prompts. Raises `ValueError` for pairs with images."""
    for index, pair in enumerate(pairs):
        others = [name for name, value in pair.items() if any(word in name for word in _OF_IMAGES) and _holds(value)]
        if others:
            raise ValueError(
                f"Pair {index} of the batch holds {', '.join(others)}, and the loss serves text alone. Train this "
                "model and these pairs by the framework's own trainer."
            )
    names = [f"{side}_{field}" for side in SIDES for field in ("input_ids", "labels")]
    return pack_pairs([{name: pair[name] for name in names} for pair in pairs], padding_id, aligned=aligned)


def _holds(value: Any) -> bool:
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)


def odds_ratio_losses(out: CausalLMOutput) -> Tensor:
    """(B,) -log sigmoid of the difference of log-odds."""
    return -F.logsigmoid(out.log_odds.detach())
