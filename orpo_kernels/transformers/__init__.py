"""ORPO for any Hugging Face language model: from text to the loss, without logits.

    collator = PreferenceCollator(tokenizer, max_length=1024)
    batch = collator(pairs)                              # prompt, chosen, rejected: text or chat messages
    out = causal_lm_orpo_loss(model, **batch, beta=0.1)  # out.loss.backward()

Needs `transformers` (`pip install orpo_kernels[transformers]`); `import orpo_kernels` alone does not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .batches import RowsCollator, batch_rows
from .causal_lm import (
    CausalLMORPOOutput,
    CausalLMOutput,
    CausalLMPreferenceOutput,
    causal_lm_answers,
    causal_lm_orpo_loss,
    causal_lm_preference_loss,
)
from .collator import PreferenceCollator
from .encoder_decoder import ShiftRight
from .encoder_decoder_collator import EncoderDecoderCollator
from .lm_head import LMHead, resolve_lm_head
from .media import freeze_vision
from .packing import PackedPairs
from .rendering import UnusablePair
from .sharing import refuses_shared_prompt
from .tokenization import Refusal, TokenizedPair, tokenize_pair, tokenize_pairs

if TYPE_CHECKING:
    from .trainer import ORPOTrainer, PreferenceTrainer

__all__ = [
    "CausalLMORPOOutput",
    "CausalLMOutput",
    "CausalLMPreferenceOutput",
    "EncoderDecoderCollator",
    "LMHead",
    "ORPOTrainer",
    "PackedPairs",
    "PreferenceCollator",
    "PreferenceTrainer",
    "Refusal",
    "RowsCollator",
    "ShiftRight",
    "TokenizedPair",
    "UnusablePair",
    "batch_rows",
    "causal_lm_answers",
    "causal_lm_orpo_loss",
    "causal_lm_preference_loss",
    "freeze_vision",
    "refuses_shared_prompt",
    "resolve_lm_head",
    "tokenize_pair",
    "tokenize_pairs",
]


def __getattr__(name: str) -> Any:
    """The trainers, when they are asked for: they need `accelerate` and `datasets`, which the loss does not."""
    if name not in ("ORPOTrainer", "PreferenceTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import trainer

    return getattr(trainer, name)
