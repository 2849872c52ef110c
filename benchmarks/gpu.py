"""Time and peak memory of head and loss on a GPU: ours beside every peer, for the lm-heads of seven models.

    python -m benchmarks.gpu                    # all of it; tables, results.json and plots in runs/gpu
    python -m benchmarks.gpu --quick            # a minute: two small models, few rounds, nothing that compiles
    python -m benchmarks.gpu --keep 0.42        # as many positions matter as in LLMBar, instead of all of them
    python -m benchmarks.gpu --shape Llama-3-8B 4096x32000 --head trained --dtype float16

For every model and head (evaluation: no gradient; frozen; trained) each contestant first has to give the loss that
float64 arithmetic gives on the same numbers. Its second call is measured for memory, the most that the allocator held
above the inputs, gradients included. Then all take turns, one call each per round in a new order every round, timed by
events on the device's own time line: forward with the graph recorded, backward, and their sum, which is what to compare
(Liger, and our single pass, make their gradients in the forward pass). All are given padded labels, so that finding the
rows that matter is timed as well. The floor, "bare GEMMs", is the lm-head's matrix products
over the rows that matter, into buffers that already exist.

Every result is written when it is known. The same command again, on the same machine with the same versions and
options, measures only what is missing.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

from benchmarks import machine, peers, shapes, workloads
from benchmarks.head_loss import BETA, TOLERANCE, exact_loss
from benchmarks.shapes import SHAPES, ModelShape
from benchmarks.workloads import LLMBAR_SHARE, Workload
from orpo_kernels import plan

HEADS = {"evaluation": (False, False), "frozen": (True, False), "trained": (True, True)}  # hidden, head require grad
OURS = {"ours": "auto", "ours, torch": "torch"}  # the same schedules with and without our kernels
PEERS = ("plain", "plain fp32", "plain compiled", "Liger compiled", "TRL-composed", "torch native", "CCE")
FLOOR = "bare GEMMs"
QUICK = {"shape": ["SmolLM2-135M", "Llama-3.2-1B"], "peer": ["plain", "TRL-composed", "torch native"], "rounds": 5}
NO_GPU = (
    "This benchmark needs a GPU that torch can use, NVIDIA's with a CUDA build or AMD's with a ROCm build, but "
    "torch.cuda.is_available() is False here."
)
NOT_A_GPU = "NO GPU MEASUREMENT: a trial run of the command on a CPU"


@dataclass(frozen=True)
class Measurement:
    """One contestant on one model and head: seconds per round, or why there are none."""

    shape: str
    head: str
    name: str
    forward: list[float]
    backward: list[float]  # empty in evaluation
    peak_bytes: int | None = None  # above the inputs; None where it was not measured
    loss_error: float | None = None  # relative, to float64
    failure: str | None = None

    @property
    def median(self) -> float:
        """Of forward + backward."""
        backward = self.backward or [0.0] * len(self.forward)
        return statistics.median(sum(parts) for parts in zip(self.forward, backward, strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


class Marks:
    """Points on the time line of a device: events in a GPU's queue, or the clock of a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self.marks: list[Any] = []
        self._wait()

    def add(self) -> None:
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Between each mark and the next."""
        self._wait()
        pairs = list(zip(self.marks[:-1], self.marks[1:], strict=True))
        return [a.elapsed_time(b) / 1e3 if self.on_gpu else b - a for a, b in pairs]

    def _wait(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()


@dataclass(frozen=True)
class Contestant:
    """A forward pass, and the backward pass of what it returned."""

    forward: Callable[[], Any]
    backward: Callable[[Any], None]


class Contest:
    """One model's inputs under one head, and everybody who takes part."""

    def __init__(self, work: Workload, head: str) -> None:
        train_hidden, train_head = HEADS[head]
        self.work, self.head = work, head
        self.hidden = work.hidden.detach().requires_grad_(train_hidden)
        self.weight = work.weight.detach().requires_grad_(train_head)
        self.bias = None if work.bias is None else work.bias.detach().requires_grad_(train_head)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def contestant(self, name: str) -> Contestant:
        """Ours, a peer, or the floor, on these inputs.

        Raises:
            RuntimeError: a peer that is not installed, or that cannot compute this head.
        """
        if name == FLOOR:
            floor = peers.GemmFloor(self.work.rows, self.hidden, self.weight)
            return Contestant(floor.forward, lambda _: floor.backward())
        inputs = (self.hidden, self.weight, self.work.labels, self.work.nll_labels, BETA)
        options = {} if self.work.logit_softcap is None else {"logit_softcap": self.work.logit_softcap}
        loss = functools.partial(peers.ours, backend=OURS[name]) if name in OURS else self._peer(name)
        return Contestant(functools.partial(loss, *inputs, bias=self.bias, **options), Tensor.backward)

    def _peer(self, name: str) -> peers.Peer:
        peer = peers.PEERS[name]
        if not peer.available:
            raise RuntimeError(f"the package {peer.package} is not installed, or this version lacks the function")
        if self.bias is not None and not peer.bias:
            raise RuntimeError("takes no lm-head bias")
        if self.work.logit_softcap is not None and not peer.softcap:
            raise RuntimeError("takes no soft-cap")
        return peer

    def run(self, contestant: Contestant) -> tuple[list[float], Any]:
        """Seconds of forward and (unless evaluating) backward of one call, and what the forward pass returned."""
        self.clear()
        with torch.set_grad_enabled(self.head != "evaluation"):
            marks = Marks(self.device)
            marks.add()
            result = contestant.forward()
            marks.add()
            if self.head != "evaluation":
                contestant.backward(result)
                marks.add()
        return marks.seconds(), result

    def peak_bytes(self, contestant: Contestant) -> int | None:
        """The most that one call allocated above what was there before it; None on a CPU."""
        self.clear()
        on_gpu = self.device.type == "cuda"
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        self.run(contestant)
        return torch.cuda.max_memory_allocated() - before if on_gpu else None

    def clear(self) -> None:
        for leaf in (self.hidden, self.weight, self.bias):
            if leaf is not None:
                leaf.grad = None


