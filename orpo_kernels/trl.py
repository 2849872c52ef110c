"""TRL's ORPOTrainer without logits: `from orpo_kernels.trl import ORPOTrainer` is the one line to change.

Config, data, callbacks, tokenisation and logged metrics are TRL's; the loss is fused. What is better than in TRL:

- A prompt that fills `max_length` leaves an empty answer. Its pair leaves the odds ratio and the metrics; the prompt's
  NLL stays. In TRL the loss is NaN from there on.
- Answers of which the model is sure give finite losses and gradients.
- Gradient accumulation and several processes are exact (see `orpo_kernels.transformers.mixin`).
- Chosen and rejected answer share one pass over their prompt, where the model allows it (`packing`).
- Metrics are read back from the device once in a step.
- An evaluation's loss and metrics are those of its set, not means of batches: they do not depend on the batch size.
- Rows are used whole, or left out and named (`unusable_pairs`): an empty answer, the same answer twice, a chat template
  that loses or changes text, a column of text that nothing reads. In TRL the first ends the run before it begins, and
  the others are trained as they come out. Rendering is tried on every row where the processing_class is given.
- `tools`, `tool_calls` and `chat_template_kwargs` reach the chat template; a column `weight` multiplies a pair's loss.
- How many rows `max_length` cuts, and how many of them it leaves without an answer, is said.

Needs `trl` 0.28 or newer (`pip install orpo_kernels[trl]`).
"""

from __future__ import annotations

import inspect
import logging
import math
import os.path
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any, get_args

import torch
from accelerate import PartialState
from torch import Tensor, nn

from .devices import moved, rows_device
from .methods import ORPO
from .transformers.body import unwrap
from .transformers.collator import PreferenceCollator, pair_weights
from .transformers.engines import whole
from .transformers.fitting import Extent
from .transformers.images import is_processor
from .transformers.lm_head import resolve_lm_head
from .transformers.metrics import PAIR_METRICS, Part, pair_metrics
from .transformers.mixin import PreferenceLossMixin
from .transformers.packing import IGNORE_INDEX, SIDES, Packing, pack_pairs
from .transformers.pairs import of_each_set
from .transformers.rendering import WEIGHT, Rendered, UnusablePair, render_pair
from .transformers.tokenization import End, Refusal, end_turn, numbers_of
from .transformers.versions import body_of, check_trl

check_trl()

from trl.data_utils import maybe_extract_prompt  # noqa: E402
from trl.experimental.orpo import ORPOConfig  # noqa: E402
from trl.experimental.orpo import ORPOTrainer as TRLORPOTrainer  # noqa: E402

__all__ = ["ORPOConfig", "ORPOTrainer"]

logger = logging.getLogger(__name__)

_LOGITS = ("logits/chosen", "logits/rejected")
_STEP_COUNTS = "step_counts"
_OF_THE_PROMPT = ("prompt_input_ids", "prompt_attention_mask")
_OF_A_SIDE = ("input_ids", "attention_mask", "labels")
_TOKENISED = (*(f"{side}_{column}" for side in SIDES for column in _OF_A_SIDE), *_OF_THE_PROMPT)
_OF_TWO_PARTS = ("chosen_labels", "rejected_labels", *_OF_THE_PROMPT)
_NOTHING = dict.fromkeys(("prompt", *SIDES), "")
_REASON = "unusable"  # a column while rows are tokenised: why one cannot be used, "" where it can
_CUT = "cut"  # another: 0, 1 where a side is as long as max_length allows, 2 where an answer is empty with that


