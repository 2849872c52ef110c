"""ESTIMATE of the loss's time on GPUs, from the FLOPs and bytes of what is launched; what was measured: docs/gpu.md.

    python -m benchmarks.estimates.roofline                      # seven models, four schedules, five GPUs, bf16
    python -m benchmarks.estimates.roofline --launches --shape Llama-3-8B     # and what each kind of launch contributes
    python -m benchmarks.estimates.roofline --active 0.13        # and the sparse schedule, that share of columns active

Our loss runs on tensors without data, planned as for the GPU and with its kernels in place; every launch is recorded
with its shapes. A launch takes the time of its matrix products at the peak of the tensor cores, or of its compulsory
traffic (every operand read once, every result written once) at the peak of the memory's bandwidth, whichever is longer,
and launches follow one another:

    time = sum over launches of max(FLOPs / peak, bytes / bandwidth)

No GPU reaches its peaks, so the times are bounds from below; what they are good for is the ratio to the bare GEMMs (the
lm-head's products that exact gradients cannot do without) under the same two peaks. A ratio of 1.05 says that what we
do beside the GEMMs costs at least a twentieth of them.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import track
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from benchmarks import shapes
from benchmarks.contest import memory
from benchmarks.report.tables import Sheet
from benchmarks.shapes import SHAPES, ModelShape
from orpo_kernels import orpo_loss_from_rows
from orpo_kernels.app.gpus import DATA_SHEETS, GPU
from orpo_kernels.devices import KINDS, Kind
from orpo_kernels.engine.schedules import recompute, resident, single_pass, sparse
from orpo_kernels.engine.work import COLUMNS_PER_SPLIT
from orpo_kernels.ops import torch_ops

SCHEDULES = {"evaluation": 1, "single_pass": 2, "resident": 3, "recompute": 3}  # and the GEMMs under each
SPARSE = {"sparse, frozen": 2, "sparse, trained": 3}  # `sparse_eps`, and the GEMMs of the exact gradients
SECTOR = 32  # bytes that a GPU reads at a time
TITLE = "ESTIMATE, not a measurement"


# ---------------------------------------------------------------------------------------------------------------------
# What a launch costs: its name and sizes -> FLOPs of matrix products, bytes to and from device memory
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """An operation and its sizes, the arguments of its formula in `COSTS`."""

    name: str
    sizes: dict[str, int]

    @property
    def flops(self) -> int:
        return COSTS[self.name](**self.sizes)[0]

    @property
    def bytes(self) -> int:
        return COSTS[self.name](**self.sizes)[1]


def _gemm(m: int, k: int, n: int, itemsize: int, out_itemsize: int, accumulates: int) -> tuple[int, int]:
    """(m, k) @ (k, n): the operands, and the result, which is read as well where it is added to."""
    return 2 * m * k * n, itemsize * (m * k + k * n) + out_itemsize * m * n * (1 + accumulates)


def _project_log_odds(rows: int, hidden_size: int, columns: int, itemsize: int) -> tuple[int, int]:
    """Rows and weight once, the partial statistics of each split written and read; no logits.

    Persistent programs (sm_90) write and read 16 times the statistics, which is not in here.
    """
    partials = 2 * 12 * -(-columns // COLUMNS_PER_SPLIT) * rows
    return 2 * rows * hidden_size * columns, itemsize * (rows + columns) * hidden_size + partials + 24 * rows


COSTS: dict[str, Callable[..., tuple[int, int]]] = {
    "GEMM": _gemm,
    "project_log_odds": _project_log_odds,
    # One read and one write. A long row is read twice; what the L2 cache does not keep until then is not in here.
    "residual_": lambda rows, columns, itemsize: (0, 2 * itemsize * rows * columns + 16 * rows),
    "recomputed_residual_": lambda rows, columns, itemsize: (0, 2 * itemsize * rows * columns + 16 * rows),
    # One read; a target and two results a row, or a weight a row and two results a column.
    "statistics": lambda rows, columns, itemsize: (0, itemsize * rows * columns + 24 * rows),
    "column_statistics": lambda rows, columns, itemsize: (0, itemsize * rows * columns + 4 * rows + 8 * columns),
    # Active columns lie apart: each takes a sector, until all of the row is read. And a write of them.
    "gather_columns": lambda rows, columns, active, itemsize: (
        0, rows * (min(columns * itemsize, active * SECTOR) + active * itemsize + 8) + 8 * active
    ),
    # A GEMM whose epilogue writes the residual instead of the logits.
    "project_residual": lambda rows, hidden_size, columns, itemsize: (
        2 * rows * hidden_size * columns,
        itemsize * (rows * hidden_size + hidden_size * columns + rows * columns) + 16 * rows,
    ),
    # A read and a write of H numbers a row, its position and its coefficient.
    "gather_rows": lambda rows, hidden_size, itemsize, out_itemsize: (
        0, rows * (hidden_size * (itemsize + out_itemsize) + 16)
    ),
    # Rows read, positions read and written; the sort of the positions is a few bytes a row.
    "scatter_rows_": lambda rows, positions, hidden_size, itemsize, out_itemsize: (
        0, rows * (hidden_size * itemsize + 24) + 2 * min(rows, positions) * hidden_size * out_itemsize
    ),
    # A few numbers a row and a sequence.
    "sequence_sums": lambda rows, sequences: (0, 33 * rows + 24 * sequences),
    "odds_ratio": lambda rows, sequences: (0, 33 * rows + 24 * sequences),
    # Any other operation of torch: all that it reads and writes.
    "other": lambda bytes: (0, bytes),
}  # fmt: skip


def bare_gemms(shape: ModelShape, rows: int, schedule: str, itemsize: int) -> list[Launch]:
    """Logits, dh and dW, as far as the schedule's gradients need them: what nobody can do without."""
    h, v = shape.hidden_size, shape.vocab_size
    products = [(rows, h, v), (rows, v, h), (v, rows, h)][: (SCHEDULES | SPARSE)[schedule]]
    return [_gemm_launch(*sizes, itemsize, itemsize, False) for sizes in products]