def measure(
    shape: ModelShape,
    work: Workload,
    exact: float,
    head: str,
    names: Sequence[str],
    rounds: int,
    advance: Callable[[], None],
) -> list[Measurement]:
    """Everybody's check against the loss `exact`, peak memory and times.

    advance: called for each contestant 1 + rounds times.
    """
    torch.compiler.reset()  # else the compiled peers run into the limit of recompilations, and on uncompiled
    contest = Contest(work, head)
    ready: dict[str, Contestant] = {}
    peaks: dict[str, int | None] = {}
    errors: dict[str, float] = {}
    failures: dict[str, str] = {}

    def attempt(name: str, step: Callable[[], None]) -> None:
        """Run `step`; what goes wrong is that contestant's result, and its memory is given back."""
        try:
            step()
        except Exception as error:  # a peer that cannot run here is a finding, not a reason to stop
            failures[name] = reason(error)
        if name in failures:
            ready.pop(name, None)
            contest.clear()
            release(contest.device)

    def prepare(name: str) -> None:
        contestant = contest.contestant(name)
        _, result = contest.run(contestant)  # compiles, tunes, warms up; some compile again at the next call
        if name != FLOOR:
            errors[name] = abs(result.item() - exact) / abs(exact)
            if not errors[name] <= TOLERANCE[work.hidden.dtype]:
                raise ArithmeticError(f"its loss is off by {errors[name]:.1e}")
        del result
        peaks[name] = contest.peak_bytes(contestant)
        ready[name] = contestant

    for name in names:
        attempt(name, functools.partial(prepare, name))
        advance()

    forward: dict[str, list[float]] = {name: [] for name in names}
    backward: dict[str, list[float]] = {name: [] for name in names}

    def timed(name: str) -> None:
        seconds, _ = contest.run(ready[name])
        forward[name].append(seconds[0])
        backward[name] += seconds[1:]

    order, shuffle = list(names), random.Random(0).shuffle
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            if name in ready:
                attempt(name, functools.partial(timed, name))
            advance()
    ready.clear()
    contest.clear()
    release(contest.device)
    return [
        Measurement(shape.name, head, name, [], [], None, errors.get(name), failures[name])
        if name in failures
        else Measurement(shape.name, head, name, forward[name], backward[name], peaks[name], errors.get(name))
        for name in names
    ]


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return line if type(error) in (RuntimeError, ArithmeticError) else f"{type(error).__name__}: {line}"


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


