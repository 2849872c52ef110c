"""ORPO, SFT, DPO, SimPO and CPO in `transformers.Trainer`: raw preference pairs go in, no logits are made.

    collator = PreferenceCollator(tokenizer, max_length=1024)
    trainer = PreferenceTrainer(model, args, data_collator=collator, train_dataset=pairs, method="dpo")
    trainer.train()

A subclass and no `compute_loss_func`: that function is given what the model's forward returns, so the logits would have
been made by then. `PreferenceLossMixin` is all that these trainers and the one for TRL (`orpo_kernels.trl`) share.

**Gradient accumulation and several processes** are exact: the means run over all tokens and all pairs of the optimizer
step, as if it were one large batch. (A mean of the micro-batches' means weighs a token of a short batch more.) The
counts are taken where the Trainer counts `num_items_in_batch`; like that, they are of all processes unless
`average_tokens_across_devices=False`. The router loss of a mixture of experts is no sum over tokens: of it, the mean
over the micro-batches is taken.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from transformers import EvalPrediction, Trainer

from .. import PreferenceOutput
from ..methods import Method, all_options, method_named
from ..objective import denominators
from ..sparsity import Sparsity, measured_sparsity
from .body import router_loss_coef, unwrap, wants_router_loss
from .causal_lm import CausalLMPreferenceOutput, batch_rows, causal_lm_preference_loss
from .collator import REFERENCE, PreferenceCollator
from .engines import run_inside
from .lm_head import resolve_lm_head
from .reference import ReferencedPairs, has_reference, reference_logps
from .sharing import refuses_shared_prompt

_FROM_THE_STEP = ("nll_denominator", "pair_denominator")
_OF_THE_ANSWERS = ("schedule", "memory_budget", "backend", "ignore_index")  # options without gradient as well


class PreferenceLossMixin:
    """The fused loss inside a `Trainer`. Put it in front of the trainer's class, and give `loss_inputs`.

    Attributes:
        method: what is trained.
        loss_options: what else `causal_lm_preference_loss` is called with beside the batch: memory_budget, ...
        loss_is_scaled_for_ga: the Trainer's own switch. True: the means run over the whole optimizer step. False: over
            each micro-batch, and the Trainer takes the mean of those.
    """

    loss_is_scaled_for_ga: bool | None = True
    method: Method
    loss_options: Mapping[str, Any] = MappingProxyType({})
    args: Any
    accelerator: Any
    model: Any
    current_gradient_accumulation_steps: int
    _compile_options: dict[str, Any] | None = None
    _sparsity: Sparsity | None = None

    def loss_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What `causal_lm_preference_loss` takes of a batch: input_ids, attention_mask and labels, or packed, ..."""
        raise NotImplementedError

    def loss_step(
        self, model: nn.Module, inputs: dict[str, Any], step_counts: Tensor | None = None
    ) -> tuple[Tensor, PreferenceOutput]:
        """Run the model on one micro-batch: its loss, to be called `backward` on as it is, and what it was made of.

        Args:
            model: the trainer's model, or DistributedDataParallel around it.
            inputs: as `loss_inputs` gives them.
            step_counts: what `_get_num_items_in_batch` gave for the optimizer step; None to average over `inputs`.

        Returns:
            The 0-d loss, with the router's if the model has one; and the `PreferenceOutput`, whose `nll_loss` is the
            mean over `inputs` in any case.
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

        def loss_of(**inputs: Any) -> CausalLMPreferenceOutput:
            with self.accelerator.autocast(), measured_sparsity(self._sparsity) as self._sparsity:
                return causal_lm_preference_loss(inner, **inputs, method=self.method, **options)

        out = run_inside(model, inner, loss_of, inputs)
        own_nll = out.nll_loss * (counts[0] / own_counts[0].clamp(min=1)).to(out.nll_loss.dtype)
        return out.loss * averaged, out._replace(nll_loss=own_nll)

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As the Trainer's, but also several processes may evaluate before they train.

        An evaluation marks the model as prepared, though it is not for training: `train` would leave it as it is (in
        transformers 5.23), and the gradients of the processes would never meet.
        """
        is_marked = self.model in self.accelerator._models
        if is_marked and self.accelerator.num_processes > 1 and not getattr(self, "is_fsdp_enabled", False):
            self.accelerator.unwrap_model(self.model, keep_fp32_wrapper=False)  # autocast is put around it again
            self.accelerator._models.remove(self.model)
            self.model._is_accelerate_prepared = False
        return super().train(*arguments, **options)  # type: ignore[misc]

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
        batch = {name: value for name, value in inputs.items() if name != "reference_logps"}
        ignored = {name: value for name, value in self.loss_options.items() if name == "ignore_index"}
        rows = batch_rows(
            **batch, **ignored, prompt_nll=self.method.prompt_nll, nll_reduction=self.method.nll_reduction
        )
        return torch.stack(denominators(rows, None, None))

    def _check_setup(self) -> None:
        """Refuse, before the first step, what the loss would bypass."""
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor is {self.args.label_smoothing_factor}, but the loss has no label smoothing; "
                "set 0."
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


