"""Which way of a forward pass is the fastest: the ways of `engine/speeds.py` in turns, and its table renewed.

A head of every model in bf16, one in fp32: statistics inside the kernel, and the library's product in chunks of 1024 to
8192 rows. `--write-docs` puts what was measured in the place of the table's records of the same heads.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.cases import Case, Settings
from benchmarks.report.docs import machine_line
from benchmarks.shapes import ModelShape
from benchmarks.timing import device_seconds, medians
from orpo_kernels.engine import speeds
from orpo_kernels.engine.gemm import WeightSlices, even_chunks
from orpo_kernels.engine.speeds import CHUNK_ROWS, KERNEL, Record
from orpo_kernels.engine.work import target_of
from orpo_kernels.ops import select

REPEATS = 2
SHARE_IN_FP32 = 4  # of the rows: its products take several times as long


def cases(settings: Settings) -> Iterator[Case]:
    heads = [(shape, torch.bfloat16) for shape in settings.models]
    heads.append((settings.models[0], torch.float32))
    for shape, dtype in heads:
        for schedule in speeds.SCHEDULES:
            key = f"ways/{shape.name}/{str(dtype).removeprefix('torch.')}/{schedule}"
            yield Case(key, partial(measure, shape, dtype, schedule, settings))


def measure(shape: ModelShape, dtype: torch.dtype, schedule: str, settings: Settings) -> dict[str, Any]:
    """The fields of a record of the table but its source; median milliseconds of every way."""
    device = torch.device(settings.device)
    rows = 2 * settings.pairs * settings.length // (SHARE_IN_FP32 if dtype == torch.float32 else 1)
    x, w, target = shape.tensors(rows, dtype, settings.device)
    calls = _calls(x, w, target, shape.logit_softcap, schedule, select(settings.backend, device, dtype))
    clock = partial(device_seconds, device=device, repeats=REPEATS)
    times = {way: 1e3 * seconds for way, seconds in medians(calls, settings.rounds, clock).items()}
    return {
        "target": target_of(device),
        "dtype": str(dtype).removeprefix("torch."),
        "hidden_size": shape.hidden_size,
        "vocab_size": shape.vocab_size,
        "softcap": shape.logit_softcap is not None,
        "schedule": schedule,
        "times": times,
        "unit": "ms",
        "rows": rows,
    }


def _calls(
    x: Tensor, w: Tensor, target: Tensor, softcap: float | None, schedule: str, ops: ModuleType
) -> Mapping[str, Callable[[], Any]]:
    """Every way by its name: forward passes of `evaluation` or of `single_pass`."""
    weight = WeightSlices(w, w.dtype, len(w))
    most = min(max(CHUNK_ROWS), len(x))
    logits, u = x.new_empty(most, len(w)), torch.empty_like(x)

    def evaluated(chunk_rows: int, buffer: Tensor | None) -> None:
        for rows in even_chunks(len(x), chunk_rows):
            ops.project_log_odds(x[rows], weight, None, target[rows], 1.0, softcap, buffer)

    def passed(chunk_rows: int) -> None:
        for rows in even_chunks(len(x), chunk_rows):
            residual = torch.mm(x[rows], w.t(), out=logits[: rows.stop - rows.start])
            ops.residual_(residual, target[rows], 1.0, softcap)
            torch.mm(residual, w, out=u[rows])

    sizes = [rows for rows in CHUNK_ROWS if rows <= most] or [most]
    if schedule == "single_pass":
        return {str(rows): partial(passed, rows) for rows in sizes}
    kernel = {KERNEL: partial(evaluated, len(x), None)}
    return kernel | {str(rows): partial(evaluated, rows, logits) for rows in sizes}


def renewed(records: tuple[Record, ...], results: dict[str, Any]) -> list[Record]:
    """The table's records, those that were measured again replaced."""
    table = {record.key: record for record in records}
    for key, case in results["cases"].items():
        if key.startswith("ways/") and "skipped" not in case and case["target"] is not None:
            fields = {name: value for name, value in case.items() if name != "rows"}
            source = f"{machine_line(results['machine'])}: {case['rows']} rows, in turns"
            record = Record(**fields, source=source)
            table[record.key] = replace(record, times={way: float(f"{t:.4g}") for way, t in record.times.items()})
    return list(table.values())


def write(results: dict[str, Any], path: Path = speeds.FILE) -> list[Path]:
    """The table with what was measured; the path written, if any."""
    before = speeds.read(path)
    after = renewed(before, results)
    if after == list(before):
        return []
    path.write_text(json.dumps([asdict(record) for record in after], indent=1) + "\n")
    speeds.records.cache_clear()
    return [path]
