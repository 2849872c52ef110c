"""What `python -m benchmarks` measures: a list of cases, each with a key, and a record for the results file.

contest/WORKLOAD/DTYPE/HEAD    everybody on one workload (`contest`)
rows/N/DTYPE, vocabulary/V/DTYPE    the same, along one size: how cost grows
process/DTYPE                  resident memory of fresh processes (`process`)
memory/shapes, /rows, /vocabulary    peak bytes by accounting, at the size of an 8B model's head (`memory`)
confidence/DTYPE               errors at logit gaps of 1 to 80 (`confidence`)
step/DATA/DTYPE                the whole training step (`training_step`)
kept pages/WORKLOAD/DTYPE/HEAD    a contest in a process whose malloc keeps what is freed (`malloc`)
estimate                       what GPUs' data sheets make of our launches (`roofline`): no measurement
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from rich.progress import Progress

from benchmarks.contest import confidence, malloc, memory, peers, process, training_step, turns, workloads
from benchmarks.contest.workloads import Workload
from benchmarks.estimates import roofline
from benchmarks.shapes import SHAPES, ModelShape, named
from orpo_kernels.app import machine

ROUNDS = {False: 3, True: 5}  # by `Settings.full`
STEP_ROUNDS = 10  # of a whole training step, whose batches differ in length
SHARES = (0.3, 0.5, 1.0)
ROWS = (256, 1024, 4096, 16384, 65536)
VOCABULARIES = (32768, 65536, 131072, 262144)
COUNTED = {  # bf16, H = 4096: ways to cut 8192 rows, padding, how the rows grow, how the vocabulary grows
    "shapes": memory.SAME_POSITIONS,
    "padding": memory.SAME_ROWS,
    "rows": [memory.Shape(8, rows // 8) for rows in ROWS],
    "vocabulary": [memory.Shape(8, 1024, vocabulary=v) for v in VOCABULARIES],
}
ROWS_TIMED_ON_A_CPU = 4096  # at most: 16 times as many take 16 times as long
ON_A_CPU = ("CCE",)  # the compiled peer that takes part everywhere: the strongest there, and quick to compile


@dataclass(frozen=True)
class Settings:
    """What was asked for. `full` has more cases, contestants and rounds; `peers` None: every one that is installed."""

    full: bool = False
    device: str = "cpu"
    dtypes: tuple[str, ...] = ("float32",)
    heads: tuple[str, ...] = ("frozen", "trained")
    peers: tuple[str, ...] | None = None
    models: tuple[str, ...] = ()
    rounds: int = 3
    threads: int = 2

    @property
    def narrow(self) -> str:
        """The dtype of the cases that take one: the last, so a 16-bit one where the hardware has it."""
        return self.dtypes[-1]


@dataclass(frozen=True)
class Case:
    """One record of the results."""

    key: str
    run: Callable[[Progress], dict[str, Any]]


def default_dtypes(device: str) -> tuple[str, ...]:
    """fp32, and bf16 where matrix products in it run in hardware."""
    return ("float32", "bfloat16") if device == "cuda" or machine.has_bf16_gemm() else ("float32",)


def cases(settings: Settings) -> Iterator[Case]:
    """All cases, in the order in which they run: what a reader looks at first comes first."""
    yield from _real(settings)
    if settings.device == "cpu":
        for name, counted in COUNTED.items():
            yield Case(f"memory/{name}", partial(_account, counted))
    for dtype in settings.dtypes:
        yield Case(f"confidence/{dtype}", partial(_gaps, settings, dtype))
    if settings.full:
        for share in SHARES:
            make = partial(workloads.synthetic, pairs=2, share=share)
            yield from _contests(f"contest/share {share}", make, settings.narrow, settings)
        yield from _growth(settings)
        if settings.device == "cpu":
            yield Case(f"process/{settings.dtypes[0]}", partial(_resident, settings, settings.dtypes[0]))
        if workloads.have_real_data() and peers.PEERS["TRL trainer"].available:
            for data, dtype in itertools.product(training_step.CASES, settings.dtypes):
                yield Case(f"step/{data}/{dtype}", partial(_step, settings, data, dtype))
    for model in settings.models or (list(SHAPES) if settings.full else ()):
        make = partial(_of_model, named(model), settings.device)
        yield from _contests(f"contest/{model}", make, settings.narrow, settings)
    if settings.full:
        if settings.device == "cpu" and malloc.available():
            # After all other contests: malloc is not quite as before afterwards.
            for case in _real(replace(settings, full=False)):
                yield Case(case.key.replace("contest", "kept pages"), partial(_with_kept_pages, case))
        yield Case("estimate", estimate)


# ---------------------------------------------------------------------------------------------------------------------
# Contests
# ---------------------------------------------------------------------------------------------------------------------


def _real(settings: Settings) -> Iterator[Case]:
    """Hidden states of SmolLM2 on LLMBar, and their real masks; where they are missing, a synthetic batch like them."""
    name = "llmbar" if workloads.have_real_data() else "synthetic"
    for dtype in settings.dtypes:
        yield from _contests(f"contest/{name}", _real_work, dtype, settings, everyone=settings.full)


@functools.cache
def _real_work() -> Workload:
    return workloads.llmbar() if workloads.have_real_data() else workloads.synthetic()


def _with_kept_pages(case: Case, progress: Progress) -> dict[str, Any]:
    with malloc.kept_pages():
        return case.run(progress)


def _growth(settings: Settings) -> Iterator[Case]:
    """All rows matter, sequences of 128; the head of SmolLM2's width, trained."""
    few = replace(settings, rounds=min(settings.rounds, 3), heads=("trained",))
    timed = [rows for rows in ROWS if settings.device == "cuda" or rows <= ROWS_TIMED_ON_A_CPU]
    sizes = {f"rows/{rows}": (rows, 32768) for rows in timed} | {f"vocabulary/{v}": (512, v) for v in VOCABULARIES}
    for key, (rows, vocabulary) in sizes.items():
        make = partial(workloads.synthetic, rows // 256, 128, vocabulary=vocabulary, share=1.0)
        yield from _contests(key, make, settings.narrow, few)


def _of_model(shape: ModelShape, device: str) -> Workload:
    """On a GPU a batch of 8 x 1024 tokens, on a CPU of 2 x 64, half of which matter."""
    if device == "cuda":
        return workloads.of_model(shape, pairs=4, length=1024, share=1.0, device=device)
    return workloads.of_model(shape, pairs=1, length=64, share=0.5)


def _contests(
    key: str, make: Callable[[], Workload], dtype: str, settings: Settings, everyone: bool = False
) -> Iterator[Case]:
    for head in settings.heads:
        yield Case(f"{key}/{dtype}/{head}", partial(_contest, make, dtype, head, settings, everyone))


def _contest(
    make: Callable[[], Workload], dtype: str, head: str, settings: Settings, everyone: bool, progress: Progress
) -> dict[str, Any]:
    names = contestants(settings, dtype, everyone)
    task = progress.add_task("everybody in turns", total=len(names) * (1 + settings.rounds))
    try:
        work = make()
        if settings.device == "cpu" and dtype != "float32" and not machine.has_bf16_gemm():
            work = work.smaller(pairs=1, vocabulary=8192)  # emulated products take up to a hundred times as long
        work = work.cast(getattr(torch, dtype)).to(settings.device)
        return turns.record(work, head, names, settings.rounds, lambda: progress.advance(task))
    except torch.OutOfMemoryError:
        failure = "out of memory: the inputs and their float64 copy do not fit"
        return {"work": "too large", "dtype": dtype, "head": head, "failure": failure, "measurements": []}
    finally:
        progress.remove_task(task)


def contestants(settings: Settings, dtype: str, everyone: bool) -> list[str]:
    """Floors, ours and the peers. In fp32, plain and its upcast are one; Liger compiled stands for Liger.

    everyone: those that compile for long or are slow, too.
    """
    ours = list(turns.OURS) if settings.device == "cuda" else ["ours"]
    installed = {peer.name: peer for peer in peers.PEERS.values() if peer.available}
    if settings.peers is not None:
        names = list(settings.peers)
    elif everyone:
        names = [name for name in installed if not (name == "Liger" and "Liger compiled" in installed)]
    else:
        names = [p.name for p in installed.values() if not p.slow and (not p.compiled or p.name in ON_A_CPU)]
    return [*turns.FLOORS, *ours, *(name for name in names if not (name == "plain fp32" and dtype == "float32"))]


# ---------------------------------------------------------------------------------------------------------------------
# Memory, confidence, the whole step, the estimate
# ---------------------------------------------------------------------------------------------------------------------


def _account(shapes: list[memory.Shape], progress: Progress) -> dict[str, Any]:
    return memory.account(progress.track(memory.our_cases() + memory.peer_cases(), description="accounting"), shapes)


def _resident(settings: Settings, dtype: str, progress: Progress) -> dict[str, Any]:
    names = [name for name in contestants(settings, dtype, everyone=True) if name not in turns.FLOORS]
    task = progress.add_task("a process each", total=len(names))
    work = _real_work().cast(getattr(torch, dtype))
    found = process.measure(work, names, settings.heads, settings.threads, lambda: progress.advance(task))
    progress.remove_task(task)
    return {"work": str(work), "dtype": dtype, "bytes": found}


def _gaps(settings: Settings, dtype: str, progress: Progress) -> dict[str, Any]:
    """Of those that do not compile: errors by side and gap."""
    names = [name for name in contestants(settings, dtype, True) if name not in turns.FLOORS]
    names = ["Liger" if name == "Liger compiled" else name for name in names]
    losses = {name: peers.ours for name in names if name in turns.OURS}
    losses |= {name: peers.PEERS[name].loss for name in names if name in peers.PEERS and not peers.PEERS[name].compiled}
    found = {}
    for name in progress.track(losses, description="logit gaps"):
        kind = getattr(torch, dtype)
        found[name] = {side: confidence.errors_by_gap(losses[name], kind, side) for side in confidence.SIDES}
    return {"dtype": dtype, "gaps": list(confidence.GAPS), "errors": found}


def _step(settings: Settings, data: str, dtype: str, progress: Progress) -> dict[str, Any]:
    bench = training_step.load(training_step.CASES[data], dtype)
    record = training_step.measure(bench, dtype, STEP_ROUNDS, progress)
    training_step.add_memory(record, data, settings.threads, progress)
    return record


def estimate(progress: Progress) -> dict[str, Any]:
    """8192 rows in bf16 on every model, schedule and GPU of the roofline."""
    kinds = itertools.product(SHAPES.values(), roofline.SCHEDULES, roofline.DATA_SHEETS)
    found = [
        roofline.estimate(shape, 8192, schedule, gpu)[0].record()
        for shape, schedule, gpu in progress.track(list(kinds), description="counting launches")
    ]
    return {"label": roofline.TITLE, "estimates": found}
