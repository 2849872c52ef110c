"""Shared prompts by flash attention: sequences of different lengths instead of a mask.

    import orpo_kernels.transformers
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="orpo_varlen")

The queries are the rows as they lie, cut into [prompt chosen] and [rejected]; the keys are [prompt chosen] and [prompt
rejected], each aligned with its queries at the end (`packing.Sequences`). So every token sees its own sequence and
nothing else, and nothing that no token sees is computed. All other batches, and generation, take sdpa as if it had been
asked for.

The kernels are those of torch (a CUDA or ROCm GPU; bf16 and fp16; FlashAttention 3 where
`torch.nn.attention.activate_flash_attention_impl` has put it in their place). `torch.nn.attention.varlen`, which newer
versions of torch have, calls the same operator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .packing import Sequences

VARLEN = "orpo_varlen"  # its name among the attention implementations of transformers
_NOT_SERVED = {"softcap": "soft-cap", "s_aux": "attention sinks", "position_bias": "position bias"}


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    sequences: Sequences | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As transformers calls an attention: (R, heads, T, D) in, (R, T, heads, D) out. The mask is for sdpa alone.

    sequences: those of a packed batch, which the body hands on to its layers. Raises `ValueError`, naming it, for what
    flash attention cannot do.
    """
    if sequences is None:
        options |= {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window}
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **options)
    if torch.is_autocast_enabled(query.device.type):  # a norm of queries and keys may have brought them to float32
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    asked = [name for option, name in _NOT_SERVED.items() if options.get(option) is not None]
    if asked or dropout:
        raise ValueError(
            f"{VARLEN} serves no {' and no '.join(asked) or 'dropout of attention'}; use another attn_implementation "
            'or packing="padded".'
        )
    # The layer says that it has a window, the config how long it is.
    window = getattr(module.config, "sliding_window", None) if sliding_window else None
    # A key comes twice at most, so that the sum of its gradients does not depend on their order.
    key, value = (_flat(tensor).index_select(0, sequences.key_index) for tensor in (key, value))
    output = flash_attention(_flat(query), key, value, sequences, scaling, window)
    return output.unflatten(0, (query.shape[0], query.shape[2])), None


def flash_attention(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float | None, window: int | None
) -> Tensor:
    """Causal attention within each sequence: of queries (R T, heads, D), keys and values (K, heads of keys, D)."""
    if query.device.type != "cuda" or query.dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(
            f"{VARLEN} runs flash attention, on a GPU in bf16 or fp16, but here is {query.dtype} on a "
            f"{query.device.type}; use autocast or another attn_implementation."
        )
    return torch.ops.aten._flash_attention_forward(
        query,
        key,
        value,
        sequences.cu_seqlens_q,
        sequences.cu_seqlens_k,
        sequences.max_seqlen_q,
        sequences.max_seqlen_k,
        0.0,  # dropout
        True,  # causal, the last query seeing the last key
        False,
        scale=scale,
        window_size_left=None if window is None else window - 1,
    )[0]


def _flat(tensor: Tensor) -> Tensor:
    """(R, heads, T, D) as (R T, heads, D)."""
    return tensor.transpose(1, 2).flatten(0, 1)


AttentionInterface.register(VARLEN, varlen_attention)
AttentionMaskInterface.register(VARLEN, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
