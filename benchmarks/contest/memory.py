"""Exact peak memory: every byte of every live storage, counted as each operation returns.

    with PeakBytes() as memory:          # real tensors, or fake ones under FakeTensorMode
        loss(hidden, weight, ...).backward()
    memory.peak                          # bytes that were alive at once and had not been before

A storage counts once, however many views look at it, from the operation that returned it until its last reference dies.
Under FakeTensorMode no storage has memory, so a head of 128256 x 4096 can be accounted for on a laptop. (Fake *cpu*
tensors: fake cuda tensors abort inside autograd.) What no accounting of this kind sees: fragmentation, and scratch that
a kernel allocates and frees inside one operation.

    python -m benchmarks.contest.memory                # table at N = 8192 rows, H = 4096, V = 128256, bf16, its growth
    python -m benchmarks.contest.memory --gpu sm_90    # the same through our Triton wrappers; peers as before
"""

from __future__ import annotations

import argparse
import itertools
import json
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks.contest import peers
from orpo_kernels import Limits, Rows, orpo_loss_from_rows
from orpo_kernels.app import machine
from orpo_kernels.engine.schedules import sparse
from orpo_kernels.ops import resolve

GIB = 2**30


# ---------------------------------------------------------------------------------------------------------------------
# The tracker
# ---------------------------------------------------------------------------------------------------------------------


class PeakBytes(TorchDispatchMode):
    """Counts the live bytes of every storage that an operation under it returns.

    baseline: tensors that count from the start (inputs and weights, say). Other tensors that exist on entry do not
    count, nor does writing into them.
    host_reads: what `.item()` or `bool(tensor)` answers on a fake tensor, which has no value. None lets it raise, so
    that accounting doubles as the proof that nothing reads the device.

    Attributes: `baseline`, `live` and `peak` in bytes, all including the baseline.
    """

    def __init__(self, baseline: Iterable[Tensor] = (), host_reads: bool | None = None) -> None:
        super().__init__()
        self.host_reads = host_reads
        self.live = self.peak = 0
        self._alive: dict[int, Any] = {}
        for tensor in baseline:
            self._track(tensor)
        self.baseline = self.live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default and self.host_reads is not None:
            return self.host_reads
        for argument in _tensors((args, kwargs)):
            self._track(argument, counts=False)  # not made here: it existed before
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            self._track(tensor)
        return out

    def _track(self, tensor: Tensor, counts: bool = True) -> None:
        storage = tensor.untyped_storage()
        key, nbytes = storage._cdata, storage.nbytes() if counts else 0
        if key not in self._alive:
            self.live += nbytes
            self.peak = max(self.peak, self.live)
            self._alive[key] = weakref.ref(storage, lambda _: self._free(key, nbytes))

    def _free(self, key: int, nbytes: int) -> None:
        del self._alive[key]
        self.live -= nbytes


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_iter(tree) if isinstance(leaf, Tensor))


@dataclass(frozen=True)
class Peak:
    """Bytes of one measurement: what it was given, and the most that was alive at once (what it was given included)."""

    baseline: int
    peak: int


def peak_bytes(run: Callable[[], Any], baseline: Iterable[Tensor], host_reads: bool | None = None) -> Peak:
    """The peak of `run()`, whose result is kept alive to its end, on top of the `baseline` tensors."""
    with PeakBytes(baseline, host_reads) as memory:
        result = run()
    del result
    return Peak(memory.baseline, memory.peak)


# ---------------------------------------------------------------------------------------------------------------------
# Cases: who, with which head
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """2B sequences of T positions, `rows` of which matter (None: all of them)."""

    sequences: int
    length: int
    rows: int | None = None
    hidden: int = 4096
    vocabulary: int = 128256

    @property
    def positions(self) -> int:
        return self.sequences * self.length

    def __str__(self) -> str:
        rows = "" if self.rows is None else f", {self.rows} rows matter"
        return f"{self.sequences} x {self.length}{rows}"


