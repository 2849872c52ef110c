"""The loss in trainers of frameworks that make their own batches: (2B, T), the B chosen sequences first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, get_args

from torch import Tensor, nn

from ..methods import Method
from ..transformers.causal_lm import CausalLMOutput
from ..transformers.mixin import PreferenceLossMixin
from ..transformers.packing import Packing, pack_pairs

OPTIONS = ("packing", "sparse_eps", "exact_accumulation")
_BATCH = ("input_ids", "attention_mask", "labels")
_OF_IMAGES = ("pixel", "image", "video", "audio", "input_features")


class CollatedPairsMixin(PreferenceLossMixin):
    """Put it in front of the framework's trainer; call `serve` behind the `__init__` of that.

    Refused by name, in the first batch, is what the loss would drop: pixel_values, position_ids, ...
    """

    def serve(
        self,
        method: Method,
        padding_id: int,
        packing: Packing = "auto",
        sparse_eps: float | None = None,
        exact_accumulation: bool = True,
    ) -> None:
        """Train by `method`. The other `OPTIONS` are those of `orpo_kernels.trl.ORPOTrainer`."""
        choices = [choice for choice in get_args(Packing) if choice != "measure"]
        if packing not in choices:
            raise ValueError(f"packing must be one of {', '.join(map(repr, choices))}; got {packing!r}.")
        self.loss_is_scaled_for_ga = exact_accumulation
        self.method = method
        self.loss_options = {"sparse_eps": sparse_eps}
        self._check_setup()
        if self._decided(packing) == "shared":
            self.data_collator = self.rows_collator(partial(packed, padding_id=padding_id, aligned=self.aligns_widths))

    def batch_inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        if "packed" in batch:
            return batch
        if others := [name for name, value in batch.items() if name not in _BATCH and value is not None]:
            raise ValueError(
                f"The batch holds {', '.join(others)} beside {', '.join(_BATCH)}, which the loss would drop: it serves "
                "text alone. Train this model and these pairs by the framework's own trainer."
            )
        return {name: batch[name] for name in _BATCH}

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
    return pack_pairs(pairs, padding_id, aligned=aligned)


def _holds(value: Any) -> bool:
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)
