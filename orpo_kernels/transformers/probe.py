"""Checks once per model that body and head, taken apart, give the model's own logits.

Reading the config finds every transform we know. A model may do more: another layer between body and head, a mask over
the vocabulary, a transform under a new name, an adapter in its forward. So the first call runs the model's own forward
on a few tokens and compares. Its small cost is paid again only when the head or its transform changes.
"""

from __future__ import annotations

import inspect
import math
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import PreTrainedModel

from .body import run_body, wants_router_loss
from .encoder_decoder import probe_inputs
from .engines import is_fsdp2
from .lm_head import LMHead, match_dtype, through_head

PROBE_TOKENS = 8
# Both sides compute the same products in the same dtype. They differ by the roundings of the transform, which a model
# may do in low precision, and by how a GPU rounds float32 products (TF32). Relative to the largest logit.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
_OF_TEXT = ("input_ids", "attention_mask", "decoder_input_ids")
_LARGE_LOGIT = 64.0  # beyond every soft-cap in use

_verified: weakref.WeakKeyDictionary[nn.Module, list[tuple]] = weakref.WeakKeyDictionary()


def verify_lm_head(
    model: nn.Module,
    inner: PreTrainedModel,
    head: LMHead,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    media: Mapping[str, Tensor] = MappingProxyType({}),
) -> None:
    """Compare on the first tokens of `input_ids`, unless this model has passed with this head before.

    With `media` (pictures, which belong to whole rows) on all of the batch, the logits of its last places.

    `inner` is `unwrap(model)`. Raises `ValueError`, naming the class, when the logits or the router loss differ.
    """
    state = (
        type(inner),
        weakref.ref(head.linear),
        head.weight.dtype,
        head.logit_scale,
        head.logit_softcap,
        tuple(adapter.identity for adapter in head.adapters),
        wants_router_loss(inner),
        tuple(sorted(media)),
    )
    verified = _verified.setdefault(model, [])
    if state in verified:
        return
    inputs = {"input_ids": input_ids[:1, :PROBE_TOKENS]}
    if media:
        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        inputs = {"input_ids": input_ids, **mask, **media}
    with undisturbed(model):
        _compare(model, inner, head, inputs)
    verified[:] = [other for other in verified if other[:-1] == state[:-1]] + [state]


def _compare(model: nn.Module, inner: PreTrainedModel, head: LMHead, inputs: dict[str, Tensor]) -> None:
    inputs = {**probe_inputs(inner, inputs["input_ids"]), **inputs}
    media = {name: value for name, value in inputs.items() if name not in _OF_TEXT}
    mask, decoder_input_ids = inputs.get("attention_mask"), inputs.get("decoder_input_ids")
    hidden, aux_loss = run_body(inner, inputs["input_ids"], mask, None, decoder_input_ids, media)
    last: dict[str, Any] = {}
    if media and "logits_to_keep" in inspect.signature(inner.forward).parameters:
        last["logits_to_keep"] = PROBE_TOKENS
        hidden = hidden[:, -PROBE_TOKENS:]
    size = getattr(head.weight, "ds_shape", head.weight.shape)[1]  # of a parameter that ZeRO-3 has put away, its own
    if hidden.shape[-1] != size:
        raise _refusal(inner, head, f"the body gives {hidden.shape[-1]} features, the head takes {size}")

    gain = _gain(through_head(inner, LMHead.logits, hidden))
    ours = through_head(inner, LMHead.logits, hidden * gain)
    amplifier = inner.get_output_embeddings().register_forward_pre_hook(lambda _, args: (args[0] * gain, *args[1:]))
    try:
        # Under FSDP2 this is inside the forward of the root already, which is not to be entered twice.
        call = model.forward if is_fsdp2(model) else model
        output = call(**inputs, **last, use_cache=False, return_dict=True)
    except RuntimeError as error:
        if hidden.dtype == head.weight.dtype:
            raise
        raise TypeError(
            f"The body of {type(inner).__name__} gives {hidden.dtype}, its lm head is {head.weight.dtype}, and "
            "the model's own forward fails on that; give both one dtype, or use autocast."
        ) from error
    finally:
        amplifier.remove()
    theirs = output.logits
    if not bool(ours.isfinite().all()):
        raise ValueError(_not_finite(inner, hidden))
    if ours.shape != theirs.shape:
        raise _refusal(inner, head, f"its logits have shape {tuple(theirs.shape)}, ours {tuple(ours.shape)}")
    difference = float((ours - theirs).abs().max() / theirs.abs().max())
    product = through_head(
        inner, lambda head, some: F.linear(match_dtype(some, head.weight), head.weight), hidden[:, :1]
    )
    tolerance = _TOLERANCE[product.dtype]
    if not difference <= tolerance:  # NaN is a difference, too
        raise _refusal(inner, head, f"its logits differ by {difference:.2g} of the largest (allowed: {tolerance:.0e})")
    if aux_loss is not None and not torch.isclose(aux_loss, output.aux_loss, rtol=tolerance):
        raise _refusal(inner, head, f"its router loss is {float(output.aux_loss):.6g}, ours {float(aux_loss):.6g}")


