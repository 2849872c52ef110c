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


def cases(settings: Settings) -> list[Case]:
    """All cases, in the order in which they run: what a reader looks at first comes first."""
    found = [*_real(settings)]
    if settings.device == "cpu":
        found += _accounting(settings)
    found += _confidence(settings)
    if settings.full:
        found += [*_shares(settings), *_growth(settings), *_processes(settings), *_steps(settings)]
    found += _models(settings)
    if settings.full:
        found += [*_kept_pages(settings), Case("estimate", estimate)]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Contests
# ---------------------------------------------------------------------------------------------------------------------


def _real(settings: Settings) -> Iterator[Case]:
    """Hidden states of SmolLM2 on LLMBar, and their real masks; where they are missing, a synthetic batch like them."""
    name = "llmbar" if workloads.have_real_data() else "synthetic"
    for dtype in settings.dtypes:
        yield from _contests(f"contest/{name}", _real_work, dtype, settings.heads, settings, everyone=settings.full)


@functools.cache
def _real_work() -> Workload:
    return workloads.llmbar() if workloads.have_real_data() else workloads.synthetic()


def _kept_pages(settings: Settings) -> Iterator[Case]:
    """The contests of real hidden states once more. After all others: malloc is not quite as before afterwards."""
    if settings.device == "cpu" and malloc.available():
        for case in _real(replace(settings, full=False)):
            yield Case(case.key.replace("contest", "kept pages"), functools.partial(_with_kept_pages, case))


def _with_kept_pages(case: Case, progress: Progress) -> dict[str, Any]:
    with malloc.kept_pages():
        return case.run(progress)


def _shares(settings: Settings) -> Iterator[Case]:
    for share in SHARES:
        work = functools.partial(workloads.synthetic, pairs=2, share=share)
        yield from _contests(f"contest/share {share}", work, settings.narrow, settings.heads, settings)


def _growth(settings: Settings) -> Iterator[Case]:
    """All rows matter, sequences of 128; the head of SmolLM2's width, trained."""
    few = replace(settings, rounds=min(settings.rounds, 3))
    for rows in ROWS:
        if settings.device == "cuda" or rows <= ROWS_TIMED_ON_A_CPU:
            work = functools.partial(_dense, rows, 32768)
            yield from _contests(f"rows/{rows}", work, settings.narrow, ("trained",), few)
    for vocabulary in VOCABULARIES:
        work = functools.partial(_dense, 512, vocabulary)
        yield from _contests(f"vocabulary/{vocabulary}", work, settings.narrow, ("trained",), few)


def _dense(rows: int, vocabulary: int) -> Workload:
    return workloads.synthetic(rows // 256, 128, vocabulary=vocabulary, share=1.0)


def _models(settings: Settings) -> Iterator[Case]:
    """The heads of known models: on a GPU in batches of 8 x 1024 tokens, on a CPU of 2 x 64, half of which matter."""
    names = settings.models or (list(SHAPES) if settings.full else ())
    for name in names:
        work = functools.partial(_of_model, named(name), settings.device)
        yield from _contests(f"contest/{name}", work, settings.narrow, settings.heads, settings)


def _of_model(shape: ModelShape, device: str) -> Workload:
    if device == "cuda":
        return workloads.of_model(shape, pairs=4, length=1024, share=1.0, device=device)
    return workloads.of_model(shape, pairs=1, length=64, share=0.5)


def _contests(
    key: str,
    work: Callable[[], Workload],
    dtype: str,
    heads: tuple[str, ...],
    settings: Settings,
    everyone: bool = False,
) -> Iterator[Case]:
    for head in heads:
        run = functools.partial(_contest, work, dtype, head, settings, everyone)
        yield Case(f"{key}/{dtype}/{head}", run)


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
# Memory
# ---------------------------------------------------------------------------------------------------------------------


def _accounting(settings: Settings) -> Iterator[Case]:
    """bf16, H = 4096. The three tables: ways to cut 8192 rows, how the rows grow, how the vocabulary grows."""
    shapes = {
        "shapes": memory.SAME_POSITIONS,
        "padding": memory.SAME_ROWS,
        "rows": [memory.Shape(8, rows // 8) for rows in ROWS],
        "vocabulary": [memory.Shape(8, 1024, vocabulary=v) for v in VOCABULARIES],
    }
    for name, list_of_shapes in shapes.items():
        yield Case(f"memory/{name}", functools.partial(_account, list_of_shapes))


def _account(shapes: list[memory.Shape], progress: Progress) -> dict[str, Any]:
    return memory.account(progress.track(memory.our_cases() + memory.peer_cases(), description="accounting"), shapes)


def _processes(settings: Settings) -> Iterator[Case]:
    if settings.device == "cpu":
        dtype = settings.dtypes[0]
        yield Case(f"process/{dtype}", functools.partial(_resident, settings, dtype))


def _resident(settings: Settings, dtype: str, progress: Progress) -> dict[str, Any]:
    names = [name for name in contestants(settings, dtype, everyone=True) if name not in turns.FLOORS]
    task = progress.add_task("a process each", total=len(names))
    work = _real_work().cast(getattr(torch, dtype))
    found = process.measure(work, names, settings.heads, settings.threads, lambda: progress.advance(task))
    progress.remove_task(task)
    return {"work": str(work), "dtype": dtype, "bytes": found}


# ---------------------------------------------------------------------------------------------------------------------
# Confidence, the whole step, the estimate
# ---------------------------------------------------------------------------------------------------------------------


def _confidence(settings: Settings) -> Iterator[Case]:
    for dtype in settings.dtypes:
        yield Case(f"confidence/{dtype}", functools.partial(_gaps, settings, dtype))


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


def _steps(settings: Settings) -> Iterator[Case]:
    if workloads.have_real_data() and peers.PEERS["TRL trainer"].available:
        for data, dtype in itertools.product(("llmbar", "dpo"), settings.dtypes):
            yield Case(f"step/{data}/{dtype}", functools.partial(_step, settings, data, dtype))


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