# ---------------------------------------------------------------------------------------------------------------------
# Results: kept in a file, from which an interrupted run goes on
# ---------------------------------------------------------------------------------------------------------------------


class Results:
    """The measurements of one machine with one set of options, in `results.json` of a folder.

    Raises:
        ValueError: the file is of another machine, other versions or other options.
    """

    def __init__(self, folder: Path, options: dict[str, Any]) -> None:
        self.path, self.machine, self.options = folder / "results.json", machine.describe(), options
        self.measurements: list[Measurement] = []
        if not self.path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            return
        saved = json.loads(self.path.read_text())
        for what, mine in (("machine", self.machine), ("options", options)):
            other = [key for key in mine if key != "date" and mine[key] != saved[what].get(key)]
            if other:
                raise ValueError(
                    f"{self.path} is of another {what} ({', '.join(other)} differ): give another --output, or delete it"
                )
        names = [field.name for field in fields(Measurement)]
        self.measurements = [Measurement(**{name: record[name] for name in names}) for record in saved["results"]]

    def of(self, shape: ModelShape, head: str) -> dict[str, Measurement]:
        """By contestant; empty if it has not been measured."""
        return {m.name: m for m in self.measurements if (m.shape, m.head) == (shape.name, head)}

    def add(self, measurements: list[Measurement]) -> None:
        self.measurements += measurements
        text = json.dumps({"machine": self.machine, "options": self.options, "results": self._records()}, indent=1)
        unfinished = self.path.with_suffix(".tmp")
        unfinished.write_text(text)
        unfinished.replace(self.path)  # at once: an interruption leaves the old file or the new one

    def _records(self) -> list[dict[str, Any]]:
        """What was measured, and for the reader the medians and ratios."""
        records = []
        for m in self.measurements:
            all_of_them = {o.name: o for o in self.measurements if (o.shape, o.head) == (m.shape, m.head)}
            derived = {"median": None if m.failure else m.median, "to_ours": None, "to_gemms": None}
            for key, name in (("to_ours", "ours"), ("to_gemms", FLOOR)):
                derived[key] = ratio(m, all_of_them.get(name))
            records.append(asdict(m) | derived)
        return records


def ratio(of: Measurement, to: Measurement | None) -> float | None:
    """Of the medians of forward + backward."""
    return None if to is None or to.failure or of.failure else of.median / to.median


# ---------------------------------------------------------------------------------------------------------------------
# Showing
# ---------------------------------------------------------------------------------------------------------------------

COLUMNS = ("loss", "fwd ms", "bwd ms", "both ms", "/ ours", "/ GEMM", "GiB", "error")


def table(shape: ModelShape, by_head: dict[str, dict[str, Measurement]], subtitle: str) -> Table:
    """One model's measurements, a section for each head, the fastest first and those that failed last."""
    shown = Table(title=f"{shape}\n{subtitle}", box=SIMPLE_HEAD, padding=(0, 1))
    for column in COLUMNS:
        shown.add_column(column, justify="left" if column == "loss" else "right", no_wrap=True)
    for head, found in by_head.items():
        shown.add_section()
        shown.add_row(f"[italic]{TITLES[head]}")
        ok = sorted((m for m in found.values() if not m.failure), key=lambda m: m.median)
        for m in ok:
            shown.add_row(*_cells(m, found), style="bold" if m.name == "ours" else "dim" if m.name == FLOOR else "")
        for m in found.values():
            if m.failure:
                shown.add_row(m.name, "[red]failed", style="dim")
    failed = (m for found in by_head.values() for m in found.values() if m.failure)
    notes = [f"{m.name}, {TITLES[m.head]}: {m.failure}" for m in failed]
    shown.caption = "\n".join(["GiB: peak above the inputs; error: of the loss", *notes])
    return shown


TITLES = {"evaluation": "no gradient", "frozen": "head frozen", "trained": "head trained"}


