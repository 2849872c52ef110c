"""The lm head of a Hugging Face model as the numbers the loss needs: logits = cap(scale * (W h + b)).

The loss multiplies by the head's weight itself and never calls the head. Whatever a head does beyond a matrix product
and the transform above would be bypassed. So a head that is anything but a plain `nn.Linear` is refused here by its
class, and `probe.py` checks the rest once against the model's own logits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from .body import unwrap

# The config fields by which the models of transformers 5.23 transform their logits, found by reading every
# `logits = self.lm_head(...)` there. A field that is missing or None does nothing.
_FACTORS = ("logit_scale", "lm_head_multiplier", "output_multiplier")  # Cohere; Falcon-H1; Muse
_DIVISORS = ("logits_scaling", "logits_mup_width_multiplier")  # Granite, MiniCPM3; Inkling
_SOFTCAPS = (
    "final_logit_softcapping",
    "logits_soft_cap",
    "output_logit_soft_cap",
)  # Gemma 2 to 4; RecurrentGemma; xLSTM
_MULTIPLIES_BY_DIVISOR = ("hyperclovax",)  # the same field as Granite, the other way round


@dataclass(frozen=True, eq=False)
class LMHead:
    """logits = cap(logit_scale * (weight @ h + bias)), where cap(z) = logit_softcap * tanh(z / logit_softcap), or z.

    `weight` (V, H) and `bias` (V) are the model's own parameters, tied to the embeddings or not.
    """

    weight: Tensor
    bias: Tensor | None
    logit_scale: float
    logit_softcap: float | None

    def logits(self, hidden: Tensor) -> Tensor:
        """The plain computation, for the probe: as the model does it up to the product, then in at least float32."""
        logits = nn.functional.linear(hidden, self.weight, self.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.logit_scale
        return logits if self.logit_softcap is None else self.logit_softcap * torch.tanh(logits / self.logit_softcap)


def resolve_lm_head(model: nn.Module) -> LMHead:
    """Weight, bias, scale and soft-cap of `model`'s head: a `PreTrainedModel`, or a `peft` model around one.

    Raises `TypeError` for a head that is not exactly an `nn.Linear` with ordinary floating-point parameters (LoRA on
    lm_head, quantized, parametrized, sharded, offloaded) and `ValueError` for one that is changed by hooks.
    """
    inner = unwrap(model)
    module = head_module(inner)
    scale, softcap = logit_transform(inner.config.get_text_config(decoder=True))
    return LMHead(module.weight, module.bias, scale, softcap)


def head_module(model: PreTrainedModel) -> nn.Linear:
    """The plain `nn.Linear` that is the head, out of `peft`'s `modules_to_save` if it is there."""
    head = model.get_output_embeddings()
    if head is None:
        raise TypeError(f"{type(model).__name__} has no output embeddings (get_output_embeddings() is None).")
    if type(head).__name__ == "ModulesToSaveWrapper":
        adapters = [] if head.disable_adapters else head.active_adapters
        head = head.modules_to_save[adapters[0]] if adapters else head.original_module
    _check_module(head)
    for parameter in (head.weight, head.bias):
        if parameter is not None:
            _check_parameter(parameter)
    return head


def _check_module(head: nn.Module) -> None:
    name = f"{type(head).__module__}.{type(head).__qualname__}"
    if type(head) is not nn.Linear:
        raise TypeError(
            f"The lm head is a {name}, not a plain torch.nn.Linear, and what it does beyond one would be bypassed. "
            "Take lm_head out of LoRA's target_modules (modules_to_save=['lm_head'] trains it in full), leave it out "
            "of quantization, and remove parametrizations from it."
        )
    hooks = (head._forward_hooks, head._forward_pre_hooks, head._backward_hooks, head._backward_pre_hooks)
    if any(hooks) or "forward" in vars(head):
        raise ValueError(
            "The lm head has hooks or a replaced forward (register_forward_hook, weight_norm, Accelerate's device_map "
            "or offloading), which would not run because the loss never calls the head. Remove them from lm_head."
        )


def _check_parameter(parameter: Tensor) -> None:
    if type(parameter) not in (nn.Parameter, Tensor):
        raise TypeError(
            f"A parameter of the lm head is a {type(parameter).__name__}, not a plain tensor: quantized and sharded "
            "heads are not supported. Leave lm_head out of quantization and sharding."
        )
    if parameter.device.type == "meta":
        raise TypeError("The lm head has no data (device 'meta'): it is offloaded. Load it onto a device.")
    if parameter.dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(f"The lm head has dtype {parameter.dtype}; the loss takes float64, float32, bfloat16, float16.")


def logit_transform(config: PreTrainedConfig) -> tuple[float, float | None]:
    """Scale and soft-cap of the logits, from the text model's config."""
    factors = _numbers(config, _FACTORS)
    divisors = _numbers(config, _DIVISORS)
    if config.model_type in _MULTIPLIES_BY_DIVISOR:
        factors, divisors = {**factors, **divisors}, {}
    scale = 1.0
    for factor in factors.values():
        scale *= factor
    for divisor in divisors.values():
        scale /= divisor
    softcaps = _numbers(config, _SOFTCAPS)
    return scale, next(iter(softcaps.values()), None)


def _numbers(config: PreTrainedConfig, fields: tuple[str, ...]) -> Mapping[str, float]:
    values: dict[str, Any] = {field: getattr(config, field, None) for field in fields}
    for field, value in values.items():
        if value is not None and not isinstance(value, (int, float)):
            raise TypeError(f"config.{field} is {value!r}; the loss can only apply a number.")
    return {field: float(value) for field, value in values.items() if value is not None}
