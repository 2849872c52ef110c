"""The published variants of ORPO, as rows. They differ only in which rows are scored and which carry NLL weight.

Every builder but `liger` takes one padded, unshifted batch, as a collator makes it:

    input_ids       (2B, T) int64, the B chosen sequences (prompt + response) first, then the rejected ones
    attention_mask  (2B, T), 1 on tokens and 0 on padding
    labels          (2B, T) int64, the response's token ids, `ignore_index` on prompt and padding

and gives `Rows` for `orpo_loss_from_rows`. The weight of the odds ratio is the caller's `beta`: 0.1 in the paper's
main runs, TRL, Liger and LLaMA-Factory; 1.0 is the default of the authors' repository.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import Rows, rows_from_labels


def paper(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Rows:
    """Response only for both terms; the NLL is a mean per sequence, then over pairs (arXiv 2403.07691, eq. 6 and 7)."""
    return rows_from_labels(labels, shift=True, ignore_index=ignore_index, nll_reduction="sequence")


llama_factory = paper  # `compute_preference_loss` takes -chosen_logps, length-averaged, as its SFT loss: the same rows


def trl(input_ids: Tensor, attention_mask: Tensor, labels: Tensor, *, ignore_index: int = -100) -> Rows:
    """TRL 1.16 `ORPOTrainer`: the NLL runs over prompt and response, as a mean over the tokens of the batch."""
    pairs = labels.shape[0] // 2
    prompt_and_response = torch.where(attention_mask[:pairs] == 1, input_ids[:pairs], ignore_index)
    return rows_from_labels(labels, prompt_and_response, shift=True, ignore_index=ignore_index)


def liger(target: Tensor, nll_target: Tensor | None = None, *, ignore_index: int = -100) -> Rows:
    """Liger 0.8.5 `LigerFusedLinearORPOLoss`: targets already aligned with the hidden states.

    `target` is (2B, T). `nll_target` is (B, T) or, as Liger asks, (2B, T) of which the chosen half is used.
    """
    if nll_target is not None and nll_target.shape[0] == target.shape[0]:
        nll_target = nll_target[: target.shape[0] // 2]
    return rows_from_labels(target, nll_target, ignore_index=ignore_index)


def xfactlab(
    input_ids: Tensor,
    attention_mask: Tensor,
    labels: Tensor,
    *,
    pad_token_id: int,
    prompt_nll: bool = True,
    ignore_index: int = -100,
) -> Rows:
    """The authors' repository (xfactlab/orpo, `src/orpo_trainer.py`), its off-by-one and its missing EOS included.

    Its response mask ends one position late, so that a padded sequence also scores its first pad token; and its NLL
    leaves out every token equal to `pad_token_id`, which is the EOS there. Right padding only.
    """
    pairs, length = labels.shape[0] // 2, labels.shape[1]
    column = torch.arange(length, device=labels.device)
    tokens = attention_mask.sum(1, keepdim=True)
    response = (labels != ignore_index).sum(1, keepdim=True)
    scored = (column >= tokens - response) & (column <= tokens)
    wants_nll = (attention_mask[:pairs] == 1) & (input_ids[:pairs] != pad_token_id)
    if not prompt_nll:
        wants_nll &= labels[:pairs] != ignore_index
    return rows_from_labels(
        torch.where(scored, input_ids, ignore_index),
        torch.where(wants_nll, input_ids[:pairs], ignore_index),
        shift=True,
        ignore_index=ignore_index,
    )
