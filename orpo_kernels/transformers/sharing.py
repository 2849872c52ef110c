"""Whether a model's hidden states stay the same in rows that share their prompt (`packing.py`).

They do where layers mix tokens by attention alone, take a 4-D attention mask, and know places by `position_ids` alone.
What is known to rule that out is named; everything else is found out once for a model, on a few tokens.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .body import MASKS, layer_kinds, run_body, unwrap, wants_router_loss
from .packing import IGNORE_INDEX, SIDES, pack_pairs
from .probe import undisturbed

# Lengths of prompt, chosen and rejected answer. They pack into two rows: one pair, then two pairs and a padding token.
PROBE_PAIRS = ((5, 8, 7), (4, 4, 3), (3, 3, 2))
PROBE_WINDOW = 3  # shorter than these sequences, so that a sliding window must show
# Of the mean over a segment of |shared - alone| / |alone|. SmolLM2-135M has 2e-6 in float32, 4e-3 in float16, 3e-2 in
# bfloat16, and 0.3 where positions are wrong. Float32 may be TF32 on a GPU, as coarse as float16.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 8e-2}
_ALIBI = ("bloom", "mpt")

_tried: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


def refuses_shared_prompt(model: nn.Module) -> str | None:
    """Why batches of `PreferenceCollator(packing="shared")` would not be exact for `model`; None where they are.

        packing = "padded" if refuses_shared_prompt(model) else "shared"

    Costs a few tokens through the body at the first call, and leaves no trace. Raises `TypeError` or `ValueError` for a
    model that the loss does not serve at all.
    """
    inner = unwrap(model)
    config = inner.config.get_text_config(decoder=True)
    obstacle = _known_obstacle(inner, config)
    if obstacle is None:
        state = (type(inner), inner.dtype, config._attn_implementation, getattr(config, "sliding_window", None))
        if model not in _tried or _tried[model][0] != state:
            with undisturbed(model), _short_window(config):
                _tried[model] = (state, _trial(inner, config))
        obstacle = _tried[model][1]
    return obstacle and f"{type(inner).__name__} cannot share prompts: {obstacle}."


def _known_obstacle(inner: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    attention, kinds = config._attn_implementation, layer_kinds(config)
    if wants_router_loss(inner):
        return "its router loss (config.output_router_logits=True) counts the tokens of a prompt for both answers"
    if getattr(config, "alibi", False) or config.model_type in _ALIBI:
        return "its ALiBi measures distances along the row, not by position_ids"
    if "local" in getattr(config, "attention_layers", ()):  # GPT-Neo
        return "the window of its local attention runs along the row, not by position_ids"
    if getattr(config, "keep_window_size", None):  # Doge
        return "its attention chooses among the keys of the row"
    if strange := [kind for kind in kinds if kind not in ("full_attention", "sliding_attention")]:
        return f"it has layers of the kind {strange[0]}"
    if "position_ids" not in inspect.signature(inner.base_model.forward).parameters:
        return "its body takes no position_ids"
    if attention not in MASKS:
        return f"{attention} takes no 4-D attention mask (model.set_attn_implementation('sdpa') does)"
    return None


def _trial(inner: PreTrainedModel, config: PreTrainedConfig) -> str | None:
    """Compare the hidden states of every sequence in a shared row with those of the sequence alone."""
    device = inner.get_input_embeddings().weight.device
    pairs = [_pair(lengths, 20 * index, config.vocab_size) for index, lengths in enumerate(PROBE_PAIRS)]
    batch = pack_pairs(pairs, padding_id=0, capacity=0)
    packed = batch["packed"].to(device)
    try:
        shared = run_body(inner, batch["input_ids"].to(device), None, packed).hidden
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return f"its body fails on a 4-D attention mask with position_ids ({type(error).__name__}: {reason:.200})"
    for index, pair in enumerate(pairs):
        for side, name in enumerate(SIDES):
            ids = torch.tensor([pair[f"{name}_input_ids"]], device=device)
            alone = run_body(inner, ids, None).hidden[0]
            prompt, answer = alone.split([PROBE_PAIRS[index][0], PROBE_PAIRS[index][1 + side]])
            for segment, expected in ((3 * index, prompt), (3 * index + 1 + side, answer)):
                difference = _difference(shared[packed.segments == segment], expected)
                if not difference <= _tolerance(alone):  # NaN is a difference, too
                    return (
                        f"the hidden states of a {name} sequence differ by {difference:.2g} from those of the "
                        f"sequence alone (allowed: {_tolerance(alone):.0e})"
                    )
    return None


def _pair(lengths: tuple[int, int, int], start: int, vocab_size: int) -> dict[str, list[int]]:
    """A pair of tokens from all over the vocabulary."""
    prompt, chosen, rejected = torch.arange(start, start + sum(lengths)).mul(max(1, vocab_size // 60)).split(lengths)
    pair = {}
    for name, answer in zip(SIDES, (chosen, rejected), strict=True):
        ids = ((torch.cat((prompt, answer)) + 4) % vocab_size).tolist()
        pair[f"{name}_input_ids"] = ids
        pair[f"{name}_labels"] = [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]
    return pair


def _difference(shared: Tensor, alone: Tensor) -> float:
    """The mean over tokens of the distance, relative to the norm."""
    shared, alone = shared.float(), alone.float()
    return float(((shared - alone).norm(dim=-1) / alone.norm(dim=-1)).mean())


def _tolerance(hidden: Tensor) -> float:
    device = hidden.device.type
    return TOLERANCE[torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype]


@contextmanager
def _short_window(config: PreTrainedConfig) -> Iterator[None]:
    """A sliding window so short that it must show. Models read it from the config when they make their masks."""
    window = getattr(config, "sliding_window", None)
    if not window:
        yield
        return
    config.sliding_window = min(window, PROBE_WINDOW)
    try:
        yield
    finally:
        config.sliding_window = window
