"""ORPO in `transformers.Trainer`: raw preference pairs go in, no logits are made.

    collator = PreferenceCollator(tokenizer, max_length=1024)
    trainer = ORPOTrainer(model, args, data_collator=collator, train_dataset=pairs, eval_dataset=held_out)
    trainer.train()

A subclass and no `compute_loss_func`: that function is given what the model's forward returns, so the logits would have
been made by then. `ORPOLossMixin` is all that this trainer and the one for TRL (`orpo_kernels.trl`) have in common.

**Gradient accumulation and several processes** are exact: the means run over all tokens and all pairs of the optimizer
step, as if it were one large batch. (A mean of the micro-batches' means weighs a token of a short batch more.) The
counts are taken where the Trainer counts `num_items_in_batch`; like that, they are of all processes unless
`average_tokens_across_devices=False`. The router loss of a mixture of experts is no sum over tokens: of it, the mean
over the micro-batches is taken.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from .. import ORPOOutput
from ..objective import denominators
from ..sparsity import Sparsity, measured_sparsity
from .body import router_loss_coef, unwrap, wants_router_loss
from .causal_lm import CausalLMORPOOutput, batch_rows, causal_lm_orpo_loss
from .collator import PreferenceCollator
from .engines import run_inside
from .lm_head import resolve_lm_head
from .sharing import refuses_shared_prompt

_FROM_THE_STEP = ("nll_denominator", "pair_denominator")
_OF_THE_ROWS = ("prompt_nll", "nll_reduction", "ignore_index")  # options of the loss that decide what counts


class ORPOLossMixin:
    """The fused loss inside a `Trainer`. Put it in front of the trainer's class, and give `loss_inputs`.

    Attributes:
        loss_options: what `causal_lm_orpo_loss` is called with beside the batch: beta, alpha, prompt_nll, ...
        loss_is_scaled_for_ga: the Trainer's own switch. True: the means run over the whole optimizer step. False: over
            each micro-batch, and the Trainer takes the mean of those.
    """

    loss_is_scaled_for_ga: bool | None = True
    loss_options: dict[str, Any]
    args: Any
    accelerator: Any
    model: Any
    current_gradient_accumulation_steps: int
    _compile_options: dict[str, Any] | None = None
    _sparsity: Sparsity | None = None

    def loss_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What `causal_lm_orpo_loss` takes of a batch: input_ids, and attention_mask and labels, or packed."""
        raise NotImplementedError

    def orpo_step(
        self, model: nn.Module, inputs: dict[str, Any], step_counts: Tensor | None = None
    ) -> tuple[Tensor, ORPOOutput]:
        """Run the model on one micro-batch: its loss, to be called `backward` on as it is, and what it was made of.

        Args:
            model: the trainer's model, or DistributedDataParallel around it.
            inputs: as `loss_inputs` gives them.
            step_counts: what `_get_num_items_in_batch` gave for the optimizer step; None to average over `inputs`.

        Returns:
            The 0-d loss, with the router's if the model has one; and the `ORPOOutput`, whose `nll_loss` is the mean
            over `inputs` in any case.
        """
        inner = self.accelerator.unwrap_model(model)
        self._compile_body(inner)
        own_counts = self._counts(inputs)
        counts, micro_batches, averaged = own_counts, 1, 1
        if step_counts is not None:
            counts, micro_batches = step_counts, self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                averaged = self.accelerator.num_processes  # by which the gradients will be divided
        options = {**self.loss_options, "nll_denominator": counts[0], "pair_denominator": counts[1]}
        if wants_router_loss(unwrap(inner)):
            options["router_aux_loss_coef"] = router_loss_coef(unwrap(inner)) / (micro_batches * averaged)

        def loss_of(**inputs: Any) -> CausalLMORPOOutput:
            with self.accelerator.autocast(), measured_sparsity(self._sparsity) as self._sparsity:
                return causal_lm_orpo_loss(inner, **inputs, **options)

        out = run_inside(model, inner, loss_of, inputs)
        own_nll = out.nll_loss * (counts[0] / own_counts[0].clamp(min=1)).to(out.nll_loss.dtype)
        return out.loss * averaged, out._replace(nll_loss=own_nll)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With `sparse_eps`, also what it left out since the last time, in this process."""
        if "loss" in logs and self._sparsity is not None and self._sparsity.shares:
            logs["sparse/active_share"] = self._sparsity.active_share
            logs["sparse/dropped_mass"] = self._sparsity.dropped_mass.mean().item()
            self._sparsity = None
        super().log(logs, start_time)  # type: ignore[misc]

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """(2,) float64: NLL weight and valid pairs of the optimizer step; None where each micro-batch has its own mean.

        The Trainer calls this once per optimizer step and hands the result to `compute_loss`.
        """
        if not self.loss_is_scaled_for_ga or not batch_samples:
            return None
        counts = torch.stack([self._counts(self.loss_inputs(batch)) for batch in batch_samples]).sum(0).to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    def _counts(self, inputs: dict[str, Any]) -> Tensor:
        """(2,) float64: what the two means of the loss divide by. Nothing is read on the host."""
        options = {name: self.loss_options[name] for name in _OF_THE_ROWS if name in self.loss_options}
        return torch.stack(denominators(batch_rows(**inputs, **options), None, None))

    def _check_setup(self) -> None:
        """Refuse, before the first step, what the loss would bypass."""
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}, but ORPO has no label smoothing; set 0."
            )
        if self.args.n_gpu > 1:
            raise ValueError(
                f"{self.args.n_gpu} GPUs are visible to one process, which would replicate the model (DataParallel). "
                "Start one process for each with torchrun or accelerate launch, or set CUDA_VISIBLE_DEVICES."
            )
        fsdp = getattr(self.accelerator.state, "fsdp_plugin", None)
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        reasons = {
            "FSDP version 1": getattr(self, "is_fsdp_enabled", False) and getattr(fsdp, "fsdp_version", 1) != 2,
            "DeepSpeed": getattr(self, "is_deepspeed_enabled", False),
            "tensor, context or sequence parallelism": parallelism is not None
            and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled),
        }
        for name, enabled in reasons.items():
            if enabled:
                raise ValueError(
                    f"{name} is enabled, which this trainer does not support. Use one process, or several with "
                    "DistributedDataParallel or FSDP2 (fsdp_version: 2); in a loop of your own, orpo_loss takes "
                    "data_group, vocab_group and sequence_group."
                )
        resolve_lm_head(self.model)

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        """`torch_compile=True` compiles the body, which is what the loss calls; Accelerate would compile the model."""
        arguments = super()._build_accelerator_args(**options)  # type: ignore[misc]
        plugin = arguments.get("dynamo_plugin")
        if plugin is not None and plugin.backend != DynamoBackend.NO:
            self._compile_options = plugin.to_kwargs()
            plugin.backend = DynamoBackend.NO
        return arguments

    def _compile_body(self, inner: nn.Module) -> None:
        if self._compile_options is None:
            return
        body = unwrap(inner).base_model
        if "forward" not in vars(body):  # its forward, not its call: so that hooks still see what goes in and out
            body.forward = torch.compile(body.forward, **self._compile_options)


class ORPOTrainer(ORPOLossMixin, Trainer):
    """`transformers.Trainer` with the ORPO loss.

    Args, beside those of `Trainer` (all of it by keyword but `model` and `args`):
        data_collator: a `PreferenceCollator`, or anything that makes the same batches. With `packing="auto"`, its
            default, prompts are shared if the model allows it (`refuses_shared_prompt`).
        train_dataset, eval_dataset: raw examples (prompt, chosen, rejected), or pairs that `tokenize_pair` made. Of a
            `datasets.Dataset`, other columns are left out; `remove_unused_columns=False` keeps them.
        beta: weight of the odds ratio.
        loss_options: what else `causal_lm_orpo_loss` takes: alpha, prompt_nll, nll_reduction, memory_budget, ...
        compute_metrics: `preference_metrics` by default. Another one gets `predictions` (pairs, 9), the columns being
            `METRICS`, NaN where a pair has an empty answer, and `label_ids` (pairs), 0 for those pairs.

    Logs, in training and as `eval_...` in evaluation: rewards/chosen, rewards/rejected, rewards/accuracies,
    rewards/margins, logps/chosen, logps/rejected, log_odds_ratio, log_odds_chosen and nll_loss, under TRL's names.

    Raises `ValueError` or `TypeError` for a missing collator, for options that are not the caller's, and for a model or
    a parallel setup that the loss cannot serve.
    """

    _signature_columns: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        data_collator: Callable[[list], dict[str, Any]] | None = None,
        beta: float = 0.1,
        loss_options: Mapping[str, Any] | None = None,
        **options: Any,
    ):
        if data_collator is None:
            raise ValueError(
                "data_collator is None, but the batches have to be preference pairs; give "
                "PreferenceCollator(tokenizer, max_length=...)."
            )
        if options.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func would replace the ORPO loss; use transformers.Trainer for another one.")
        self.loss_options = {"beta": beta, **_checked_options(loss_options or {})}
        self._sums: Tensor | None = None
        options.setdefault("compute_metrics", preference_metrics)
        super().__init__(model, args, data_collator=data_collator, **options)
        self.model_accepts_loss_kwargs = True  # transformers before 5.19: the loss is scaled already
        self._check_setup()
        if isinstance(data_collator, PreferenceCollator) and data_collator.packing == "auto":
            packing: Any = "padded" if refuses_shared_prompt(self.model) else "shared"
            self.data_collator = replace(data_collator, packing=packing)

    def loss_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return dict(batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        loss, out = self.orpo_step(model, self.loss_inputs(inputs), num_items_in_batch)
        self._record(out, self._counts(inputs)[0])
        return (loss, out) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, metrics (B, 9) in place of logits, and which pairs are valid (B,) in place of labels."""
        with torch.no_grad():
            loss, out = self.orpo_step(model, self.loss_inputs(self._prepare_inputs(inputs)))
        if prediction_loss_only:
            return loss, None, None
        nll = out.nll_loss.expand(len(out.valid_pairs), 1)
        return loss, torch.cat((pair_metrics(out, self.loss_options["beta"]), nll), 1), out.valid_pairs.long()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._recorded())
        super().log(logs, start_time)

    def _record(self, out: ORPOOutput, nll_count: Tensor) -> None:
        """Add to the sums that the next log divides: so many metrics, valid pairs, NLL and its tokens. No host read."""
        metrics = pair_metrics(out, self.loss_options["beta"]).double()
        rest = torch.stack((out.valid_pairs.sum(), out.nll_loss * nll_count, nll_count))
        sums = torch.cat((metrics.nansum(0), rest))
        self._sums = sums if self._sums is None else self._sums + sums

    def _recorded(self) -> dict[str, float]:
        """Means over all that was recorded since the last call, by all processes."""
        if self._sums is None:
            return {}
        *metrics, pairs, nll, nll_count = self.accelerator.gather(self._sums[None]).sum(0).tolist()
        self._sums = None
        means = {name: metric / pairs for name, metric in zip(PAIR_METRICS, metrics, strict=True) if pairs}
        return means | ({"nll_loss": nll / nll_count} if nll_count else {})

    def _get_dataloader(self, *args: Any, **options: Any) -> Any:
        loader = super()._get_dataloader(*args, **options)
        if isinstance(loader, DataLoaderDispatcher) and self.accelerator.num_processes > 1:
            raise ValueError(
                "The main process would collate the batches and slice them for the others, which tears the pairs "
                "apart. Set accelerator_config={'dispatch_batches': False}."
            )
        return loader

    def _set_signature_columns_if_needed(self) -> None:
        """The columns that are kept are those the collator reads, not the arguments of the model's forward."""
        if self._signature_columns is None:
            tokenised = [f"{side}_{part}" for side in ("chosen", "rejected") for part in ("input_ids", "labels")]
            self._signature_columns = ["prompt", "chosen", "rejected", *tokenised]


