"""A sketch, not part of the library: a forward pass whose columns are screened in a cheaper precision first.

    python -m benchmarks.scout

With the backward pass sparse (docs/sparse.md) the forward product is what is left. The sketch makes all logits in a
cheaper precision, computes the columns again that are active by them for a block of rows (and the targets'), in the
weight's own precision, and takes the rest of the log-sum-exp from the scout. On real hidden states, at the start and
after the steps of `benchmarks.sparse training`:

- *kept*: the columns computed again; *missed*: columns above eps by float64 that the scout did not find, per block;
- *logp*: the largest and the mean error of a row's log-probability, to float64 arithmetic on the same operands, beside
  that of the whole product in the weight's precision;
- *time*: of the forward pass up to the residual's active entries, over the exact one's up to the residual.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks import peers, sparse
from benchmarks.report import Sheet
from benchmarks.workloads import Workload
from orpo_kernels.engine.gemm import even_chunks
from orpo_kernels.engine.schedules.sparse import LEAST_WEIGHT
from orpo_kernels.ops import native

BLOCK_ROWS = 512
Scout = Callable[[Tensor, Tensor], Tensor]  # logits (R, V) in bf16 of hidden states (R, H) and weight (V, H)


def bf16_scout(x: Tensor, weight: Tensor) -> Tensor:
    return x.bfloat16() @ weight.bfloat16().t()


def int8_scout(x: Tensor, weight: Tensor) -> Tensor:
    """A scale for every hidden state and every row of the weight."""
    (x8, x_scale), (w8, w_scale) = _as_int8(x), _as_int8(weight)
    return (torch._int_mm(x8, w8.t()).float() * x_scale * w_scale.t()).bfloat16()


def _as_int8(rows: Tensor) -> tuple[Tensor, Tensor]:
    scale = rows.float().abs().amax(1, keepdim=True) / 127
    return (rows / scale).round().to(torch.int8), scale


CASES: dict[str, tuple[torch.dtype, Scout]] = {
    "bf16 under fp32": (torch.float32, bf16_scout),
    "int8 under fp32": (torch.float32, int8_scout),
    "int8 under bf16": (torch.bfloat16, int8_scout),
}


@dataclass(frozen=True)
class Found:
    """One scout on one batch; `plain`: errors of the whole product in the weight's precision. Errors: mean, largest."""

    kept: float
    missed: float
    error: tuple[float, float]
    plain: tuple[float, float]
    seconds: float
    exact_seconds: float


# ---------------------------------------------------------------------------------------------------------------------
# The forward passes
# ---------------------------------------------------------------------------------------------------------------------


def exact_forward(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Log-odds (R,) of all rows, and in passing their residual."""
    parts = []
    for rows in even_chunks(len(x), BLOCK_ROWS):
        logits = x[rows] @ weight.t()
        parts.append(native.residual_(logits, target[rows], 1.0, None))
    return torch.cat(parts)


def scouted_forward(
    x: Tensor, weight: Tensor, target: Tensor, scout: Scout, eps: float
) -> tuple[Tensor, list[tuple[slice, Tensor]]]:
    """The same by a scout, and the columns of each block that it computed again."""
    parts, active = [], []
    for rows in even_chunks(len(x), BLOCK_ROWS):
        z = scout(x[rows], weight)
        logit = z.gather(1, target[rows, None]).squeeze(1).double()
        log_odds = native.residual_(z, target[rows], 1.0, None)
        lse_others = logit - log_odds
        peak, _ = native.column_statistics(z, torch.sigmoid(-log_odds).clamp(min=LEAST_WEIGHT).float())
        is_active = peak > eps
        is_active[target[rows]] = True
        columns = is_active.nonzero().squeeze(1)
        _, share = native.gather_columns(z, columns)  # of the other tokens, and -1 of the target
        again = x[rows] @ weight[columns].t()
        again_log_odds, again_lse = native.statistics(again, torch.searchsorted(columns, target[rows]), 1.0, None)
        left_out = lse_others + torch.log1p(-(share + 1).clamp(max=1 - 1e-12))
        parts.append(again_log_odds + again_lse - torch.logaddexp(again_lse, left_out))
        active.append((rows, columns))
    return torch.cat(parts), active


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def measure(work: Workload, dtype: torch.dtype, scout: Scout, eps: float, rounds: int) -> Found:
    rows = peers.valid_rows(work.labels, work.nll_labels)
    x, weight = work.hidden.flatten(0, 1)[rows.position].to(dtype), work.weight.to(dtype)
    target = rows.target
    log_odds, active = scouted_forward(x, weight, target, scout, eps)
    truth, missed = torch.empty(len(x), dtype=torch.float64), 0
    for part, columns in active:
        logps = (x[part].double() @ weight.double().t()).log_softmax(1)
        truth[part] = logps.gather(1, target[part, None]).squeeze(1)
        above = logps.amax(0) > torch.log(torch.tensor(eps, dtype=torch.float64))
        above[columns] = False
        missed += int(above.sum())
    steps = {
        "scouted": lambda: scouted_forward(x, weight, target, scout, eps),
        "exact": lambda: exact_forward(x, weight, target),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    order = list(steps)
    for _ in range(rounds):
        random.shuffle(order)
        for name in order:
            began = time.perf_counter()
            steps[name]()
            seconds[name].append(time.perf_counter() - began)
    kept = sum((part.stop - part.start) * len(columns) for part, columns in active) / (len(x) * len(weight))
    return Found(
        kept,
        missed / len(active),
        _errors(log_odds, truth),
        _errors(exact_forward(x, weight, target), truth),
        *(statistics.median(seconds[name]) for name in steps),
    )


def _errors(log_odds: Tensor, truth: Tensor) -> tuple[float, float]:
    """Of logp = log sigmoid(log-odds): mean and largest."""
    error = (torch.nn.functional.logsigmoid(log_odds) - truth).abs()
    return error.mean().item(), error.max().item()


def sheet(name: str, eps: float, found: dict[str, Found]) -> Sheet:
    columns = ["scout", "kept", "missed", "logp, mean", "largest", "whole product, mean", "largest", "time / exact"]
    rows = [
        [
            case,
            f"{one.kept:.1%}",
            f"{one.missed:.1f}",
            *(f"{error:.0e}" for error in (*one.error, *one.plain)),
            f"{one.seconds / one.exact_seconds:.2f}",
        ]
        for case, one in found.items()
    ]
    return Sheet(f"{name}, eps = {eps:.3g}", columns, rows)


def states() -> Iterator[Workload]:
    """LLMBar and dpo_en_demo, at the start and after the steps of `benchmarks.sparse`."""
    from examples.smollm2 import load_smollm2

    yield from sparse.error_workloads(*load_smollm2(), "at the start", 4)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        _, model = sparse.train(sparse.STEPS, progress)
    yield from sparse.error_workloads(model, load_smollm2()[1], f"after {sparse.STEPS} steps", 4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scout", description="A scouted forward pass, sketched.")
    parser.add_argument("--eps", type=int, default=12, help="as a power of 1/2 (default: 12)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--markdown", action="store_true", help="print Markdown")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    eps = 2.0**-options.eps
    for work in states():
        found = {case: measure(work, dtype, scout, eps, options.rounds) for case, (dtype, scout) in CASES.items()}
        table = sheet(work.name, eps, found)
        print(table.markdown()) if options.markdown else Console(width=130).print(table.rich())


if __name__ == "__main__":
    main()
