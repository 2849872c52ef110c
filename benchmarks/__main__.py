"""One command that measures the loss and everyone else's on the same inputs, in the same process.

    python -m benchmarks                     # --quick: about two minutes
    python -m benchmarks --full              # everything; 70 minutes on two cores. Interrupted, it goes on
    python -m benchmarks --full --write-docs # and writes docs/benchmarks.md, its pictures, and the README's figures
    python -m benchmarks --list
    python -m benchmarks --case 'contest/llmbar/*' --peer plain CCE --dtype bfloat16
    python -m benchmarks --device cuda --full
    python -m benchmarks --compare runs/one/results.json runs/two/results.json    # do they rank everyone the same way?

Tables go to the terminal; results.json, with the machine and the versions, and PNG pictures to --output. A finished
case is in the file at once: the same command again measures only what is missing. `contest/suite.py` says what the
cases are, `contest/turns.py` how everybody is checked and timed.
"""

from __future__ import annotations

import argparse
import fnmatch
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import shapes
from benchmarks.contest import peers, suite, turns, workloads
from benchmarks.contest.suite import Settings
from benchmarks.report import docs, plots, tables
from benchmarks.report.results import Results, read

DTYPES = ("float32", "bfloat16", "float16")
NO_GPU = (
    "--device cuda needs a GPU that torch can use, NVIDIA's with a CUDA build or AMD's with a ROCm build, but "
    "torch.cuda.is_available() is False here."
)
NO_REAL_DATA = (
    "No LLMBar or no SmolLM2 here (examples/smollm2.py and benchmarks/contest/workloads.py look for them): "
    "a synthetic batch with the same share of rows stands in for them, and there is no training step."
)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = _parser()
    options = parser.parse_args(arguments)
    console = Console(width=max(Console().width, 130))
    if options.compare:
        console.print(tables.ranking_sheet(*(read(path)["cases"] for path in options.compare)).rich())
        return 0
    if options.device == "cuda" and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    settings = settings_of(options)
    try:
        for name in settings.models:
            shapes.named(name)
        chosen = [case for case in suite.cases(settings) if any(fnmatch.fnmatch(case.key, p) for p in options.case)]
        if not chosen:
            raise ValueError(f"no case is called {' or '.join(options.case)}: --list shows those of these options")
        if options.list:
            console.print("\n".join(case.key for case in chosen), highlight=False)
            return 0
        output = options.output or Path("runs/benchmarks") / (
            settings.device + ("-full" if settings.full else "-quick")
        )
        if options.fresh:
            (output / "results.json").unlink(missing_ok=True)
        torch.set_num_threads(settings.threads)
        results = Results(output, measured_under(settings))
    except ValueError as error:
        parser.error(str(error))
    if not workloads.have_real_data():
        console.print(NO_REAL_DATA)
    warnings.filterwarnings("ignore")  # peers warn about their own deprecations; a wrong loss is caught

    missing = [case for case in chosen if case.key not in results.cases]
    if kept := len(chosen) - len(missing):
        console.print(f"{kept} of {len(chosen)} cases are in {results.path} already; --fresh measures them again.")
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        whole = progress.add_task("cases", total=len(missing))
        for case in missing:
            progress.update(whole, description=case.key)
            results.add(case.key, case.run(progress))
            progress.advance(whole)
    shown = {case.key: results.cases[case.key] for case in chosen}
    for sheet in tables.sheets(shown):
        console.print(sheet.rich())
    where = docs.machine_line(results.machine)
    plots.draw(results.cases, output, where)
    console.print(f"{where}\nresults.json and pictures: {output}", soft_wrap=True, highlight=False)
    if options.write_docs:
        for path in docs.write(read(results.path)):
            console.print(f"wrote {path}", soft_wrap=True, highlight=False)
    return 0


def settings_of(options: argparse.Namespace) -> Settings:
    heads = ("evaluation", "frozen", "trained") if options.device == "cuda" else ("frozen", "trained")
    quick_dtypes = suite.default_dtypes(options.device)
    dtypes = quick_dtypes if options.full else quick_dtypes[:1]
    return Settings(
        full=options.full,
        device=options.device,
        dtypes=tuple(options.dtype or dtypes),
        heads=tuple(options.head or heads),
        peers=None if options.peer is None else tuple(options.peer),
        models=tuple(options.model or ()),
        rounds=options.rounds or suite.ROUNDS[options.full],
        threads=options.threads,
    )


def measured_under(settings: Settings) -> dict[str, object]:
    """The settings that a record depends on; dtypes and heads are in its key, models have one of their own."""
    kept = asdict(settings)
    for name in ("dtypes", "heads", "models"):
        del kept[name]
    return kept | {"peers": None if settings.peers is None else list(settings.peers)}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--quick", action="store_true", help="the default: about two minutes")
    length.add_argument("--full", action="store_true", help="every case, every peer, more rounds")
    parser.add_argument("--list", action="store_true", help="only list the cases of these options")
    parser.add_argument("--case", nargs="+", default=["*"], metavar="PATTERN", help="only these, as in '*/trained'")
    parser.add_argument("--peer", nargs="*", choices=list(peers.PEERS), help="(default: every one that is installed)")
    parser.add_argument(
        "--dtype", nargs="+", choices=DTYPES, help="(default: float32, with --full also bfloat16 if in hardware)"
    )
    parser.add_argument("--head", nargs="+", choices=list(turns.HEADS), help="(default: the last two; on a GPU all)")
    parser.add_argument(
        "--model", nargs="+", metavar="MODEL", help=f"{', '.join(shapes.SHAPES)}, or HxV (default: with --full, all)"
    )
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument(
        "--rounds", type=int, help=f"timed calls (default: {suite.ROUNDS[False]}, full: {suite.ROUNDS[True]})"
    )
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default: 2)")
    parser.add_argument("--output", type=Path, help="folder (default: runs/benchmarks/cpu-quick, cpu-full, ...)")
    parser.add_argument("--fresh", action="store_true", help="start anew instead of going on with what --output has")
    parser.add_argument("--write-docs", action="store_true", help="write docs/benchmarks.md and the README's figures")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="RESULTS", help="only compare two runs' rankings")
    return parser


if __name__ == "__main__":
    sys.exit(main())