def _checked_options(options: Mapping[str, Any]) -> dict[str, Any]:
    for name in _FROM_THE_STEP:
        if name in options:
            raise ValueError(
                f"loss_options has {name}, which the trainer counts for every optimizer step; leave it out."
            )
    if "beta" in options:
        raise ValueError("loss_options has beta, which is an argument of its own; give beta=... to the trainer.")
    return dict(options)


# --- metrics -------------------------------------------------------------------------------------------------------

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


def pair_metrics(out: ORPOOutput, beta: float) -> Tensor:
    """(B, 8) fp32: `PAIR_METRICS` of every pair, as TRL defines them; NaN for a pair with an empty answer."""
    chosen, rejected = beta * out.chosen_logps, beta * out.rejected_logps
    values = {
        "rewards/chosen": chosen,
        "rewards/rejected": rejected,
        "rewards/accuracies": (chosen > rejected).to(chosen.dtype),
        "rewards/margins": chosen - rejected,
        "logps/rejected": out.rejected_logps,
        "logps/chosen": out.chosen_logps,
        "log_odds_ratio": F.logsigmoid(out.log_odds),
        "log_odds_chosen": out.log_odds,
    }
    metrics = torch.stack([values[name].detach().float() for name in PAIR_METRICS], 1)
    return metrics.masked_fill(~out.valid_pairs[:, None], torch.nan)


def preference_metrics(prediction: EvalPrediction) -> dict[str, float]:
    """The means of `METRICS` over the valid pairs, for `compute_metrics`; nll_loss is a mean over batches."""
    values = prediction.predictions
    values = np.concatenate(values) if isinstance(values, list) else np.asarray(values)
    valid = ~np.isnan(values)
    sums, counts = np.where(valid, values, 0).sum(0, dtype=np.float64), valid.sum(0)
    return {name: float(s / n) for name, s, n in zip(METRICS, sums, counts, strict=True) if n}
