"""Records of the results file as tables, for the terminal and for Markdown, and the verdict that they allow."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from benchmarks.contest import confidence
from benchmarks.contest.peers import NATIVE_ROWS
from benchmarks.contest.training_step import OURS, PARTS
from benchmarks.contest.turns import FLOOR, FLOORS, Measurement, ratios
from orpo_kernels import Limits

GIB, MIB = 2**30, 2**20
TITLES = {"evaluation": "no gradient", "frozen": "head frozen", "trained": "head trained"}
SAME_PROCESS = 0.98  # of our resident bytes: more is the same
MORE_ACCURATE = 0.95  # a gradient error below this times ours: less is the order of the sums

# Why somebody is ahead of us, where somebody is.
ROWS = Limits.of(on_cpu=True).chunk_rows
SAME_PRODUCTS = "given the rows that matter alone, it has the same products as we, and they are most of the time"
SMALLER_CHUNKS = f"logits of {NATIVE_ROWS} rows at a time; ours of up to {ROWS} on a CPU in fp32, which is faster"
ROUNDED_TWICE = (
    "we round the residual's product with the weight, and again once the row's coefficient is in it, which is known "
    "only when both answers of a pair are; theirs is in the gradient of the logits"
)
ANYBODY = ""
REASONS = {  # (in what, who): why
    ("time", "CCE"): SAME_PRODUCTS,
    ("memory", "torch native"): SMALLER_CHUNKS,
    ("accuracy of the hidden", ANYBODY): ROUNDED_TWICE,
}


@dataclass(frozen=True)
class Sheet:
    """A table: text cells, the first column a name. Rows of ours are bold, those of floors dim."""

    title: str
    columns: Sequence[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def rich(self) -> Table:
        shown = Table(title=self.title, box=SIMPLE_HEAD, padding=(0, 1, 0, 0), caption="\n".join(self.notes) or None)
        for i, column in enumerate(self.columns):
            shown.add_column(column, justify="right" if i else "left", no_wrap=not i)
        for row in self.rows:
            shown.add_row(*row, style="bold" if is_ours(row[0]) else "dim" if row[0] in FLOORS else "")
        return shown

    def markdown(self, title: bool = True) -> str:
        def line(cells: Iterable[str]) -> str:
            return "| " + " | ".join(cells) + " |"

        rows = [[f"**{cell}**" if cell and is_ours(row[0]) else cell for cell in row] for row in self.rows]
        lines = [line(self.columns), line("---" if i == 0 else "---:" for i in range(len(self.columns)))]
        lines += map(line, rows)
        notes = ["", *(f"{note}  " for note in self.notes)] if self.notes else []
        return "\n".join([*([f"**{self.title}**", ""] if title else []), *lines, *notes])


def is_ours(name: str) -> bool:
    return name.startswith("ours")


def sheets(cases: dict[str, dict[str, Any]]) -> list[Sheet]:
    """Every record as it is best read; the cases that belong together in one."""
    found: list[Sheet] = []
    for kind, group in itertools.groupby(cases, key=lambda key: key.partition("/")[0]):
        records = {key: cases[key] for key in group}
        found += SHEETS[kind](records)
    return found


# ---------------------------------------------------------------------------------------------------------------------
# Contests
# ---------------------------------------------------------------------------------------------------------------------


def measurements(record: dict[str, Any]) -> dict[str, Measurement]:
    """Those of one contest by contestant."""
    return {one["name"]: Measurement(**one) for one in record["measurements"]}


def contest_sheet(record: dict[str, Any]) -> Sheet:
    """Everybody, the fastest first; those without a result last, with the reason beneath."""
    found = measurements(record)
    ours = found.get("ours")
    ok = sorted((m for m in found.values() if not m.failure), key=lambda m: m.median)
    columns = ("loss", "forward", "backward", "both, s", "range", "/ ours", "/ GEMMs", "MiB", "FLOP", "dh", "dW")
    rows = [_contest_row(m, ours, found.get(FLOOR), record["least_flops"]) for m in ok]
    failed = [m for m in found.values() if m.failure]
    rows += [[m.name, *["-"] * (len(columns) - 1)] for m in failed]
    return Sheet(
        f"{record['work']}; {record['dtype']}, {TITLES[record['head']]}",
        columns,
        rows,
        [
            *([record["failure"]] if "failure" in record else []),
            *(f"{m.name}: {m.failure}" for m in failed),
            *verdict(record),
        ],
    )


def _contest_row(m: Measurement, ours: Measurement | None, floor: Measurement | None, least: int) -> list[str]:
    def over(other: Measurement | None) -> str:
        return "" if other is None or other.failure else f"{ratios(m, other)[1]:.2f}"

    return [
        m.name,
        seconds(statistics.median(m.forward)),
        seconds(statistics.median(m.backward)) if m.backward else "",
        seconds(m.median),
        f"{seconds(min(m.both))}-{seconds(max(m.both))}",
        over(ours),
        over(floor),
        "" if m.peak_bytes is None else f"{m.peak_bytes / MIB:.0f}",
        "" if m.flops is None else f"{m.flops / least:.2f}",
        *(f"{m.gradient_errors[leaf]:.1e}" if leaf in m.gradient_errors else "" for leaf in ("hidden", "weight")),
    ]


def seconds(value: float) -> str:
    """Three digits."""
    return f"{value:#.3g}".rstrip(".")


def verdict(record: dict[str, Any]) -> list[str]:
    """Who is faster, leaner or more accurate than we are; faster is beyond the noise: in three rounds of four."""
    found = {name: m for name, m in measurements(record).items() if not m.failure}
    ours = found.get("ours")
    if ours is None:
        return []
    ahead = []
    for name, m in found.items():
        if name in FLOORS or is_ours(name):
            continue
        low, middle, high = ratios(m, ours)
        if high < 1:
            ahead.append(("time", name, f"{name} is faster: {middle:.2f} of our time"))
        elif low < 1:
            ahead.append(("time", name, f"{name} is as fast, within the noise: {low:.2f} to {high:.2f} of our time"))
        if m.peak_bytes is not None and ours.peak_bytes is not None and m.peak_bytes < ours.peak_bytes:
            text = f"{name} is leaner: {m.peak_bytes / MIB:.0f} MiB to our {ours.peak_bytes / MIB:.0f}"
            ahead.append(("memory", name, text))
        for leaf, error in m.gradient_errors.items():
            if error < MORE_ACCURATE * ours.gradient_errors[leaf]:
                text = f"{name}'s gradient of the {leaf} is more accurate: {error:.1e} to our "
                ahead.append((f"accuracy of the {leaf}", name, f"{text}{ours.gradient_errors[leaf]:.1e}"))
    return with_reasons(ahead) or ["Nobody is faster, leaner or more accurate than ours."]


def with_reasons(ahead: list[tuple[str, str, str]]) -> list[str]:
    """(what, who, sentence) as lines, those that have one reason in one."""
    lines: dict[str, list[str]] = {}
    for what, name, text in ahead:
        why = REASONS.get((what, name)) or REASONS.get((what, ANYBODY))
        lines.setdefault(f" ({why})" if why else "", []).append(text)
    return [f"{'; '.join(texts)}{why}" for why, texts in lines.items()]


def growth_sheet(kind: str, records: dict[str, dict[str, Any]]) -> Sheet:
    """Seconds of everybody along the rows, or along the vocabulary."""
    sizes = [key.split("/")[1] for key in records]
    columns = [measurements(record) for record in records.values()]
    names = list(dict.fromkeys(name for column in columns for name in column))
    first = next(iter(records.values()))
    rows = [
        [name, *(seconds(c[name].median) if name in c and not c[name].failure else "-" for c in columns)]
        for name in names
    ]
    what = "rows grow; V = 32768" if kind == "rows" else "vocabulary grows; 512 rows"
    title = f"Seconds of forward + backward as the {what}, H = 576, {first['dtype']}, head trained"
    return Sheet(title, [kind, *sizes], rows)


# ---------------------------------------------------------------------------------------------------------------------
# The others
# ---------------------------------------------------------------------------------------------------------------------

MEMORY_TITLES = {
    "shapes": "8192 rows, all of which matter, in sequences of different lengths",
    "padding": "the same 3440 rows in ever more padding",
    "rows": "as the rows grow",
    "vocabulary": "8192 rows as the vocabulary grows",
}


def memory_sheet(key: str, record: dict[str, Any]) -> Sheet:
    kind = key.split("/")[1]
    shapes = record["shapes"]
    if kind in ("rows", "vocabulary"):
        heads = [str(s["vocabulary" if kind == "vocabulary" else "positions"]) for s in shapes]
    else:
        heads = [f"{s['sequences']} x {s['length']}" for s in shapes]
    rows = [["inputs and weight alone", "", *(f"{n / GIB:.3f}" for n in record["baselines"])]]
    rows += [[one["loss"], one["head"], *(f"{n / GIB:.3f}" for n in one["peaks"])] for one in record["losses"]]
    title = f"Peak GiB of forward + backward, counted to the byte: {MEMORY_TITLES[kind]}; H = 4096, {record['dtype']}"
    return Sheet(title, ["loss", "head", *heads], rows)


def process_sheet(record: dict[str, Any]) -> Sheet:
    """Leanest first, by the last head."""
    found = record["bytes"]
    ok = {name: b for name, b in found.items() if "failure" not in b}
    heads = list(next(iter(ok.values()), {}))
    rows = [
        [name, *(f"{ok[name][head] / MIB:.0f}" for head in heads)]
        for name in sorted(ok, key=lambda name: [ok[name][head] for head in reversed(heads)])
    ]
    notes = [f"{name}: {b['failure']}" for name, b in found.items() if "failure" in b]
    notes += leaner_processes(record)
    title = f"Resident MiB of a fresh process above what it held before; {record['work']}, {record['dtype']}"
    return Sheet(title, ["loss", *(TITLES[head] for head in heads)], rows, notes)


def leaner_processes(record: dict[str, Any]) -> list[str]:
    """Peers whose process held less than ours, by more than what two processes of the same code differ by."""
    found = {name: b for name, b in record["bytes"].items() if "failure" not in b}
    ours = found.get("ours", {})
    ahead = [
        ("memory", name, f"{name} is leaner, {TITLES[head]}: {b[head] / MIB:.0f} MiB to our {ours[head] / MIB:.0f}")
        for head in ours
        for name, b in found.items()
        if b[head] < SAME_PROCESS * ours[head]
    ]
    return with_reasons(ahead)


def confidence_sheet(record: dict[str, Any]) -> Sheet:
    """The gap from which somebody is wrong by more than a tenth, and the error at 80."""

    def cell(errors: list[float]) -> str:
        gap = confidence.first_broken(errors)
        return f"never ({errors[-1]:.0e} at {confidence.GAPS[-1]})" if gap is None else f"from {gap}"

    sides = list(confidence.SIDES)
    rows = [[name, *(cell(errors[side]) for side in sides)] for name, errors in record["errors"].items()]
    rows.sort(key=lambda row: not is_ours(row[0]))
    title = f"Logit gap from which loss or gradient is off by more than a tenth, or not finite; {record['dtype']}"
    return Sheet(title, ["confident answers", *sides], rows)


def step_medians(record: dict[str, Any], *parts: str) -> dict[str, float]:
    """Seconds of everybody's step, or of some of its parts."""
    return {
        one["name"]: statistics.median(sum(step[part] for part in parts or PARTS) for step in one["steps"])
        for one in record["contestants"]
    }