class ORPOTrainer(PreferenceLossMixin, TRLORPOTrainer):
    """`trl.experimental.orpo.ORPOTrainer` with the fused loss. All its arguments, and four by keyword:

    Args:
        exact_accumulation: True (default): with gradient accumulation, the loss is that of one large batch. False:
            each micro-batch has its own means, as TRL normalises; then the losses are those that TRL logs.
        end: "trl" (default): TRL's tokenisation, which appends an EOS behind what the chat template prints after the
            end of a turn (`<|im_end|>\\n<|im_end|>`). "single": the answer stops behind its first end token.
        packing: as of a `PreferenceCollator`. "auto" is "padded" where the batches come from a `data_collator` of
            yours or `generate_during_eval` is set. Pictures are not timed: for them "measure" is "auto".
        sparse_eps: None (default): exact gradients; else as in `orpo_loss`, and what it leaves out is logged as
            `sparse/active_share` and `sparse/dropped_mass`.

    With a model's processor (`AutoProcessor`) as `processing_class`, rows may have pictures (`images`, as for TRL's
    other trainers; `tokenize_pair` has the forms). This package's `PreferenceCollator` tokenises them, as `end` says,
    and makes the batches. TRL's own trainer serves text alone.

    Logged are TRL's metrics, averaged over the pairs with two non-empty answers. `logits/chosen` and
    `logits/rejected`, the mean of all logits (of padding as well, in a padded batch, as in TRL), come from the mean
    hidden state and the mean row of the weight. They are left out for a model whose logits are soft-capped (Gemma 2),
    where that is not the mean, and where the hidden states cannot be seen (a body compiled with `.compile()`;
    `torch_compile=True` lets them be seen). TRL's `compute_metrics` gets NaN for them.

    An encoder-decoder model (T5, BART, ...) is trained as TRL trains it, prompts in the encoder and answers of at most
    `max_completion_length` tokens in the decoder, but that its encoder runs once for both answers. They end as its
    tokenizer ends a text, whatever `end` is.

    Raises `ValueError` or `TypeError` for a set of which no row can be used, and for a model or a parallel setup that
    the loss cannot serve.
    """

    _logs_all_metrics = True  # whatever compute_metrics is
    _makes_batches = False  # or TRL, or a collator of the caller's

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
        given = inspect.signature(TRLORPOTrainer.__init__).bind_partial(self, *args, **options).arguments
        given.pop("self")
        processor, rows = given.get("processing_class"), (given.get("train_dataset"), given.get("eval_dataset"))
        pictured = _take_pictures(given, end) if is_processor(processor) else None
        for name in ("train_dataset", "eval_dataset"):
            given[name] = _rendered(given.get(name), given.get("processing_class"), given.get("args"))
        super().__init__(**given)
        self.unusable_pairs: dict[str, list[Refusal]] = {}
        self.train_dataset = of_each_set(self.train_dataset, "train", self._usable)
        self.eval_dataset = of_each_set(self.eval_dataset, "eval", self._usable)
        self.method = ORPO(beta=self.beta)
        self.loss_options = {"sparse_eps": sparse_eps}
        self._check_setup()
        if pictured is not None:
            self.processing_class = processor  # which is saved beside the model
            self._serve_pictures(pictured, rows, packing)
        else:
            padded = self.data_collator
            packed = partial(_packed, padding_id=self.padding_value or 0, aligned=self.aligns_widths)
            collators = {"padded": padded, "shared": self.rows_collator(packed)}
            self.data_collator = collators[self._decided(packing, collator_of=collators.__getitem__)]

    def _serve_pictures(self, collator: PreferenceCollator, rows: tuple[Any, Any], packing: Packing) -> None:
        """Rows and batches as `PreferenceTrainer` makes them. Raises `ValueError` where prompts cannot be shared."""
        if self.generate_during_eval:
            raise ValueError("generate_during_eval=True takes the prompts out of TRL's batches; leave it out.")
        self._makes_batches = True
        collator = replace(collator, packing=self._decided(packing, images=True), aligned=self.aligns_widths)
        self.data_collator = self.rows_collator(collator)

        def usable(rows: Any, name: str) -> Any:
            rows = rows if "prompt" in rows.column_names else rows.map(maybe_extract_prompt)
            return self._looked_through(rows, name, collator)

        self.train_dataset = of_each_set(rows[0], "train", usable)
        self.eval_dataset = of_each_set(rows[1], "eval", usable)

    def _refuses_shared_prompt(self, images: bool = False) -> str | None:
        if not self._makes_batches and not self.use_dpo_data_collator:
            return "The batches are made by a data_collator of yours."
        if self.generate_during_eval:
            return "generate_during_eval=True takes the prompts out of padded batches."
        return super()._refuses_shared_prompt(images)

    def _usable(self, rows: Any, name: str) -> Any:
        """The rows without those that could not be rendered or tokenised."""
        if _REASON not in rows.column_names:
            return rows
        unusable = [Refusal(index, reason) for index, reason in enumerate(rows[_REASON]) if reason]
        extent = Extent(**{name: max(rows[name], default=none) for name, none in vars(Extent()).items()})
        extent.add((self.padding_value or 0,))
        self._take_note(name, unusable, len(rows), extent)
        cut = [kind for kind in rows[_CUT] if kind]
        limit = "max_completion_length" if self.is_encoder_decoder else "max_length"
        if cut and self.is_world_process_zero():
            logger.warning(
                f"{len(cut)} of {len(rows)} rows of {name} reach {limit}={getattr(self, limit)} and were cut, or end "
                f"there; {cut.count(2)} of them have no answer left on a side and count in the NLL alone."
            )
        left_out = {one.index for one in unusable}
        rows = rows.remove_columns([_REASON, _CUT, *vars(extent)])
        return rows.select([index for index in range(len(rows)) if index not in left_out]) if left_out else rows

    def batch_inputs(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        weighted = batch if "pair_weights" in batch else pair_weights([{WEIGHT: w} for w in batch.get(WEIGHT, ())])
        inputs: dict[str, Any] = {}
        if "pair_weights" in weighted:
            inputs["pair_weights"] = moved(weighted["pair_weights"], rows_device(device), torch.float64)
        if self._makes_batches or "packed" in batch:
            return {name: value for name, value in batch.items() if name != _STEP_COUNTS} | inputs
        two_parts, padding = self.is_encoder_decoder, self.padding_value or 0
        tensors = self.concatenated_inputs(batch, two_parts, padding_value=padding, device=device)
        inputs |= {name: tensors[f"concatenated_{name}"] for name in _OF_A_SIDE}
        if two_parts:
            inputs |= {name: batch[f"prompt_{name}"].to(device) for name in ("input_ids", "attention_mask")}
            inputs["decoder_input_ids"] = self._shift_right(inputs["labels"])
        return inputs

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
        sides = sides_of(inputs)
        with mean_hidden_states(inner, sides / sides.sum((1, 2), keepdim=True)) as means:
            if train_eval == "eval":
                loss, out = self.evaluation_step(model, inputs)
            else:
                loss, out = self.loss_step(model, inputs, batch.get(_STEP_COUNTS))
        logits = mean_logits(inner, means)
        if train_eval == "eval" and self._evaluation is not None:
            positions = sides.sum((1, 2))
            parts = zip(_LOGITS, logits * positions, positions, strict=True)
            self._evaluation.add({name: Part(total, weight) for name, total, weight in parts})
        of_pairs = self.accelerator.gather_for_metrics(pair_metrics(out)).nanmean(0)
        of_batch = self.accelerator.gather(torch.cat((out.nll_loss[None].float(), logits))[None]).mean(0)
        values = torch.cat((of_pairs, of_batch)).tolist()
        prefix = "eval_" if train_eval == "eval" else ""
        names = (f"{prefix}{name}" for name in (*PAIR_METRICS, "nll_loss", *_LOGITS))
        return loss, dict(zip(names, values, strict=True))

    def store_metrics(self, metrics: dict[str, float], train_eval: Any = "train") -> None:
        """What is not known is not logged: one NaN would be the mean of the whole interval."""
        if self._evaluation is None:  # an evaluation has its own averages
            metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
            super().store_metrics(metrics, train_eval)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        output = super().evaluation_loop(*args, **options)
        unknown = [key for key, value in output.metrics.items() if key.endswith(_LOGITS) and math.isnan(value)]
        for key in unknown:
            del output.metrics[key]
        return output

    def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
        """TRL's columns; where TRL fails, empty ones, and the reason in a column more."""
        reason = feature.get(_REASON, "")
        if not reason:
            try:
                row = super().tokenize_row(feature, model)
            except (TypeError, ValueError) as error:
                reason = f"TRL cannot tokenise it ({error})"
        if reason:
            columns = _OF_TWO_PARTS if self.is_encoder_decoder else _TOKENISED
            return {**{name: [] for name in columns}, _REASON: reason, _CUT: 0, **vars(Extent())}
        if self.is_encoder_decoder:
            answers = [row[f"{side}_labels"] for side in SIDES]
            is_cut = max(map(len, answers)) >= self.max_completion_length
            return {**row, _REASON: "", _CUT: int(is_cut), **vars(Extent().add(row["prompt_input_ids"], *answers))}
        sides = [(row[f"{side}_input_ids"], row[f"{side}_labels"]) for side in SIDES]
        is_cut = any(len(ids) >= self.max_length for ids, _ in sides)
        is_empty = any(set(labels) <= {IGNORE_INDEX} for _, labels in sides)
        if self.end == "single":
            for side in SIDES:
                self._end_once(row, side)
        extent = Extent().add(*(ids for ids, _ in sides))
        return {**row, _REASON: "", _CUT: is_cut + (is_cut and is_empty), **vars(extent)}

    def _end_once(self, row: dict[str, Any], side: str) -> None:
        """Cut the side behind the first of its end tokens. A truncated answer has none and stays as it is."""
        ids, labels = row[f"{side}_input_ids"], row[f"{side}_labels"]
        answer = ids[labels.count(IGNORE_INDEX) :]
        surplus = max(0, len(answer) - len(end_turn(answer, self.processing_class)))
        for column in _OF_A_SIDE:
            row[f"{side}_{column}"] = row[f"{side}_{column}"][: len(ids) - surplus]


def _take_pictures(given: dict[str, Any], end: End) -> PreferenceCollator:
    """Leave TRL no row to tokenise, a tokenizer, and a collator that makes its batches, which is returned."""
    args = given.get("args")
    if args is None or given.get("data_collator") is not None:
        raise ValueError("With a processor, give args (ORPOConfig), and no data_collator: batches are made here.")
    for name in ("train_dataset", "eval_dataset"):
        part = given.get(name)
        for one in part.values() if isinstance(part, dict) else [part]:
            if one is not None and not hasattr(one, "select"):
                raise TypeError(f"{name} is a {type(one).__name__}; with pictures it has to be a datasets.Dataset.")
    args.remove_unused_columns = False
    collator = PreferenceCollator(given["processing_class"], max_length=args.max_length, end=end)
    train = given.get("train_dataset")
    given["train_dataset"], given["eval_dataset"] = None if train is None else train.select([]), None
    given["processing_class"], given["data_collator"] = collator.tokenizer, collator
    return collator


def _packed(rows: Sequence[Mapping[str, Any]], padding_id: int, aligned: bool = False) -> dict[str, Any]:
    return pack_pairs(rows, padding_id, aligned=aligned) | pair_weights(rows)


# --- rows that TRL is given ----------------------------------------------------------------------------------------


def _rendered(rows: Any, tokenizer: Any, config: Any) -> Any:
    """The rows as text, rendered as everywhere here (`rendering.py`), and the reason where one is unusable.

    TRL then finds nothing left to render: it tokenises, and cuts. Left to it is all where there is no tokenizer.
    """
    if rows is None or tokenizer is None or not hasattr(rows, "map"):
        return rows
    with PartialState().main_process_first():
        return rows.map(_render_row, fn_kwargs={"tokenizer": tokenizer}, num_proc=config.dataset_num_proc)


def _render_row(row: dict[str, Any], tokenizer: Any) -> dict[str, Any]:
    try:
        row = {name: value for name, value in row.items() if value is not None}  # columns that other rows fill
        chosen, rejected = render_pair(_with_prompt(row), tokenizer)
        numbers_of(row)
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            if len(side.answers) > 1:
                raise UnusablePair(
                    f"its {name} answer has several turns, and TRL's tokenisation would train what is said between them"
                )
    except UnusablePair as unusable:
        return _NOTHING | {_REASON: str(unusable)}
    except Exception as error:  # of TRL, or of the tokenizer: this row's alone
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        return _NOTHING | {_REASON: f"it cannot be rendered ({reason:.200})"}
    prompt = os.path.commonprefix([chosen.prompt, rejected.prompt])  # noqa: RUF071 (strings, not paths)
    answers = (_closed(side, tokenizer)[len(prompt) :] for side in (chosen, rejected))
    return dict(zip(_NOTHING, (prompt, *answers), strict=True)) | {_REASON: ""}


def _with_prompt(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its prompt apart from its answers; TRL finds it in conversations that both begin with it."""
    is_apart = isinstance(row.get("prompt"), list) or all(isinstance(row.get(name), str) for name in _NOTHING)
    return row if is_apart else maybe_extract_prompt(row)


def _closed(side: Rendered, tokenizer: Any) -> str:
    """The text, up to the end of its turn where the template may open another one unasked."""
    if not side.opens_next:
        return side.text
    stop = side.answers[-1][1]
    behind = side.text[stop:]
    tail = behind.lstrip()
    special = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    ends = [token for token in special if tail.startswith(token) and not side.text.startswith(token)]
    return side.text[:stop] + (behind[: len(behind) - len(tail)] + max(ends, key=len) if ends else "")


# --- mean logits ---------------------------------------------------------------------------------------------------


def sides_of(inputs: Mapping[str, Any]) -> Tensor:
    """(2, rows, T) fp32, 0 or 1: the positions that the means over the chosen and over the rejected side are taken of.

    As TRL averages logits: over all positions but the last of each sequence, padding included. In a packed batch there
    is no such padding: over all tokens of each sequence. In a decoder, to the last position too.
    """
    if "packed" in inputs:
        segments = inputs["packed"].segments.to(inputs["input_ids"].device)
        others = torch.tensor([2, 1], device=segments.device)[:, None, None]  # rejected answers, chosen answers
        return ((segments >= 0) & (segments % 3 != others)).float()
    ids, stop = (inputs["decoder_input_ids"], None) if "decoder_input_ids" in inputs else (inputs["input_ids"], -1)
    pairs = len(ids) // 2
    sides = ids.new_zeros(2, *ids.shape, dtype=torch.float32)
    sides[0, :pairs, :stop] = sides[1, pairs:, :stop] = 1
    return sides


@contextmanager
def mean_hidden_states(model: nn.Module, sides: Tensor) -> Iterator[list[Tensor]]:
    """Inside, the list holds the mean hidden states (2, H) fp32 of the body's last call, weighted by `sides`."""
    means: list[Tensor] = []

    def keep(module: nn.Module, args: tuple, output: Any) -> None:
        hidden = output[0].detach()
        if hidden.shape[:2] == sides.shape[1:]:  # not the few tokens of a check
            means[:] = [sides.flatten(1) @ hidden.flatten(0, 1).float()]

    handle = body_of(unwrap(model)).register_forward_hook(keep)
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
    with whole(unwrap(model).get_output_embeddings()):
        return head.mean_logits(means[0])
