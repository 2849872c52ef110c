"""What a GPU should show, and whether it did: every goal with its bound, what was measured, and the verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from benchmarks.contest.training_step import OURS, SHARED, TRL
from benchmarks.contest.turns import FLOOR, ratios
from benchmarks.gpu.heads import PEERS, RECOMPUTE
from benchmarks.gpu.kernels import ROW_WISE
from benchmarks.report.tables import measurements

Cases = dict[str, dict[str, Any]]

# Time over that of the bare GEMMs of one head in bf16, all rows: (head, who of ours) by model.
OVER_GEMMS = {
    "Llama-3-8B": {
        ("evaluation", "ours"): 1.12,
        ("frozen", "ours"): 1.12,
        ("trained", "ours"): 1.08,
        ("trained", RECOMPUTE): 1.45,
    },
    "Llama-3.2-1B": {("frozen", "ours"): 1.25, ("trained", "ours"): 1.2},
    "Qwen3-0.6B": {("frozen", "ours"): 1.25, ("trained", "ours"): 1.2},
}
NO_SLOWER_THAN_A_PEER = 1.0
STEP_OF_TRL, SHARED_OF_PADDED = 2.5, 1.25
SHARE_OF_COPY = 0.75
OPERATIONS, HOST_OF_PLAIN = 25, 1.3


@dataclass(frozen=True)
class Verdict:
    """One goal: its bound, the number that was measured or why there is none, and whether it is met."""

    goal: str
    bound: float
    at_most: bool
    measured: float | None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """None where nothing was measured."""
        if self.measured is None:
            return None
        return self.measured <= self.bound if self.at_most else self.measured >= self.bound

    @property
    def word(self) -> str:
        return {True: "met", False: "MISSED", None: "not measured"}[self.met]

    @property
    def bound_text(self) -> str:
        return f"{'<=' if self.at_most else '>='} {self.bound:g}"


def verdicts(cases: Cases) -> list[Verdict]:
    """All goals, in the order of the parts."""
    return [*_tests(cases), *_kernels(cases), *_heads(cases), *_host(cases), *_steps(cases)]


def _verdict(
    cases: Cases, goal: str, bound: float, key: str, value: Callable[[dict[str, Any]], float], *, at_most: bool = True
) -> Verdict:
    """Of one record, or without a number where that is missing, was left out, or lacks who is asked for."""
    record = cases.get(key)
    if record is None or "skipped" in record:
        return Verdict(goal, bound, at_most, None, "" if record is None else record["skipped"])
    try:
        return Verdict(goal, bound, at_most, value(record))
    except LookupError as error:
        return Verdict(goal, bound, at_most, None, str(error.args[0]))


def _tests(cases: Cases) -> Iterator[Verdict]:
    found = _verdict(cases, "tests that fail", 0, "tests", lambda record: len(record["failed"]))
    if found.measured is not None:
        record = cases["tests"]
        note = f"{record['passed']} passed, {record['skips']} skipped"
        found = replace(found, note=f"{note}, the others cut by the time" if record["cut"] else note)
    yield found


def _kernels(cases: Cases) -> Iterator[Verdict]:
    keys = [key for key in cases if key.startswith("kernels/") and key.split("/")[1] in ROW_WISE]
    for key in keys:
        goal = f"{' at V = '.join(key.split('/')[1:])}, of the copy's bandwidth"
        yield _verdict(cases, goal, SHARE_OF_COPY, key, lambda record: record["share"], at_most=False)


def _heads(cases: Cases) -> Iterator[Verdict]:
    for model, goals in OVER_GEMMS.items():
        for (head, who), bound in goals.items():
            key = f"heads/{model}/100%/{head}"
            goal = f"{model}, {head}, {who}: over the bare GEMMs"
            yield _verdict(cases, goal, bound, key, partial(over, of=who, to=FLOOR))
    for key, record in cases.items():
        if key.startswith("heads/") and "skipped" not in record:
            yield _fastest_peer(key, record)


def _fastest_peer(key: str, record: dict[str, Any]) -> Verdict:
    """How many times our time the fastest peer's is."""
    goal = f"{', '.join(key.split('/')[1:])}: the fastest peer over ours"
    found = {name: over(record, name, "ours") for name in PEERS if has(record, name) and has(record, "ours")}
    if not found:
        return Verdict(goal, NO_SLOWER_THAN_A_PEER, False, None, "no peer ran")
    fastest = min(found, key=found.__getitem__)
    return Verdict(goal, NO_SLOWER_THAN_A_PEER, False, found[fastest], fastest)


def _host(cases: Cases) -> Iterator[Verdict]:
    for head in ("evaluation", "frozen", "trained"):
        key = f"host/{head}"
        yield _verdict(cases, f"host, {head}: over plain", HOST_OF_PLAIN, key, lambda record: record["ratio"])
    yield _verdict(cases, "device operations, frozen, one chunk", OPERATIONS, "host/frozen", _operations)


def _operations(record: dict[str, Any]) -> float:
    if record["operations"] is None:
        raise LookupError("no GPU to count on")
    return record["operations"]


def _steps(cases: Cases) -> Iterator[Verdict]:
    def times(record: dict[str, Any], slow: str, fast: str) -> float:
        seconds = {name: one["seconds"] for name, one in record["contestants"].items()}
        if missing := [name for name in (slow, fast) if name not in seconds]:
            raise LookupError(f"{missing[0]} did not run")
        return seconds[slow] / seconds[fast]

    for key in dict.fromkeys(["step/long prompts/sdpa", *(key for key in cases if key.startswith("step/"))]):
        name = f"step, {', '.join(key.split('/')[1:])}"
        if key.endswith("/sdpa"):  # elsewhere TRL does not take part
            goal = f"{name}: TRL over ours"
            yield _verdict(cases, goal, STEP_OF_TRL, key, lambda r: times(r, TRL, SHARED), at_most=False)
        if "long prompts" in key:
            goal = f"{name}: padded over shared"
            yield _verdict(cases, goal, SHARED_OF_PADDED, key, lambda r: times(r, OURS, SHARED), at_most=False)


def has(record: dict[str, Any], name: str) -> bool:
    found = measurements(record).get(name)
    return found is not None and not found.failure and bool(found.forward)


def over(record: dict[str, Any], of: str, to: str) -> float:
    """Median, over the rounds, of one contestant's time over another's.

    Raises:
        LookupError: one of them has no time, with its reason.
    """
    found = measurements(record)
    for name in (of, to):
        if name not in found:
            raise LookupError(f"{name} did not take part")
        if not has(record, name):
            raise LookupError(f"{name}: {found[name].failure}")
    return ratios(found[of], found[to])[1]
