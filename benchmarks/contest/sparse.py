"""The sparse backward pass on real hidden states: what it costs in error, and what it saves in time.

    python -m benchmarks.contest.sparse error training --output docs/sparse_measured.md  # tables and a plot
    python -m benchmarks.contest.sparse time                # beside the exact path and the peers
    python -m benchmarks.contest.sparse time --keep-pages   # the same without page faults (`contest/malloc.py`)

**error**: SmolLM2's head on batches of LLMBar and dpo_en_demo, at the start and after the steps of `training`, fp32.
Relative Frobenius errors of dh and dW, to the exact gradients, against eps and the size of a block. Beside each: the
same columns without the tail; the filter of Cut Cross Entropy (arXiv 2411.09009), which leaves out the tiles of 128
rows by 128 tokens (sorted by their mean logit, as it sorts them) that have no |p - onehot| >= eps; and what it costs
to round the operands and results of the same two products to bf16, all else exact.

**training**: 20 steps of the model on LLMBar, exact, sparse, and exact under bf16 autocast: the losses.

**time**: forward and backward of head and loss, everyone in turns in one process, as in `benchmarks.contest.turns`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from benchmarks.contest import malloc, peers, turns, workloads
from benchmarks.contest.exact import BETA
from benchmarks.contest.workloads import Workload
from benchmarks.report import tables
from orpo_kernels import Limits, measured_sparsity
from orpo_kernels.engine.schedules import sparse

EPS = (10, 12, 14, 16)  # as powers of 1/2
LIMITS = Limits.of(on_cpu=True)
BLOCK = LIMITS.block_rows
BLOCKS = (64, 128, 256, 512)
DEFAULT_EPS = 14
TILE = 128
STEPS, TRAINING_PAIRS, TRAINING_LENGTH, RATE = 20, 2, 128, 2e-5


@dataclass(frozen=True)
class Errors:
    """Of dh and dW, relative."""

    hidden: float
    weight: float

    def __str__(self) -> str:
        return f"{self.hidden:.3%} / {self.weight:.3%}"


@dataclass(frozen=True)
class Point:
    """One workload at one eps and size of the blocks."""

    eps: int
    block: int
    active_share: float
    dropped_mass: float  # mean of the rows
    corrected: Errors
    filtered: Errors  # the same columns, no tail


# ---------------------------------------------------------------------------------------------------------------------
# Error
# ---------------------------------------------------------------------------------------------------------------------


def gradients(workload: Workload, **options: Any) -> tuple[Tensor, ...]:
    """dh and dW of our loss."""
    hidden, weight = workload.hidden.clone().requires_grad_(), workload.weight.clone().requires_grad_()
    loss = peers.ours(hidden, weight, workload.labels, workload.nll_labels, BETA, **options)
    return torch.autograd.grad(loss, (hidden, weight))


def compare(ours: tuple[Tensor, ...], exact: tuple[Tensor, ...]) -> Errors:
    return Errors(*(((a - b).norm() / b.norm()).item() for a, b in zip(ours, exact, strict=True)))


@contextmanager
def without_tail() -> Iterator[None]:
    """Every block's tail is 0 (not None: a block of active columns has one, and its gradient starts from there)."""
    whole = sparse.block_of

    def cut(*arguments: Any) -> sparse.Block:
        block = whole(*arguments)
        assert block.amount is not None
        assert block.profile is not None
        return block._replace(amount=torch.zeros_like(block.amount), profile=torch.zeros_like(block.profile))

    with patch.object(sparse, "block_of", cut):
        yield


def error_points(workload: Workload, progress: Progress) -> list[Point]:
    exact = gradients(workload)
    points = []
    cases = [(eps, BLOCK) for eps in EPS] + [(DEFAULT_EPS, block) for block in BLOCKS if block != BLOCK]
    for eps, block in progress.track(cases, description=workload.name):
        # Sparse whatever it costs: a chunk that goes dense has no error to show.
        options = {"sparse_eps": 2.0**-eps, "limits": replace(LIMITS, block_rows=block, dense_share=1.0)}
        with measured_sparsity() as measured:
            corrected = compare(gradients(workload, **options), exact)
        with without_tail():
            filtered = compare(gradients(workload, **options), exact)
        mass = measured.dropped_mass.mean().item()
        points.append(Point(eps, block, measured.active_share, mass, corrected, filtered))
    return points


