"""ORPO, SFT, DPO, SimPO and CPO in `transformers.Trainer`: raw preference pairs go in, no logits are made."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.data_loader import DataLoaderDispatcher
from torch import Tensor, nn
from transformers import Trainer

from .._moved import moved
from ..methods import Method, all_options, method_named
from .body import unwrap
from .collator import PreferenceCollator
from .encoder_decoder_collator import EncoderDecoderCollator
from .engines import is_in_parts
from .metrics import Averages, averaged_metrics, pair_metrics, preference_metrics
from .mixin import PreferenceLossMixin, counts_in_loss
from .packing import COLUMNS, Packing
from .pairs import NAMED, UsablePairs, UsableStream, is_stream, of_each_set
from .reference_model import ReferencedPairs, has_reference, reference_logps
from .rendering import KNOWN
from .tokenization import Refusal

logger = logging.getLogger(__name__)

_COLLATORS = (PreferenceCollator, EncoderDecoderCollator)  # that read of an example what we know
_FROM_THE_STEP = ("nll_denominator", "pair_denominator")
_OF_THE_ANSWERS = ("schedule", "memory_budget", "backend", "ignore_index")  # options without gradient as well

__getattr__ = moved(__name__, {"run_inside": "orpo_kernels.transformers.engines"})


class PreferenceTrainer(PreferenceLossMixin, Trainer):
    """`transformers.Trainer` with the loss of a preference-tuning method (`orpo_kernels.methods`).

        collator = PreferenceCollator(tokenizer, max_length=1024)
        trainer = PreferenceTrainer(model, args, data_collator=collator, train_dataset=pairs, method="dpo")
        trainer.train()

    Args, beside those of `Trainer` (all of it by keyword but `model` and `args`):
        data_collator: a `PreferenceCollator`, or anything that makes the same batches. SFT leaves the rejected answers
            out of the batches that it trains on. For an encoder-decoder model an `EncoderDecoderCollator` is made of
            it.
        train_dataset, eval_dataset: raw examples (prompt, chosen, rejected; `tokenize_pair` says what else they may
            hold), or pairs that it made. With a `PreferenceCollator` they are looked through and tokenised here, once
            (`pairs.py`).
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
    `per_device_eval_batch_size`, and kept in `output_dir/reference_logps` (`reference_model.py`); `reference_seconds`
    is what it took, or what reading it took. Pairs that have the columns ref_chosen_logps and ref_rejected_logps keep
    theirs; a stream has to have them.

    `unusable_pairs`: by the name of the set ("train", "eval", "eval_<name>", ...), the `Refusal`s (index and reason)
    of all pairs that were left out; of a stream, of those so far, in this process (not those that workers of the data
    loader have left out).

    Raises `ValueError` or `TypeError` for a missing collator, for options that are not the caller's or not the
    method's, for a set of which no pair can be used, and for a model or a parallel setup that the loss cannot serve.
    """

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
        self._check_setup()
        if isinstance(data_collator, PreferenceCollator):
            self.data_collator = self._for_this_model(data_collator)
        self.train_dataset = of_each_set(self.train_dataset, "train", self._prepared)
        self.eval_dataset = of_each_set(self.eval_dataset, "eval", self._prepared)

    def _for_this_model(self, collator: PreferenceCollator) -> PreferenceCollator:
        """The collator with what it leaves open decided by the model and the device."""
        if collator.aligned is None:
            collator = replace(collator, aligned=self.aligns_widths)
        if unwrap(self.model).config.is_encoder_decoder and not isinstance(collator, EncoderDecoderCollator):
            collator = EncoderDecoderCollator.of(collator, self.model)
        if collator.packing not in ("auto", "measure"):
            return collator

        def of(packing: Packing) -> PreferenceCollator:
            return self._for_training(replace(collator, packing=packing))

        return replace(collator, packing=self._decided(collator.packing, collator.processor is not None, of))

    def _take_packing(self, packing: Any) -> None:
        self.data_collator = replace(self.data_collator, packing=packing)

    def _for_training(self, collator: Any) -> Any:
        """The collator without the answers that the method does not train on."""
        if self.method.is_preference or not isinstance(collator, PreferenceCollator):
            return collator
        return replace(collator, answers="chosen")

    def _prepared(self, pairs: Any, name: str) -> Any:
        """The pairs as they go into batches: those that can be used, with what the method needs of a reference."""
        pairs = self._usable(pairs, name)
        return self._with_reference(pairs) if self.method.needs_reference else pairs

    def _usable(self, pairs: Any, name: str) -> Any:
        # A collator of the caller's may read more of an example than we know.
        is_prepared = isinstance(pairs, UsablePairs | UsableStream | ReferencedPairs)
        if is_prepared or type(self.data_collator) not in _COLLATORS:
            return pairs
        if is_stream(pairs):
            return UsableStream(pairs, self.data_collator, partial(self._leave_out, name))
        return self._looked_through(pairs, name, self.data_collator)

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
        if has_reference(pairs) or not isinstance(self.data_collator, PreferenceCollator):
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

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        inputs = self.loss_inputs(inputs)
        loss, out = self.loss_step(model, inputs, num_items_in_batch)
        self._recent.add(averaged_metrics(out, out.valid_pairs, counts_in_loss(inputs["rows"])[0]))
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
        collator = self.data_collator
        of_answers = self._for_training(collator) if is_training else collator
        if not self.accelerator.dispatch_batches:  # which concatenates and slices what is in a batch, all of it tensors
            of_answers = self.rows_collator(of_answers)
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