def step_sheet(record: dict[str, Any]) -> Sheet:
    steps = {one["name"]: one for one in record["contestants"]}
    whole, of_parts = step_medians(record), [step_medians(record, part) for part in PARTS]
    rows = [
        [
            name,
            seconds(whole[name]),
            f"{whole[name] / whole[OURS]:.2f}",
            *(seconds(of_part[name]) for of_part in of_parts),
            "" if steps[name]["peak_bytes"] is None else f"{steps[name]['peak_bytes'] / GIB:.2f}",
        ]
        for name in sorted(steps, key=lambda name: whole[name])
    ]
    columns = ["step", "s", "/ ours", "body", "head + loss", "optimizer", "process GiB"]
    return Sheet(f"A whole training step of SmolLM2-135M: {record['case']}, {record['dtype']}", columns, rows)


def estimate_sheet(record: dict[str, Any]) -> Sheet:
    """Time over that of the bare GEMMs, both at the data sheet's peaks."""
    found = record["estimates"]
    gpus = list(dict.fromkeys(one["gpu"] for one in found))
    keys = list(dict.fromkeys((one["shape"], one["schedule"]) for one in found))
    ratio = {(one["shape"], one["schedule"], one["gpu"]): one["ratio"] for one in found}
    rows = [[shape, schedule, *(f"{ratio[shape, schedule, gpu]:.2f}" for gpu in gpus)] for shape, schedule in keys]
    title = f"{record['label']}: 8192 rows, bf16, ours over the bare GEMMs at the data sheets' peaks"
    return Sheet(title, ["model", "schedule", *gpus], rows)