def other_errors(workload: Workload) -> dict[str, tuple[Errors, float]]:
    """What a reader may compare with: CCE's filter, and rounding to bf16; and the share of the products they do."""
    exact = gradients(workload)
    rows = peers.valid_rows(workload.labels, workload.nll_labels)
    h, target = workload.hidden.flatten(0, 1)[rows.position], rows.target
    logits = h @ workload.weight.t()
    p = logits.softmax(1)
    logps = logits.log_softmax(1).gather(1, target[:, None]).squeeze(1).requires_grad_()
    pairs = len(workload.nll_labels)
    loss = peers.Composed(lambda *_: logps).from_rows(workload.hidden, workload.weight, rows, pairs, BETA)
    (g,) = torch.autograd.grad(loss, logps)
    order = logits.mean(0).argsort(descending=True)
    residual = -p
    residual[torch.arange(len(target)), target] += 1
    del logits, p

    def products(residual: Tensor, weight: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        dh = torch.zeros_like(workload.hidden)
        dh.flatten(0, 1).index_add_(0, rows.position, g[:, None] * (residual @ weight))
        return dh, residual.t() @ (g[:, None] * h)

    def rounded(tensor: Tensor) -> Tensor:
        return tensor.bfloat16().float()

    def tiles(eps: float) -> tuple[Tensor, float]:
        kept, count, of = residual[:, order], 0, 0
        for some in kept.split(TILE):
            for tile in some.split(TILE, dim=1):
                of += 1
                if tile.abs().amax() < eps:
                    tile.zero_()
                else:
                    count += 1
        return torch.empty_like(kept).index_copy_(1, order, kept), count / of

    dh, _ = products(rounded(residual), rounded(workload.weight), h)
    dw = rounded(residual).t() @ rounded(g[:, None] * h)
    found = {"rounding to bf16": (compare((rounded(dh), rounded(dw)), exact), 1.0)}
    for eps in (12, DEFAULT_EPS):
        kept, share = tiles(2.0**-eps)
        found[f"CCE's filter at 2^-{eps}"] = compare(products(kept, workload.weight, h), exact), share
    return found


def error_table(workload: Workload, points: list[Point], others: dict[str, tuple[Errors, float]]) -> str:
    lines = [
        f"**{workload}**, fp32. Errors are those of dh / dW.",
        "",
        "| eps | rows of a block, at most | active columns | dropped mass | with the tail | without |",
        "|---|---|---|---|---|---|",
    ]
    for p in points:
        lines.append(
            f"| 2^-{p.eps} | {p.block} | {p.active_share:.1%} | {p.dropped_mass:.2%} | {p.corrected} | {p.filtered} |"
        )
    lines += ["", *(f"- {name}: {errors}, {share:.1%} of the products" for name, (errors, share) in others.items()), ""]
    return "\n".join(lines)


def plot(results: dict[str, list[Point]], path: Path) -> None:
    """Errors against the share of active columns, one line for each workload."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    for name, points in results.items():
        chosen = sorted((p for p in points if p.block == BLOCK), key=lambda p: p.active_share)
        shares = [100 * p.active_share for p in chosen]
        for ax, part in zip(axes, ("hidden", "weight"), strict=True):
            (line,) = ax.loglog(shares, [100 * getattr(p.corrected, part) for p in chosen], "o-", label=name)
            ax.loglog(shares, [100 * getattr(p.filtered, part) for p in chosen], "x--", color=line.get_color(), lw=1)
    for ax, title in zip(axes, ("dh", "dW"), strict=True):
        ax.set(title=f"{title}: with the tail (o) and without (x)", xlabel="active columns, %", ylabel="error, %")
        ax.grid(True, which="both", alpha=0.3)
    axes[0].legend(fontsize=8)
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------------------------------------------------------------
# Training
# ---------------------------------------------------------------------------------------------------------------------


def train(steps: int, progress: Progress, autocast: bool = False, **options: Any) -> tuple[list[float], Any]:
    """The losses of these steps on LLMBar, a plain PyTorch loop with AdamW, and the model after them."""
    from examples.smollm2 import load_smollm2
    from orpo_kernels.transformers import causal_lm_orpo_loss

    model, tokenizer = load_smollm2()
    batches: list[Any] = workloads.llmbar_batches(tokenizer, TRAINING_PAIRS, TRAINING_LENGTH)[:steps]
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.0, fused=True)
    losses = []
    for batch in progress.track(batches, description=f"training, {options or ('bf16' if autocast else 'exact')}"):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = causal_lm_orpo_loss(model, **batch, beta=BETA, **options).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, model


def training_table(exact: list[float], sparse_losses: list[float], bf16: list[float]) -> str:
    def off(losses: list[float]) -> tuple[float, float]:
        differences = [abs(a - b) for a, b in zip(losses, exact, strict=True)]
        return statistics.mean(differences), max(differences)

    lines = [
        f"**{len(exact)} steps of SmolLM2-135M on LLMBar**, {TRAINING_PAIRS} pairs a step, AdamW at {RATE:g}, fp32: "
        f"the loss goes from {exact[0]:.4f} to {exact[-1]:.4f} (exact), {sparse_losses[-1]:.4f} "
        f"(sparse_eps=2^-{DEFAULT_EPS}), "
        f"{bf16[-1]:.4f} (exact, bf16 autocast).",
        "",
        "| losses beside the exact run's in fp32 | mean difference | largest |",
        "|---|---|---|",
    ]
    for name, losses in ((f"sparse_eps=2^-{DEFAULT_EPS}, fp32", sparse_losses), ("exact, bf16 autocast", bf16)):
        lines.append("| {} | {:.1e} | {:.1e} |".format(name, *off(losses)))
    return "\n".join([*lines, ""])


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def error_workloads(model: Any, tokenizer: Any, when: str, pairs: int) -> Iterator[Workload]:
    for file in (workloads.LLMBAR, workloads.DPO_EN_DEMO):
        batches = workloads.llmbar_batches(tokenizer, pairs, 256 if file == workloads.LLMBAR else 384, file)
        batch = max(itertools.islice(batches, 8), key=lambda batch: batch["labels"].shape[1])
        yield workloads.workload_of(f"{file.removesuffix('.jsonl')}, {when}", model, batch)


def report(parts: list[str], console: Console, plot_path: Path | None) -> str:
    """The tables of `error` and `training`."""
    from examples.smollm2 import load_smollm2

    text: list[str] = []
    with Progress(console=console, transient=True) as progress:
        model, tokenizer = load_smollm2()
        states = list(error_workloads(model, tokenizer, "at the start", 4)) if "error" in parts else []
        exact, model = train(STEPS, progress)
        if "training" in parts:
            sparse_losses, _ = train(STEPS, progress, sparse_eps=2.0**-DEFAULT_EPS)
            bf16, _ = train(STEPS, progress, autocast=True)
            text.append(training_table(exact, sparse_losses, bf16))
        if "error" in parts:
            states += error_workloads(model, tokenizer, f"after {STEPS} steps", 4)
        results = {}
        for workload in states:
            results[workload.name] = error_points(workload, progress)
            text.append(error_table(workload, results[workload.name], other_errors(workload)))
        if results and plot_path:
            plot(results, plot_path)
    return "\n".join(text)


def time_everyone(options: argparse.Namespace, console: Console) -> None:
    """Contests with the sparse loss among the contestants."""
    variants: turns.Variants = {
        "ours": {},
        **{f"ours, sparse 2^-{eps}": {"sparse_eps": 2.0**-eps} for eps in options.eps},
    }
    names = [*turns.FLOORS, *variants, *options.peer]
    workload = workloads.synthetic(share=0.42) if options.uniform else workloads.llmbar(4, 256)
    with Progress(console=console, transient=True) as progress:
        for dtype, head in itertools.product(options.dtype, options.head):
            task = progress.add_task(f"{dtype}, head {head}", total=len(names) * (1 + options.rounds))
            advance = functools.partial(progress.advance, task)
            work = workload.cast(getattr(torch, dtype))
            record = turns.record(work, head, names, options.rounds, advance, variants)
            progress.remove_task(task)
            Console(width=130).print(tables.contest_sheet(record).rich(), "")


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    if not workloads.have_real_data():
        raise SystemExit(workloads.NEEDS_REAL_DATA)
    if options.keep_pages and not malloc.available():
        raise SystemExit(f"--keep-pages: {malloc.ONLY_GLIBC}.")
    if "time" in options.parts:
        with malloc.kept_pages() if options.keep_pages else nullcontext():
            time_everyone(options, console)
    if rest := [part for part in options.parts if part != "time"]:
        plot_path = options.output and options.output.with_suffix(".png")
        text = report(rest, console, plot_path)
        print(text)
        if options.output:
            command = f"python -m benchmarks.contest.sparse {' '.join(sys.argv[1:])}"
            links = f" Plot: [{plot_path.name}]({plot_path.name})." if "error" in rest else ""
            options.output.write_text(f"Printed by `{command}`; torch {torch.__version__}.{links}\n\n{text}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contest.sparse", description="Error and time of sparse_eps."
    )
    parser.add_argument("parts", nargs="+", choices=["error", "training", "time"])
    parser.add_argument("--output", type=Path, help="also write the tables of error and training here, a plot beside")
    parser.add_argument("--threads", type=int, default=2)
    timing = parser.add_argument_group("time")
    timing.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16"])
    timing.add_argument("--head", nargs="+", default=["frozen", "trained"], choices=["frozen", "trained"])
    timing.add_argument("--eps", nargs="+", type=int, default=[12, DEFAULT_EPS], help="as powers of 1/2")
    timing.add_argument("--peer", nargs="*", default=["CCE", "TRL-composed"], choices=list(peers.PEERS))
    timing.add_argument("--rounds", type=int, default=7)
    timing.add_argument("--uniform", action="store_true", help="random weights and hidden states: flat distributions")
    timing.add_argument(
        "--keep-pages", action="store_true", help="malloc keeps what is freed: see benchmarks/contest/malloc.py"
    )
    return parser.parse_args()


if __name__ == "__main__":
    main()
