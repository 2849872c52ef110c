"""TRL's ORPOTrainer without logits: `from orpo_kernels.trl import ORPOTrainer` is the one line to change.

Config, data, callbacks, tokenisation and logged metrics are TRL's; the loss is fused. What is better than in TRL:

- A prompt that fills `max_length` leaves an empty answer. Its pair leaves the odds ratio and the metrics; the prompt's
  NLL stays. In TRL the loss is NaN from there on.
- Answers of which the model is sure give finite losses and gradients.
- Gradient accumulation and several processes are exact (see `orpo_kernels.transformers.trainer`).
- Metrics are read back from the device once in a step.

Needs `trl` (`pip install orpo_kernels[trl]`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from trl.experimental.orpo import ORPOConfig
from trl.experimental.orpo import ORPOTrainer as TRLORPOTrainer

from .transformers.collator import IGNORE_INDEX, End, _end_turn
from .transformers.lm_head import resolve_lm_head
from .transformers.trainer import PAIR_METRICS, ORPOLossMixin, _base_model, pair_metrics, router_logits_of

__all__ = ["ORPOConfig", "ORPOTrainer"]

_BATCH_METRICS = ("nll_loss", "logits/chosen", "logits/rejected")
_STEP_COUNTS = "step_counts"


class ORPOTrainer(ORPOLossMixin, TRLORPOTrainer):
    """`trl.experimental.orpo.ORPOTrainer` with the fused loss. All its arguments, and two by keyword:

    Args:
        exact_accumulation: True (default): with gradient accumulation, the loss is that of one large batch. False:
            each micro-batch has its own means, as TRL normalises; then the losses are those that TRL logs.
        end: "trl" (default): TRL's tokenisation, which appends an EOS behind what the chat template prints after the
            end of a turn (`<|im_end|>\\n<|im_end|>`). "single": the answer stops behind its first end token.

    Logged are TRL's metrics, averaged over the pairs with two non-empty answers. `logits/chosen` and
    `logits/rejected`, the mean of all logits, are those of the mean hidden states, the head being linear. They are left
    out for a model whose logits are soft-capped (Gemma 2), where that is not the mean, and where the hidden states
    cannot be seen (a body compiled with `.compile()`; `torch_compile=True` lets them be seen). TRL's `compute_metrics`
    gets NaN for them.

    Raises `ValueError` or `TypeError` for an encoder-decoder model, and for a model or a parallel setup that the loss
    cannot serve.
    """

    def __init__(self, *args: Any, exact_accumulation: bool = True, end: End = "trl", **options: Any):
        if end not in ("trl", "single"):
            raise ValueError(f'end must be "trl" or "single"; got {end!r}.')
        self.loss_is_scaled_for_ga = exact_accumulation
        self.end = end
        _refuse_encoder_decoder(args[0] if args else options.get("model"))
        super().__init__(*args, **options)
        _refuse_encoder_decoder(self.model)  # one that came by its name
        self.loss_options = {"beta": self.beta}
        self._check_setup()

    def loss_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        tensors = self.concatenated_inputs(batch, padding_value=self.padding_value or 0, device=self.accelerator.device)
        return {name: tensors[f"concatenated_{name}"] for name in ("input_ids", "attention_mask", "labels")}

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        # TRL hands on nothing but the batch.
        return super().compute_loss(model, {**inputs, _STEP_COUNTS: num_items_in_batch}, return_outputs)

    def get_batch_loss_metrics(
        self, model: nn.Module, batch: dict[str, Any], train_eval: str = "train"
    ) -> tuple[Tensor, dict[str, float]]:
        """The loss, 0-d, and TRL's metrics; NaN for what is not known."""
        inner = self.accelerator.unwrap_model(model)
        with mean_hidden_states(inner) as means:
            loss, out = self.orpo_step(model, self.loss_inputs(batch), batch.get(_STEP_COUNTS))
        of_pairs = self.accelerator.gather_for_metrics(pair_metrics(out, self.beta)).nanmean(0)
        of_batch = torch.cat((out.nll_loss[None].float(), mean_logits(inner, means)))
        of_batch = self.accelerator.gather(of_batch[None]).mean(0)
        values = torch.cat((of_pairs, of_batch)).tolist()
        prefix = "eval_" if train_eval == "eval" else ""
        names = (f"{prefix}{name}" for name in (*PAIR_METRICS, *_BATCH_METRICS))
        return loss, dict(zip(names, values, strict=True))

    def store_metrics(self, metrics: dict[str, float], train_eval: Any = "train") -> None:
        """What is not known is not logged: one NaN would be the mean of the whole interval."""
        super().store_metrics({name: value for name, value in metrics.items() if not math.isnan(value)}, train_eval)

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        row = super().tokenize_row(feature, model)
        if self.end == "single":
            for side in ("chosen", "rejected"):
                self._end_once(row, side)
        return row

    def _end_once(self, row: dict[str, Any], side: str) -> None:
        """Cut the side behind the first of its end tokens. A truncated answer has none and stays as it is."""
        ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
        answer = ids[labels.count(IGNORE_INDEX) :]
        surplus = max(0, len(answer) - len(_end_turn(answer, self.processing_class)))
        for column in ("input_ids", "attention_mask", "labels"):
            row[f"{side}_{column}"] = row[f"{side}_{column}"][: len(ids) - surplus]


def _refuse_encoder_decoder(model: Any) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; the fused loss serves decoder-only language models. "
            "Use TRL's own trainer for it: trl.experimental.orpo.ORPOTrainer."
        )


@contextmanager
def mean_hidden_states(model: nn.Module) -> Iterator[list[Tensor]]:
    """Inside, the list holds the mean hidden states (2, H) of the body's last call: chosen, rejected.

    As TRL averages logits: over all positions but the last of each sequence, padding included.
    """
    means: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0].detach()[:, :-1]
        sides = hidden.split([len(hidden) // 2, len(hidden) - len(hidden) // 2])
        means[:] = [torch.stack([side.mean((0, 1), dtype=torch.float32) for side in sides])]

    handle = _base_model(model).base_model.register_forward_hook(keep)
    try:
        yield means
    finally:
        handle.remove()


@torch.no_grad()
def mean_logits(model: nn.Module, means: list[Tensor]) -> Tensor:
    """(2,) fp32: the mean logit of the chosen and of the rejected side; NaN if it is not known.

    The head is linear, so the mean of all logits is that of the logits of the mean hidden state: two rows.
    """
    with router_logits_of(model):
        head = resolve_lm_head(model)
    if head.logit_softcap is not None or not means:
        return torch.full((2,), torch.nan, device=head.weight.device)
    return head.logits(means[0]).mean(-1).float()
