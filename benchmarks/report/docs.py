"""docs/benchmarks.md, its pictures, and the README's measured figures, written from a results file.

The README has a pair of comments around every block that is written here; what stands between them is replaced:

    <!-- benchmarks: time -->
    <!-- end of benchmarks: time -->
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.contest import suite
from benchmarks.contest.training_step import SHARED, TRL
from benchmarks.contest.turns import ALL_ROWS
from benchmarks.report import plots, tables
from benchmarks.report.results import PROJECT

Cases = dict[str, dict[str, Any]]


def command_of(options: dict[str, Any]) -> str:
    """What measures the same again."""
    words = ["python -m benchmarks", "--full" if options["full"] else "--quick"]
    words += [f"--device {options['device']}"] * (options["device"] != "cpu")
    words += [f"--peer {shlex.join(options['peers'])}"] if options["peers"] is not None else []
    words += [f"--rounds {options['rounds']}"] * (options["rounds"] != suite.ROUNDS[options["full"]])
    words += [f"--threads {options['threads']}"] * (options["threads"] != suite.Settings().threads)
    return " ".join(words)


def machine_line(machine: dict[str, Any]) -> str:
    """Date, processor and versions in a line."""
    gpu = machine["gpu"]
    bf16 = "bf16 products in hardware" if machine["bf16_gemm_hardware"] else "bf16 products emulated"
    on = gpu["name"] if gpu else f"{machine['kind']}, {machine['threads']} threads ({bf16})"
    versions = ", ".join(f"{name} {v}" for name, v in machine["packages"].items() if v and name != "orpo-kernels")
    return f"{machine['date'][:10]}, {on}; {versions}"


# ---------------------------------------------------------------------------------------------------------------------
# docs/benchmarks.md
# ---------------------------------------------------------------------------------------------------------------------

INTRODUCTION = """\
# Benchmarks

Written by the command below, from its `results.json`; nothing here is edited by hand.

    {command}

{machine}

Everybody is on the same inputs, in the same process, in turns, in a new order every round; nobody is timed before its
loss is that of float64 arithmetic on the same numbers, and a torch.compile'd peer has compiled before.

- *both*: median of forward + backward. Liger, and our single pass, make their gradients in the forward pass.
- *range*: from the fastest to the slowest call.
- */ ours*, */ GEMMs*: medians of the ratio within a round, to ours and to the bare products on the rows that matter.
- *MiB*: peak above the inputs, gradients included, counted to the byte. Code that torch.compile generates, torch's
  `linear_cross_entropy` and Unsloth's head cannot be counted: for them there is the resident memory.
- *FLOP*: of all matrix products that ran, over the least that exact gradients need.
- *dh*, *dW*: errors of the gradients of hidden states and weight: norm of the difference to float64's, over its norm.

