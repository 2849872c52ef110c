"""The kernels' machine code for every GPU, without one: registers, spills, shared memory, matrix instructions.

    python -m benchmarks.kernels.compiled                                 # bf16, eight targets: a table
    python -m benchmarks.kernels.compiled --dtype bfloat16 float16 float32 --output benchmarks/kernels/compiled.md

The loss runs on fake tensors of the models' sizes under a stub driver (`stub_gpu`), forward and backward in every
schedule, so that exactly the specialisations are collected that a real GPU would be given. Each is compiled once, by
the compiler that would run there, and its machine code is read. These are facts about code; how fast it runs, only a
GPU can tell.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import re
import sys
import warnings
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.contest.memory import active_columns
from benchmarks.kernels.stub_gpu import TARGETS, Specialisation, stub_gpu
from benchmarks.shapes import SHAPES, ModelShape
from orpo_kernels import Rows, orpo_loss_from_rows
from orpo_kernels.app import machine
from orpo_kernels.ops import triton as triton_ops
from orpo_kernels.ops.triton.label_rows import filled_rows

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
IN_THE_TABLE = ("split_statistics_kernel", "project_residual_kernel", "residual_kernel")
MEMORY_BUDGET = 5 * 2**30  # of the loss: a sixteenth of 80 GB


# ---------------------------------------------------------------------------------------------------------------------
# What is launched
# ---------------------------------------------------------------------------------------------------------------------

SCHEDULES = ("evaluation", "single_pass", "resident", "resident by groups", "recompute", "sparse")
ACTIVE_SHARE = 0.125  # of the columns, under the last


def run_loss(
    shape: ModelShape, dtype: torch.dtype, num_rows: int, schedule: str, num_pairs: int = 4, weighted: bool = False
) -> None:
    """Forward and backward of one batch, on fake tensors: to be called under `stub_gpu` and `FakeTensorMode`."""
    trained = schedule not in ("evaluation", "single_pass")
    hidden = torch.empty(num_rows, shape.hidden_size, dtype=dtype, requires_grad=schedule != "evaluation")
    weight = torch.empty(shape.vocab_size, shape.hidden_size, dtype=dtype, requires_grad=trained)
    bias = torch.empty(shape.vocab_size, dtype=dtype, requires_grad=trained) if shape.bias else None
    rows = Rows(
        position=torch.empty(num_rows, dtype=torch.int64),
        target=torch.empty(num_rows, dtype=torch.int64),
        sequence=torch.empty(num_rows, dtype=torch.int64),
        scored=torch.empty(num_rows, dtype=torch.bool),
        nll_weight=torch.empty(num_rows, dtype=torch.float64),
        num_pairs=num_pairs,
        pair_weight=torch.empty(num_pairs, dtype=torch.float64) if weighted else None,
    )
    residual = num_rows * shape.vocab_size * dtype.itemsize
    by_groups = residual // 2 + shape.vocab_size * shape.hidden_size * 4
    budget = {"resident": residual, "resident by groups": by_groups}.get(schedule, MEMORY_BUDGET)
    name = {"evaluation": "auto", "resident by groups": "resident", "sparse": "auto"}.get(schedule, schedule)
    # How many rows a pair has is read on the host, and fake rows do not say.
    sizes = [num_rows // num_pairs] * (num_pairs - 1)
    sizes.append(num_rows - sum(sizes))
    with mock.patch.object(Rows, "pair_sizes", return_value=sizes), active_columns(ACTIVE_SHARE):
        out = orpo_loss_from_rows(
            hidden,
            weight,
            rows,
            bias=bias,
            logit_softcap=shape.logit_softcap,
            schedule=name,
            memory_budget=budget,
            backend="triton",
            sparse_eps=2.0**-14 if schedule == "sparse" else None,
        )
        if schedule != "evaluation":
            out.loss.backward()


def run_shard(shape: ModelShape, dtype: torch.dtype, num_rows: int = 4096, ranks: int = 8) -> None:
    """What a vocabulary group alone asks for, of one rank's columns: to be called as `run_loss`."""
    logits = torch.empty(num_rows, shape.vocab_size // ranks, dtype=dtype)
    target = torch.empty(num_rows, dtype=torch.int64)
    _, lse_others = triton_ops.statistics(logits, target, 1.0, shape.logit_softcap)
    triton_ops.recomputed_residual_(logits, target, lse_others, 1.0, shape.logit_softcap)


def run_labels(num_pairs: int = 4, length: int = 1024) -> None:
    """What makes rows of labels, counts, checks and sums them, on a GPU: to be called as `run_loss`."""
    labels, nll_labels = (torch.empty(count, length, dtype=torch.int64) for count in (2 * num_pairs, num_pairs))
    filled_rows(labels, None, False, -100, False)
    (position, target, sequence, scored, nll_weight), offsets = filled_rows(labels, nll_labels, True, -100, True)
    rows = Rows(position, target, sequence, scored, nll_weight, num_pairs)
    triton_ops.sequence_sums(rows.nll_weight, rows.knowing(offsets=offsets))
    triton_ops.count_rows(rows)
    triton_ops.are_within(rows.position, labels.numel(), rows.target, 32000)


def specialisations(target: str, shapes: Iterable[ModelShape], dtypes: Iterable[str]) -> list[Specialisation]:
    """All that a GPU would compile for these models, by every schedule; fp32 at both of torch's precisions."""
    before = torch.get_float32_matmul_precision()
    with stub_gpu(target, compile=False) as gpu, FakeTensorMode():
        run_labels()
        for dtype in dtypes:
            for precision in ("highest", "high") if dtype == "float32" else ("highest",):
                torch.set_float32_matmul_precision(precision)
                for shape in shapes:
                    run_shard(shape, DTYPES[dtype])
                    run_loss(shape, DTYPES[dtype], 4096, "evaluation", weighted=True)
                    for schedule in SCHEDULES:
                        # As one group of pairs, and as several. The launches of "sparse" are too many for that.
                        for num_rows in (4096, 32768) if schedule != "sparse" else (1024,):
                            run_loss(shape, DTYPES[dtype], num_rows, schedule)
    torch.set_float32_matmul_precision(before)
    return gpu.specialisations


# ---------------------------------------------------------------------------------------------------------------------
# What it is compiled to
# ---------------------------------------------------------------------------------------------------------------------

MATRIX = {  # in PTX, and in AMD's assembly
    "mma.sync": r"\bmma\.sync",
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05.mma": r"\btcgen05\.mma\b",
    "mfma": r"^\s+v_mfma",
    "wmma": r"^\s+v_wmma",
}
ASYNCHRONOUS = {
    "cp.async": r"\bcp\.async\.c[ga]\.",
    "TMA": r"\bcp\.async\.bulk\.tensor",
    "lds": r"^\s+(?:buffer|global)_load\w*.*\blds\b|^\s+global_load_lds",
}


@dataclass(frozen=True)
class Code:
    """One specialisation's machine code."""

    kernel: str
    target: str
    types: str  # of the pointer arguments that are matrices, e.g. "bf16"
    head: str  # "", "bias", "soft-cap" or "pair weights", and what else the code depends on
    tile: str  # rows x columns x depth of a kernel with a dot, columns of a row-wise one
    warps: int
    stages: int
    registers: int = 0  # of a thread; for AMD vector registers, accumulation registers included
    spilled: int = 0  # bytes on NVIDIA, registers on AMD that did not fit and went to memory
    stack: int = 0  # bytes of local memory a thread (NVIDIA's stack frame, AMD's scratch)
    shared: int = 0  # bytes that a block takes, and may take
    shared_limit: int = 0
    blocks: int = 0  # that fit one processor at a time (NVIDIA), or waves that fit one SIMD (AMD); an estimate
    matrix: dict[str, int] | None = None  # instructions in the code, not executions: a loop counts once
    asynchronous: dict[str, int] | None = None
    row_loads: int = 0  # vector loads and stores of logits in the IR, of `residual_kernel`
    row_stores: int = 0
    error: str | None = None  # why it did not compile


def inspect(specialisation: Specialisation) -> Code:
    """Compile, and read the machine code."""
    from triton import knobs

    knobs.compilation.always_compile = True  # what the assembler says about registers is not in Triton's cache
    knobs.nvidia.dump_ptxas_log = True
    code = described(specialisation)
    gpu = TARGETS[specialisation.target]
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            compiled = specialisation.compile()
    except Exception as error:  # the report names every kernel that fails, not the first
        return replace(code, error=f"{type(error).__name__}: {error}"[:300])
    text = compiled.asm["ptx" if gpu.backend == "cuda" else "amdgcn"]
    if gpu.backend == "cuda":
        figures = nvidia_figures(log.getvalue(), compiled.metadata.shared, code)
    else:
        figures = amd_figures(text)
    pointers = rf"tensor<\S*!tt\.ptr<{code.types}>>"
    return replace(
        code,
        **figures,
        shared=compiled.metadata.shared,
        shared_limit=gpu.shared,
        matrix=counts(MATRIX, text),
        asynchronous=counts(ASYNCHRONOUS, text),
        row_loads=len(re.findall(rf"tt\.load .*{pointers}", compiled.asm["ttir"])),
        row_stores=len(re.findall(rf"tt\.store .*{pointers}", compiled.asm["ttir"])),
    )


def described(specialisation: Specialisation) -> Code:
    """What the specialisation says, before it is compiled."""
    constants, types, options = specialisation.constexprs, specialisation.types, dict(specialisation.options)
    blocks = ("BLOCK_R", "BLOCK_B", "BLOCK_V", "BLOCK_H", "BLOCK", "BLOCK_A")
    matrices = ("X", "LOGITS", "RESIDUAL", "HIDDEN", "ROWS", "OUT")
    first = next((types[name] for name in matrices if name in types), "*fp64")
    flags = {
        "bias": types.get("BIAS", "constexpr") != "constexpr",
        "pair weights": types.get("PAIR_WEIGHT", "constexpr") != "constexpr",
        "soft-cap": constants.get("softcap", 0) is not None and "softcap" in types,
        "one tile": constants.get("ONE_TILE", False),
        "TMA": constants.get("TMA", False),
        constants.get("PRECISION", "ieee"): "PRECISION" in constants and constants["PRECISION"] != "ieee",
    }
    return Code(
        kernel=specialisation.kernel,
        target=specialisation.target,
        types=re.sub(r"^.*?(bf16|fp16|fp32|fp64).*$", r"\1", first).replace("fp", "f"),
        head=", ".join(name for name, is_set in flags.items() if is_set),
        tile="x".join(str(constants[name]) for name in blocks if name in constants),
        warps=options["num_warps"],
        stages=options["num_stages"],
    )


def counts(patterns: dict[str, str], text: str) -> dict[str, int]:
    found = {name: len(re.findall(pattern, text, re.MULTILINE)) for name, pattern in patterns.items()}
    return {name: count for name, count in found.items() if count}


def nvidia_figures(log: str, shared: int, code: Code) -> dict[str, Any]:
    """What ptxas, run by Triton with its own flags, says; and how many blocks of it a multiprocessor takes."""
    registers = number(r"Used (\d+) registers", log)
    gpu = TARGETS[code.target]
    limits = (
        65536 // (-(-registers // 8) * 8 * 32 * code.warps),
        gpu.processor_shared // (shared + 1024),  # of which the system keeps 1 KiB a block
        gpu.processor_warps // code.warps,
    )
    return {
        "registers": registers,
        "spilled": number(r"(\d+) bytes spill stores", log) + number(r"(\d+) bytes spill loads", log),
        "stack": number(r"(\d+) bytes stack frame", log),
        "blocks": min(limits),
    }


def amd_figures(assembly: str) -> dict[str, Any]:
    """What the code's own metadata say."""
    return {
        "registers": number(r"\.vgpr_count:\s+(\d+)", assembly),
        "spilled": number(r"\.vgpr_spill_count:\s+(\d+)", assembly),  # scalar registers spill into vector ones
        "stack": number(r"\.private_segment_fixed_size:\s+(\d+)", assembly),
        "blocks": number(r"; Occupancy:\s*(\d+)", assembly),
    }


def number(pattern: str, text: str) -> int:
    match = re.search(pattern, text)
    if match is None:
        raise ValueError(f"the compiler's output does not say {pattern!r}")
    return int(match.group(1))


def inspect_all(work: list[Specialisation], processes: int) -> list[Code]:
    """Each of them, with a progress bar, in `processes` processes."""
    context = multiprocessing.get_context("spawn")
    with Progress(console=Console(stderr=True)) as progress, ProcessPoolExecutor(processes, context) as pool:
        return list(progress.track(pool.map(inspect, work), len(work), description="compiling"))


# ---------------------------------------------------------------------------------------------------------------------
# The report
# ---------------------------------------------------------------------------------------------------------------------


def worst(codes: list[Code]) -> Code:
    """Of several specialisations of one kernel, the one nearest to its limits."""
    return max(codes, key=lambda code: (bool(code.error), code.spilled + code.stack, code.registers, code.shared))


def grouped(codes: list[Code], key: Any) -> dict[Any, list[Code]]:
    groups: dict[Any, list[Code]] = {}
    for code in codes:
        groups.setdefault(key(code), []).append(code)
    return groups


def row_of(code: Code) -> dict[str, str]:
    """The cells of the table by column."""
    instructions = {**(code.matrix or {}), **(code.asynchronous or {})}
    unit = "blocks" if TARGETS[code.target].backend == "cuda" else "waves"
    return {
        "kernel": code.kernel.removesuffix("_kernel") + (f" ({code.head})" if code.head else ""),
        "target": code.target,
        "dtype": code.types,
        "tile": code.tile,
        "warps": str(code.warps),
        "stages": str(code.stages),
        "registers": code.error or str(code.registers),
        "spilled": str(code.spilled + code.stack),
        "shared KiB, of": f"{code.shared / 1024:.0f}, {code.shared_limit // 1024}",
        "instructions": ", ".join(f"{count} {name}" for name, count in instructions.items()) or "-",
        "resident": f"{code.blocks} {unit}",
    }


def report_rows(codes: list[Code]) -> list[dict[str, str]]:
    """Of each large kernel on each target its worst specialisation; of a second dtype, and of all others, the worst."""
    large = [code for code in codes if code.kernel in IN_THE_TABLE]
    small = [code for code in codes if code.kernel not in IN_THE_TABLE]
    first = large[0].types
    groups = [
        *grouped([c for c in large if c.types == first], lambda code: (code.kernel, code.target)).values(),
        *grouped([c for c in large if c.types != first], lambda code: (code.types, code.target)).values(),
        *grouped(small, lambda code: code.target).values(),
    ]
    return [row_of(worst(group)) for group in sorted(groups, key=_order)]


def _order(group: list[Code]) -> tuple:
    """By dtype, then by kernel, then by target; the small kernels last."""
    code = group[0]
    place = IN_THE_TABLE.index(code.kernel) if code.kernel in IN_THE_TABLE else len(IN_THE_TABLE)
    return place == len(IN_THE_TABLE), code.types != "bf16", code.types, place, list(TARGETS).index(code.target)


def markdown(rows: list[dict[str, str]], count: int, command: str) -> str:
    facts = machine.describe()
    versions = ", ".join(f"{name} {facts['packages'][name]}" for name in ("torch", "triton"))
    lines = [
        "# What the kernels compile to",
        "",
        f"{facts['date'][:10]}, {versions}. `{command}`: {count} specialisations; of each kernel the one nearest "
        "to its limits. `spilled` is registers or bytes that went to memory. Instructions are counted in the code: "
        "a loop counts once. What is resident on a multiprocessor (NVIDIA) or a SIMD (AMD) at one time is an estimate.",
        "",
        "| " + " | ".join(rows[0]) + " |",
        "|" + "---|" * len(rows[0]),
        *("| " + " | ".join(row.values()) + " |" for row in rows),
    ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", nargs="*", default=list(TARGETS), choices=list(TARGETS), help="(default: all)")
    parser.add_argument("--dtype", nargs="*", default=["bfloat16"], choices=list(DTYPES), help="(default: bfloat16)")
    parser.add_argument("--shape", nargs="*", default=list(SHAPES), choices=list(SHAPES), help="(default: all)")
    parser.add_argument("--processes", type=int, default=2, help="(default: 2)")
    parser.add_argument("--json", type=Path, help="write every figure here")
    parser.add_argument("--output", type=Path, help="write the table here, as markdown")
    options = parser.parse_args(arguments)
    warnings.simplefilter("ignore")

    shapes = [SHAPES[name] for name in options.shape]
    work = [s for target in options.target for s in specialisations(target, shapes, options.dtype)]
    codes = inspect_all(work, options.processes)
    rows = report_rows(codes)
    table = Table(*rows[0], title=f"{len(codes)} specialisations: of each kernel the one nearest to its limits")
    for row in rows:
        table.add_row(*row.values())
    Console(width=200).print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(code) for code in codes], indent=1))
    if options.output:
        command = f"python -m benchmarks.kernels.compiled --dtype {' '.join(options.dtype)}"
        options.output.write_text(markdown(rows, len(codes), command))
    failed = [code for code in codes if code.error or code.spilled or code.stack or code.shared > code.shared_limit]
    for code in failed:
        print(f"{code.kernel} {code.types} on {code.target}: {code.error or 'spills, or takes too much shared memory'}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
