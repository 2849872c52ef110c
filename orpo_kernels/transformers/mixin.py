"""What every trainer with the fused loss shares, whatever makes its batches: `PreferenceLossMixin`.

It stands in front of the class of a trainer, with `batch_inputs` to read a batch, and overrides what would make logits:
a subclass and no `compute_loss_func`, because that function is given what the model's forward returns.

**Gradient accumulation and several processes** are exact: the means run over all tokens and all pairs of the optimizer
step, as if it were one large batch. (A mean of the micro-batches' means weighs a token of a short batch more.) The
counts are taken where the Trainer counts `num_items_in_batch`; like that, they are of all processes unless
`average_tokens_across_devices=False`. So is **an evaluation**: the NLL of all tokens of its set, the pair loss of all
its valid pairs. The router loss of a mixture of experts is no sum over tokens: of it, the mean over the micro-batches
is taken; in an evaluation, by their tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend
from torch import Tensor, nn
from torch.utils.data import SequentialSampler
from transformers.trainer_utils import EvalLoopOutput

from .. import Rows
from ..devices import moved, statistics_dtype
from ..engine.objective import counts_of
from ..methods import Method
from ..sparsity import Sparsity, measured_sparsity
from .batches import RowsCollator, with_rows
from .body import router_loss_coef, unwrap, wants_router_loss
from .causal_lm import CausalLMOutput, causal_lm_preference_loss
from .collator import PreferenceCollator
from .engines import is_in_parts, run_inside
from .fitting import Extent, check_fits
from .lm_head import resolve_lm_head
from .measuring import Collators, cannot_measure, chosen_packing
from .media import media_tokens
from .metrics import Averages, Part, averaged_metrics
from .packing import IGNORE_INDEX, Packing
from .pairs import GroupedByLength, UsablePairs, is_stream, lengths_of, warn_of_unusable
from .sharing import automatic_packing, refuses_shared_prompt
from .tokenization import Refusal
from .versions import body_of, compilation_by_environment, groups_by_length, loss_takes_counts

if TYPE_CHECKING:
    from transformers import Trainer as _Trainer
else:
    _Trainer = object

logger = logging.getLogger(__name__)

_PAIR_LOSS, _ROUTER_LOSS = "pair_loss", "router_loss"  # the parts of a loss beside its NLL


class PreferenceLossMixin(_Trainer):
    """The fused loss inside a `Trainer`. Put it in front of the trainer's class, and give `batch_inputs`.

    Attributes:
        method: what is trained.
        loss_options: what else `causal_lm_preference_loss` is called with beside the batch: memory_budget, ...
        loss_is_scaled_for_ga: the Trainer's own switch. True: the means run over the whole optimizer step. False: over
            each micro-batch, and the Trainer takes the mean of those.
        unusable_pairs: the pairs that were left out, by the name of their set.
    """

    loss_is_scaled_for_ga: bool | None = True
    method: Method
    loss_options: Mapping[str, Any] = MappingProxyType({})
    unusable_pairs: dict[str, list[Refusal]]
    train_dataset: Any
    eval_dataset: Any
    data_collator: Any
    _compile_options: dict[str, Any] | None = None
    _sparsity: Sparsity | None = None
    _to_measure: Collators = MappingProxyType({})  # the collators of which `train` takes the faster
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

    def batch_inputs(self, batch: Mapping[str, Any]) -> Mapping[str, Any]:
        """What `causal_lm_preference_loss` takes of a batch of this trainer; by default all of it."""
        return batch

    def loss_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """`batch_inputs`, with the rows that its labels make in their place."""
        return with_rows(self.batch_inputs(batch), self.method, self._ignore_index, self.media_tokens)

    def rows_collator(self, collator: Callable[[Any], Any]) -> RowsCollator:
        """The collator, whose batches come with their rows."""
        return RowsCollator(collator, self.method, self._ignore_index, self.args.device, self.media_tokens)

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
        own_counts = counts_in_loss(inputs["rows"], counted)
        if counted is not None:
            weights = inputs.get("pair_weights")
            inputs = {**inputs, "pair_weights": counted.double() if weights is None else weights * counted}
        counts, micro_batches, averaged = own_counts, 1, 1
        if step_counts is not None:
            counts = moved(step_counts, own_counts.device, torch.float64)
            micro_batches = self.current_gradient_accumulation_steps
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
        nll_count, pairs = counts_in_loss(inputs["rows"], counted)
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
            output = super().evaluation_loop(
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
        if self._to_measure:
            checkpoint = options.get("resume_from_checkpoint", arguments[0] if arguments else None)
            self._take_packing(chosen_packing(self, self._to_measure, checkpoint))
            self._to_measure = {}
        return super().train(*arguments, **options)

    def _refuses_shared_prompt(self, images: bool = False) -> str | None:
        """Why no batch of this trainer can share prompts; None too for a model in parts, which the first step tries."""
        with self.accelerator.autocast():  # as its steps run
            return None if is_in_parts(self.model) else refuses_shared_prompt(self.model, images)

    def _decided(
        self, asked: Packing, images: bool = False, collator_of: Callable[[Packing], Any] | None = None
    ) -> Packing:
        """The packing that `asked` means; of "measure", until training begins with the collators of both.

        Raises `ValueError` for "shared" where prompts cannot be shared.
        """
        if asked == "padded":
            return asked
        refused = self._refuses_shared_prompt(images)
        if asked == "shared":
            if refused:
                raise ValueError(f'{refused} Use packing="padded".')
            return asked
        packing: Packing = "padded"
        why = refused
        if refused is None:
            with self.accelerator.autocast():
                packing, why = automatic_packing(self.model, self.args.device, images)
        if asked == "measure" and collator_of is not None:
            unmeasured = refused or cannot_measure(self)
            why = unmeasured or "until training begins, which times both"
            if unmeasured is None:
                self._to_measure = {"padded": collator_of("padded"), "shared": collator_of("shared")}
        logger.info("packing=%r is %r: %s", asked, packing, why)
        return packing

    def _looked_through(self, pairs: Any, name: str, collator: PreferenceCollator) -> UsablePairs:
        """The pairs of the set `name` that can be used; what cannot, and what is cut, is said."""
        usable = UsablePairs(pairs, collator, not self.args.disable_tqdm and self.is_local_process_zero())
        self._take_note(name, usable.unusable, len(usable) + len(usable.unusable), usable.extent)
        if usable.cut_pairs and self.is_world_process_zero():
            logger.warning(
                "%d of the %d pairs of the %s set are longer than max_length=%s and are cut, by %d tokens in all.",
                *(usable.cut_pairs, len(usable), name, collator.max_length, usable.cut_tokens),
            )
        return usable

    def _take_note(self, name: str, unusable: list[Refusal], total: int, extent: Extent) -> None:
        """Say which of the pairs of the set `name` are left out. Raises `ValueError` where the others do not do."""
        self.unusable_pairs[name] = unusable
        warn_of_unusable(unusable, total, name, say=self.is_world_process_zero())
        check_fits(self.model, extent, name, say=self.is_world_process_zero())

    def _take_packing(self, packing: str) -> None:
        """Make batches of this packing from now on, one of `_to_measure`."""
        self.data_collator = self._to_measure[packing]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With `sparse_eps`, also what it left out since the last time, in this process."""
        if "loss" in logs and self._sparsity is not None and self._sparsity.shares:
            logs["sparse/active_share"] = self._sparsity.active_share
            logs["sparse/dropped_mass"] = self._sparsity.dropped_mass.mean().item()
            self._sparsity = None
        super().log(logs, start_time)

    def _get_num_items_in_batch(self, batch_samples: list, device: torch.device) -> Tensor | None:
        """(2,): NLL weight and valid pairs of the optimizer step; None where each micro-batch has its own mean.

        The Trainer calls this once per optimizer step and hands the result to `compute_loss`.
        """
        if not self.loss_is_scaled_for_ga or not batch_samples:
            return None
        counts = torch.stack([counts_in_loss(self.loss_inputs(batch)["rows"]) for batch in batch_samples]).sum(0)
        counts = moved(counts, device, statistics_dtype(device))
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.gather(counts[None]).sum(0)
        return counts

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """With group_by_length, by the tokens of prompt and answers."""
        pairs = self.train_dataset if train_dataset is None else train_dataset
        if not groups_by_length(self.args) or (lengths := lengths_of(pairs)) is None:
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        return GroupedByLength(self.args.train_batch_size * self.args.gradient_accumulation_steps, lengths, seed)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        """An evaluation keeps the order of the pairs, so that predictions are theirs, also with group_by_length."""
        if not groups_by_length(self.args) or eval_dataset is None or is_stream(eval_dataset):
            return super()._get_eval_sampler(eval_dataset)
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    def _check_setup(self) -> None:
        """Refuse, before the first step, what the loss would bypass, and take over what belongs to it."""
        loss_takes_counts(self)
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
        arguments = super()._build_accelerator_args(**options)
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


def counts_in_loss(rows: Rows, counted: Tensor | None = None) -> Tensor:
    """(2,) float64: what the two means of the loss divide by, of the pairs that are `counted` (B,) bool."""
    if counted is not None:
        in_loss = counted[rows.pair]
        rows = replace(rows, scored=rows.scored & in_loss, nll_weight=rows.nll_weight * in_loss)
    return counts_of(rows)


def zero_stage(accelerator: Any) -> int:
    """The stage of DeepSpeed's ZeRO; 0 where there is no DeepSpeed, or none of its stages."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else plugin.zero_stage
