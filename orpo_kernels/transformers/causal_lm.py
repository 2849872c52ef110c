"""The loss of any Hugging Face language model, ORPO's or another method's, straight from its last hidden states."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from .. import PreferenceOutput, Rows, preference_loss_from_rows
from ..loss import row_logps
from ..methods import ORPO, Answers, Method, method_named
from .batches import batch_rows
from .body import router_loss_coef, run_body, unwrap
from .encoder_decoder import decoder_inputs
from .engines import is_fsdp2, through
from .lm_head import LMHead, resolve_lm_head, through_head
from .media import media_inputs, media_tokens
from .packing import IGNORE_INDEX, PackedPairs
from .probe import verify_lm_head
from .sharing import refuses_shared_prompt

T = TypeVar("T")

_FROM_THE_MODEL = ("hidden", "weight", "bias", "low_rank", "logit_scale", "logit_softcap")
_FROM_THE_BATCH = ("nll_labels", "shift")
_FROM_THE_METHOD = ("alpha", "beta", "prompt_nll", "nll_reduction")


class CausalLMOutput(PreferenceOutput):
    """`PreferenceOutput`, and one thing more.

    Attributes:
        aux_loss: 0-d, the router loss of a mixture of experts, which is a part of `loss`; None where there is none.
    """

    aux_loss: Tensor | None = None

    @classmethod
    def of(cls, out: PreferenceOutput, aux_loss: Tensor | None, **values: Any) -> CausalLMOutput:
        """`out` with its router loss, and with other `values` in some fields."""
        made = cls(*out._replace(**values))
        made.aux_loss = aux_loss
        return made

    def to(self, device: torch.device) -> CausalLMOutput:
        aux_loss = None if self.aux_loss is None else self.aux_loss.to(device)
        return self.of(PreferenceOutput(*(value.to(device) for value in self)), aux_loss)


CausalLMORPOOutput = CausalLMOutput  # the names they had when they were two
CausalLMPreferenceOutput = CausalLMOutput


def causal_lm_orpo_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
    prompt_nll: bool = True,
    nll_reduction: str = "token",
    decoder_input_ids: Tensor | None = None,
    packed: PackedPairs | None = None,
    rows: Rows | None = None,
    pair_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    router_aux_loss_coef: float | None = None,
    **options: Any,
) -> CausalLMOutput:
    """ORPO loss of one batch, without its logits: a padded one, or one whose rows share their prompts.

    Args:
        model: a `transformers` causal LM or encoder-decoder model, or a `peft` model around one (adapters in the body,
            LoRA or `modules_to_save` on the head), also under FSDP2 (`fully_shard`). Its body is
            called as its own forward calls it; no forward is copied. The first call also runs the model's own forward
            on a few tokens, to check that its head is what it seems (`probe.py`).
        input_ids: (2B, T) int64, the B chosen sequences first, then the rejected ones in the same order; (R, T) with
            `packed`.
        attention_mask: (2B, T) int or bool, 1 on tokens and 0 on padding, on either side; None if there is no padding.
            With padding on the left, a model with absolute positions (GPT-2) counts the padding, as its own
            forward does; pad on the right.
        labels: (2B, T) int64, unshifted: the response's ids, `ignore_index` on prompt and padding.
        beta, alpha, nll_reduction: as in `orpo_loss`.
        prompt_nll: whether the NLL of the chosen side covers its prompt as well (TRL) or only its response (the paper).
        decoder_input_ids: of an encoder-decoder model (T5, BART, ...) alone, (2B, T) int64: what its decoder reads to
            predict `labels` (2B, T) at the same places, the B chosen answers first. By default the labels, shifted as
            the model shifts them. Then `input_ids` (B, S) and `attention_mask` (B, S) are the prompts, one for each
            pair: the encoder runs once over a prompt, for both answers. No prompt is in the NLL, whatever prompt_nll
            says.
        packed: where everything is in a batch of `PreferenceCollator(packing="shared")`, instead of attention_mask and
            labels. Loss and gradients are those of the padded batch, or the model is refused: the first call also
            compares a few shared tokens with the sequences alone (`refuses_shared_prompt`).
        rows: what `batch_rows`, or a `RowsCollator`, made of the batch on the host, in place of its labels: then no
            device is waited for. What they cover is theirs, whatever prompt_nll and nll_reduction say.
        pair_weights: (B,) float64, finite and at least 0: what each pair's loss is multiplied by, `pair_weight` of
            `orpo_loss`. The router loss, which is of tokens, is not weighted.
        ignore_index: the label that is no target; a packed batch has none.
        router_aux_loss_coef: the weight of the router loss of a mixture of experts with
            `config.output_router_logits=True`, which is added to the loss as the model's own forward adds it; by
            default the model's own. It is a mean over the tokens of this batch: where the denominators are those of k
            micro-batches, pass the model's coefficient / k.
        options: anything else that `orpo_loss` takes: nll_denominator, pair_denominator, data_group, schedule,
            memory_budget, backend, sparse_eps, limits; and what the model's own forward takes beside text, in the
            order of the 2B rows (pixel_values, image_grid_thw, image_sizes, mm_token_type_ids, ...), which its body is
            given. Tokens that stand for a picture (`config.image_token_id`) are never targets. The first batch with
            pictures also runs through the model's own forward, without gradient. With `packed` every picture comes
            once, in the order of its rows.

    Returns:
        `CausalLMOutput`. `loss` is differentiable with respect to whatever of the model requires grad.

    Raises `TypeError` or `ValueError`, naming what was given and what is needed, for inputs that do not fit together,
    for an option that is not the caller's to give, and for a model that cannot be served (`body.py`, `lm_head.py`,
    `probe.py`, `sharing.py`).
    """
    method = ORPO(beta=beta, alpha=alpha, prompt_nll=prompt_nll, nll_reduction=nll_reduction)
    return causal_lm_preference_loss(
        *(model, input_ids, attention_mask, labels),
        method=method,
        decoder_input_ids=decoder_input_ids,
        packed=packed,
        rows=rows,
        pair_weights=pair_weights,
        ignore_index=ignore_index,
        router_aux_loss_coef=router_aux_loss_coef,
        **options,
    )


def causal_lm_preference_loss(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    method: Method | str,
    decoder_input_ids: Tensor | None = None,
    packed: PackedPairs | None = None,
    rows: Rows | None = None,
    pair_weights: Tensor | None = None,
    reference_logps: Tensor | None = None,
    chosen_only: bool = False,
    ignore_index: int = IGNORE_INDEX,
    router_aux_loss_coef: float | None = None,
    **options: Any,
) -> CausalLMOutput:
    """The loss of any method on one batch, without its logits: `causal_lm_orpo_loss` for SFT, DPO, SimPO and CPO too.

    Args:
        model, input_ids, attention_mask, labels, decoder_input_ids, packed, rows, pair_weights, ignore_index,
            router_aux_loss_coef: as in `causal_lm_orpo_loss`.
        method: one of `orpo_kernels.methods`, or its name, for its defaults.
        reference_logps: (2B,) summed log-probabilities of the answers under the reference model, which DPO needs:
            `causal_lm_answers(reference_model, **batch).logps`.
        chosen_only: the batch has the B chosen sequences alone, as SFT trains on. Every pair then counts as not valid.
        options: anything else that `preference_loss_from_rows` takes, and what the model's forward takes beside text.

    Raises as `causal_lm_orpo_loss`, and `ValueError` for an unknown method, for one without the reference it needs, and
    for one that compares with rejected answers where there are none.
    """
    method = method_named(method) if isinstance(method, str) else method
    if taken := [name for name in options if name in _FROM_THE_METHOD]:
        raise TypeError(
            f"{taken[0]} belongs to the method and cannot be passed; give method={type(method).__name__}(...)."
        )
    if chosen_only and method.is_preference:
        raise ValueError(
            f"The batch has chosen answers alone (chosen_only), and the method {method.name} compares two."
        )

    def at_the_head(rows: Rows, aux_loss: Tensor | None, head: dict[str, Any]) -> tuple[Tensor, CausalLMOutput]:
        out = preference_loss_from_rows(rows=rows, method=method, reference_logps=reference_logps, **head, **options)
        out = _with_router_loss(out, aux_loss, unwrap(model), router_aux_loss_coef)
        return out.loss, out

    loss, out = _run_to_the_head(
        *(model, at_the_head, options, input_ids, attention_mask, labels, decoder_input_ids, packed, ignore_index),
        rows=rows,
        pair_weights=pair_weights,
        prompt_nll=method.prompt_nll,
        nll_reduction=method.nll_reduction,
        chosen_only=chosen_only,
    )
    return CausalLMOutput.of(out, out.aux_loss, loss=loss)


@torch.no_grad()
def causal_lm_answers(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    *,
    decoder_input_ids: Tensor | None = None,
    packed: PackedPairs | None = None,
    rows: Rows | None = None,
    pair_weights: Tensor | None = None,
    ignore_index: int = IGNORE_INDEX,
    **options: Any,
) -> Answers:
    """Log-probabilities and lengths of a batch's answers, without gradient; one GEMM of the head.

    Arguments and errors as in `causal_lm_orpo_loss`; the options are schedule, memory_budget and backend, and what the
    model's forward takes beside text. The weights of the pairs, which a batch may hold, change nothing here.
    """

    def at_the_head(rows: Rows, aux_loss: Tensor | None, head: dict[str, Any]) -> tuple[Tensor, Rows]:
        return row_logps(rows=rows, **head, **options), rows

    logps, made = _run_to_the_head(
        *(model, at_the_head, options, input_ids, attention_mask, labels, decoder_input_ids, packed, ignore_index),
        rows=rows,
        prompt_nll=False,
    )
    return Answers.of(logps, made)


def _run_to_the_head(
    model: nn.Module,
    at_the_head: Callable[[Rows, Tensor | None, dict[str, Any]], tuple[Tensor, T]],
    options: dict[str, Any],
    input_ids: Tensor,
    attention_mask: Tensor | None,
    labels: Tensor | None,
    decoder_input_ids: Tensor | None,
    packed: PackedPairs | None,
    ignore_index: int,
    **of_the_rows: Any,
) -> tuple[Tensor, T]:
    """The model's body, and `at_the_head(rows, router loss, arguments of the loss)` in place of its head.

    Takes from `options` what is for the body. An engine that shards the model sees the tensor that comes first of what
    this returns.
    """
    inner = unwrap(model)
    media = media_inputs(inner, options)
    _check_options(options)
    if packed is None or decoder_input_ids is not None:  # one that packs is refused with its reason, later
        decoder_input_ids = decoder_inputs(inner, labels, decoder_input_ids, ignore_index)
    rows = batch_rows(
        *(input_ids, attention_mask, labels),
        decoder_input_ids=decoder_input_ids,
        packed=packed,
        ignore_index=ignore_index,
        media_tokens=media_tokens(inner),
        **of_the_rows,
    )
    own_packed = None if packed is None else packed.to(input_ids.device)
    kept: list[T] = []

    def forward() -> Tensor:
        if packed is not None and (reason := refuses_shared_prompt(model, images=bool(media))):
            raise ValueError(f'{reason} Use PreferenceCollator(packing="padded").')
        verify_lm_head(model, inner, resolve_lm_head(inner), input_ids, attention_mask, media)
        hidden, aux_loss = run_body(inner, input_ids, attention_mask, own_packed, decoder_input_ids, media)

        def head_forward(head: LMHead, hidden: Tensor) -> Tensor:
            operands = head.operands(hidden)
            arguments = operands._asdict() | {"hidden": operands.hidden.flatten(0, 1)}
            arguments |= {"logit_scale": head.logit_scale, "logit_softcap": head.logit_softcap}
            value, rest = at_the_head(rows, aux_loss, arguments)
            kept.append(rest)
            return value

        return through_head(inner, head_forward, hidden)

    # FSDP2 gathers what belongs to no layer of its own in the forward of the whole model.
    value = through(model, forward) if is_fsdp2(model) else forward()
    return value, kept[0]


def _with_router_loss(
    out: PreferenceOutput, aux_loss: Tensor | None, inner: PreTrainedModel, coef: float | None
) -> CausalLMOutput:
    """`out` with the loss of the router in its own."""
    if aux_loss is None:
        if coef:
            raise ValueError(
                f"router_aux_loss_coef is {coef}, but the model gives no router loss; for a mixture of experts, set "
                "model.config.output_router_logits = True."
            )
        return CausalLMOutput.of(out, None)
    weight = router_loss_coef(inner) if coef is None else coef
    return CausalLMOutput.of(out, aux_loss.detach(), loss=out.loss + weight * aux_loss.to(out.loss.device))


def _check_options(options: dict[str, Any]) -> None:
    for name in options:
        if name in _FROM_THE_MODEL:
            raise TypeError(
                f"{name} is read from the model and cannot be passed; call orpo_kernels.orpo_loss to set it."
            )
        if name in _FROM_THE_BATCH:
            raise TypeError(f"{name} is made from the batch (see prompt_nll); call orpo_kernels.orpo_loss to set it.")
        if name in ("vocab_group", "sequence_group") and options[name] is not None:
            raise ValueError(
                f"{name} is given, but the model has the whole head and the batch whole sequences; pass data_group, or "
                "call orpo_kernels.orpo_loss_from_rows with hidden states and a head of your own."
            )
