"""The row-wise passes on a CPU against what bounds them: the machine's copy bandwidth, and its throughput of exp.

    python -m benchmarks.kernels.rowwise                       # bf16, fp16, fp32 at V = 49152 and 128256
    python -m benchmarks.kernels.rowwise --dtype bfloat16 --vocabulary 128256 --json rowwise.json

Every pass works on a chunk that no cache holds. The bound by memory is `torch.Tensor.copy_` of as many bytes as the
pass reads and writes (the best of its medians within the run); the bound by arithmetic is our own exp of every logit,
from and to the L1 cache; and where the two do not overlap, both in turn. Ours, the eager operations and the bounds take
turns.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.report.tables import Sheet
from benchmarks.timing import in_turns, wall_seconds
from orpo_kernels.app import machine
from orpo_kernels.ops import torch_ops, why_not

PASSES = ("residual", "statistics", "recomputed")
DTYPES = ("bfloat16", "float16", "float32")
VOCABULARIES = (49152, 128256)
CHUNK_BYTES = 192 * 2**20  # several times any cache
L1_FLOATS = 2048  # and as many results: 16 KiB


@dataclass(frozen=True)
class Result:
    """One pass on one chunk: median seconds of each contestant, and the bytes that the pass must move."""

    name: str
    dtype: str
    rows: int
    vocabulary: int
    nbytes: int
    seconds: dict[str, float]  # ours, eager, copy, exp

    @property
    def gigabytes_per_second(self) -> float:
        return self.nbytes / self.seconds["ours"] / 1e9

    def share_of(self, bound: str) -> float:
        return self.seconds[bound] / self.seconds["ours"]

    @property
    def share(self) -> float:
        """Of the bound that binds: the slower of the two."""
        return max(self.share_of("copy"), self.share_of("exp"))

    @property
    def share_in_turn(self) -> float:
        """Of both bounds one after the other: 1 and more is where one hides behind the other."""
        return self.share_of("copy") + self.share_of("exp")

    @property
    def speedup(self) -> float:
        return self.seconds["eager"] / self.seconds["ours"]


class Chunk:
    """Logits, as they come from the product, and everything that the passes take beside them."""

    def __init__(self, rows: int, vocabulary: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        self.source = (torch.randn(rows, vocabulary, generator=generator) * 3).to(dtype)
        self.logits, self.other = torch.empty_like(self.source), torch.empty_like(self.source)
        self.target = torch.randint(vocabulary, (rows,), generator=generator)
        self.log_odds, self.lse_others = torch.empty(2, rows, dtype=torch.float64)
        self.lse_others.copy_(self.source.float().logsumexp(1))

    def fill(self) -> None:
        self.logits.copy_(self.source)

    def ours(self, name: str) -> None:
        from orpo_kernels import _native

        options = (1.0, None, torch.get_num_threads())
        if name == "residual":
            _native.residual_(self.logits, self.target, self.log_odds, *options)
        elif name == "statistics":
            _native.statistics(self.logits, self.target, self.log_odds, self.lse_others, *options)
        else:
            _native.recomputed_residual_(self.logits, self.target, self.lse_others, *options)

    def eager(self, name: str) -> None:
        """The same by `torch_ops`, without its product."""
        if name == "residual":
            torch_ops.residual_(self.logits, self.target, 1.0, None)
            return
        z, _ = torch_ops._transform(self.logits, 1.0, None, False)
        if name == "statistics":
            torch_ops._statistics_(z, self.target[:, None])
            return
        z.sub_(self.lse_others[:, None].to(z.dtype)).exp_()
        torch_ops._finish(z, self.target[:, None], z.new_full((), -1.0).expand(len(z), 1), None, self.logits)

    def copy(self, name: str) -> None:
        """As many bytes: read and written, of half of the chunk where the pass only reads."""
        rows = len(self.logits) // (2 if name == "statistics" else 1)
        self.other[:rows].copy_(self.logits[:rows])

    def exp(self, name: str) -> None:
        """As many exponentials, each thread in its own L1 cache."""
        from orpo_kernels import _native

        threads = torch.get_num_threads()
        x, out = torch.linspace(-20, 0, L1_FLOATS), torch.empty(threads * L1_FLOATS)
        _native.exp(x, out, -(-self.logits.numel() // (threads * L1_FLOATS)), threads)


def measure(dtype: torch.dtype, vocabulary: int, rounds: int, chunk_bytes: int = CHUNK_BYTES) -> list[Result]:
    """Every pass on one chunk, all contestants in turn, in a new order every round."""
    rows = max(2, chunk_bytes // (vocabulary * dtype.itemsize))
    chunk = Chunk(rows, vocabulary, dtype)
    name_of_dtype = str(dtype).removeprefix("torch.")

    def seconds(run: tuple[str, str]) -> float:
        name, who = run
        chunk.fill()
        return wall_seconds(partial(getattr(chunk, who), name), chunk.logits.device)

    runs = [(name, who) for name in PASSES for who in ("ours", "eager", "copy", "exp")]
    times = in_turns(runs, rounds, seconds, warm_up=1)  # the first touches every page
    medians = {run: statistics.median(values) for run, values in times.items()}
    size = chunk.logits.numel() * dtype.itemsize
    # One machine, one bandwidth: the best that any of the copies showed, for all passes.
    copy = min(medians["residual", "copy"], medians["recomputed", "copy"], 2 * medians["statistics", "copy"])
    exp = min(medians[name, "exp"] for name in PASSES)
    return [
        Result(
            name,
            name_of_dtype,
            rows,
            vocabulary,
            nbytes=size if name == "statistics" else 2 * size,
            seconds={
                "ours": medians[name, "ours"],
                "eager": medians[name, "eager"],
                "copy": copy / 2 if name == "statistics" else copy,
                "exp": exp,
            },
        )
        for name in PASSES
    ]


def table(results: list[Result], isa: str) -> Sheet:
    rows = [
        [
            result.name,
            result.dtype,
            str(result.vocabulary),
            f"{result.gigabytes_per_second:.1f}",
            f"{result.share_of('copy'):.0%}",
            f"{result.share_of('exp'):.0%}",
            f"{result.share_in_turn:.0%}",
            f"{result.speedup:.1f}",
        ]
        for result in results
    ]
    copy = max(result.nbytes / result.seconds["copy"] for result in results) / 1e9
    exp = max(result.rows * result.vocabulary / result.seconds["exp"] for result in results) / 1e9
    note = f"copy {copy:.1f} GB/s read and written, exp {exp:.2f} G/s, both at their best"
    title = f"Row-wise passes on {torch.get_num_threads()} threads, {isa}"
    return Sheet(title, ("pass", "dtype", "V", "GB/s", "of copy", "of exp", "of both", "eager / ours"), rows, [note])


def as_json(results: list[Result], isa: str) -> dict[str, Any]:
    def with_derived(r: Result) -> dict[str, Any]:
        return {**asdict(r), "gigabytes_per_second": r.gigabytes_per_second, "share": r.share, "speedup": r.speedup}

    return {"machine": machine.describe(), "isa": isa, "results": [with_derived(result) for result in results]}


def main() -> None:
    options = _options()
    torch.set_num_threads(options.threads)
    console = Console()
    if reason := why_not("native", torch.device("cpu")):
        raise SystemExit(f"Nothing to measure: {reason}.")
    from orpo_kernels import _native

    results: list[Result] = []
    cases = list(itertools.product(options.dtype, options.vocabulary))
    for dtype, vocabulary in track(cases, "measuring", console=Console(stderr=True), transient=True):
        results += measure(getattr(torch, dtype), vocabulary, options.rounds)
        if options.json:  # after every case, so that an interrupted run leaves what it has
            options.json.write_text(json.dumps(as_json(results, _native.isa()), indent=1))
    console.print(table(results, _native.isa()).rich())


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.kernels.rowwise",
        description="The row-wise passes on a CPU against the machine's copy bandwidth and its throughput of exp.",
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--vocabulary", nargs="+", type=int, default=list(VOCABULARIES))
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", type=Path, help="also write the figures and the machine to this file")
    return parser.parse_args()


if __name__ == "__main__":
    main()