def _cells(m: Measurement, found: dict[str, Measurement]) -> list[str]:
    def milliseconds(seconds: float | None) -> str:
        return "" if seconds is None else f"{seconds * 1e3:.3g}"

    ratios = (ratio(m, found.get(name)) for name in ("ours", FLOOR))
    return [
        m.name,
        milliseconds(statistics.median(m.forward)),
        milliseconds(statistics.median(m.backward) if m.backward else None),
        milliseconds(m.median),
        *("" if r is None else f"{r:.2f}" for r in ratios),
        "" if m.peak_bytes is None or m.name == FLOOR else f"{m.peak_bytes / 2**30:.3f}",
        "" if m.loss_error is None else f"{m.loss_error:.0e}",
    ]


def plot(results: Results, folder: Path, title: str) -> None:
    """time.png: forward + backward over the bare GEMMs. memory.png: peak GiB above the inputs."""

    def over_gemms(m: Measurement) -> float | None:
        return ratio(m, next((o for o in results.measurements if _same_case(o, m) and o.name == FLOOR), None))

    def gibibytes(m: Measurement) -> float | None:
        return None if m.peak_bytes is None else m.peak_bytes / 2**30

    _bars(results, over_gemms, "time / bare GEMMs", title, folder / "time.png", log=False)
    _bars(results, gibibytes, "peak GiB above the inputs", title, folder / "memory.png", log=True)


def _same_case(a: Measurement, b: Measurement) -> bool:
    return (a.shape, a.head) == (b.shape, b.head)


def _bars(
    results: Results, height: Callable[[Measurement], float | None], label: str, title: str, path: Path, log: bool
) -> None:
    """A panel for each head, a group of bars for each model, a bar for each contestant; a cross where it failed."""
    from matplotlib.figure import Figure

    found = [m for m in results.measurements if m.name != FLOOR]
    heads = [head for head in HEADS if any(m.head == head for m in found)]
    models, names = (list(dict.fromkeys(getattr(m, key) for m in found)) for key in ("shape", "name"))
    figure = Figure(figsize=(3 + 1.6 * len(models), 3.2 * len(heads)), layout="constrained")
    panels = figure.subplots(len(heads), 1, sharex=True, squeeze=False)[:, 0]
    width = 0.85 / len(names)
    for axis, head in zip(panels, heads, strict=True):
        axis.set(title=TITLES[head], ylabel=label)
        if log:
            axis.set_yscale("log")
        for i, name in enumerate(names):
            mine = [m for m in found if (m.head, m.name) == (head, name)]
            at = [models.index(m.shape) + (i - (len(names) - 1) / 2) * width for m in mine]
            heights = [height(m) for m in mine]
            bars = [(x, h) for x, h in zip(at, heights, strict=True) if h is not None]
            axis.bar([x for x, _ in bars], [h for _, h in bars], width, label=name, color=f"C{i}")
            failed = [x for x, m in zip(at, mine, strict=True) if m.failure]
            axis.plot(failed, [0.02] * len(failed), "x", color=f"C{i}", transform=axis.get_xaxis_transform())
        axis.grid(axis="y", alpha=0.3)
        if not log:
            axis.axhline(1, color="black", linewidth=0.8)
    panels[-1].set_xticks(range(len(models)), models, rotation=20)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(title)
    figure.savefig(path, dpi=120)


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    console, device = Console(), torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if options.quick:
        for name, value in QUICK.items():
            setattr(options, name, value)
    try:
        models = [shapes.named(text) for text in options.shape]
        results = Results(options.output, _measured_under(options))
    except ValueError as error:
        parser.error(str(error))
    warnings.filterwarnings("ignore")  # peers warn about their own deprecations; a wrong loss is caught
    where = machine.gpu()["name"] if device.type == "cuda" else NOT_A_GPU
    names = [FLOOR, *OURS, *_peers(options)]
    console.print(f"{where}. Results and plots go to {options.output}.", soft_wrap=True)

    missing = [(shape, head) for shape in models for head in options.head if not results.of(shape, head)]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("", total=len(missing) * len(names) * (1 + options.rounds))
        for shape in models:
            heads = [head for head in options.head if (shape, head) in missing]
            inputs = _inputs(shape, options, device) if heads else None
            for head in heads:
                progress.update(task, description=f"{shape.name}, {TITLES[head]}")
                advance = functools.partial(progress.advance, task)
                if inputs is None:
                    left_out = "out of memory: the inputs and their float64 copy do not fit"
                    results.add([Measurement(shape.name, head, name, [], [], failure=left_out) for name in names])
                else:
                    results.add(measure(shape, *inputs, head, names, options.rounds, advance))
            inputs = None
            by_head = {head: results.of(shape, head) for head in options.head}
            console.print(table(shape, by_head, f"{where}; {_subtitle(options)}"), _schedules(shape, options), "")
            plot(results, options.output, f"{where}\n{_subtitle(options)}")
    return 0