SHEETS = {
    "contest": lambda records: [contest_sheet(r) for r in records.values()],
    "kept pages": lambda records: [contest_sheet(r) for r in records.values()],
    "rows": lambda records: [growth_sheet("rows", records)],
    "vocabulary": lambda records: [growth_sheet("vocabulary", records)],
    "process": lambda records: [process_sheet(r) for r in records.values()],
    "memory": lambda records: [memory_sheet(key, r) for key, r in records.items()],
    "confidence": lambda records: [confidence_sheet(r) for r in records.values()],
    "step": lambda records: [step_sheet(r) for r in records.values()],
    "estimate": lambda records: [estimate_sheet(r) for r in records.values()],
}


# ---------------------------------------------------------------------------------------------------------------------
# Two runs
# ---------------------------------------------------------------------------------------------------------------------


def ranking_sheet(first: dict[str, dict[str, Any]], second: dict[str, dict[str, Any]]) -> Sheet:
    """Contests that both runs have: whether they rank everyone the same way, and whose ratio crossed 1."""
    rows = []
    for key in (key for key in first if key in second and "measurements" in first[key]):
        one, other = (
            {n: m for n, m in measurements(cases[key]).items() if not m.failure and n not in FLOORS}
            for cases in (first, second)
        )
        names = [name for name in one if name in other]
        swapped: list[str] = []
        drawn: list[str] = []
        for a, b in itertools.combinations(names, 2):
            before, after = one[a].median / one[b].median, other[a].median / other[b].median
            if (before < 1) != (after < 1):
                pair = f"{a} / {b} {before:.2f} and {after:.2f}"
                (drawn if is_draw(one[a], one[b]) or is_draw(other[a], other[b]) else swapped).append(pair)
        says = f"differs: {', '.join(swapped)}" if swapped else "the same"
        rows.append([key, str(len(names)), says, ", ".join(drawn)])
    title = "Do two runs rank everyone the same way? (draws: within the noise of a run)"
    return Sheet(title, ["contest", "losses", "ranking", "draws that changed places"], rows)


def is_draw(a: Measurement, b: Measurement) -> bool:
    """Neither is ahead in three rounds of four."""
    low, _, high = ratios(a, b)
    return low <= 1 <= high