def _gain(logits: Tensor) -> float:
    """A power of two that makes the logits so large that a soft-cap we do not know of must show."""
    largest = float(logits.abs().max())
    if not 0 < largest < _LARGE_LOGIT:
        return 1.0
    return 2.0 ** min(10, math.ceil(math.log2(_LARGE_LOGIT / largest)))


def _not_finite(inner: PreTrainedModel, hidden: Tensor) -> str:
    """What is told of a model whose own numbers are at fault, not the way they are computed."""
    weights = [name for name, weight in inner.named_parameters() if not bool(weight.isfinite().all())]
    where = f"its weight {weights[0]} has NaN or infinite values" if weights else f"{hidden.dtype} overflows in it"
    more = f" (and so have {len(weights) - 1} others)" if len(weights) > 1 else ""
    return (
        f"The logits of this {type(inner).__name__} are not finite: {where}{more}. Take a checkpoint from before it "
        "diverged, or a wider dtype."
    )


def _refusal(inner: PreTrainedModel, head: LMHead, finding: str) -> ValueError:
    name = type(inner).__name__
    formula = "W h" if head.bias is None else "(W h + b)"
    formula = formula if head.logit_scale == 1.0 else f"{head.logit_scale:g} * {formula}"
    softcap = "" if head.logit_softcap is None else f" with soft-cap {head.logit_softcap:g}"
    wrapped = " Its forward was replaced: if by one with autocast (Accelerate), call the loss inside that autocast."
    return ValueError(
        f"{name} is not supported. The loss computes its logits as {formula}{softcap} from the body's last hidden "
        f"states, and the model does more: {finding}.{wrapped if 'forward' in vars(inner) else ''}"
    )


@contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Afterwards the modes of all modules and the RNG are what they were."""
    modes = {module: module.training for module in model.modules()}
    device = next(model.parameters()).device
    devices = [device] if device.type != "cpu" else []
    with torch.random.fork_rng(devices, device_type=device.type if devices else "cuda"):
        try:
            yield
        finally:
            for module, mode in modes.items():
                module.training = mode


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, without gradient, eager. Nothing has changed afterwards: not the mode, not the RNG."""
    with as_before(model), torch.compiler.set_stance("force_eager"), torch.no_grad():
        for module in model.modules():
            module.training = False
        try:
            yield
        finally:
            # What autocast has cast without gradient it would reuse in the training forward, which then had none.
            torch.clear_autocast_cache()


@contextmanager
def training_without_noise(model: nn.Module) -> Iterator[None]:
    """Inside `undisturbed`, to its end: as in training, with gradients, but what is random there gives its mean.

    Norms over the batch, which would learn from what they see, stay in evaluation mode.
    """
    for module in model.modules():
        module.training = not isinstance(module, nn.modules.batchnorm._NormBase)
    with torch.enable_grad(), _Means():
        yield


class _Means(TorchFunctionMode):
    """Dropout drops nothing, and a random number is the mean of its distribution (NEFTune, a router's jitter, ...)."""

    def __torch_function__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs, name = dict(kwargs or {}), getattr(function, "__name__", "")
        if name == "scaled_dot_product_attention":
            args, kwargs = args[:4] + args[5:], {**kwargs, "dropout_p": 0.0}  # whose place is the fifth
        elif name.rstrip("_") in ("dropout", "alpha_dropout", "feature_dropout", "dropout1d", "dropout2d", "dropout3d"):
            return args[0] if args else kwargs["input"]
        result = function(*args, **kwargs)
        if name in ("rand", "rand_like", "randn", "randn_like"):
            return result.fill_(0.0 if "randn" in name else 0.5)
        if name == "uniform_":
            low, high = _given(args[1:], kwargs, {"from": 0.0, "to": 1.0})
            return result.fill_((low + high) / 2)
        if name == "normal_":
            return result.fill_(_given(args[1:], kwargs, {"mean": 0.0})[0])
        return result


def _given(args: tuple, kwargs: dict[str, Any], defaults: dict[str, float]) -> list[float]:
    """The values of the first parameters of a call."""
    return [args[i] if i < len(args) else kwargs.get(name, defaults[name]) for i, name in enumerate(defaults)]