def _inputs(shape: ModelShape, options: argparse.Namespace, device: torch.device) -> tuple[Workload, float] | None:
    """The inputs in the dtype asked for, and their exact loss; None if the device has no room for that."""
    try:
        work = workloads.synthetic(
            pairs=options.sequences // 2,
            length=options.length,
            hidden_size=shape.hidden_size,
            vocabulary=shape.vocab_size,
            share=options.keep,
            bias=shape.bias,
            logit_softcap=shape.logit_softcap,
            device=device,
        ).cast(getattr(torch, options.dtype))
        return work, exact_loss(work)
    except torch.OutOfMemoryError:
        return None


def _schedules(shape: ModelShape, options: argparse.Namespace) -> str:
    """What our plan chooses for each head."""
    chosen = {}
    for head in options.head:
        hidden, trained = HEADS[head]
        chosen[head] = plan(
            round(options.keep * options.sequences * options.length),
            shape.hidden_size,
            shape.vocab_size,
            dtype=getattr(torch, options.dtype),
            device=options.device,
            needs_hidden=hidden,
            needs_weight=trained,
            needs_bias=trained and shape.bias,
            softcap=shape.logit_softcap is not None,
            largest_pair=lambda: 2 * options.length,
        )
    parts = (f"{TITLES[head]}: {c.schedule}, {c.gemms} GEMM{'s' * (c.gemms > 1)}" for head, c in chosen.items())
    return "ours: " + "; ".join(parts)


def _subtitle(options: argparse.Namespace) -> str:
    shape = f"{options.sequences} x {options.length} tokens, {options.keep:.0%} of them matter"
    return f"{options.dtype}, {shape}, median of {options.rounds}"


def _measured_under(options: argparse.Namespace) -> dict[str, Any]:
    """The options that a number depends on; models and heads are in the results themselves."""
    names = ("device", "dtype", "sequences", "length", "keep", "rounds")
    return {name: getattr(options, name) for name in names} | {"peers": _peers(options)}


def _peers(options: argparse.Namespace) -> list[str]:
    """In fp32, plain and its upcast are one."""
    return [name for name in options.peer if not (name == "plain fp32" and options.dtype == "float32")]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu",
        description="Time and peak memory of head and loss on a GPU, ours and the peers'.",
    )
    parser.add_argument(
        "--shape", nargs="+", default=list(SHAPES), metavar="MODEL", help=f"{', '.join(SHAPES)}, or HxV (default: all)"
    )
    parser.add_argument("--head", nargs="+", default=list(HEADS), choices=list(HEADS))
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--sequences", type=_even, default=8, help="chosen and rejected together (default: 8)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each (default: 1024)")
    parser.add_argument(
        "--keep",
        type=float,
        default=1.0,
        metavar="SHARE",
        help=f"of the positions that matter (default: 1; in LLMBar it is {LLMBAR_SHARE})",
    )
    parser.add_argument("--peer", nargs="*", default=list(PEERS), choices=list(peers.PEERS), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=11, help="timed calls of each (default: 11)")
    parser.add_argument(
        "--quick", action="store_true", help="a minute: two small models, few rounds, nothing that compiles"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/gpu"), help="folder (default: runs/gpu)")
    parser.add_argument(
        "--device", default="cuda", choices=["cuda", "cpu"], help="cpu only tries the command out: it measures no GPU"
    )
    return parser


def _even(text: str) -> int:
    number = int(text)
    if number < 2 or number % 2:
        raise argparse.ArgumentTypeError(f"{text} is not an even number: half are chosen, half rejected")
    return number


if __name__ == "__main__":
    sys.exit(main())
