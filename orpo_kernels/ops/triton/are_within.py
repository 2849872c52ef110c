"""Whether every row has a token of the vocabulary and a position of the hidden states: one program, one verdict."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 2048


@triton.jit(
    do_not_specialize=["R", "num_positions", "vocab_size"],
    do_not_specialize_on_alignment=["POSITION", "TARGET", "VERDICT"],
)
def are_within_kernel(
    POSITION,  # (R,) int64
    TARGET,  # (R,) int64
    VERDICT,  # () bool, out
    R,
    num_positions: tl.int64,
    vocab_size: tl.int64,
    BLOCK: tl.constexpr,
):
    inside = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, R, BLOCK):
        o_r = start + tl.arange(0, BLOCK)
        m_r = o_r < R
        position = tl.load(POSITION + o_r, mask=m_r, other=0)
        target = tl.load(TARGET + o_r, mask=m_r, other=0)
        is_inside = (position >= 0) & (position < num_positions) & (target >= 0) & (target < vocab_size)
        inside += (m_r & is_inside).to(tl.int32)
    tl.store(VERDICT, tl.sum(inside, 0) == R)


def are_within(position: Tensor, num_positions: int, target: Tensor, vocab_size: int) -> Tensor:
    """See `torch_ops.are_within`."""
    verdict = torch.empty((), dtype=torch.bool, device=position.device)
    numbers = len(position), num_positions, vocab_size
    launch(are_within_kernel, (1,), position, target, verdict, *numbers, BLOCK=BLOCK, num_warps=8)
    return verdict
