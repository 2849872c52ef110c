"""The lm head of a Hugging Face model as the numbers the loss needs: logits = cap(scale * (W h + b)).

The loss multiplies by the head's weight itself and never calls the head. Whatever a head does beyond a matrix product
and the transform above would be bypassed. So a head that is anything but a plain `nn.Linear`, or plain LoRA or trained
tokens around one, is refused here by its class, and `probe.py` checks the rest once against the model's own logits.

**LoRA on the head** adds s * B A dropout(h) to W h. That is one product of longer vectors,

    [W, B] @ [h, s * A dropout(h)]        (V, H + r) @ (H + r)

which is exact with dropout too. (The merged weight W + s * B A rounds small steps of B A away in 16 bits.) W is copied
for it, V * (H + r) elements from the forward to the backward pass; but the gradient of the frozen W is not made, only
that of B, (V, r), and of the longer hidden states, through which A gets its own.

**Trained tokens** (`peft`'s trainable_token_indices, on a head that is tied to the embeddings) put rows D of their own
in the place of k rows of W, which is a product of that form, too: [W, E] @ [h, (D - W_k) h], where E (V, k) has a 1 in
the row of each token.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from .body import unwrap
from .encoder_decoder import logits_bias, width_scale
from .engines import class_of, hooks_of_engine, through

# The config fields by which the models of transformers 5.23 transform their logits, found by reading every
# `logits = self.lm_head(...)` there. A field that is missing or None does nothing.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon-H1; Muse
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM3; Inkling
# Gemma 2 to 4; RecurrentGemma; xLSTM
_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
_LEAVES_OUT = ("aya_vision", "cohere2_vision")  # the logit_scale of their text model, in their own forward
_MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # the same field as Granite, the other way round


@dataclass(frozen=True, eq=False)
class LoRA:
    """One adapter of the head, as `peft` holds it: adds scaling * up(down(dropout(h)))."""

    down: nn.Linear  # A, (r, H)
    up: nn.Linear  # B, (V, r), and perhaps a bias
    dropout: nn.Module
    scaling: float

    def features(self, hidden: Tensor) -> Tensor:
        """(..., r): what the hidden states (..., H) are continued with."""
        return self.scaling * self.down(self.dropout(match_dtype(hidden, self.down.weight)))

    def mean_features(self, hidden: Tensor) -> Tensor:
        """The same in fp32, without dropout."""
        return self.scaling * (hidden @ self.down.weight.float().t())

    @property
    def columns(self) -> Tensor:
        """(V, r): what the weight is continued with."""
        return self.up.weight

    @property
    def bias(self) -> Tensor | None:
        return None if self.up.bias is None else self.scaling * self.up.bias

    @property
    def identity(self) -> tuple:
        return weakref.ref(self.up), self.scaling


@dataclass(frozen=True, eq=False)
class TrainedTokens:
    """Rows of a tied head that `peft` trains in place of the weight's own."""

    weight: Tensor  # of the head, (V, H)
    indices: tuple[int, ...]  # of the k rows
    rows: Tensor  # (k, H)

    bias = None

    def features(self, hidden: Tensor) -> Tensor:
        own = self.weight[list(self.indices)]
        difference = self.rows.to(torch.promote_types(own.dtype, torch.float32)) - own
        return match_dtype(hidden, own) @ difference.to(own.dtype).t()

    def mean_features(self, hidden: Tensor) -> Tensor:
        return hidden @ (self.rows.float() - self.weight[list(self.indices)].float()).t()

    @property
    def columns(self) -> Tensor:
        place = torch.tensor(self.indices, device=self.weight.device)
        ones = self.weight.new_zeros(self.weight.shape[0], len(self.indices))
        return ones.scatter_(0, place[None], 1.0)

    @property
    def identity(self) -> tuple:
        return weakref.ref(self.rows), self.indices