class PreferenceTrainer(PreferenceLossMixin, Trainer):
    """`transformers.Trainer` with the loss of a preference-tuning method (`orpo_kernels.methods`).

    Args, beside those of `Trainer` (all of it by keyword but `model` and `args`):
        data_collator: a `PreferenceCollator`, or anything that makes the same batches. With `packing="auto"`, its
            default, prompts are shared if the model allows it (`refuses_shared_prompt`). SFT leaves the rejected
            answers out of the batches that it trains on.
        train_dataset, eval_dataset: raw examples (prompt, chosen, rejected), or pairs that `tokenize_pair` made. Of a
            `datasets.Dataset`, other columns are left out; `remove_unused_columns=False` keeps them.
        method: "orpo", "sft", "dpo", "simpo" or "cpo".
        beta: the strength of the preference, by default the method's own.
        loss_options: the method's other options (alpha, prompt_nll, nll_reduction, gamma), and what else
            `causal_lm_preference_loss` takes: schedule, memory_budget, backend, ...
        ref_model: DPO's reference; by default the model as it is given here, of a `peft` model without its adapters.
        compute_metrics: `preference_metrics` by default. Another one gets `predictions` (pairs, 9), the columns being
            `METRICS`, NaN where a pair has an empty answer, and `label_ids` (pairs), 0 for those pairs.

    Logs, in training and as `eval_...` in evaluation: rewards/chosen, rewards/rejected, rewards/accuracies,
    rewards/margins, logps/chosen, logps/rejected, log_odds_ratio, log_odds_chosen and nll_loss, under TRL's names and
    as TRL defines them for the method; SFT, which trains without rejected answers, only nll_loss in training.

    **DPO's reference** is run once over the datasets, here in the constructor, in batches of
    `per_device_eval_batch_size`, and its log-probabilities are kept in `output_dir/reference_logps`, under a hash of
    the model and of the tokens, batch by batch: interrupted, it goes on with the rest. Pairs that have the columns
    ref_chosen_logps and ref_rejected_logps keep theirs; a stream has to have them.

    `reference_seconds` is what it took here, or what reading it took.

    Raises `ValueError` or `TypeError` for a missing collator, for options that are not the caller's or not the
    method's, and for a model or a parallel setup that the loss cannot serve.
    """

    train_dataset: Any
    eval_dataset: Any
    _signature_columns: Any

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        data_collator: Callable[[list], dict[str, Any]] | None = None,
        method: str = "orpo",
        beta: float | None = None,
        loss_options: Mapping[str, Any] | None = None,
        ref_model: nn.Module | None = None,
        **options: Any,
    ):
        if data_collator is None:
            raise ValueError(
                "data_collator is None, but the batches have to be preference pairs; give "
                "PreferenceCollator(tokenizer, max_length=...)."
            )
        if options.get("compute_loss_func") is not None:
            raise ValueError(
                "compute_loss_func would replace the method's loss; use transformers.Trainer for another one."
            )
        self.method, self.loss_options = _method_and_options(method, beta, loss_options or {})
        self.ref_model = ref_model
        self.reference_seconds = 0.0
        self._sums: Tensor | None = None
        options.setdefault("compute_metrics", preference_metrics)
        super().__init__(model, args, data_collator=data_collator, **options)
        self.model_accepts_loss_kwargs = True  # transformers before 5.19: the loss is scaled already
        self._check_setup()
        if isinstance(data_collator, PreferenceCollator) and data_collator.packing == "auto":
            packing: Any = "padded" if refuses_shared_prompt(self.model) else "shared"
            self.data_collator = replace(data_collator, packing=packing)
        if self.method.needs_reference:
            self.train_dataset = self._with_reference(self.train_dataset)
            self.eval_dataset = self._with_reference(self.eval_dataset)

    def _with_reference(self, pairs: Any) -> Any:
        """The pairs with the reference's log-probabilities, if they do not have them."""
        if isinstance(pairs, dict):
            return {name: self._with_reference(part) for name, part in pairs.items()}
        if pairs is None or has_reference(pairs) or not isinstance(self.data_collator, PreferenceCollator):
            return pairs  # a batch without them is refused by the loss
        model = self.model if self.ref_model is None else self.ref_model.to(self.args.device)
        if self.ref_model is None and self.state.global_step and not hasattr(model, "disable_adapter"):
            raise ValueError(
                "The model has been trained, and with that DPO's reference is gone: its log-probabilities of these "
                "pairs cannot be computed any more. Give them as eval_dataset to the trainer, or give it a ref_model."
            )
        began = time.perf_counter()
        logps = reference_logps(
            model,
            pairs,
            self.data_collator,
            self.accelerator,
            folder=Path(self.args.output_dir),
            batch_size=self.args.per_device_eval_batch_size,
            show_progress=not self.args.disable_tqdm,
            **{name: value for name, value in self.loss_options.items() if name in _OF_THE_ANSWERS},
        )
        self.reference_seconds += time.perf_counter() - began
        return ReferencedPairs(pairs, logps)

    def loss_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return dict(batch)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        loss, out = self.loss_step(model, self.loss_inputs(inputs), num_items_in_batch)
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
            loss, out = self.loss_step(model, self.loss_inputs(self._prepare_inputs(inputs)))
        if prediction_loss_only:
            return loss, None, None
        nll = out.nll_loss.expand(len(out.valid_pairs), 1)
        return loss, torch.cat((pair_metrics(out), nll), 1), out.valid_pairs.long()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._recorded())
        super().log(logs, start_time)

    def _record(self, out: PreferenceOutput, nll_count: Tensor) -> None:
        """Add to the sums that the next log divides: so many metrics, valid pairs, NLL and its tokens. No host read."""
        metrics = pair_metrics(out).double()
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

    def _get_dataloader(self, dataset: Any, *args: Any, is_training: bool = False, **options: Any) -> Any:
        if self.method.needs_reference:
            dataset = self._with_reference(dataset)
        if self.accelerator.num_processes == 1 and self.accelerator.dispatch_batches is None:
            # Of a stream, Accelerate would cut all tensors to as many rows as the first of them has.
            self.accelerator.dataloader_config.dispatch_batches = False
        collator = self.data_collator
        if is_training and not self.method.is_preference and isinstance(collator, PreferenceCollator):
            self.data_collator = replace(collator, answers="chosen")
        try:
            loader = super()._get_dataloader(dataset, *args, is_training=is_training, **options)
        finally:
            self.data_collator = collator
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
            self._signature_columns = ["prompt", "chosen", "rejected", *tokenised, *REFERENCE]


