"""Pictures of a results file: one PNG a question."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contest.training_step import PARTS
from benchmarks.contest.turns import ALL_ROWS, FLOOR, FLOORS, Measurement, ratios
from benchmarks.report.tables import GIB, MIB, TITLES, is_ours, measurements, step_medians

OURS_COLOR, PEER_COLOR, BACKWARD = "#c44e52", "#4c72b0", 0.55
Cases = dict[str, dict[str, Any]]
MARKERS = "osv^D<>pP*X"


def draw(cases: Cases, folder: Path, subtitle: str) -> list[Path]:
    """Every picture that the records allow, into `folder`; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = []
    for name, picture in PICTURES.items():
        figure = picture(cases)
        if figure is not None:
            lines = textwrap.wrap(subtitle, int(17 * figure.get_figwidth()))
            figure.supxlabel("\n".join(lines), fontsize=7, color="0.4")
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1], dpi=110)
    return drawn


def _figure(width: float, height: float, lines: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """A figure, and its panels by line and column."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(lines, columns, squeeze=False, **options)


def _color(name: str) -> str:
    return OURS_COLOR if is_ours(name) else PEER_COLOR


def contests(cases: Cases, *workloads: str) -> Cases:
    """Contests with results, of these workloads; "" is any."""
    starts = tuple(f"contest/{name}/" if name else "contest/" for name in workloads)
    return {key: record for key, record in cases.items() if key.startswith(starts) and record["measurements"]}


def time(cases: Cases) -> Any:
    """Forward and backward of everybody on the real batch, the bare GEMMs as a line."""

    def panel(axis: Any, record: dict[str, Any]) -> None:
        found = {name: m for name, m in measurements(record).items() if not m.failure}
        ok = sorted((m for m in found.values() if m.name not in FLOORS), key=lambda m: -m.median)
        for m in ok:
            forward, both = sorted(m.forward)[len(m.forward) // 2], m.median
            axis.barh(m.name, forward, color=_color(m.name))
            axis.barh(m.name, max(0.0, both - forward), left=forward, color=_color(m.name), alpha=BACKWARD)
            axis.plot([min(m.both), max(m.both)], [m.name] * 2, color="black", linewidth=1)
        for floor, style in ((FLOOR, "-"), (ALL_ROWS, ":")):
            if floor in found:
                axis.axvline(found[floor].median, color="black", linestyle=style, linewidth=1, label=floor)
        axis.set(xlabel="seconds (forward, then backward; line: range)")
        if set(FLOORS) & set(found):
            axis.legend(fontsize="x-small", loc="upper right")

    return _grid(contests(cases, "llmbar", "synthetic"), panel)


def memory_here(cases: Cases) -> Any:
    """Peak bytes on the real batch by accounting, and resident in a fresh process."""

    def panel(axis: Any, record: dict[str, Any]) -> None:
        counted = {name: m.peak_bytes for name, m in measurements(record).items() if m.peak_bytes is not None}
        resident = cases.get(f"process/{record['dtype']}", {"bytes": {}})["bytes"]
        resident = {name: b[record["head"]] for name, b in resident.items() if record["head"] in b}
        names = sorted({**counted, **resident}, key=lambda name: -(counted.get(name) or resident.get(name) or 0))
        for i, name in enumerate(names):
            axis.barh(i + 0.2, counted.get(name, 0) / MIB, 0.4, color=_color(name))
            axis.barh(i - 0.2, resident.get(name, 0) / MIB, 0.4, color=_color(name), alpha=BACKWARD)
        axis.set_yticks(range(len(names)), names)
        axis.set(xlabel="MiB above the inputs; dark: counted, light: resident")

    return _grid(contests(cases, "llmbar", "synthetic"), panel)


def accuracy(cases: Cases) -> Any:
    """Error of the gradients on the real batch."""

    def panel(axis: Any, record: dict[str, Any]) -> None:
        found = [m for m in measurements(record).values() if m.gradient_errors]
        found.sort(key=lambda m: -m.gradient_errors["hidden"])
        for i, m in enumerate(found):
            axis.plot(m.gradient_errors["hidden"], i, "o", color=_color(m.name))
            if "weight" in m.gradient_errors:
                axis.plot(m.gradient_errors["weight"], i, "s", color=_color(m.name), markerfacecolor="none")
        axis.set_xscale("log")
        axis.set_yticks(range(len(found)), [m.name for m in found])
        axis.set(xlabel="error against float64 (dot: hidden states, square: weight)")
        axis.grid(axis="x", alpha=0.3)

    return _grid(contests(cases, "llmbar", "synthetic"), panel)


def _grid(records: Cases, panel: Callable[[Any, dict[str, Any]], None]) -> Any:
    """A panel a contest, two a line."""
    if not records:
        return None
    lines, columns = -(-len(records) // 2), min(2, len(records))
    figure, panels = _figure(5.2 * columns, 0.4 + 2.9 * lines, lines, columns)
    axes = panels.flatten()
    for axis, record in zip(axes, records.values(), strict=False):
        panel(axis, record)
        axis.set_title(f"{record['dtype']}, {TITLES[record['head']]}", fontsize="medium")
    for axis in axes[len(records) :]:
        axis.remove()
    figure.suptitle(next(iter(records.values()))["work"], fontsize="medium")
    return figure


def growth(cases: Cases) -> Any:
    """Time (measured here) and memory (counted, at the size of an 8B model's head) as rows and vocabulary grow."""
    if not any(key.startswith(("rows/", "vocabulary/", "memory/rows")) for key in cases):
        return None
    figure, panels = _figure(10.4, 7, 2, 2)
    for column, kind in enumerate(("rows", "vocabulary")):
        times = {int(key.split("/")[1]): record for key, record in cases.items() if key.startswith(f"{kind}/")}
        by_name: dict[str, list[tuple[int, float]]] = {}
        for size, record in sorted(times.items()):
            for name, m in measurements(record).items():
                if not m.failure and name != ALL_ROWS:
                    by_name.setdefault(name, []).append((size, m.median))
        _lines(panels[0][column], by_name)
        panels[0][column].set(xlabel=kind, ylabel="seconds, head trained", title="time, H = 576")
        by_loss: dict[str, list[tuple[int, float]]] = {}
        if counted := cases.get(f"memory/{kind}"):
            sizes = [s["vocabulary" if kind == "vocabulary" else "positions"] for s in counted["shapes"]]
            by_loss = {
                f"{one['loss']}, {one['head']}": [
                    (size, (peak - base) / GIB)
                    for size, peak, base in zip(sizes, one["peaks"], counted["baselines"], strict=True)
                ]
                for one in counted["losses"]
                if one["head"] == "trained"
            }
        _lines(panels[1][column], by_loss)
        panels[1][column].set(xlabel=kind, ylabel="GiB above the inputs, counted", title="memory, H = 4096, bf16")
    return figure


def _lines(axis: Any, by_name: dict[str, list[tuple[int, float]]]) -> None:
    for i, (name, points) in enumerate(by_name.items()):
        style = {"color": OURS_COLOR, "linewidth": 2.5} if is_ours(name) else {"color": f"C{i % 10}", "linewidth": 1.2}
        if name in FLOORS:
            style = {"color": "black", "linestyle": "--", "linewidth": 1}
        axis.plot(*zip(*points, strict=True), marker=MARKERS[i % len(MARKERS)], markersize=4, label=name, **style)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.grid(alpha=0.3)
    if by_name:
        axis.legend(fontsize="x-small")
    else:
        axis.set_axis_off()


def models(cases: Cases) -> Any:
    """Time over the bare GEMMs for the heads of known models, and for shares of rows that matter."""
    real = contests(cases, "llmbar", "synthetic")
    records = {key: r for key, r in contests(cases, "").items() if key not in real}
    heads = [head for head in TITLES if any(r["head"] == head for r in records.values())]
    if not records:
        return None
    groups = list(dict.fromkeys(key.split("/")[1] for key in records))
    names = [n for n in dict.fromkeys(n for r in records.values() for n in measurements(r)) if n not in FLOORS]
    figure, panels = _figure(3 + 1.3 * len(groups), 0.5 + 3 * len(heads), len(heads), sharex=True)
    axes = panels[:, 0]
    width = 0.85 / len(names)
    for axis, head in zip(axes, heads, strict=True):
        for i, name in enumerate(names):
            points = [
                (groups.index(key.split("/")[1]), over_gemms(name, measurements(record)))
                for key, record in records.items()
                if record["head"] == head
            ]
            bars = [(x + (i - (len(names) - 1) / 2) * width, y) for x, y in points if y is not None]
            color = OURS_COLOR if name == "ours" else f"C{i % 10}"
            axis.bar([x for x, _ in bars], [y for _, y in bars], width, label=name, color=color)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=TITLES[head], ylabel="time / bare GEMMs")
    axes[-1].set_xticks(range(len(groups)), groups, rotation=20)
    axes[0].legend(fontsize="x-small", ncols=4)
    return figure


def over_gemms(name: str, found: dict[str, Measurement]) -> float | None:
    m, floor = found.get(name), found.get(FLOOR)
    return None if m is None or floor is None or m.failure or floor.failure else ratios(m, floor)[1]


def _row(cases: Cases, kind: str, height: float, panel: Callable[[Any, dict[str, Any]], None]) -> Any:
    """A panel for each record of a kind, side by side."""
    records = [record for key, record in cases.items() if key.startswith(kind)]
    if not records:
        return None
    figure, panels = _figure(5.2 * len(records), height, columns=len(records))
    for axis, record in zip(panels[0], records, strict=True):
        panel(axis, record)
    return figure


def gaps(cases: Cases) -> Any:
    """Error at logit gaps of 1 to 80; beyond the top: not finite."""

    def panel(axis: Any, record: dict[str, Any]) -> None:
        for i, (name, errors) in enumerate(record["errors"].items()):
            ys = [min(1e2, y) if math.isfinite(y) else 1e2 for y in errors["both"]]
            style = {"color": OURS_COLOR, "linewidth": 2.5} if is_ours(name) else {"color": f"C{i % 10}", "alpha": 0.8}
            axis.plot(record["gaps"], ys, marker=MARKERS[i % len(MARKERS)], markersize=3, label=name, **style)
        axis.axhline(1e2, color="black", linestyle=":", linewidth=1)
        axis.text(record["gaps"][-1], 1.2e2, "inf or NaN", ha="right", va="bottom", fontsize="x-small")
        axis.set_yscale("log")
        axis.set(xlabel="logit gap of both answers", ylabel="worst error of loss and gradients", title=record["dtype"])
        axis.legend(fontsize="x-small", loc="center right")

    return _row(cases, "confidence/", 3.6, panel)


def step(cases: Cases) -> Any:
    """The training step by its parts."""

    def panel(axis: Any, record: dict[str, Any]) -> None:
        left = dict.fromkeys(step_medians(record), 0.0)
        for part, color in zip(PARTS, ("0.6", OURS_COLOR, "0.8"), strict=True):
            widths = step_medians(record, part)
            names = list(reversed(widths))
            axis.barh(names, [widths[name] for name in names], left=[left[name] for name in names], color=color)
            left = {name: left[name] + width for name, width in widths.items()}
        axis.set(xlabel="seconds: body, head + loss (red), optimizer", title=f"{record['case']}\n{record['dtype']}")

    return _row(cases, "step/", 2.6, panel)


PICTURES: dict[str, Callable[[Cases], Any]] = {
    "time": time,
    "memory": memory_here,
    "accuracy": accuracy,
    "growth": growth,
    "models": models,
    "gaps": gaps,
    "step": step,
}
