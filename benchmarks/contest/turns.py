"""One contest: everybody who computes the loss, on the same inputs, in the same process, in turns.

Each contestant first has to give the loss that float64 arithmetic gives on the same numbers; one that does not, or that
cannot run, is named with its reason and left out. That first call also compiles and warms up, and its gradients are
compared with float64's. A second call, outside of the timing, is counted: bytes (on a GPU by its allocator, on a CPU
to the byte by `memory.PeakBytes`) and FLOPs of matrix products. Then all take turns, one call each per round in a new
order every round, so that a slow minute of the machine hits everyone.

The floors are the bare matrix products, into buffers that already exist, on all positions and on the rows that matter.
"""

from __future__ import annotations

import functools
import gc
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.contest import peers
from benchmarks.contest.exact import BETA, Exact, exact, relative_error
from benchmarks.contest.memory import PeakBytes
from benchmarks.contest.workloads import Workload
from benchmarks.timing import Marks

HEADS = {"evaluation": (False, False), "frozen": (True, False), "trained": (True, True)}  # hidden, head require grad
Variants = Mapping[str, Mapping[str, Any]]  # name -> options of `orpo_loss`
OURS: Variants = {"ours": {}, "ours, torch": {"backend": "torch"}}  # the same schedules with our kernels and without
FLOOR, ALL_ROWS = "GEMMs, valid rows", "GEMMs, all rows"
FLOORS = (FLOOR, ALL_ROWS)
SLOW_ROUNDS = 3  # of those that take several times as long as the others
# How far a loss may be from float64's on the same inputs. A 16-bit peer rounds its logits, TRL its token sums as well.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}


@dataclass(frozen=True)
class Measurement:
    """One contestant: seconds per round, and what its one counted call took; or why there is nothing."""

    name: str
    forward: list[float] = field(default_factory=list)
    backward: list[float] = field(default_factory=list)  # empty in evaluation
    peak_bytes: int | None = None  # above the inputs, gradients included; None where it was not measured
    flops: int | None = None  # of matrix products; None where they cannot be counted
    loss_error: float | None = None  # relative, to float64
    gradient_errors: dict[str, float] = field(default_factory=dict)  # of "hidden" and "weight", relative norms
    failure: str | None = None

    @property
    def both(self) -> list[float]:
        """Forward + backward of every round."""
        backward = self.backward or [0.0] * len(self.forward)
        return [sum(parts) for parts in zip(self.forward, backward, strict=True)]

    @property
    def median(self) -> float:
        return statistics.median(self.both)


def ratios(of: Measurement, to: Measurement) -> tuple[float, float, float]:
    """Quartiles, the median in the middle, of one's time over another's in the same round."""
    paired = [a / b for a, b in zip(of.both, to.both, strict=False)]  # a slow one has fewer rounds, the first ones
    if len(paired) < 2:
        return paired[0], paired[0], paired[0]
    low, middle, high = statistics.quantiles(paired, n=4, method="inclusive")
    return low, middle, high


def _addmm_flops(_: Any, a: Sequence[int], b: Sequence[int], **options: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


IN_PLACE = {torch.ops.aten.addmm_: _addmm_flops}  # which torch's counter leaves out


# ---------------------------------------------------------------------------------------------------------------------
# A call
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Contestant:
    """A forward pass, and the backward pass of what it returned."""

    forward: Callable[[], Any]
    backward: Callable[[Any], None]
    compiled: bool = False
    opaque: bool = False


class Contest:
    """One workload's inputs under one head, and everybody who takes part."""

    def __init__(self, work: Workload, head: str, variants: Variants = OURS) -> None:
        train_hidden, train_head = HEADS[head]
        self.work, self.head, self.variants = work, head, variants
        self.hidden = work.hidden.detach().requires_grad_(train_hidden)
        self.weight = work.weight.detach().requires_grad_(train_head)
        self.bias = None if work.bias is None else work.bias.detach().requires_grad_(train_head)

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def contestant(self, name: str) -> Contestant:
        """Ours, a peer, or a floor, on these inputs.

        Raises:
            RuntimeError: a peer that is not installed, or that cannot compute this head.
        """
        if name in FLOORS:
            rows = self.work.rows if name == FLOOR else self.work.labels.numel()
            floor = peers.GemmFloor(rows, self.hidden, self.weight)
            return Contestant(floor.forward, lambda _: floor.backward())
        inputs = (self.hidden, self.weight, self.work.labels, self.work.nll_labels, BETA)
        options: dict[str, Any] = {"bias": self.bias}
        if self.work.logit_softcap is not None:
            options["logit_softcap"] = self.work.logit_softcap
        if name in self.variants:
            ours: Callable[..., Tensor] = peers.ours
            return Contestant(functools.partial(ours, *inputs, **options, **self.variants[name]), Tensor.backward)
        peer = self._peer(name)
        forward = functools.partial(peer, *inputs, **options)
        return Contestant(forward, Tensor.backward, peer.compiled, peer.opaque)

    def _peer(self, name: str) -> peers.Peer:
        peer = peers.PEERS[name]
        if not peer.available:
            raise RuntimeError(f"the package {peer.package} is not installed, or this version lacks the function")
        if self.bias is not None and not peer.bias:
            raise RuntimeError("takes no lm-head bias")
        if self.work.logit_softcap is not None and not peer.softcap:
            raise RuntimeError("takes no soft-cap")
        return peer

    def run(self, contestant: Contestant) -> tuple[list[float], Any]:
        """Seconds of forward and (unless evaluating) backward of one call, and what the forward pass returned."""
        self.clear()
        with torch.set_grad_enabled(self.head != "evaluation"):
            marks = Marks(self.device)
            marks.add()
            result = contestant.forward()
            marks.add()
            if self.head != "evaluation":
                contestant.backward(result)
                marks.add()
        return marks.seconds(), result

    def gradients(self) -> dict[str, Tensor]:
        """Those that the last call left."""
        leaves = {"hidden": self.hidden, "weight": self.weight}
        return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}

    def count(self, contestant: Contestant) -> tuple[int | None, int | None]:
        """Peak bytes above the inputs and FLOPs of matrix products, of one call.

        On a CPU a compiled peer counts as it would run uncompiled: as many FLOPs, but what it holds is unknown. On a
        GPU the products of a Triton kernel cannot be seen, so that no FLOPs are given there; nor for an opaque peer.
        """
        self.clear()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            self.run(contestant)
            return torch.cuda.max_memory_allocated() - before, None
        if contestant.opaque:
            return None, None
        inputs = [t for t in (self.hidden, self.weight, self.bias) if t is not None]
        with (
            torch.compiler.set_stance("force_eager"),
            FlopCounterMode(display=False, custom_mapping=IN_PLACE) as flops,
            PeakBytes(inputs) as memory,
        ):
            self.run(contestant)
        return None if contestant.compiled else memory.peak - memory.baseline, flops.get_total_flops()

    def clear(self) -> None:
        for leaf in (self.hidden, self.weight, self.bias):
            if leaf is not None:
                leaf.grad = None

    def least_flops(self) -> int:
        """The products that exact gradients cannot do without, over the rows that matter."""
        return (1 + sum(HEADS[self.head])) * self.work.gemm_flops


