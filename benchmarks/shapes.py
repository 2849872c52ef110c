"""The lm-heads of the models that the GPU benchmark and the roofline estimate look at."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ModelShape:
    """An lm-head: logits = hidden (N, H) @ weight (V, H).T, with a bias (V,) or a soft-cap where the model has one."""

    name: str
    hidden_size: int
    vocab_size: int
    bias: bool = False
    logit_softcap: float | None = None

    def tensors(self, rows: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor, Tensor]:
        """Random hidden states (rows, H), weight (V, H) and targets (rows) for kernels; logits have a spread of 1."""
        x = torch.randn(rows, self.hidden_size, device=device).to(dtype)
        w = (torch.randn(self.vocab_size, self.hidden_size, device=device) / self.hidden_size**0.5).to(dtype)
        return x, w, torch.randint(self.vocab_size, (rows,), device=device)

    def __str__(self) -> str:
        extra = ", bias" if self.bias else "" if self.logit_softcap is None else f", soft-cap {self.logit_softcap:g}"
        return f"{self.name} (H = {self.hidden_size}, V = {self.vocab_size}{extra})"


SHAPES = {
    shape.name: shape
    for shape in (
        ModelShape("SmolLM2-135M", 576, 49152),
        ModelShape("Llama-3.2-1B", 2048, 128256),
        ModelShape("Qwen3-0.6B", 1024, 151936),
        ModelShape("Llama-3-8B", 4096, 128256),
        ModelShape("Gemma-2-2B", 2304, 256000, logit_softcap=30.0),
        ModelShape("Mistral-7B", 4096, 32768),
        ModelShape("Phi-2", 2560, 51200, bias=True),
    )
}


def named(text: str) -> ModelShape:
    """The model of that name, or for "HxV" a head of these sizes.

    Raises:
        ValueError: neither.
    """
    if text in SHAPES:
        return SHAPES[text]
    hidden_size, _, vocab_size = text.partition("x")
    if not (hidden_size.isdecimal() and vocab_size.isdecimal()):
        raise ValueError(
            f"{text!r} is neither one of {', '.join(SHAPES)} nor a head of the form HxV, as in 4096x128256"
        )
    return ModelShape(text, int(hidden_size), int(vocab_size))
