"""Whether a model's hidden states stay the same in rows that share their prompt (`packing.py`).

They do where layers mix tokens by attention alone, take a 4-D attention mask, and know places by `position_ids` alone.
What is known to rule that out is named; everything else is found out once for a model, on a few tokens: in evaluation
and in training mode, for forwards that others have replaced (Unsloth's) may treat masks differently in the two.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .body import MASKS, layer_kinds, run_body, unwrap, wants_router_loss
from .engines import is_in_parts
from .packing import IGNORE_INDEX, SIDES, Packing, pack_pairs
from .probe import training_without_noise, undisturbed
from .varlen import VARLEN
from .versions import body_of

# Lengths of prompt, chosen and rejected answer. They pack into two rows: one pair, then two pairs and a padding token.
PROBE_PAIRS = ((5, 8, 7), (4, 4, 3), (3, 3, 2))
PROBE_WINDOW = 3  # shorter than these sequences, so that a sliding window must show
# Of the mean over a segment of |shared - alone| / |alone|. SmolLM2-135M has 2e-6 in float32, 4e-3 in float16, 3e-2 in
# bfloat16, and 0.3 where positions are wrong. Float32 may be TF32 on a GPU, as coarse as float16.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2, torch.float16: 3e-2, torch.bfloat16: 8e-2}
_SKIPS_UNSEEN = ("flex_attention", VARLEN)  # attention that computes nothing that no token sees
_ALIBI = ("bloom", "mpt")
# Models whose pictures are tokens among others, found exact by `tests/test_images.py`.
_SHARES_IMAGES = (
    *("aria", "aya_vision", "cohere2_vision", "deepseek_vl", "exaone4_5", "got_ocr2", "idefics2", "idefics3"),
    *("internvl", "janus", "lighton_ocr", "llava", "llava_next", "llava_next_video", "llava_onevision", "mistral3"),
    *("qianfan_ocr", "smolvlm", "video_llama_3", "vipllava"),
)

_tried: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()


def refuses_shared_prompt(model: nn.Module, images: bool = False) -> str | None:
    """Why batches of `PreferenceCollator(packing="shared")` would not be exact for `model`; None where they are.

        packing = "padded" if refuses_shared_prompt(model) else "shared"

    Costs a few tokens through the body at the first call, and again where a forward of it has been replaced or gradient
    checkpointing switched since; leaves no trace. Raises `TypeError` or `ValueError` for a
    model that the loss does not serve at all.

    images: ask for batches with pictures. They are exact where a picture's tokens are tokens among others; what the
    tests have not found so is refused.
    """
    inner = unwrap(model)
    config = inner.config.get_text_config(decoder=True)
    obstacle = _known_obstacle(inner, config) or (_obstacle_of_images(inner, config) if images else None)
    if obstacle is None:
        state = _what_runs(inner, config)
        if model not in _tried or _tried[model][0] != state:
            with undisturbed(model), _short_window(config):
                _tried[model] = (state, _trial(inner, config))
        obstacle = _tried[model][1]
    return obstacle and f"{type(inner).__name__} cannot share prompts: {obstacle}."


def automatic_packing(model: nn.Module, device: torch.device, images: bool = False) -> tuple[Packing, str]:
    """What packing="auto" means for `model` on `device`, and why: shared prompts where they are exact and fast.

    images: whether the prompts may have pictures.

    On a CPU they save what the prompts cost. On an H100 masked attention by sdpa made them 1.7 to 2.2 times slower than
    padded rows, and FlexAttention a little faster (docs/gpu.md). Flash attention by variable lengths has not
    been timed.
    """
    if is_in_parts(model):
        return "padded", (
            "ZeRO-3 has the weights in parts until training begins, so nothing can be tried before; "
            'packing="shared" tries it in the first step'
        )
    if reason := refuses_shared_prompt(model, images):
        return "padded", reason
    attention = unwrap(model).config.get_text_config(decoder=True)._attn_implementation
    if device.type == "cpu":
        return "shared", "both answers share one pass over their prompt"
    if attention in _SKIPS_UNSEEN:
        return "shared", f"both answers share one pass over their prompt, by {attention}"
    return "padded", (
        f"on a GPU the mask of shared prompts makes {attention} slower than padding; load the model with "
        f'attn_implementation="flex_attention" or "{VARLEN}", or ask for packing="shared"'
    )


def _known_obstacle(inner: PreTrainedModel, config: PretrainedConfig) -> str | None:
    if inner.config.is_encoder_decoder:
        return "it is an encoder-decoder model, whose encoder runs once for both answers in any case"
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
    if "position_ids" not in inspect.signature(body_of(inner).forward).parameters:
        return "its body takes no position_ids"
    if attention not in MASKS:
        return (
            f"{attention} takes no 4-D attention mask (model.set_attn_implementation('sdpa') does; on a GPU "
            f"'{VARLEN}' runs flash attention without one)"
        )
    return None


def _obstacle_of_images(inner: PreTrainedModel, config: PretrainedConfig) -> str | None:
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    takes = inspect.signature(inner.forward).parameters
    if "mrope_section" in rope or hasattr(body_of(inner), "get_rope_index"):
        return "its rope has an axis each for time, height and width, and the places of pictures are made along the row"
    if types := [name for name in takes if name.endswith("token_type_ids")]:
        return f"the tokens of a picture see each other in both directions ({types[0]})"
    if inner.config.model_type not in _SHARES_IMAGES:
        return "it has not been tried with pictures"
    return None


def _what_runs(inner: PreTrainedModel, config: PretrainedConfig) -> tuple:
    """What the result of a trial depends on. Of code, weak references: it may refer to the model."""
    modules: list[nn.Module] = [body_of(inner)]
    for module in modules:  # as `modules()`, whose bookkeeping would take milliseconds in every call of the loss
        modules += filter(None, module._modules.values())
    classes: dict[Any, None] = dict.fromkeys(map(type, modules))
    code = [ALL_ATTENTION_FUNCTIONS.get(config._attn_implementation)]
    code += [code for cls in classes for code in (cls.forward, cls.__call__)]
    own = [vars(module) for module in modules]
    code += [here[name] for here in own for name in ("forward", "_gradient_checkpointing_func") if name in here]
    return (
        type(inner),
        inner.dtype,
        _runs_in(inner.dtype, inner.get_input_embeddings().weight.device),
        config._attn_implementation,
        getattr(config, "sliding_window", None),
        [_weak(one) for one in code if one is not None],
        [here.get("gradient_checkpointing") for here in own],
    )


def _weak(code: Callable[..., Any]) -> Any:
    try:
        return weakref.ref(code)
    except TypeError:  # a builtin
        return code


def _trial(inner: PreTrainedModel, config: PretrainedConfig) -> str | None:
    """Compare the hidden states of every sequence in a shared row with those of the sequence alone, in both modes."""
    pairs = [_pair(lengths, 20 * index, config.vocab_size) for index, lengths in enumerate(PROBE_PAIRS)]
    obstacle = _difference_in_a_shared_row(inner, pairs)
    if obstacle is not None:
        return obstacle
    with training_without_noise(inner):
        try:
            _hidden_alone(inner, pairs[:1])
        except torch.OutOfMemoryError:
            raise
        except Exception:
            return None  # it does not train at all (FlexAttention on a CPU), and says so itself
        obstacle = _difference_in_a_shared_row(inner, pairs)
    return obstacle and f"in training mode, {obstacle}"


def _hidden_alone(inner: PreTrainedModel, pairs: list[dict[str, list[int]]]) -> list[Tensor]:
    """Hidden states (T, H) of both sequences of every pair, each run by itself."""
    device = inner.get_input_embeddings().weight.device
    sequences = [torch.tensor([pair[f"{name}_input_ids"]], device=device) for pair in pairs for name in SIDES]
    return [run_body(inner, ids, None).hidden[0].detach() for ids in sequences]


def _difference_in_a_shared_row(inner: PreTrainedModel, pairs: list[dict[str, list[int]]]) -> str | None:
    device = inner.get_input_embeddings().weight.device
    batch = pack_pairs(pairs, padding_id=0, capacity=0)
    packed = batch["packed"].to(device)
    try:
        shared = run_body(inner, batch["input_ids"].to(device), None, packed).hidden.detach()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = str(error).partition("\n")[0]
        return f"its body fails on a 4-D attention mask with position_ids ({type(error).__name__}: {reason:.200})"
    for place, hidden in enumerate(_hidden_alone(inner, pairs)):
        index, side = divmod(place, len(SIDES))
        prompt, answer = hidden.split([PROBE_PAIRS[index][0], PROBE_PAIRS[index][1 + side]])
        for segment, expected in ((3 * index, prompt), (3 * index + 1 + side, answer)):
            difference = _difference(shared[packed.segments == segment], expected)
            tolerance = TOLERANCE[_runs_in(hidden.dtype, hidden.device)]
            if not difference <= tolerance:  # NaN is a difference, too
                return (
                    f"the hidden states of a {SIDES[side]} sequence differ by {difference:.2g} from those of the "
                    f"sequence alone (allowed: {tolerance:.0e})"
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


def _runs_in(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else dtype


@contextmanager
def _short_window(config: PretrainedConfig) -> Iterator[None]:
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
