"""TRL's ORPOTrainer without logits: `from orpo_kernels.trl import ORPOTrainer` is the one line to change.

Config, data, callbacks, tokenisation and logged metrics are TRL's; the loss is fused. What is better than in TRL:

- A prompt that fills `max_length` leaves an empty answer. Its pair leaves the odds ratio and the metrics; the prompt's
  NLL stays. In TRL the loss is NaN from there on.
- Answers of which the model is sure give finite losses and gradients.
- Gradient accumulation and several processes are exact (see `orpo_kernels.transformers.trainer`).
- Chosen and rejected answer share one pass over their prompt, where the model allows it (`packing`).
- Metrics are read back from the device once in a step.

Needs `trl` (`pip install orpo_kernels[trl]`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, get_args

import torch
from torch import Tensor, nn
from trl.experimental.orpo import ORPOConfig
from trl.experimental.orpo import ORPOTrainer as TRLORPOTrainer

from .methods import ORPO
from .transformers.body import unwrap
from .transformers.collator import IGNORE_INDEX, End, Packing, end_turn
from .transformers.lm_head import resolve_lm_head
from .transformers.packing import PackedPairs, pack_pairs
from .transformers.sharing import refuses_shared_prompt
from .transformers.trainer import PAIR_METRICS, PreferenceLossMixin, pair_metrics

__all__ = ["ORPOConfig", "ORPOTrainer"]

_BATCH_METRICS = ("nll_loss", "logits/chosen", "logits/rejected")
_STEP_COUNTS = "step_counts"


class ORPOTrainer(PreferenceLossMixin, TRLORPOTrainer):
    """`trl.experimental.orpo.ORPOTrainer` with the fused loss. All its arguments, and four by keyword:

    Args:
        exact_accumulation: True (default): with gradient accumulation, the loss is that of one large batch. False:
            each micro-batch has its own means, as TRL normalises; then the losses are those that TRL logs.
        end: "trl" (default): TRL's tokenisation, which appends an EOS behind what the chat template prints after the
            end of a turn (`<|im_end|>\\n<|im_end|>`). "single": the answer stops behind its first end token.
        packing: "shared": a prompt runs through the model once for both answers, and without padding between pairs;
            loss and gradients are the same. "padded": as TRL. "auto" (default): shared, unless the model does not allow
            it (`refuses_shared_prompt`), the batches come from a `data_collator` of yours, or `generate_during_eval`
            is set.
        sparse_eps: None (default): exact gradients; else as in `orpo_loss`, and what it leaves out is logged as
            `sparse/active_share` and `sparse/dropped_mass`.

    Logged are TRL's metrics, averaged over the pairs with two non-empty answers. `logits/chosen` and
    `logits/rejected`, the mean of all logits (of padding as well, in a padded batch, as in TRL), come from the mean
    hidden state and the mean row of the weight. They are left out for a model whose logits are soft-capped (Gemma 2),
    where that is not the mean, and where the hidden states cannot be seen (a body compiled with `.compile()`;
    `torch_compile=True` lets them be seen). TRL's `compute_metrics` gets NaN for them.

    Raises `ValueError` or `TypeError` for an encoder-decoder model, and for a model or a parallel setup that the loss
    cannot serve.
    """

    def __init__(
        self,
        *args: Any,
        exact_accumulation: bool = True,
        end: End = "trl",
        packing: Packing = "auto",
        sparse_eps: float | None = None,
        **options: Any,
    ):
        for name, value, choices in (("end", end, get_args(End)), ("packing", packing, get_args(Packing))):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}.")
        self.loss_is_scaled_for_ga = exact_accumulation
        self.end = end
        _refuse_encoder_decoder(args[0] if args else options.get("model"))
        super().__init__(*args, **options)
        _refuse_encoder_decoder(self.model)  # one that came by its name
        self.method = ORPO(beta=self.beta)
        self.loss_options = {"sparse_eps": sparse_eps}
        self._check_setup()
        reason = self._refuses_shared_prompt() if packing != "padded" else None
        if packing == "shared" and reason:
            raise ValueError(f'{reason} Use packing="padded".')
        if packing != "padded" and not reason:
            self.data_collator = partial(pack_pairs, padding_id=self.padding_value or 0)

    def _refuses_shared_prompt(self) -> str | None:
        if not self.use_dpo_data_collator:
            return "The batches are made by a data_collator of yours."
        if self.generate_during_eval:
            return "generate_during_eval=True takes the prompts out of padded batches."
        return refuses_shared_prompt(self.model)

    def loss_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        if "packed" in batch:
            return {name: batch[name] for name in ("input_ids", "packed")}
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
        inputs = self.loss_inputs(batch)
        with mean_hidden_states(inner, sides_of(**inputs)) as means:
            loss, out = self.loss_step(model, inputs, batch.get(_STEP_COUNTS))
        of_pairs = self.accelerator.gather_for_metrics(pair_metrics(out)).nanmean(0)
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
        surplus = max(0, len(answer) - len(end_turn(answer, self.processing_class)))
        for column in ("input_ids", "attention_mask", "labels"):
            row[f"{side}_{column}"] = row[f"{side}_{column}"][: len(ids) - surplus]


def _refuse_encoder_decoder(model: Any) -> None:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; the fused loss serves decoder-only language models. "
            "Use TRL's own trainer for it: trl.experimental.orpo.ORPOTrainer."
        )


def sides_of(input_ids: Tensor, packed: PackedPairs | None = None, **padded: Any) -> Tensor:
    """(2, rows, T) fp32: the weights of the positions in the means over the chosen and over the rejected side.

    As TRL averages logits: over all positions but the last of each sequence, padding included. In a packed batch there
    is no such padding: over all tokens of each sequence.
    """
    if packed is None:
        pairs = len(input_ids) // 2
        sides = input_ids.new_zeros(2, *input_ids.shape, dtype=torch.float32)
        sides[0, :pairs, :-1] = sides[1, pairs:, :-1] = 1
    else:
        segments = packed.segments.to(input_ids.device)
        others = torch.tensor([2, 1], device=segments.device)[:, None, None]  # rejected answers, chosen answers
        sides = ((segments >= 0) & (segments % 3 != others)).float()
    return sides / sides.sum((1, 2), keepdim=True)


@contextmanager
def mean_hidden_states(model: nn.Module, sides: Tensor) -> Iterator[list[Tensor]]:
    """Inside, the list holds the mean hidden states (2, H) fp32 of the body's last call, weighted by `sides`."""
    means: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0].detach()
        if hidden.shape[:2] == sides.shape[1:]:  # not the few tokens of a check
            means[:] = [sides.flatten(1) @ hidden.flatten(0, 1).float()]

    handle = unwrap(model).base_model.register_forward_hook(keep)
    try:
        yield means
    finally:
        handle.remove()


@torch.no_grad()
def mean_logits(model: nn.Module, means: list[Tensor]) -> Tensor:
    """(2,) fp32: the mean logit of the chosen and of the rejected side; NaN if not known."""
    head = resolve_lm_head(model)
    if not means:
        return torch.full((2,), torch.nan, device=head.weight.device)
    return head.mean_logits(means[0])