class ORPOTrainer(PreferenceTrainer):
    """`PreferenceTrainer` with `method="orpo"`."""

    def __init__(self, model: Any = None, args: Any = None, **options: Any):
        super().__init__(model, args, method="orpo", **options)


def _method_and_options(name: str, beta: float | None, options: Mapping[str, Any]) -> tuple[Method, dict[str, Any]]:
    """The method with those of the options that are a method's, and the rest."""
    for option in _FROM_THE_STEP:
        if option in options:
            raise ValueError(
                f"loss_options has {option}, which the trainer counts for every optimizer step; leave it out."
            )
    if "beta" in options:
        raise ValueError("loss_options has beta, which is an argument of its own; give beta=... to the trainer.")
    of_methods = all_options()
    method = method_named(name, beta=beta, **{key: value for key, value in options.items() if key in of_methods})
    return method, {key: value for key, value in options.items() if key not in of_methods}


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
    """The means of `METRICS` over the valid pairs, for `compute_metrics`; nll_loss is a mean over batches."""
    values = prediction.predictions
    values = np.concatenate(values) if isinstance(values, list) else np.asarray(values)
    valid = ~np.isnan(values)
    sums, counts = np.where(valid, values, 0).sum(0, dtype=np.float64), valid.sum(0)
    return {name: float(s / n) for name, s, n in zip(METRICS, sums, counts, strict=True) if n}
