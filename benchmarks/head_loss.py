"""Forward and backward of head and loss: ours against every peer, on the same inputs, in the same process.

    python -m benchmarks.head_loss                     # SmolLM2's head on a batch of real preference data, two threads
    python -m benchmarks.head_loss --quick             # fp32, 3 rounds, without the slowest peers
    python -m benchmarks.head_loss --batch-size 8 --dtype float32 bfloat16 --json head_loss.json

Every contestant first has to give the loss that float64 arithmetic gives on the same numbers; one that does not is
named and left out. Then they take turns: one call each per round, in a new order every round, so that a slow minute of
the machine hits everyone. The floors are the bare matrix products, into preallocated buffers, on all positions and on
the rows that matter.
"""

from __future__ import annotations

import argparse
import functools
import json
import random
import statistics
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch import Tensor

from benchmarks import machine, peers, workloads
from benchmarks.workloads import Workload

BETA = 0.1
SLOW = ("TRL trainer", "torch native")  # several times as slow as the others on a CPU
# How far a loss may be from float64's on the same inputs. A 16-bit peer rounds its logits, TRL its token sums as well.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Timing:
    """Seconds of one contestant, one number per round."""

    name: str
    seconds: list[float]
    floor: bool = False
    loss_error: float | None = None  # relative, to float64

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def best(self) -> float:
        return min(self.seconds)


@dataclass(frozen=True)
class Result:
    """One workload, dtype and head: everyone's timings, those left out, and the ratio that matters."""

    workload: str
    dtype: str
    head: str
    timings: list[Timing]
    left_out: dict[str, str]

    @property
    def ours(self) -> Timing:
        return next(timing for timing in self.timings if timing.name == "ours")

    @property
    def peers(self) -> list[Timing]:
        return [timing for timing in self.timings if not timing.floor and timing.name != "ours"]

    @property
    def speedups(self) -> dict[str, float]:
        """Every peer's median time over ours, the fastest first."""
        return {peer.name: peer.median / self.ours.median for peer in sorted(self.peers, key=lambda t: t.median)}

    @property
    def speedup_of_best(self) -> float:
        """The same of the fastest peer by each one's best call, which a busy machine disturbs least."""
        return min(peer.best for peer in self.peers) / self.ours.best


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def measure(
    workload: Workload,
    *,
    trained: bool,
    names: list[str],
    rounds: int,
    progress: Progress,
    variants: Mapping[str, Mapping[str, Any]] | None = None,
) -> Result:
    """Check, then time, ours and the named peers on one workload in its dtype.

    variants: more of ours, by the name they are to have and the options of `orpo_loss` that make them.
    """
    dtype, head = workload.hidden.dtype, "trained" if trained else "frozen"
    hidden = workload.hidden.clone().requires_grad_()
    weight = workload.weight.clone().requires_grad_(trained)

    def step(loss: Callable[..., Tensor]) -> float:
        hidden.grad = weight.grad = None
        value = loss(hidden, weight, workload.labels, workload.nll_labels, BETA)
        value.backward()
        return value.item()

    title = f"{str(dtype).removeprefix('torch.')}, head {head}"
    variants = variants or {}
    task = progress.add_task(title, total=(rounds + 1) * (len(names) + len(variants) + 3))
    exact = exact_loss(workload)
    errors: dict[str, float] = {}
    left_out: dict[str, str] = {}
    runs: dict[str, Callable[[], Any]] = {}
    contestants: dict[str, Callable[..., Tensor]] = {"ours": peers.ours, **{name: peers.PEERS[name] for name in names}}
    contestants |= {name: functools.partial(peers.ours, **options) for name, options in variants.items()}
    for name, loss in contestants.items():
        try:  # the first call also compiles and warms up
            errors[name] = abs(step(loss) - exact) / abs(exact)
        except Exception as error:  # a peer that cannot run here is a finding, not a reason to stop
            left_out[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        else:
            if errors[name] > TOLERANCE[dtype]:
                left_out[name] = f"its loss is off by {errors[name]:.1e}, more than {TOLERANCE[dtype]:.0e}"
            else:
                runs[name] = functools.partial(step, loss)
        progress.advance(task)
    if "ours" in left_out:
        raise RuntimeError(f"Our own loss is not fit to be timed: {left_out['ours']}.")
    floors = {"GEMMs, all rows": workload.labels.numel(), "GEMMs, valid rows": workload.rows}
    runs |= {name: peers.GemmFloor(rows, hidden, weight) for name, rows in floors.items()}

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    order, shuffle = list(runs), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            begin = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - begin)
            progress.advance(task)
    progress.remove_task(task)
    timings = [Timing(name, seconds[name], name in floors, errors.get(name)) for name in runs]
    return Result(str(workload), str(dtype).removeprefix("torch."), head, timings, left_out)