`python -m benchmarks` is the two-minute version, `--list` shows the cases, `--compare` compares the rankings of two
runs, and `python -m benchmarks.contest.regression` fails where ours over the bare GEMMs has become worse than was kept
for this kind of processor.
"""

SECTIONS: tuple[tuple[str, str, tuple[str, ...], tuple[str, ...]], ...] = (
    # title, text, keys that begin with, pictures
    (
        "Real hidden states, real masks",
        "SmolLM2-135M on a batch of LLMBar, the odds ratio on the answers, the NLL on the chosen prompt and answer.",
        ("contest/llmbar/", "contest/synthetic/"),
        ("time", "accuracy", "memory"),
    ),
    (
        "The same where malloc keeps its pages",
        "glibc's malloc gives large blocks back to the kernel and faults their pages in again at the next call. Here "
        "it keeps them, as jemalloc and tcmalloc do (`benchmarks/contest/malloc.py`; for a script of your own, "
        "`MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1000000000000`): what is left of the difference to the bare "
        "products, which never pay for pages, is work. Who holds whole matrices of logits gains most.",
        ("kept pages/",),
        (),
    ),
    ("Resident memory", "What a fresh process holds while it runs one contestant.", ("process/",), ()),
    (
        "Shares of rows that matter, heads of other models",
        "Random hidden states. Padding and the prompts of rejected answers are what does not matter.",
        ("contest/",),
        ("models",),
    ),
    ("How cost grows", "", ("rows/", "vocabulary/", "memory/"), ("growth",)),
    ("Confident answers", "", ("confidence/",), ("gaps",)),
    (
        "The whole training step",
        "Forward to optimizer, through TRL's own trainer and the drop-in.",
        ("step/",),
        ("step",),
    ),
    (
        "GPUs: an estimate, not a measurement",
        "What the data sheets make of the FLOPs and bytes that our launches have "
        "(`python -m benchmarks.estimates.roofline`). Bounds from below.",
        ("estimate",),
        (),
    ),
)


def document(results: dict[str, Any], pictures: set[str]) -> str:
    command, machine = command_of(results["options"]), machine_line(results["machine"])
    parts = [INTRODUCTION.format(command=command, machine=machine)]
    cases, taken = results["cases"], set()
    if lines := summary(cases):
        parts.append("\n".join(["## Who is ahead of us, and where", "", *(f"- {line}" for line in lines), ""]))
    for title, text, starts, wanted in SECTIONS:
        mine = {key: cases[key] for key in cases if key.startswith(starts) and key not in taken}
        taken |= set(mine)
        if not mine:
            continue
        parts += [f"## {title}\n", f"{text}\n" if text else ""]
        parts += [f"![{name}](benchmarks/{name}.png)\n" for name in wanted if name in pictures]
        parts += [f"{sheet.markdown()}\n" for sheet in tables.sheets(mine)]
    return "\n".join(part for part in parts if part)


def summary(cases: Cases) -> list[str]:
    """The verdict of every contest, and of the processes, in a line each."""
    lines = []
    for key, record in cases.items():
        if key.startswith(("contest/", "kept pages/")) and record["measurements"]:
            lines.append(f"`{key}`: {'; '.join(tables.verdict(record))}")
        if key.startswith("process/"):
            lines.append(f"`{key}`: {'; '.join(tables.leaner_processes(record)) or 'no process is leaner than ours.'}")
    return lines


# ---------------------------------------------------------------------------------------------------------------------
# The README's blocks
# ---------------------------------------------------------------------------------------------------------------------


def _summary(cases: Cases) -> str:
    """Times over ours on the real batch, and TRL's step over ours; "" without that batch."""
    records = plots.contests(cases, "llmbar")
    if not records:
        return ""
    found = {key: tables.measurements(record) for key, record in records.items()}
    heads = [f"{r['dtype'].replace('float', 'fp').replace('bfp', 'bf')}, {r['head']}" for r in records.values()]
    rows = []
    for name in dict.fromkeys(name for measured in found.values() for name in measured):
        pairs = [(measured[name], measured["ours"]) for measured in found.values() if name in measured]
        is_timed = len(pairs) == len(found) and all(m.forward and not m.failure for m, _ in pairs)
        if is_timed and name != ALL_ROWS:
            rows.append([name, *(f"{tables.ratios(m, ours)[1]:.2f}" for m, ours in pairs)])
    rows.sort(key=lambda row: float(row[-1]))
    parts = [tables.Sheet("", ["over ours", *heads], rows).markdown(title=False)]
    told = []
    for record in (record for key, record in cases.items() if key.startswith("step/")):
        medians = tables.step_medians(record)
        if {TRL, SHARED} <= set(medians):
            told.append(f"{record['case']}, {record['dtype']} {medians[TRL] / medians[SHARED]:.1f}")
    if told:
        parts.append(f"A whole training step by TRL's trainer over ours, prompts shared: {'; '.join(told)}.")
    return "\n\n".join(parts)


BLOCKS: dict[str, Callable[[Cases], str]] = {"summary": _summary}


def renewed(text: str, word: str, write: Callable[[str, str], str]) -> str:
    """A text whose every block between `<!-- word: NAME -->` and its end is what `write` makes of its name and text."""
    pattern = rf"(<!-- {word}: (\w+) -->\n)(.*?)(\n<!-- end of {word}: \2 -->)"
    return re.sub(pattern, lambda m: f"{m[1]}{write(m[2], m[3])}{m[4]}", text, flags=re.DOTALL)


def with_blocks(text: str, results: dict[str, Any]) -> str:
    """The README's text with its blocks renewed; a block whose cases are not in the results stays as it was.

    Raises:
        ValueError: a block that nobody knows how to write.
    """

    def block(name: str, before: str) -> str:
        if name not in BLOCKS:
            raise ValueError(f"the README has a block {name!r}, but known are {', '.join(BLOCKS)}")
        figures = BLOCKS[name](results["cases"])
        if not figures:
            return before
        return f"{figures}\n\n`{command_of(results['options'])}`, {machine_line(results['machine'])}."

    return renewed(text, "benchmarks", block)


def write(results: dict[str, Any], project: Path = PROJECT) -> list[Path]:
    """docs/benchmarks.md, docs/benchmarks/*.png and the README's blocks; the paths written."""
    pictures = plots.draw(results["cases"], project / "docs" / "benchmarks", machine_line(results["machine"]))
    page, readme = project / "docs" / "benchmarks.md", project / "README.md"
    page.write_text(document(results, {path.stem for path in pictures}))
    readme.write_text(with_blocks(readme.read_text(), results))
    return [page, *pictures, readme]
