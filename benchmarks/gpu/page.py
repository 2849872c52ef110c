"""The results as tables: for the terminal, for docs/gpu.md and for the README.

Both documents have a pair of comments around what is written here; what stands between them is replaced:

    <!-- gpu: measured -->
    <!-- end of gpu: measured -->
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contest.training_step import PARTS
from benchmarks.contest.turns import FLOOR
from benchmarks.gpu.goals import Cases, Verdict, has, over, verdicts
from benchmarks.gpu.heads import PEERS, RECOMPUTE
from benchmarks.gpu.sparse_eps import SPARSE
from benchmarks.report.docs import machine_line, renewed
from benchmarks.report.results import PROJECT
from benchmarks.report.tables import GIB, MIB, Sheet, measurements
from orpo_kernels.engine.speeds import CHUNK_ROWS, KERNEL

WAYS = (KERNEL, *map(str, CHUNK_ROWS))
COMMAND = "python -m benchmarks.gpu"


def sheets(cases: Cases) -> list[Sheet]:
    """All that was measured; what was left out is in the last one, with the reason."""
    measured = {key: record for key, record in cases.items() if "skipped" not in record}
    made = (sheet(measured) for sheet in (_heads, _kernels, _ways, _host, _steps, _tiles, _sparse))
    return [sheet for sheet in (goals_sheet(verdicts(cases)), *made, _skipped(cases)) if sheet.rows]


def goals_sheet(found: list[Verdict]) -> Sheet:
    """What missed its goal first; what was not measured last."""
    order = {False: 0, True: 1, None: 2}
    rows = [
        [v.goal, v.bound_text, "" if v.measured is None else f"{v.measured:.3g}", v.word, v.note]
        for v in sorted(found, key=lambda v: order[v.met])
    ]
    return Sheet("Goals", ["goal", "bound", "measured", "verdict", ""], rows)


def _of(cases: Cases, part: str) -> list[tuple[list[str], dict[str, Any]]]:
    """The records of a part, each with the words of its key behind the part's name."""
    return [(key.split("/")[1:], record) for key, record in cases.items() if key.startswith(f"{part}/")]


def _heads(cases: Cases) -> Sheet:
    names = (FLOOR, "ours", RECOMPUTE, *PEERS)
    rows = []
    for words, record in _of(cases, "heads"):
        found = measurements(record)

        def cell(name: str, record: dict[str, Any] = record, found: Any = found) -> str:
            if not has(record, name):
                return "-"
            text = f"{found[name].median * 1e3:.3g}"
            return text if name == FLOOR else f"{text} ({over(record, name, FLOOR):.2f})"

        bytes_of = {name: found[name].peak_bytes for name in names if has(record, name)}
        peaks = [f"{(bytes_of[name] or 0) / MIB:.0f}" if name in bytes_of else "-" for name in ("ours", *PEERS)]
        rows.append([", ".join(words), *map(cell, names), " / ".join(peaks)])
    columns = ["head", *names, f"MiB: ours / {' / '.join(PEERS)}"]
    return Sheet("Head and loss in bf16: ms, and over the bare GEMMs", columns, rows)


def _kernels(cases: Cases) -> Sheet:
    rows = []
    for words, r in _of(cases, "kernels"):
        if "bytes" in r:
            rate, share = f"{r['bytes'] / r['ours'] / 1e9:.0f} GB/s", f"{r['share']:.0%} of the copy's bandwidth"
        else:
            rate, share = f"{r['flops'] / r['ours'] / 1e12:.0f} TFLOP/s", f"{r['ratio']:.2f} of the library's time"
        rows.append([" at ".join(words), f"{r['ours'] * 1e3:.3g}", rate, share])
    return Sheet("Kernels, bf16", ["kernel", "ms", "rate", "beside its bound"], rows)


def _ways(cases: Cases) -> Sheet:
    rows = [
        [", ".join(words), *(f"{r['times'][way]:.3g}" if way in r["times"] else "-" for way in WAYS)]
        for words, r in _of(cases, "ways")
    ]
    columns = ["head", *(f"{way} rows" if way.isdecimal() else way for way in WAYS)]
    return Sheet("Ways of a forward pass: ms inside the kernel, and in chunks by the library", columns, rows)


