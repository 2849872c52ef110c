"""What a call costs the host: a batch so small that its arithmetic is nothing, ours beside plain torch, in turns.

    python -m benchmarks.contest.host --rounds 300

On one thread, with the denominators counted by the loss. What is printed is the median time of a forward and (but in
evaluation) a backward pass, and the ratio of the medians: on a GPU the host launches the same work, and this is what a
small batch waits for.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.contest.peers import IGNORE, odds_ratio
from benchmarks.contest.turns import HEADS
from benchmarks.timing import in_turns, wall_seconds
from orpo_kernels import orpo_loss

PAIRS, LENGTH, HIDDEN, VOCAB, PROMPT, BETA = 2, 12, 16, 50, 5, 0.1
GOALS = {"evaluation": 3.0, "frozen": 1.4, "trained": 1.4}
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return orpo_loss(hidden, weight, labels, beta=BETA).loss


def plain(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """The textbook formula; both its terms look at the same labels."""
    scored, pairs = labels != IGNORE, len(labels) // 2
    log_probs = F.linear(hidden, weight).log_softmax(-1)
    logps = log_probs.gather(-1, labels.clamp(min=0)[..., None]).squeeze(-1)
    logps, counts = torch.where(scored, logps, 0.0).sum(-1), scored.sum(-1)
    means = logps / counts
    return -logps[:pairs].sum() / counts[:pairs].sum() + BETA * odds_ratio(means[:pairs], means[pairs:])


def measure(head: str, rounds: int) -> tuple[float, float]:
    """The median seconds of ours and of plain torch, one call each in every round."""
    train_hidden, train_head = HEADS[head]
    hidden = torch.randn(2 * PAIRS, LENGTH, HIDDEN, requires_grad=train_hidden)
    weight = torch.randn(VOCAB, HIDDEN, requires_grad=train_head)
    labels = torch.randint(VOCAB, (2 * PAIRS, LENGTH))
    labels[:, :PROMPT] = IGNORE
    torch.testing.assert_close(ours(hidden, weight, labels), plain(hidden, weight, labels))

    def call(loss: Loss) -> None:
        result = loss(hidden, weight, labels)
        if result.requires_grad:
            result.backward()

    def seconds(loss: Loss) -> float:
        hidden.grad = weight.grad = None
        return wall_seconds(partial(call, loss), hidden.device)

    times = in_turns((ours, plain), rounds, seconds, warm_up=rounds // 3)
    return statistics.median(times[ours]), statistics.median(times[plain])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=300)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    print("| head | ours, us | plain torch, us | ratio | goal |\n| --- | ---: | ---: | ---: | ---: |")
    for head, goal in GOALS.items():
        mine, theirs = measure(head, rounds)
        print(f"| {head} | {mine * 1e6:.0f} | {theirs * 1e6:.0f} | {mine / theirs:.2f} | {goal} |")


if __name__ == "__main__":
    main()