class Operands(NamedTuple):
    """What the loss multiplies: [weight, low_rank] @ hidden + bias.

    hidden (..., H + r), weight (V, H), bias (V) or None, low_rank (V, r) or None; r is 0 without LoRA.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low_rank: Tensor | None


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = cap(logit_scale * (weight @ h + bias)), where cap(z) = logit_softcap * tanh(z / logit_softcap), or z.

    `linear` is the head out of `peft`'s wrappers, its `weight` (V, H) and the `bias` (V) the model's own parameters,
    tied to the embeddings or not; `lora` and `tokens` are the adapters that are active on them.
    """

    linear: nn.Linear
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None
    lora: tuple[LoRA, ...] = ()
    tokens: tuple[TrainedTokens, ...] = ()

    @property
    def weight(self) -> Tensor:
        return self.linear.weight

    @property
    def adapters(self) -> tuple[LoRA | TrainedTokens, ...]:
        return *self.lora, *self.tokens

    def operands(self, hidden: Tensor) -> Operands:
        """Hidden states (..., H) and head as one product, adapters included."""
        hidden, weight, bias = match_dtype(hidden, self.weight), self.weight, self.bias
        if not self.adapters:
            return Operands(hidden, weight, bias, None)
        for adapter in self.adapters:
            if adapter.bias is not None:
                shift = adapter.bias.to(weight.dtype)
                bias = shift if bias is None else bias + shift
        features = [adapter.features(hidden).to(hidden.dtype) for adapter in self.adapters]
        columns = torch.cat([adapter.columns for adapter in self.adapters], dim=1)
        return Operands(torch.cat([hidden, *features], dim=-1), weight, bias, columns)

    def mean_logits(self, hidden: Tensor) -> Tensor:
        """(...) fp32: the mean over the vocabulary of the logits of hidden states (..., H), without making them.

        A plain head is linear, so the mean passes through it; dropout in front of an adapter is left out. NaN with a
        soft-cap, where it does not pass.
        """
        hidden = hidden.float()
        if self.logit_softcap is not None:
            return torch.full_like(hidden[..., 0], torch.nan)
        logits = hidden @ _mean_row(self.weight)
        for adapter in self.adapters:
            logits = logits + adapter.mean_features(hidden) @ _mean_row(adapter.columns)
        biases = [self.bias, *(adapter.bias for adapter in self.adapters)]
        shift = sum(bias.float().mean() for bias in biases if bias is not None)
        return self.logit_scale * (logits + shift)

    def logits(self, hidden: Tensor) -> Tensor:
        """The plain computation, for the probe: as the model does it up to the product, then in at least float32."""
        hidden, weight, bias, low_rank = self.operands(hidden)
        if low_rank is not None:
            weight = torch.cat((weight, low_rank.to(weight.dtype)), dim=1)
        logits = nn.functional.linear(hidden, weight, bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        return logits if self.logit_softcap is None else self.logit_softcap * torch.tanh(logits / self.logit_softcap)


def _mean_row(weight: Tensor) -> Tensor:
    """(H,) fp32; of a DTensor, over the rows of all ranks."""
    mean: Any = weight.mean(0, dtype=torch.float32)
    return mean.full_tensor() if hasattr(mean, "device_mesh") else mean


def match_dtype(hidden: Tensor, weight: Tensor) -> Tensor:
    """Hidden states in the weight's dtype. Autocast does that itself, and a model that does not fails in the probe."""
    return hidden if torch.is_autocast_enabled(hidden.device.type) else hidden.to(weight.dtype)


def resolve_lm_head(model: nn.Module) -> LMHead:
    """Weight, bias, scale, soft-cap and adapters of `model`'s head: a `PreTrainedModel`, or a `peft` model around one.

    Raises `TypeError` for a head that is not exactly an `nn.Linear` with ordinary floating-point parameters, or LoRA or
    trained tokens around one (DoRA and other variants, quantized, parametrized, sharded, offloaded), and `ValueError`
    for one that is changed by hooks.
    """
    inner = unwrap(model)
    head = inner.get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(inner).__name__} has no output embeddings (get_output_embeddings() is None).")
    lora: tuple[LoRA, ...] = ()
    tokens: tuple[TrainedTokens, ...] = ()
    if type(head).__name__ == "ModulesToSaveWrapper":
        adapters = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[adapters[0]] if adapters else head.original_module
    elif _class_name(head) == "peft.tuners.lora.layer.Linear":
        head, lora = head.base_layer, _active_lora(head)
    if _class_name(head) == "peft.utils.other.TrainableTokensWrapper":
        head, tokens = head.original_module, _active_tokens(head)
    _check_module(head)
    scale, softcap = logit_transform(inner.config.get_text_config(decoder=True))
    scale = 1.0 if inner.config.model_type in _LEAVES_OUT else scale
    bias: Tensor | None = head.bias
    if inner.config.is_encoder_decoder:
        scale, bias = scale * width_scale(inner), logits_bias(inner, bias, head.weight.dtype)
    return LMHead(head, bias, scale, softcap, lora, tokens)


def through_head(model: PreTrainedModel, function: Callable[[LMHead, Tensor], Tensor], hidden: Tensor) -> Tensor:
    """`function(head, hidden)` where the head's parameters are whole: inside the forwards of their modules.

    FSDP2 shards the head with what is around it; ZeRO-3 every layer by itself, an adapter's too.
    """
    head = resolve_lm_head(model)

    def run(hidden: Tensor) -> Tensor:
        return function(resolve_lm_head(model), hidden)

    for module in dict.fromkeys((head.linear, *(adapter.up for adapter in head.lora), model.get_output_embeddings())):
        run = partial(through, module, run)
    return run(hidden)