# ---------------------------------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------------------------------


def measure(
    work: Workload,
    truth: Exact,
    head: str,
    names: Sequence[str],
    rounds: int,
    advance: Callable[[], None],
    variants: Variants = OURS,
) -> list[Measurement]:
    """Everybody's check against `truth`, what a call takes, and the times of every round.

    variants: ours, by the names that they have among `names`.
    advance: called for each contestant 1 + rounds times.
    """
    torch.compiler.reset()  # else the compiled peers run into the limit of recompilations, and on uncompiled
    contest = Contest(work, head, variants)
    ready: dict[str, Contestant] = {}
    found: dict[str, dict[str, Any]] = {name: {} for name in names}

    def attempt(name: str, step: Callable[[], None]) -> None:
        """Run `step`; what goes wrong is that contestant's result, and its memory is given back."""
        try:
            step()
        except Exception as error:  # a peer that cannot run here is a finding, not a reason to stop
            found[name] = {"failure": reason(error), "loss_error": found[name].get("loss_error")}
            ready.pop(name, None)
        if name not in ready:  # here, where the error and its frames are gone
            contest.clear()
            release(contest.device)

    def prepare(name: str) -> None:
        contestant = contest.contestant(name)
        _, result = contest.run(contestant)
        if name not in FLOORS:
            error = found[name]["loss_error"] = abs(result.item() - truth.loss) / abs(truth.loss)
            if not error <= TOLERANCE[work.hidden.dtype]:
                raise ArithmeticError(f"its loss is off by {error:.1e}, more than {TOLERANCE[work.hidden.dtype]:.0e}")
            gradients = contest.gradients()
            found[name]["gradient_errors"] = {
                leaf: relative_error(gradients[leaf], true) for leaf, true in truth.gradients.items()
            }
            del result, gradients
            found[name]["peak_bytes"], found[name]["flops"] = contest.count(contestant)
        if contestant.compiled:
            contest.run(contestant)  # some compile again at their second call
        ready[name] = contestant

    def timed(name: str, i_round: int) -> None:
        if i_round >= SLOW_ROUNDS and name in peers.PEERS and peers.PEERS[name].slow:
            return
        seconds, _ = contest.run(ready[name])
        found[name].setdefault("forward", []).append(seconds[0])
        found[name].setdefault("backward", []).extend(seconds[1:])

    for name in names:
        attempt(name, functools.partial(prepare, name))
        advance()
    order, shuffle = list(names), random.Random(0).shuffle
    for i_round in range(rounds):
        shuffle(order)
        for name in order:
            if name in ready:
                attempt(name, functools.partial(timed, name, i_round))
            advance()
    ready.clear()
    contest.clear()
    release(contest.device)
    return [Measurement(name, **found[name]) for name in names]


def record(
    work: Workload,
    head: str,
    names: Sequence[str],
    rounds: int,
    advance: Callable[[], None] = lambda: None,
    variants: Variants = OURS,
    truth: Exact | None = None,
) -> dict[str, Any]:
    """A contest as it stands in the results, and as `report` shows it; `truth` where it is known already."""
    found = measure(work, truth or exact(work, *HEADS[head]), head, names, rounds, advance, variants)
    return {
        "work": str(work),
        "dtype": str(work.hidden.dtype).removeprefix("torch."),
        "head": head,
        "least_flops": Contest(work, head).least_flops(),
        "measurements": [asdict(measurement) for measurement in found],
    }


def reason(error: Exception) -> str:
    if isinstance(error, torch.OutOfMemoryError):
        return "out of memory"
    line = str(error).strip().splitlines()[0] if str(error).strip() else ""
    return line if type(error) in (RuntimeError, ArithmeticError) else f"{type(error).__name__}: {line}"


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
