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

**An evaluation** is the loss of its set, whatever the batches: the NLL of all its tokens, the pair loss of all its
valid pairs, also over several processes. (The Trainer's own is a mean of batches.) Of the router loss it is the mean
over batches, by their tokens.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput

from .. import Rows
from ..devices import moved, statistics_dtype
from ..engine.objective import counts_of
from ..methods import Method, all_options, method_named
from ..sparsity import Sparsity, measured_sparsity
from .batches import RowsCollator, with_rows
from .body import router_loss_coef, unwrap, wants_router_loss
from .causal_lm import CausalLMOutput, causal_lm_preference_loss
from .collator import IGNORE_INDEX, PreferenceCollator, Refusal
from .encoder_decoder import is_encoder_decoder
from .encoder_decoder_collator import EncoderDecoderCollator
from .engines import is_in_parts, run_inside
from .fitting import check_fits
from .lm_head import resolve_lm_head
from .media import media_tokens
from .metrics import Averages, Part, averaged_metrics, pair_metrics, preference_metrics
from .pairs import COLUMNS, NAMED, GroupedByLength, UsablePairs, UsableStream, is_stream, lengths_of, warn_of_unusable
from .reference_model import ReferencedPairs, has_reference, reference_logps
from .rendering import KNOWN
from .sharing import automatic_packing
from .versions import body_of, compilation_by_environment, groups_by_length, loss_takes_counts

logger = logging.getLogger(__name__)

_COLLATORS = (PreferenceCollator, EncoderDecoderCollator)  # that read of an example what we know
_PAIR_LOSS, _ROUTER_LOSS = "pair_loss", "router_loss"  # the parts of a loss beside its NLL
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
    train_dataset: Any
    model: Any
    optimizer: Any
    current_gradient_accumulation_steps: int
    _compile_options: dict[str, Any] | None = None
    _sparsity: Sparsity | None = None
    _evaluation: Averages | None = None  # of the evaluation that is running
    _logs_all_metrics = False  # of an evaluation; or only those that compute_metrics gives as well

    @property
    def _ignore_index(self) -> int:
        return self.loss_options.get("ignore_index", IGNORE_INDEX)

    @property
    def media_tokens(self) -> tuple[int, ...]:
        """The ids that stand for pictures, which are no targets."""
        return media_tokens(self.accelerator.unwrap_model(self.model))

    @property
    def aligns_widths(self) -> bool:
        """Whether batches are as wide as an `aligned_width`, for the sake of a GPU's libraries."""
        return self.args.device.type != "cpu"

    def loss_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """What `causal_lm_preference_loss` takes of a batch, its rows among it (`with_rows`)."""
        raise NotImplementedError

    def loss_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        step_counts: Tensor | None = None,
        counted: Tensor | None = None,
    ) -> tuple[Tensor, CausalLMOutput]:
        """Run the model on one micro-batch: its loss, to be called `backward` on as it is, and what it was made of.

        Args:
            model: the trainer's model, or DistributedDataParallel around it.
            inputs: as `loss_inputs` gives them.
            step_counts: what `_get_num_items_in_batch` gave for the optimizer step; None to average over `inputs`.
            counted: (B,) bool, the pairs that are in the loss; by default all.

        Returns:
            The 0-d loss, with the router's if the model has one; and what the loss function gave, whose `nll_loss` is
            the mean over `inputs` in any case.
        """
        inner = self.accelerator.unwrap_model(model)
        self._compile_body(inner)
        own_counts = _counts(inputs["rows"], counted)
        if step_counts is not None:
            step_counts = moved(step_counts, own_counts.device, torch.float64)
        if counted is not None:
            weights = inputs.get("pair_weights")
            inputs = {**inputs, "pair_weights": counted.double() if weights is None else weights * counted}
        counts, micro_batches, averaged = own_counts, 1, 1
        if step_counts is not None:
            counts, micro_batches = step_counts, self.current_gradient_accumulation_steps
            if self.args.average_tokens_across_devices:
                averaged = self.accelerator.num_processes  # by which the gradients will be divided
        options = {**self.loss_options, "nll_denominator": counts[0], "pair_denominator": counts[1]}
        if wants_router_loss(unwrap(inner)):
            options["router_aux_loss_coef"] = router_loss_coef(unwrap(inner)) / (micro_batches * averaged)

        def loss_of(**inputs: Any) -> CausalLMOutput:
            with self.accelerator.autocast(), measured_sparsity(self._sparsity) as self._sparsity:
                return causal_lm_preference_loss(inner, **inputs, method=self.method, **options)

        out = run_inside(model, inner, loss_of, inputs)
        own_nll = out.nll_loss * (counts[0] / own_counts[0].clamp(min=1)).to(out.nll_loss)
        return out.loss * averaged, CausalLMOutput.of(out, out.aux_loss, nll_loss=own_nll)

    def evaluation_step(self, model: nn.Module, inputs: dict[str, Any]) -> tuple[Tensor, CausalLMOutput]:
        """`loss_step` without gradient, on a batch that the evaluation which is running, if one is, averages over."""
        counted = self._counted(inputs)
        with torch.no_grad():
            loss, out = self.loss_step(model, inputs, counted=counted)
            if self._evaluation is not None:
                self._evaluation.add(self._evaluated(self.accelerator.unwrap_model(model), inputs, out, counted))
        return loss, out

    def _counted(self, inputs: dict[str, Any]) -> Tensor | None:
        """(B,) bool, False for a pair that fills up the last batch of several processes; None where there is none."""
        state, processes = self.accelerator.gradient_state, self.accelerator.num_processes
        if processes == 1 or not state.end_of_dataloader or state.remainder <= 0:
            return None
        rows = inputs["rows"]
        place = torch.arange(rows.num_pairs, device=rows.position.device)
        place += self.accelerator.process_index * rows.num_pairs
        return place < state.remainder

    def _evaluated(
        self, inner: nn.Module, inputs: dict[str, Any], out: CausalLMOutput, counted: Tensor | None
    ) -> dict[str, Part]:
        """What a batch adds to the metrics of its evaluation and to the parts of its loss."""
        nll_count, pairs = _counts(inputs["rows"], counted)
        out = out.to(nll_count.device)
        valid = out.valid_pairs if counted is None else out.valid_pairs & counted
        router = torch.zeros_like(out.loss) if out.aux_loss is None else out.aux_loss.to(out.loss)
        coef = router_loss_coef(unwrap(inner)) if out.aux_loss is not None else 0.0
        mask = inputs.get("attention_mask")
        tokens = nll_count.new_tensor(inputs["input_ids"].numel()) if mask is None else mask.sum()
        return averaged_metrics(out, valid, nll_count) | {
            _PAIR_LOSS: Part((out.loss - self.method.alpha * out.nll_loss - coef * router) * pairs, pairs),
            _ROUTER_LOSS: Part(coef * router * tokens, tokens),
        }

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> EvalLoopOutput:
        """The Trainer's, with the loss and the metrics of the whole set in place of means over its batches."""
        self._evaluation = Averages()
        try:
            output = super().evaluation_loop(  # type: ignore[misc]
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
            means = self._evaluation.means(self.accelerator)
        finally:
            self._evaluation = None
        loss = means.pop(_PAIR_LOSS, 0.0) + means.pop(_ROUTER_LOSS, 0.0)
        if "nll_loss" in means:
            output.metrics[f"{metric_key_prefix}_loss"] = self.method.alpha * means["nll_loss"] + loss
        for name, value in means.items():
            key = f"{metric_key_prefix}_{name}"
            if self._logs_all_metrics or key in output.metrics:
                output.metrics[key] = value
        return output

    def train(self, *arguments: Any, **options: Any) -> Any:
        """As the Trainer's, but also several processes may evaluate before they train.

        An evaluation marks the model as prepared, though it is not for training: `train` would leave it as it is (in
        transformers 5.23), and the gradients of the processes would never meet. Of DeepSpeed's ZeRO-3 it makes an
        engine without optimizer, which is refused.
        """
        if getattr(self, "deepspeed", None) is not None and self.optimizer is None:
            raise ValueError(
                "The trainer has evaluated under ZeRO-3, for which the Trainer makes an engine that cannot train. Set "
                "eval_on_start=True in place of evaluate() before train(), or make a new trainer of a new model."
            )
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
        """(2,): NLL weight and valid pairs of the optimizer step; None where each micro-batch has its own mean.

        The Trainer calls this once per optimizer step and hands the result to `compute_loss`.
        """
        if not self.loss_is_scaled_for_ga or not batch_samples:
            return None
        counts = torch.stack([_counts(self.loss_inputs(batch)["rows"]) for batch in batch_samples]).sum(0)
        counts = moved(counts, device, statistics_dtype(device))
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """With group_by_length, by the tokens of prompt and answers."""
        pairs = self.train_dataset if train_dataset is None else train_dataset
        if not groups_by_length(self.args) or (lengths := lengths_of(pairs)) is None:
            return super()._get_train_sampler(train_dataset)  # type: ignore[misc]
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """An evaluation keeps the order of the pairs, so that predictions are theirs, also with group_by_length."""
        if not groups_by_length(self.args) or eval_dataset is None or is_stream(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

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
        if getattr(self, "is_fsdp_enabled", False) and getattr(fsdp, "fsdp_version", 1) != 2:
            raise ValueError(
                "FSDP version 1 is enabled, which this trainer does not support. Use version 2: fsdp=True, "
                "fsdp_config={'version': 2, 'transformer_layer_cls_to_wrap': [the class of the model's layers]} among "
                "the training arguments, or in an Accelerate config distributed_type: FSDP with fsdp_version: 2, "
                "fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP and fsdp_reshard_after_forward: true."
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and (parallelism.tp_enabled or parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "Tensor, context or sequence parallelism is enabled, which this trainer does not support. Use one "
                "process, or several with DistributedDataParallel, FSDP2 (fsdp_version: 2) or DeepSpeed's ZeRO; in a "
                "loop of your own, orpo_loss takes data_group, vocab_group and sequence_group."
            )
        head = resolve_lm_head(self.model)
        if head.tokens and zero_stage(self.accelerator) == 3:
            raise ValueError(
                "The adapter trains tokens of the lm head (trainable_token_indices), which DeepSpeed's ZeRO-3 keeps in "
                "parts outside of any layer's forward. Use ZeRO 2 or FSDP2, or leave trainable_token_indices out."
            )
        self._take_over(compilation_by_environment(self.accelerator))

    def _build_accelerator_args(self, **options: Any) -> dict[str, Any]:
        """`torch_compile=True` compiles the body, which is what the loss calls; Accelerate would compile the model."""
        arguments = super()._build_accelerator_args(**options)  # type: ignore[misc]
        self._take_over(arguments.get("dynamo_plugin"))
        return arguments

    def _take_over(self, plugin: Any) -> None:
        if plugin is not None and plugin.backend != DynamoBackend.NO:
            self._compile_options = plugin.to_kwargs()
            plugin.backend = DynamoBackend.NO

    def _compile_body(self, inner: nn.Module) -> None:
        if self._compile_options is None:
            return
        body = body_of(unwrap(inner))
        if "forward" not in vars(body):  # its forward, not its call: so that hooks still see what goes in and out
            body.forward = torch.compile(body.forward, **self._compile_options)


def _counts(rows: Rows, counted: Tensor | None = None) -> Tensor:
    """(2,) float64: what the two means of the loss divide by, of the pairs that are `counted` (B,) bool."""
    if counted is not None:
        in_loss = counted[rows.pair]
        rows = replace(rows, scored=rows.scored & in_loss, nll_weight=rows.nll_weight * in_loss)
    return counts_of(rows)


def zero_stage(accelerator: Any) -> int:
    """The stage of DeepSpeed's ZeRO; 0 where there is no DeepSpeed, or none of its stages."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage


class PreferenceTrainer(PreferenceLossMixin, Trainer):
    """`transformers.Trainer` with the loss of a preference-tuning method (`orpo_kernels.methods`).

    Args, beside those of `Trainer` (all of it by keyword but `model` and `args`):
        data_collator: a `PreferenceCollator`, or anything that makes the same batches. With `packing="auto"`, its
            default, prompts are shared if the model allows it and it is fast there (`automatic_packing`). SFT leaves
            the rejected answers out of the batches that it trains on. For an encoder-decoder model an
            `EncoderDecoderCollator` is made of it.
        train_dataset, eval_dataset: raw examples (prompt, chosen, rejected; `tokenize_pair` says what else they may
            hold), or pairs that it made. With a `PreferenceCollator` they are looked through and tokenised here, once
            (`pairs.py`): what cannot be used is left out, said in a warning and held in `unusable_pairs`; what
            `max_length` cuts is said, too.
        method: "orpo", "sft", "dpo", "simpo" or "cpo".
        beta: the strength of the preference, by default the method's own.
        loss_options: the method's other options (alpha, prompt_nll, nll_reduction, gamma), and what else
            `causal_lm_preference_loss` takes: schedule, memory_budget, backend, ...
        ref_model: DPO's reference; by default the model as it is given here, of a `peft` model without its adapters.
        compute_metrics: `preference_metrics` by default. Another one gets `predictions` (pairs, 9), the columns being
            `METRICS`, NaN where a pair has an empty answer (nll_loss: that of the pair's batch), and `label_ids`
            (pairs), 0 for those pairs.

    Logs, in training and as `eval_...` in evaluation: rewards/chosen, rewards/rejected, rewards/accuracies,
    rewards/margins, logps/chosen, logps/rejected, log_odds_ratio, log_odds_chosen and nll_loss, under TRL's names and
    as TRL defines them for the method; SFT, which trains without rejected answers, only nll_loss in training.

    **DPO's reference** is run once over the datasets, here in the constructor, in batches of
    `per_device_eval_batch_size`, and its log-probabilities are kept in `output_dir/reference_logps`, under a hash of
    the model and of the tokens, batch by batch: interrupted, it goes on with the rest. Pairs that have the columns
    ref_chosen_logps and ref_rejected_logps keep theirs; a stream has to have them.

    `reference_seconds` is what it took here, or what reading it took.

    `unusable_pairs`: by the name of the set ("train", "eval", "eval_<name>", ...), the `Refusal`s (index and reason)
    of all pairs that were left out; of a stream, of those so far, in this process (not those that workers of the data
    loader have left out).

    Raises `ValueError` or `TypeError` for a missing collator, for options that are not the caller's or not the
    method's, for a set of which no pair can be used, and for a model or a parallel setup that the loss cannot serve.
    """

    eval_dataset: Any
    data_collator: Any
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
        self.unusable_pairs: dict[str, list[Refusal]] = {}
        self._recent = Averages()  # since the last log
        options.setdefault("compute_metrics", preference_metrics)
        super().__init__(model, args, data_collator=data_collator, **options)
        loss_takes_counts(self)
        self._check_setup()
        if isinstance(data_collator, PreferenceCollator):
            self.data_collator = self._for_this_model(data_collator)
        self.train_dataset = self._prepared(self.train_dataset, "train")
        self.eval_dataset = self._prepared(self.eval_dataset, "eval")

    def _for_this_model(self, collator: PreferenceCollator) -> PreferenceCollator:
        """The collator with what it leaves open decided by the model and the device."""
        if collator.aligned is None:
            collator = replace(collator, aligned=self.aligns_widths)
        if is_encoder_decoder(unwrap(self.model)) and not isinstance(collator, EncoderDecoderCollator):
            collator = EncoderDecoderCollator.of(collator, self.model)
        if collator.packing != "auto":
            return collator
        packing, why = automatic_packing(self.model, self.args.device, images=collator.processor is not None)
        logger.info('packing="auto" is %r: %s', packing, why)
        return replace(collator, packing=packing)

    def _prepared(self, pairs: Any, name: str) -> Any:
        """The pairs as they go into batches: those that can be used, with what the method needs of a reference."""
        if isinstance(pairs, dict):
            return {key: self._prepared(part, f"{name}_{key}") for key, part in pairs.items()}
        pairs = self._usable(pairs, name)
        return self._with_reference(pairs) if self.method.needs_reference else pairs

    def _usable(self, pairs: Any, name: str) -> Any:
        # A collator of the caller's may read more of an example than we know.
        is_prepared = isinstance(pairs, UsablePairs | UsableStream | ReferencedPairs)
        if pairs is None or is_prepared or type(self.data_collator) not in _COLLATORS:
            return pairs
        if is_stream(pairs):
            return UsableStream(pairs, self.data_collator, partial(self._leave_out, name))
        usable = UsablePairs(pairs, self.data_collator, not self.args.disable_tqdm and self.is_local_process_zero())
        self.unusable_pairs[name] = usable.unusable
        say = self.is_world_process_zero()
        warn_of_unusable(usable.unusable, len(usable) + len(usable.unusable), name, say)
        check_fits(self.model, usable.extent, name, say)
        if usable.cut_pairs and say:
            logger.warning(
                "%d of the %d pairs of the %s set are longer than max_length=%s and are cut, by %d tokens in all.",
                *(usable.cut_pairs, len(usable), name, self.data_collator.max_length, usable.cut_tokens),
            )
        return usable

    def _leave_out(self, name: str, refusal: Refusal) -> None:
        """A pair of a stream, whose every epoch may come by here."""
        known = self.unusable_pairs.setdefault(name, [])
        if refusal in known:
            return
        known.append(refusal)
        if len(known) <= NAMED:
            rest = f" Of further ones nothing is said; trainer.unusable_pairs[{name!r}] has them."
            logger.warning(
                "Pair %d of the %s set cannot be used and is left out: %s.%s",
                *(refusal.index, name, refusal.reason, rest if len(known) == NAMED else ""),
            )

    def _with_reference(self, pairs: Any) -> Any:
        """The pairs with the reference's log-probabilities, if they do not have them."""
        if pairs is None or has_reference(pairs) or not isinstance(self.data_collator, PreferenceCollator):
            return pairs  # a batch without them is refused by the loss
        model = self.model if self.ref_model is None else self.ref_model.to(self.args.device)
        if is_in_parts(model):
            raise ValueError(
                "DPO's reference is in parts: it was loaded under ZeRO-3's config, and can only be run whole. Give the "
                "pairs ref_chosen_logps and ref_rejected_logps, a ref_model that was loaded before the training "
                "arguments were made, or use ZeRO 2."
            )
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
        return with_rows(batch, self.method, self._ignore_index, self.media_tokens)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        inputs = self.loss_inputs(inputs)
        loss, out = self.loss_step(model, inputs, num_items_in_batch)
        self._recent.add(averaged_metrics(out, out.valid_pairs, _counts(inputs["rows"])[0]))
        return (loss, out) if return_outputs else loss

    def prediction_step(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Loss, metrics (B, 9) in place of logits, and which pairs are valid (B,) in place of labels."""
        loss, out = self.evaluation_step(model, self.loss_inputs(self._prepare_inputs(inputs)))
        if prediction_loss_only:
            return loss, None, None
        nll = out.nll_loss.expand(len(out.valid_pairs), 1)
        return loss, torch.cat((pair_metrics(out), nll), 1), out.valid_pairs.long()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self._recent.means(self.accelerator))
            self._recent = Averages()
        super().log(logs, start_time)

    def _get_dataloader(
        self, dataset: Any, description: str, *args: Any, is_training: bool = False, **options: Any
    ) -> Any:
        dataset = self._prepared(dataset, description.lower())
        if self.accelerator.num_processes == 1 and self.accelerator.dispatch_batches is None:
            # Of a stream, Accelerate would cut all tensors to as many rows as the first of them has.
            self.accelerator.dataloader_config.dispatch_batches = False
        collator = of_answers = self.data_collator
        if is_training and not self.method.is_preference and isinstance(collator, PreferenceCollator):
            of_answers = replace(collator, answers="chosen")
        if not self.accelerator.dispatch_batches:  # which concatenates and slices what is in a batch, all of it tensors
            device, media = self.args.device, self.media_tokens
            of_answers = RowsCollator(of_answers, self.method, self._ignore_index, device, media)
        self.data_collator = of_answers
        try:
            loader = super()._get_dataloader(dataset, description, *args, is_training=is_training, **options)
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
            self._signature_columns = [*sorted(KNOWN), *COLUMNS]


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