def _active_tokens(wrapper: Any) -> tuple[TrainedTokens, ...]:
    """The rows that the forward of `peft`'s wrapper would put into the weight."""
    layer = wrapper.token_adapter
    _check_hooks(wrapper)
    _check_hooks(layer)
    if not _adds_to_its_base(layer):
        return ()
    active = [name for name in wrapper.active_adapters if name in layer.trainable_tokens_delta]
    weight = layer.base_layer.weight
    return tuple(
        TrainedTokens(weight, tuple(layer.token_indices[name]), layer.trainable_tokens_delta[name]) for name in active
    )


def _active_lora(layer: Any) -> tuple[LoRA, ...]:
    """What the forward of `peft`'s LoRA layer would add to that of its base layer."""
    _check_hooks(layer)
    if not _adds_to_its_base(layer):
        return ()
    return tuple(_lora(layer, name) for name in layer.active_adapters if name in layer.lora_A)


def _adds_to_its_base(layer: Any) -> bool:
    """Whether a layer of `peft`'s computes more than its base layer. Raises `ValueError` where it computes less."""
    if layer.merged and layer.disable_adapters:
        raise ValueError("The lm head has merged adapters that are disabled; call unmerge_adapter() on the model.")
    return not (layer.merged or layer.disable_adapters)


def _lora(layer: Any, name: str) -> LoRA:
    if name in layer.lora_variant:
        raise TypeError(
            f"The adapter {name!r} on the lm head is not plain LoRA but a {type(layer.lora_variant[name]).__name__}, "
            "and what that does beyond LoRA would be bypassed. Use plain LoRA on lm_head (use_dora=False), or take "
            "lm_head out of target_modules."
        )
    down, up = layer.lora_A[name], layer.lora_B[name]
    for module in (down, up):
        _check_module(module)
    return LoRA(down, up, layer.lora_dropout[name], layer.scaling[name])


def _class_name(module: nn.Module) -> str:
    return f"{class_of(module).__module__}.{class_of(module).__qualname__}"


def _check_module(head: nn.Module) -> None:
    if class_of(head) is not nn.Linear or not isinstance(head, nn.Linear):
        raise TypeError(
            f"The lm head is a {_class_name(head)}, not a plain torch.nn.Linear, and what it does beyond one would be "
            "bypassed. Leave lm_head out of quantization, remove parametrizations from it, and of adapters put plain "
            "LoRA on it, train some tokens (trainable_token_indices) or all of it (modules_to_save=['lm_head'])."
        )
    _check_hooks(head)
    for parameter in (head.weight, head.bias):
        if parameter is not None:
            _check_parameter(parameter)


def _check_hooks(head: nn.Module) -> None:
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if not all(map(hooks_of_engine, hooks)) or "forward" in vars(head):
        raise ValueError(
            "The lm head has hooks or a replaced forward (register_forward_hook, weight_norm, Accelerate's device_map "
            "or offloading), which would not run because the loss never calls the head. Remove them from lm_head."
        )


def _check_parameter(parameter: Tensor) -> None:
    if type(parameter) not in (nn.Parameter, Tensor) and not hasattr(parameter, "device_mesh"):  # a DTensor
        raise TypeError(
            f"A parameter of the lm head is a {type(parameter).__name__}, not a plain tensor: quantized heads are not "
            "supported. Leave lm_head out of quantization."
        )
    if parameter.device.type == "meta":
        raise TypeError("The lm head has no data (device 'meta'): it is offloaded. Load it onto a device.")
    if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"The lm head has dtype {parameter.dtype}; the loss takes float64, float32, bfloat16, float16.")


def logit_transform(config: PretrainedConfig) -> tuple[float, float | None]:
    """Scale and soft-cap of the logits, from the text model's config."""
    multiplies = config.model_type in _MULTIPLIES_BY_DIVISOR
    factor, divisor = math.prod(_numbers(config, _FACTORS)), math.prod(_numbers(config, _DIVISORS))
    scale = factor * divisor if multiplies else factor / divisor
    return scale, next(iter(_numbers(config, _SOFTCAPS)), None)


def _numbers(config: PretrainedConfig, fields: tuple[str, ...]) -> list[float]:
    values: dict[str, Any] = {field: getattr(config, field, None) for field in fields}
    for field, value in values.items():
        if value is not None and not isinstance(value, (int, float)):
            raise TypeError(f"config.{field} is {value!r}; the loss can only apply a number.")
    return [float(value) for value in values.values() if value is not None]
