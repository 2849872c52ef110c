"""Encoder-decoder models (T5, BART, ...): the encoder runs once over a prompt, for both answers of its pair.

Such a model reads the prompt in its encoder and the answer in its decoder. The decoder's hidden state at position t
predicts label t, because what it reads is shifted (a causal model's labels are shifted instead). Answers are not packed
behind a shared prompt: the encoder reads each prompt once anyway.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .versions import scaled_when_tied

_PREPARE = "prepare_decoder_input_ids_from_labels"
IGNORED = -100  # the label that the models' own shift knows


def check_encoder_decoder(model: PreTrainedModel) -> None:
    """Raise `ValueError` for a model that does not read text by an encoder and write it by a decoder."""
    name, encoder, decoder = type(model).__name__, model.get_encoder(), model.get_decoder()
    if encoder is model or decoder is model or encoder is None or decoder is None:
        raise ValueError(f"{name} is an encoder-decoder model without an encoder and a decoder of its own to call.")
    if model.get_output_embeddings() is None:
        raise ValueError(
            f"{name} has no body apart from its head; load the class that ends in ForConditionalGeneration."
        )
    needs = {
        "encoder": (encoder, ("input_ids", "attention_mask")),
        "decoder": (decoder, ("input_ids", "encoder_hidden_states", "encoder_attention_mask")),
    }
    for part, (module, arguments) in needs.items():
        taken = inspect.signature(module.forward).parameters
        if missing := [argument for argument in arguments if argument not in taken]:
            raise ValueError(
                f"{name} is an encoder-decoder model whose {part} takes no {missing[0]}; the loss serves those that "
                "read text and write text."
            )


def decoder_hidden_states(
    model: PreTrainedModel, input_ids: Tensor, attention_mask: Tensor | None, decoder_input_ids: Tensor
) -> Tensor:
    """(rows, T, H): the decoder's last hidden states, of k B rows that read B prompts, those of prompt i at i + j B.

    Encoder and decoder are called as the model's own forward calls them.
    """
    prompts, rows = len(input_ids), len(decoder_input_ids)
    if prompts == 0 or rows % prompts:
        raise ValueError(
            f"input_ids has {prompts} prompts and decoder_input_ids {rows} answers; a batch has B prompts, B chosen "
            "answers, then B rejected ones."
        )
    encoder, decoder = model.get_encoder(), model.get_decoder()
    prompt = encoder(input_ids=input_ids, attention_mask=attention_mask)[0]
    output = decoder(
        input_ids=decoder_input_ids,
        encoder_hidden_states=prompt.repeat(rows // prompts, 1, 1),
        encoder_attention_mask=None if attention_mask is None else attention_mask.repeat(rows // prompts, 1),
        use_cache=False,
    )
    return output[0]


def probe_inputs(model: PreTrainedModel, tokens: Tensor) -> dict[str, Tensor]:
    """What the model's forward takes beside `tokens` (1, T) as its input_ids, for a check of the whole of it."""
    if not model.config.is_encoder_decoder:
        return {}
    mask = torch.ones_like(tokens)
    mask[:, 1:][:, -1:] = 0  # padding, if there is more than one token: it has to reach both
    return {"attention_mask": mask, "decoder_input_ids": tokens}


# --- what the decoder reads ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ShiftRight:
    """What a model's decoder reads to predict labels: `prepare_decoder_input_ids_from_labels`, without its weights.

    T5, BART and most others put the start token in front and leave out the last label; mBART puts the last one (the
    language) in front. Small enough to go to the processes of a data loader.
    """

    model_class: Any  # of a PreTrainedModel
    config: PretrainedConfig

    @classmethod
    def of(cls, model: nn.Module) -> ShiftRight:
        """`model`: a `transformers` model or a `peft` model around one. Raises `ValueError` if it has no such thing."""
        base: Any = getattr(model, "get_base_model", None)  # of `peft`
        inner: Any = model if base is None else base()
        if not hasattr(inner, _PREPARE) and _shift_of_the_module(type(inner)) is None:
            raise ValueError(
                f"{type(inner).__name__} does not say what its decoder reads ({_PREPARE}); give "
                "decoder_input_ids in the batch."
            )
        return cls(type(inner), inner.config)

    def __call__(self, labels: Tensor, ignore_index: int = IGNORED) -> Tensor:
        """(rows, T) int64 labels to decoder_input_ids of that shape."""
        labels = labels.masked_fill(labels == ignore_index, IGNORED)
        if not hasattr(self.model_class, _PREPARE):
            return _shift_of_the_module(self.model_class)(
                labels, self.config.pad_token_id, self.config.decoder_start_token_id
            )
        bare: Any = self.model_class.__new__(self.model_class)
        nn.Module.__init__(bare)
        bare.config = self.config
        return getattr(bare, _PREPARE)(labels=labels)


def _shift_of_the_module(model_class: type) -> Any:
    """The function by which the forward of M2M100's and Blenderbot's kind makes what its decoder reads; or None."""
    function = getattr(sys.modules[model_class.__module__], "shift_tokens_right", None)
    return function if function is not None and len(inspect.signature(function).parameters) == 3 else None


def decoder_inputs(
    model: PreTrainedModel, labels: Tensor | None, decoder_input_ids: Tensor | None, ignore_index: int = IGNORED
) -> Tensor | None:
    """What the decoder of a batch reads: as given, or made of the labels; None for a decoder-only model.

    Raises `TypeError` where a decoder-only model is given any, or an encoder-decoder model can be given none.
    """
    name = type(model).__name__
    if not model.config.is_encoder_decoder:
        if decoder_input_ids is not None:
            raise TypeError(f"{name} has a decoder alone, whose tokens are input_ids; leave decoder_input_ids out.")
        return None
    if decoder_input_ids is not None:
        return decoder_input_ids
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} is an encoder-decoder model: a batch has labels, or rows and decoder_input_ids.")
    return ShiftRight.of(model)(labels, ignore_index)


# --- the head ------------------------------------------------------------------------------------------------------


def width_scale(model: PreTrainedModel) -> float:
    """What T5's kind multiplies the hidden states by, in front of a head that is tied to the embeddings."""
    config = model.config
    scales = getattr(config, "scale_decoder_outputs", None)  # T5 and LongT5
    if scales is None:
        scales = config.model_type in scaled_when_tied() and config.tie_word_embeddings
    return float(config.d_model**-0.5) if scales else 1.0


def logits_bias(model: PreTrainedModel, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """(V,) of `dtype`: the head's own bias with the buffer that BART's kind adds to its logits, (1, V)."""
    buffer: Any = getattr(model, "final_logits_bias", None)
    if buffer is None:
        return bias
    buffer = buffer[0].to(dtype)
    return buffer if bias is None else bias + buffer