def exact_loss(workload: Workload) -> float:
    """The loss by float64 arithmetic on the same hidden states and weight, a few rows at a time."""

    def logps(hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> Tensor:
        chunks = zip(hidden.split(256), target.split(256), strict=True)
        return torch.cat([logits(h, weight, bias).log_softmax(-1).gather(1, t[:, None]).squeeze(1) for h, t in chunks])

    def logits(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        z, cap = F.linear(hidden, weight, bias), workload.logit_softcap
        return z if cap is None else cap * torch.tanh(z / cap)

    exact = peers.Composed(logps, lambda chosen, rejected, beta: beta * peers.odds_ratio(chosen, rejected))
    double = workload.cast(torch.float64)
    with torch.no_grad():
        return exact(double.hidden, double.weight, double.labels, double.nll_labels, BETA, double.bias).item()


# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------


def table(result: Result) -> Table:
    floor = min(timing.median for timing in result.timings if timing.floor)
    shown = Table(title=f"{result.workload}\n{result.dtype}, head {result.head}, forward + backward")
    for column in ("loss", "median s", "range", "/ ours", "/ floor", "error"):
        shown.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    for timing in sorted(result.timings, key=lambda t: t.median):
        style = "bold" if timing.name == "ours" else "dim" if timing.floor else ""
        shown.add_row(
            timing.name,
            f"{timing.median:.3f}",
            f"{timing.best:.3f}-{max(timing.seconds):.3f}",
            f"{timing.median / result.ours.median:.2f}",
            f"{timing.median / floor:.2f}",
            "" if timing.loss_error is None else f"{timing.loss_error:.0e}",
            style=style,
        )
    if result.peers:
        name, ratio = next(iter(result.speedups.items()))
        shown.caption = (
            f"{ratio:.2f} times as fast as the fastest peer, {name} (by best calls {result.speedup_of_best:.2f})"
        )
    for name, reason in result.left_out.items():
        shown.caption = f"{shown.caption or ''}\n{name} is left out: {reason}"
    return shown


def as_json(results: list[Result]) -> dict[str, Any]:
    return {
        "machine": machine.describe(),
        "results": [asdict(result) | {"speedups": result.speedups} for result in results],
    }


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")  # peers warn about their own deprecations; a wrong loss is caught above
    console = Console()
    real = options.synthetic is None and workloads.have_real_data()
    if options.synthetic is None and not real:
        console.print("No LLMBar or no SmolLM2 here: a synthetic batch with the same share of rows instead.")
    whole = (
        workloads.llmbar(options.batch_size, options.length)
        if real
        else workloads.synthetic(options.batch_size, options.length, share=options.synthetic or workloads.LLMBAR_SHARE)
    )
    results: list[Result] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for name in options.dtype:
            dtype = getattr(torch, name)
            workload, rounds = whole, options.rounds
            if dtype != torch.float32 and not machine.has_bf16_gemm():
                console.print(f"This processor emulates {name} matrix products: a small shape and few rounds for it.")
                workload, rounds = whole.smaller(pairs=1, vocabulary=8192), min(rounds, 3)
            for head in options.head:
                result = measure(
                    workload.cast(dtype),
                    trained=head == "trained",
                    names=_names(options, dtype),
                    rounds=rounds,
                    progress=progress,
                )
                results.append(result)
                console.print(table(result), "")
                if options.json:  # after every case, so that an interrupted run leaves what it has
                    options.json.write_text(json.dumps(as_json(results), indent=1))


def _names(options: argparse.Namespace, dtype: torch.dtype) -> list[str]:
    """The peers to run: in fp32, plain and its upcast are one; Liger compiled stands for Liger, unless asked for."""
    names = options.peer or [name for name in peers.available() if not (options.quick and name in SLOW)]
    if not options.peer and "Liger compiled" in names:
        names.remove("Liger")
    return [name for name in names if not (name == "plain fp32" and dtype == torch.float32)]


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.head_loss",
        description="Time of forward + backward of head and loss, ours and the peers'.",
    )
    parser.add_argument(
        "--batch-size", type=int, default=4, help="pairs in the batch (default: 4, which is 8 sequences)"
    )
    parser.add_argument("--length", type=int, default=256, help="longest sequence (default: 256)")
    parser.add_argument(
        "--dtype", nargs="+", default=["float32", "bfloat16"], choices=["float32", "bfloat16", "float16"]
    )
    parser.add_argument("--head", nargs="+", default=["frozen", "trained"], choices=["frozen", "trained"])
    parser.add_argument(
        "--peer", nargs="+", choices=list(peers.PEERS), help="only these (default: every one installed)"
    )
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each (default: 11)")
    parser.add_argument("--quick", action="store_true", help=f"fp32, 3 rounds, without {' and '.join(SLOW)}")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--synthetic", type=float, metavar="SHARE", help="random data of which this share matters")
    parser.add_argument("--json", type=Path, help="write every number, the machine and the versions here")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.dtype = 3, ["float32"]
    return options


if __name__ == "__main__":
    main()