def _gemm_launch(m: int, k: int, n: int, itemsize: int, out_itemsize: int, accumulates: bool) -> Launch:
    sizes = {"m": m, "k": k, "n": n, "itemsize": itemsize, "out_itemsize": out_itemsize}
    return Launch("GEMM", sizes | {"accumulates": int(accumulates)})


# ---------------------------------------------------------------------------------------------------------------------
# What our loss launches
# ---------------------------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Keeps a `Launch` for all that runs under it: the backend's operations, the library's GEMMs, and the rest.

    `ops` stands in for the Triton backend. It makes results of the right shapes by the eager operations, whose own
    launches do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[Launch] = []
        self.paused = False
        self.ops = SimpleNamespace(**{name: self._operation(name, sizes) for name, sizes in SIZES.items()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if not (self.paused or func.is_view or func.__name__.startswith(NO_LAUNCH) or func.namespace == "prim"):
            self.launches.append(_launch_of(func, args, kwargs, out))
        return out

    def matmul_into(self, out: Tensor, a: Tensor, b: Tensor, accumulate: bool = False) -> None:
        """Stands in for `gemm.matmul_into`, which takes a detour on a CPU where `out` is wider than the operands."""
        (m, k), n = a.shape, b.shape[1]
        self.launches.append(_gemm_launch(m, k, n, a.itemsize, out.itemsize, accumulate))

    def _operation(self, name: str, sizes: Callable[..., dict[str, int]]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            self.launches.append(Launch(name, sizes(*args)))
            self.paused = True
            try:
                return getattr(torch_ops, name)(*args)
            finally:
                self.paused = False

        return run


NO_LAUNCH = ("empty", "new_empty", "lift_fresh", "detach")
FILLS = ("zeros", "ones", "full", "new_zeros", "new_ones", "new_full", "scalar_tensor")  # they read no tensor


def _launch_of(func: Any, args: Any, kwargs: Any, out: Any) -> Launch:
    """The launch of one operation of torch."""
    if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
        a, b = args[-2:]
        accumulates = func.overloadpacket is torch.ops.aten.addmm and args[0].shape == out.shape  # else it is a bias
        return _gemm_launch(a.shape[0], a.shape[1], b.shape[1], a.itemsize, out.itemsize, accumulates)
    if func.overloadpacket is torch.ops.aten.bmm:  # one product by parts of its inner dimension (`gemm.matmul_long`)
        a, b = args
        return _gemm_launch(a.shape[1], a.shape[0] * a.shape[2], b.shape[2], a.itemsize, out.itemsize, False)
    inputs = (args, {name: value for name, value in kwargs.items() if name != "out"})
    if func.overloadpacket is torch.ops.aten.index_select:
        inputs = (args[2], out)  # no more than the rows that it takes
    fills = func.__name__.startswith(FILLS)
    read = [] if fills else [t for t in tree_iter(inputs) if isinstance(t, Tensor)]
    written = [t for t in tree_iter(out) if isinstance(t, Tensor)]
    return Launch("other", {"bytes": sum(t.numel() * t.itemsize for t in (*read, *written))})


def _sizes_of_logits(logits: Tensor, *_: Any) -> dict[str, int]:
    return {"rows": logits.shape[0], "columns": logits.shape[1], "itemsize": logits.itemsize}


SIZES: dict[str, Callable[..., dict[str, int]]] = {
    "project_log_odds": lambda x, weight, *_: {
        "rows": x.shape[0], "hidden_size": x.shape[1], "columns": weight.vocab_size, "itemsize": x.itemsize
    },
    "residual_": _sizes_of_logits,
    "statistics": _sizes_of_logits,
    "recomputed_residual_": _sizes_of_logits,
    "column_statistics": _sizes_of_logits,
    "gather_columns": lambda residual, columns: _sizes_of_logits(residual) | {"active": len(columns)},
    "project_residual": lambda x, w, *_: {
        "rows": x.shape[0], "hidden_size": x.shape[1], "columns": w.shape[0], "itemsize": x.itemsize
    },
    "gather_rows": lambda hidden, position, coefficient, dtype: {
        "rows": len(position), "hidden_size": hidden.shape[1], "itemsize": hidden.itemsize,
        "out_itemsize": dtype.itemsize,
    },
    "scatter_rows_": lambda out, position, rows, coefficient, unique=False: {
        "rows": len(position), "positions": out.shape[0], "hidden_size": out.shape[1], "itemsize": rows.itemsize,
        "out_itemsize": out.itemsize,
    },
    "sequence_sums": lambda log_odds, rows: {"rows": len(rows), "sequences": 2 * rows.num_pairs},
    "odds_ratio": lambda log_odds, rows, *_: {"rows": len(rows), "sequences": 2 * rows.num_pairs},
}  # fmt: skip


def launches(
    shape: ModelShape, rows: int, schedule: str, gpu: GPU, dtype: torch.dtype = torch.bfloat16, active: float = 0.0
) -> list[Launch]:
    """All that forward and backward launch on that GPU: `rows` rows, all of which matter, in 8 sequences.

    active: the share of the columns that is active under a schedule of `SPARSE`.
    """
    gradient, trained = schedule != "evaluation", schedule in ("resident", "recompute", "sparse, trained")
    chosen = {"sparse_eps": 2.0**-14} if schedule in SPARSE else {"schedule": schedule if gradient else "auto"}
    with _as_on(gpu) as recorder, FakeTensorMode(), memory.active_columns(active):
        hidden = torch.empty(rows, shape.hidden_size, dtype=dtype, requires_grad=gradient)
        weight = torch.empty(shape.vocab_size, shape.hidden_size, dtype=dtype, requires_grad=trained)
        bias = torch.empty(shape.vocab_size, dtype=dtype, requires_grad=trained) if shape.bias else None
        batch = memory.fake_rows(memory.Shape(8, rows // 8, rows))
        with recorder:
            loss = orpo_loss_from_rows(
                hidden, weight, batch, bias=bias, logit_softcap=shape.logit_softcap, **chosen
            ).loss
            if gradient:
                loss.backward()
    return recorder.launches


@contextmanager
def _as_on(gpu: GPU) -> Iterator[Recorder]:
    """Our loss plans as on that GPU with its kernels, and the recorder stands in for those."""
    recorder = Recorder()
    with ExitStack() as stack:
        for module in (single_pass, resident, recompute, sparse):
            stack.enter_context(mock.patch.object(module, "matmul_into", recorder.matmul_into))
        stack.enter_context(mock.patch("orpo_kernels.engine.head.select", return_value=recorder.ops))
        stack.enter_context(mock.patch("orpo_kernels.engine.planning.resolve", return_value="triton"))
        stack.enter_context(mock.patch.dict(KINDS, cpu=Kind("triton", memory=gpu.memory)))
        yield recorder


# ---------------------------------------------------------------------------------------------------------------------
# The estimate
# ---------------------------------------------------------------------------------------------------------------------


def seconds(gpu: GPU, launches: list[Launch]) -> float:
    """One after another, each at the peak that it meets first."""
    return sum(max(launch.flops / gpu.flops, launch.bytes / gpu.bandwidth) for launch in launches)


@dataclass(frozen=True)
class Estimate:
    """One model under one schedule on one GPU: seconds at its peaks, of ours and of the bare GEMMs."""

    shape: str
    schedule: str
    gpu: str
    rows: int
    flops: int
    bytes: int
    seconds: float
    bare_gemm_seconds: float

    @property
    def ratio(self) -> float:
        return self.seconds / self.bare_gemm_seconds

    def record(self) -> dict[str, Any]:
        return {"label": TITLE, **asdict(self), "ratio": self.ratio}


def estimate(
    shape: ModelShape, rows: int, schedule: str, gpu: GPU, dtype: torch.dtype = torch.bfloat16, active: float = 0.0
) -> tuple[Estimate, list[Launch]]:
    """The estimate, and the launches that it is made of."""
    ours = launches(shape, rows, schedule, gpu, dtype, active)
    floor = bare_gemms(shape, rows, schedule, dtype.itemsize)
    flops, traffic = sum(launch.flops for launch in ours), sum(launch.bytes for launch in ours)
    times = seconds(gpu, ours), seconds(gpu, floor)
    return Estimate(shape.name, schedule, gpu.name, rows, flops, traffic, *times), ours


def table(shape: ModelShape, estimates: list[Estimate], rows: int) -> Sheet:
    """A row for each schedule, a column for each GPU: milliseconds, and how many times the bare GEMMs they are."""
    lines = []
    for schedule in dict.fromkeys(e.schedule for e in estimates):
        mine = [e for e in estimates if (e.shape, e.schedule) == (shape.name, schedule)]
        cells = (f"{e.seconds * 1e3:.3g}\n({e.ratio:.2f})" for e in mine)
        lines.append([schedule, f"{mine[0].flops / 1e12:.3g}", f"{mine[0].bytes / 1e9:.3g}", *cells])
    columns = ["schedule", "TFLOP", "GB", *(gpu.name.replace(" ", "\n") for gpu in DATA_SHEETS)]
    note = "ms at the peaks of the data sheets (over the bare GEMMs at the same peaks)"
    return Sheet(f"{TITLE}: {shape}, {rows} rows, bf16", columns, lines, [note])


def launch_table(shape: ModelShape, schedule: str, ours: list[Launch]) -> Sheet:
    """How often each kind of launch runs, and its share."""
    rows = []
    for name in COSTS:
        if mine := [launch for launch in ours if launch.name == name]:
            flops, traffic = sum(launch.flops for launch in mine), sum(launch.bytes for launch in mine)
            rows.append([name, str(len(mine)), f"{flops / 1e12:.3g}", f"{traffic / 1e9:.3g}"])
    return Sheet(f"{shape.name}, {schedule}: launches", ["operation", "launches", "TFLOP", "GB"], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.estimates.roofline",
        description="ESTIMATE of the loss's time from FLOPs, bytes and data sheets.",
    )
    parser.add_argument(
        "--shape", nargs="+", default=list(SHAPES), metavar="MODEL", help=f"{', '.join(SHAPES)}, or HxV"
    )
    parser.add_argument("--rows", type=int, default=8192, help="that matter (default: 8192)")
    parser.add_argument(
        "--active", type=float, metavar="SHARE", help="also of the sparse schedule, with this share of columns active"
    )
    parser.add_argument("--launches", action="store_true", help="show what each kind of launch contributes")
    parser.add_argument("--json", type=Path, help="write the numbers here as well")
    options = parser.parse_args(arguments)
    try:
        models = [shapes.named(text) for text in options.shape]
    except ValueError as error:
        parser.error(str(error))
    console = Console()
    estimates: list[Estimate] = []
    for shape in track(models, "counting", console=Console(stderr=True), transient=True):
        kinds = []
        for schedule in [*SCHEDULES, *(SPARSE if options.active is not None else ())]:
            for gpu in DATA_SHEETS:
                found, ours = estimate(shape, options.rows, schedule, gpu, active=options.active or 0.0)
                estimates.append(found)
            kinds.append(launch_table(shape, schedule, ours).rich())
        console.print(table(shape, estimates, options.rows).rich(), *(kinds if options.launches else ()), "")
    if options.json:
        options.json.write_text(json.dumps([one.record() for one in estimates], indent=1))


if __name__ == "__main__":
    main()
