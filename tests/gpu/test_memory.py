"""Peak memory as the allocator counts it: what `plan` predicts, to 3 % with our kernels."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from orpo_kernels import Rows, orpo_loss_from_rows, plan

from .inputs import SCHEDULES

SHAPES = {"Llama-3-8B": (8192, 4096, 128256), "SmolLM2-135M": (16384, 576, 49152), "odd": (5001, 577, 50257)}

# Eager operations make temporaries that the plan does not name.
WITHIN = {"triton": 0.03, "torch": 0.05}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_peak_is_as_planned(schedule, shape, device, backend, room):
    """Inputs, and the larger of what the plan says of the two passes, the second with the gradients; bf16."""
    rows, size, vocab = SHAPES[shape]
    trained, gradient = schedule in ("resident", "recompute"), schedule != "evaluation"
    asked = "auto" if schedule == "evaluation" else schedule
    chosen = plan(
        rows,
        size,
        vocab,
        dtype=torch.bfloat16,
        device=device,
        needs_hidden=gradient,
        needs_weight=trained,
        schedule=asked,
        backend=backend,
    )
    assert chosen.schedule == schedule
    inputs = 2 * (rows + vocab) * size + rows * 33  # a row of Rows has 33 bytes
    gradients = 2 * (rows * gradient + vocab * trained) * size
    predicted = inputs + max(chosen.forward_bytes, chosen.backward_bytes + gradients)
    if torch.cuda.mem_get_info()[0] < 1.2 * predicted:
        pytest.skip(f"needs {predicted / 2**30:.1f} GiB of free memory on the GPU")

    def call(rows: int, vocab: int) -> None:
        """Everything is made and let go of in here."""
        hidden = torch.empty(rows, size, dtype=torch.bfloat16, device=device).normal_().requires_grad_(gradient)
        weight = torch.empty(vocab, size, dtype=torch.bfloat16, device=device).normal_(std=size**-0.5)
        weight.requires_grad_(trained)
        index = torch.arange(rows, device=device)
        every = torch.ones(rows, dtype=torch.bool, device=device)
        batch = Rows(index, index % vocab, index % 2, every, torch.ones(rows, dtype=torch.float64, device=device), 1)
        with torch.set_grad_enabled(gradient):
            loss = orpo_loss_from_rows(hidden, weight, batch, schedule=asked, backend=backend).loss
            if gradient:
                loss.backward()
        torch.cuda.synchronize()

    call(64, 1000)  # workspaces of the library, which it keeps
    measured = peak_of(lambda: call(rows, vocab))
    assert measured == pytest.approx(predicted, rel=WITHIN[backend]), f"{measured / predicted:.3f} of the prediction"


def peak_of(run: Callable[[], None]) -> int:
    """The most that `run` allocated at one time, on top of what was there."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before