def _host(cases: Cases) -> Sheet:
    rows = []
    for words, r in _of(cases, "host"):
        times = [f"{r[name] * 1e3:.2f}" for name in ("ours", "plain")]
        rows.append([words[0], *times, f"{r['ratio']:.2f}", str(r["operations"] or "-")])
    title = "The host: a call at a tiny size, from an idle GPU"
    return Sheet(title, ["head", "ours, ms", "plain, ms", "/ plain", "device operations"], rows)


def _steps(cases: Cases) -> Sheet:
    rows = []
    for words, record in _of(cases, "step"):
        for name, one in record["contestants"].items():
            parts = [f"{one[part] * 1e3:.0f}" for part in PARTS]
            rows.append(
                [", ".join([name, *words]), f"{one['seconds'] * 1e3:.0f}", *parts, f"{one['peak_bytes'] / GIB:.1f}"]
            )
    return Sheet("A whole training step", ["step", "ms", "body", "head + loss", "optimizer", "GiB"], rows)


def _tiles(cases: Cases) -> Sheet:
    rows = [
        [words[0], f"{r['tile'] * 1e3:.3g}", f"{r['table'] * 1e3:.3g}", f"{r['ratio']:.2f}"]
        for words, r in _of(cases, "tiles")
    ]
    return Sheet("Other tiles: both kernels with a product", ["tile", "ms", "the table's, ms", "/ the table's"], rows)


def _sparse(cases: Cases) -> Sheet:
    rows = []
    for words, record in _of(cases, "sparse_eps"):
        found = measurements(record)
        if has(record, SPARSE) and has(record, "ours"):
            exact, sparse = found["ours"], found[SPARSE]
            errors = [f"{m.gradient_errors['hidden']:.0e}" for m in (exact, sparse)]
            times = [f"{m.median * 1e3:.3g}" for m in (exact, sparse)]
            rows.append([words[0], *times, f"{over(record, SPARSE, 'ours'):.2f}", " / ".join(errors)])
    columns = ["head", "exact, ms", "sparse, ms", "sparse / exact", "error of dh, exact / sparse"]
    return Sheet("`sparse_eps` on SmolLM2's hidden states", columns, rows)


def _skipped(cases: Cases) -> Sheet:
    rows = [[key, record["skipped"]] for key, record in cases.items() if "skipped" in record]
    for key, record in cases.items():
        rows += [[f"{key}: {m['name']}", m["failure"]] for m in record.get("measurements", ()) if m["failure"]]
    if failed := cases.get("tests", {}).get("failed"):
        rows += [[test, "failed"] for test in failed]
    return Sheet("Left out, or failed", ["what", "why"], rows)


# ---------------------------------------------------------------------------------------------------------------------
# The documents
# ---------------------------------------------------------------------------------------------------------------------


def _measured(results: dict[str, Any]) -> str:
    return "\n\n".join([_source(results), *(sheet.markdown() for sheet in sheets(results["cases"]))])


def _figures(results: dict[str, Any]) -> str:
    """Heads at all rows, and whole steps."""
    cases = results["cases"]
    kept = {key: r for key, r in cases.items() if "skipped" not in r and ("/100%/" in key or key.startswith("step/"))}
    found = [sheet.markdown() for sheet in (_heads(kept), _steps(kept)) if sheet.rows]
    return "\n\n".join([*found, _source(results)])


def _source(results: dict[str, Any]) -> str:
    return f"`{COMMAND}`, {machine_line(results['machine'])}."


BLOCKS: dict[str, Callable[[dict[str, Any]], str]] = {"measured": _measured, "figures": _figures}


def with_blocks(text: str, results: dict[str, Any]) -> str:
    """A document's text with its blocks renewed."""
    return renewed(text, "gpu", lambda name, _: BLOCKS[name](results))


def write(results: dict[str, Any], project: Path = PROJECT) -> list[Path]:
    """docs/gpu.md and the README with their blocks renewed; the paths written."""
    paths = [project / "docs" / "gpu.md", project / "README.md"]
    for path in paths:
        path.write_text(with_blocks(path.read_text(), results))
    return paths
