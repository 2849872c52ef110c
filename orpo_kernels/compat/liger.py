"""Liger's ORPO loss, as a module and as a function, with ours behind it: one import line to change.

    from orpo_kernels.compat.liger import LigerFusedLinearORPOLoss, liger_fused_linear_orpo

Arguments and return values are those of liger-kernel 0.8.5 (`liger_kernel.chunked_loss` and its `functional`), which
need not be installed. So are the values, but where Liger's are wrong:

| | Liger 0.8.5 | here |
|---|---|---|
| a sequence without a target | loss and all gradients NaN | its pair leaves the odds ratio and its mean |
| an answer the model is sure of | loss inf, or gradients NaN | finite |
| `nll_target` of the chosen half alone, (B, T) | silently divided by half of its tokens | as if it were (2B, T) |
| an odd batch | sequences silently paired wrongly | ValueError |
| `chunk_size` > 1 with a non-contiguous `nll_target` | raises | works |
| bf16: means of the logits | summed in bf16 | in fp32 |

Two arguments say how Liger computes and have no effect here: `compiled` (there is nothing to compile) and `chunk_size`
(chunks follow from the memory budget, not from pairs). Without gradient it costs one GEMM instead of three.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..dialects import liger
from ..loss import orpo_loss_from_rows

__all__ = ["LigerFusedLinearORPOLoss", "liger_fused_linear_orpo"]


class LigerFusedLinearORPOLoss(nn.Module):
    """The ORPO loss of aligned hidden states and targets.

    Args:
        ignore_index: the target that is none.
        beta: weight of the odds ratio.
        compute_nll_loss: False leaves the NLL out: `nll_loss` is 0 and the loss is the odds ratio's part alone.
        compiled, chunk_size: Liger's; no effect.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        beta: float = 0.1,
        compute_nll_loss: bool = True,
        compiled: bool = True,
        chunk_size: int = 1,
    ):
        super().__init__()
        self.ignore_index = ignore_index
        self.beta = beta
        self.compute_nll_loss = compute_nll_loss
        self.compiled = compiled
        self.chunk_size = chunk_size

    def forward(
        self,
        lin_weight: Tensor,
        _input: Tensor,
        target: Tensor,
        bias: Tensor | None = None,
        nll_target: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """The loss, differentiable in weight, input and bias, and nine detached metrics.

        Args:
            lin_weight: (V, H) lm-head weight.
            _input: (2B, T, H) last hidden states, the B chosen sequences first, in the weight's dtype.
            target: (2B, T) int64, the target of each position in the odds ratio, `ignore_index` where there is none.
            bias: (V,) or None.
            nll_target: (2B, T), of which the chosen half counts, or (B, T): the NLL's targets; `target` if None. Its
                ids may be others than those of `target` at the same position.

        Returns:
            loss (0-d), and chosen_logps (B,), rejected_logps (B,), chosen_logits_mean, rejected_logits_mean, nll_loss
            (0-d), chosen_rewards (B,), rejected_rewards (B,), log_odds_ratio, log_odds_chosen (0-d); fp32, float64 for
            float64 inputs. The logits' means run over all positions, padding included. A sequence without a target has
            log-probability 0.

        Raises `ValueError` or `TypeError` as `orpo_loss` does.
        """
        if _input.dim() != 3 or target.shape != _input.shape[:2]:
            raise ValueError(
                f"_input must be (2B, T, H) and target (2B, T), but they have the shapes {tuple(_input.shape)} and "
                f"{tuple(target.shape)}"
            )
        if not self.compute_nll_loss:
            nll_target = torch.full_like(target, self.ignore_index)
        rows = liger(target, nll_target, ignore_index=self.ignore_index)
        out = orpo_loss_from_rows(_input.flatten(0, 1), lin_weight, rows, bias=bias, beta=self.beta)
        pairs = out.valid_pairs.sum().clamp(min=1)
        metrics = (
            out.chosen_logps,
            out.rejected_logps,
            *_mean_logits(lin_weight, _input, bias),
            out.nll_loss,
            self.beta * out.chosen_logps,
            self.beta * out.rejected_logps,
            F.logsigmoid(out.log_odds).where(out.valid_pairs, 0).sum() / pairs,
            out.log_odds.sum() / pairs,  # 0 for a pair that is not valid
        )
        return out.loss, tuple(metric.detach() for metric in metrics)

    def extra_repr(self) -> str:
        return f"ignore_index={self.ignore_index}, beta={self.beta}, compute_nll_loss={self.compute_nll_loss}"


def liger_fused_linear_orpo(
    _input: Tensor,
    weight: Tensor,
    target: Tensor,
    bias: Tensor | None = None,
    ignore_index: int = -100,
    beta: float = 0.1,
    compute_nll_loss: bool = True,
    nll_target: Tensor | None = None,
    compiled: bool = True,
    chunk_size: int = 1,
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`liger_kernel.chunked_loss.functional`'s form: `LigerFusedLinearORPOLoss` with all in one call, the input first.

    (Liger's takes its arguments by place alone.)
    """
    loss = LigerFusedLinearORPOLoss(ignore_index, beta, compute_nll_loss, compiled, chunk_size)
    return loss(weight, _input, target, bias, nll_target)


@torch.no_grad()
def _mean_logits(weight: Tensor, hidden: Tensor, bias: Tensor | None) -> Any:
    """(2,) mean logit of the chosen and of the rejected half: the head is linear, so the mean passes through it."""
    dtype = torch.promote_types(hidden.dtype, torch.float32)
    halves = hidden.unflatten(0, (2, -1)).mean((1, 2), dtype=dtype)
    logits = halves @ weight.mean(0, dtype=dtype)
    return logits if bias is None else logits + bias.mean(dtype=dtype)