@dataclass(frozen=True)
class Case:
    """Somebody's loss, forward and (unless evaluating) backward, with a frozen or a trained head."""

    name: str
    loss: Callable[[Tensor, Tensor, Shape], Tensor]
    trained: bool
    gradient: bool = True
    host_reads: bool | None = None

    @property
    def head(self) -> str:
        return "no gradient" if not self.gradient else "trained" if self.trained else "frozen"

    def peak(self, shape: Shape, dtype: torch.dtype = torch.bfloat16) -> Peak:
        """Exact peak bytes of this case by fake-tensor accounting."""
        with FakeTensorMode(allow_non_fake_inputs=True):
            hidden = torch.empty(shape.sequences, shape.length, shape.hidden, dtype=dtype, requires_grad=self.gradient)
            weight = torch.empty(shape.vocabulary, shape.hidden, dtype=dtype, requires_grad=self.trained)

            def run() -> Any:
                if not self.gradient:
                    with torch.no_grad():
                        return self.loss(hidden, weight, shape)
                wanted = [tensor for tensor in (hidden, weight) if tensor.requires_grad]
                return torch.autograd.grad(self.loss(hidden, weight, shape), wanted)

            return peak_bytes(run, [hidden, weight], self.host_reads)


def peer_case(name: str, trained: bool) -> Case:
    """A peer on padded labels. It projects every position, so only the shape of the labels matters to its memory."""

    def loss(hidden: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        labels = torch.zeros(shape.sequences, shape.length, dtype=torch.int64)
        return peers.PEERS[name](hidden, weight, labels, labels[: shape.sequences // 2], 0.1)

    # Liger's backward asks on the host whether the upstream gradient differs from 1: it does not.
    return Case(name, loss, trained, host_reads=False)


def trl_composed_case(trained: bool) -> Case:
    """TRL-composed from rows, by its torch code: on a GPU, Triton folds its tiles with fewer temporaries."""

    def loss(hidden: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        index = torch.zeros(shape.rows or shape.positions, dtype=torch.int64)
        everywhere = torch.ones(len(index), dtype=torch.bool)
        rows = peers.ValidRows(index, index, index, everywhere, everywhere)
        return peers.trl_composed.from_rows(hidden, weight, rows, shape.sequences // 2, 0.1)

    return Case("TRL-composed (its torch path)", loss, trained)


def our_case(
    schedule: str, trained: bool, gradient: bool = True, limits: Limits | None = None, native: bool | None = None
) -> Case:
    """Ours, from rows: finding the rows reads the labels, which fake tensors do not have.

    "sparse" reads the number of active columns as well: to be run inside `active_columns`.

    native: account as on a device that multiplies in the tensors' dtype (True), or in fp32 (False), or as here (None).
    A processor without bf16 units makes our loss multiply in fp32, a slice at a time; peers leave that to the library.
    """

    def loss(hidden: Tensor, weight: Tensor, shape: Shape) -> Tensor:
        of_gemms = limits
        if native is not None:
            dtype = hidden.dtype if native else torch.promote_types(hidden.dtype, torch.float32)
            on_cpu = resolve("auto", hidden.device) != "triton"
            of_gemms = replace(limits or Limits.of(on_cpu), gemm_dtype=dtype)
        options: dict[str, Any] = {"schedule": schedule} if schedule != "sparse" else {"sparse_eps": 2.0**-14}
        return orpo_loss_from_rows(hidden.flatten(0, 1), weight, fake_rows(shape), limits=of_gemms, **options).loss

    return Case(f"ours, {schedule if gradient else 'evaluation'}", loss, trained, gradient)


def fake_rows(shape: Shape) -> Rows:
    """`Rows` of the right sizes: all scored, all with an NLL weight."""
    count = shape.positions if shape.rows is None else shape.rows
    index = torch.zeros(count, dtype=torch.int64)
    scored = torch.ones(count, dtype=torch.bool)
    return Rows(
        index, index.clone(), index.clone(), scored, torch.ones(count, dtype=torch.float64), shape.sequences // 2
    )


@contextmanager
def active_columns(share: float) -> Iterator[list[int]]:
    """How many columns are active, which the sparse schedule reads on the host, and tensors without data do not say.

    Gives the reads of all chunks so far: of how many blocks each was.
    """
    reads: list[int] = []

    def counted(ranks: Tensor, slices: list[slice]) -> list[Tensor]:
        reads.append(len(ranks))
        widths = [round(share * (columns.stop - columns.start)) for columns in slices]
        with unset_fake_temporarily():
            return [torch.tensor([0, *itertools.accumulate(widths)], dtype=torch.int32) for _ in range(len(ranks))]

    with mock.patch.object(sparse, "counted", counted):
        yield reads


def our_cases(native: bool | None = True) -> list[Case]:
    return [
        our_case("single_pass", trained=False, native=native),
        our_case("recompute", trained=True, native=native),
        our_case("resident", trained=True, native=native),
        our_case("auto", trained=True, gradient=False, native=native),
    ]


def peer_cases() -> list[Case]:
    """Those whose memory can be accounted for: no torch.compile, nothing opaque."""
    names = [name for name in ("plain", "plain fp32", "TRL trainer", "Liger") if peers.PEERS[name].available]
    cases = [peer_case(name, trained) for name in names for trained in (False, True)]
    if peers.PEERS["TRL-composed"].available:
        cases += [trl_composed_case(trained) for trained in (False, True)]
    return cases


def account(cases: Iterable[Case], shapes: list[Shape], dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    """A record of the results: the peaks of these cases at these shapes."""
    found = []
    for case in cases:
        peaks = [case.peak(shape, dtype) for shape in shapes]
        found.append({"loss": case.name, "head": case.head, "peaks": [peak.peak for peak in peaks]})
    sizes = [asdict(shape) | {"positions": shape.positions} for shape in shapes]
    baselines = [peak.baseline for peak in peaks]
    return {"dtype": str(dtype).removeprefix("torch."), "shapes": sizes, "baselines": baselines, "losses": found}


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------

SAME_POSITIONS = [Shape(16, 512), Shape(8, 1024), Shape(4, 2048), Shape(2, 4096)]
# 42 % of 16 x 512, then ever more padding
SAME_ROWS = [Shape(16, length, rows=3440) for length in (256, 512, 1024, 2048)]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contest.memory", description="Exact peak memory of head and loss."
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument(
        "--this-processor",
        action="store_true",
        help="account for our GEMMs as they run here: in fp32 where the dtype would be emulated",
    )
    parser.add_argument(
        "--gpu", help="account for our Triton kernels, as planned for and launched on sm_90, gfx942, ..."
    )
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args()
    from benchmarks.report.tables import memory_sheet

    kernels: AbstractContextManager = nullcontext()
    if options.gpu:
        from benchmarks.kernels.stub_gpu import TARGETS, stub_gpu

        if options.gpu not in TARGETS:
            parser.error(f"--gpu is {options.gpu}, it must be one of {', '.join(TARGETS)}")
        kernels = stub_gpu(options.gpu, compile=False)
    console, records = Console(width=max(Console().width, 110)), {}
    cases = our_cases(None if options.this_processor else True) + peer_cases()
    with kernels:
        for key, shapes in (("memory/shapes", SAME_POSITIONS), ("memory/padding", SAME_ROWS)):
            shown = track(cases, key, console=Console(stderr=True), transient=True)
            records[key] = account(shown, shapes, getattr(torch, options.dtype))
            console.print(memory_sheet(key, records[key]).rich(), "")
    if options.json:
        options.json.write_text(json.dumps({"machine": machine.describe(), "cases": records}, indent=1))


if __name__ == "__main__":
    main()
