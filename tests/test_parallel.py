"""Several processes against one: data, vocabulary and sequence groups, alone and together."""

from __future__ import annotations

import math
import os
import re
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from benchmarks.estimates.distributed import PAGE, messages, with_tables
from orpo_kernels import Limits, ORPOOutput, orpo_loss, orpo_loss_from_rows, parallel, plan, token_logps
from orpo_kernels.ops import why_not

from .batches import (
    IGNORE,
    PLAIN_OPTIONS,
    Batch,
    answer_logps,
    batches,
    plain_loss,
    random_labels,
    random_rows,
    relative_error,
)
from .ranks import RankError, Ranks, topology

if not dist.is_available():
    pytest.skip("torch.distributed is not in this build of torch", allow_module_level=True)

FP32 = torch.float32
BACKENDS = [name for name in ("torch", "native", "triton") if why_not(name, torch.device("cpu")) is None]
SMALL_CHUNKS = Limits(chunk_rows=3, chunk_bytes=512, least_columns=5)
properties = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with Ranks(4) as pool:
        yield pool


# --- splitting a batch ---------------------------------------------------------------------------------------------


def cut(total: int, parts: int, generator: torch.Generator, least: int = 0) -> list[slice]:
    """[0, total) in `parts` pieces of any sizes from `least` on."""
    room = total - least * parts
    bounds = torch.randint(room + 1, (parts - 1,), generator=generator).sort().values.tolist()
    starts = [least * i + bound for i, bound in enumerate([0, *bounds])]
    return [slice(start, end) for start, end in zip(starts, [*starts[1:], total], strict=True)]


def some_pairs(batch: Batch, pairs: slice) -> Batch:
    count = len(batch.labels) // 2

    def of_both_halves(tensor: Tensor) -> Tensor:
        return torch.cat((tensor[:count][pairs], tensor[count:][pairs]))

    of_chosen = {name: getattr(batch, name) for name in ("nll_labels", "pair_weight")}
    return replace(
        batch,
        hidden=of_both_halves(batch.hidden),
        labels=of_both_halves(batch.labels),
        **{name: None if tensor is None else tensor[pairs] for name, tensor in of_chosen.items()},
    )


def some_columns(batch: Batch, columns: slice) -> Batch:
    return replace(batch, weight=batch.weight[columns], bias=None if batch.bias is None else batch.bias[columns])


def some_positions(batch: Batch, positions: slice) -> Batch:
    nll_labels = None if batch.nll_labels is None else batch.nll_labels[:, positions]
    return replace(batch, hidden=batch.hidden[:, positions], labels=batch.labels[:, positions], nll_labels=nll_labels)


def shifted(batch: Batch) -> Batch:
    """The same batch with labels under the positions that predict them."""
    if not batch.options["shift"]:
        return batch

    def shift(labels: Tensor | None) -> Tensor | None:
        return None if labels is None else torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORE)

    return replace(
        batch,
        labels=shift(batch.labels),
        nll_labels=shift(batch.nll_labels),
        options={**batch.options, "shift": False},
    )


# --- what runs on every rank ---------------------------------------------------------------------------------------


def group_of(name: str) -> Any:
    """A group of the pool, a ProcessGroup or a DeviceMesh."""
    found = topology()
    return {"pair": found.pair, "world": found.world, "outer": found.mesh["outer"], "inner": found.mesh["inner"]}[name]


def place(name: str) -> int:
    """This rank's place in the group."""
    group = group_of(name)
    return dist.get_rank(group.get_group() if hasattr(group, "get_group") else group)


def run(batch: Batch, options: dict[str, Any], small: bool = True) -> tuple[ORPOOutput, dict[str, Tensor]]:
    out, grads = batch.run(orpo_loss, **options, limits=SMALL_CHUNKS if small else None)
    return ORPOOutput(*(value.detach() for value in out)), grads


def in_parts(batch: Batch, split: dict[str, tuple[str, list[slice]]], options: dict[str, Any]) -> Any:
    """The loss of this rank's part. `split`: for each kind of group, which one it is and what its ranks hold."""
    take = {"data": some_pairs, "vocab": some_columns, "sequence": some_positions}
    groups = {}
    for kind, (name, parts) in split.items():
        batch = take[kind](batch, parts[place(name)])
        groups[f"{kind}_group"] = group_of(name)
    return run(batch, {**options, **groups})


# --- against one process -------------------------------------------------------------------------------------------


def joined(results: list[Any], split: dict[str, tuple[str, list[slice]]], name: str, whole: Tensor) -> Tensor:
    """The gradient `name` of one process from those of four: averaged as DDP does, put together where it was split."""
    replicas = math.prod(len(parts) for kind, (_, parts) in split.items() if kind != "vocab")
    total = torch.zeros_like(whole)
    for rank, (_, grads) in enumerate(results):
        index: list[Any] = [slice(None)] * whole.dim()
        copies = 4
        for kind, (group, parts) in split.items():
            at = {"pair": rank % 2, "world": rank, "outer": rank // 2, "inner": rank % 2}[group]
            copies //= len(parts)
            if kind == "data" and name == "hidden":
                half = len(whole) // 2
                index[0] = list(range(half)[parts[at]]) + list(range(half, 2 * half)[parts[at]])
            elif kind == "sequence" and name == "hidden":
                index[1] = parts[at]
            elif kind == "vocab" and name in ("weight", "bias"):
                index[0] = parts[at]
            elif kind == "vocab":
                copies *= len(parts)
        total[tuple(index)] += grads[name] / (replicas * copies)
    return total


def check(ranks: Ranks, batch: Batch, split: dict[str, tuple[str, list[slice]]], **options: Any) -> None:
    out, grads = batch.to(FP32).run(orpo_loss, **options)
    results = ranks.run(in_parts, batch.to(FP32), split, options)
    for name in ("loss", "nll_loss", "or_loss"):
        whole = getattr(out, name).detach()
        mean = torch.stack([getattr(theirs, name) for theirs, _ in results]).mean()
        assert abs(float(mean - whole)) <= 1e-6 * max(1.0, abs(float(whole))), name
    for name, grad in grads.items():
        # A gradient that cancels to almost nothing is known to the rounding of its terms, which are of order 1.
        error = (joined(results, split, name, grad) - grad).norm()
        assert error <= 1e-5 * grad.norm() + 1e-7, name


seeds = st.integers(0, 2**31)


ONE_KIND = [((kind, group),) for kind in ("data", "vocab", "sequence") for group in ("pair", "world")]
TWO_KINDS = [("data", "vocab"), ("sequence", "vocab"), ("data", "sequence")]
LAYOUTS = [*ONE_KIND, *(tuple(zip(kinds, ("outer", "inner"), strict=True)) for kinds in TWO_KINDS)]


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: " x ".join(map(" ".join, layout)))
@properties
@given(batches(), seeds, st.sampled_from(["auto", "resident", "recompute"]), st.sampled_from(BACKENDS))
def test_groups_are_one_process(ranks, layout, batch, seed, schedule, backend):
    """Two processes (twice) or four, alone and on a mesh: any number of pairs, of positions and of tokens on a rank.

    None of the first two included; every schedule (a frozen head's is single_pass by itself), answers without a label.
    """
    generator, kinds = torch.Generator().manual_seed(seed), dict(layout)
    batch = shifted(batch) if "sequence" in kinds else batch
    if len(batch.weight) < 8:
        bias = None if batch.bias is None else batch.bias.repeat(4)
        batch = replace(batch, weight=batch.weight.repeat(4, 1), bias=bias)
    totals = {"data": len(batch.labels) // 2, "vocab": len(batch.weight), "sequence": batch.labels.shape[1]}
    split = {
        kind: (group, cut(totals[kind], 4 if group == "world" else 2, generator, least=2 if kind == "vocab" else 0))
        for kind, group in layout
    }
    schedule = schedule if batch.train_weight or batch.train_bias else "auto"
    backend = backend if layout == (("vocab", "pair"),) or backend != "triton" else "auto"  # interpreted for long
    check(ranks, batch, split, schedule=schedule, backend=backend)


# --- particular cases ----------------------------------------------------------------------------------------------


def example(pairs: int = 3, length: int = 6, size: int = 8, vocab: int = 37, seed: int = 0, **changes: Any) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return replace(
        Batch(
            hidden=torch.randn(2 * pairs, length, size, generator=generator, dtype=torch.float64),
            weight=torch.randn(vocab, size, generator=generator, dtype=torch.float64),
            labels=random_labels(generator, (2 * pairs, length), vocab, 0.7),
        ),
        **changes,
    )


def test_a_vocabulary_group_by_groups_of_pairs(ranks):
    """A residual that fits the budget only in parts: the gradient is summed over groups of pairs in fp32."""
    batch = example(pairs=6, vocab=400, size=4)
    rows = int((batch.labels != IGNORE).sum())
    shard = 100 * 4
    budget = 100 * 4 * 4 + (rows // 3) * shard
    planned = plan(rows, 4, 100, memory_budget=budget, largest_pair=lambda: 12)
    assert planned.group_rows is not None
    assert planned.group_rows < rows
    parts = [slice(100 * i, 100 * (i + 1)) for i in range(4)]
    check(ranks, batch, {"vocab": ("world", parts)}, memory_budget=budget)


@pytest.mark.parametrize("backend", BACKENDS)
def test_evaluation(ranks, backend):
    """Nothing requires grad: one GEMM, inside a kernel for Triton."""
    batch = example(train_hidden=False, train_weight=False)
    parts = [slice(0, 2), slice(2, 20), slice(20, 30), slice(30, 37)]
    check(ranks, batch, {"vocab": ("world", parts)}, backend=backend)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("train_weight", [False, True], ids=["frozen", "trained"])
def test_16_bits(ranks, dtype, train_weight):
    """Against float64, at most twice the error of plain PyTorch in the same dtype; the gradient crosses ranks in it."""
    batch = example(vocab=200, size=32, length=12).to(dtype)
    batch = replace(batch, train_weight=train_weight)
    truth, true_grads = batch.to(torch.float64).run(orpo_loss)
    plain, plain_grads = replace(batch, options=PLAIN_OPTIONS).run(plain_loss)
    fair = relative_error(answer_logps(plain), answer_logps(truth))  # in the loss alone, plain's errors may cancel
    parts = [slice(0, 60), slice(60, 71), slice(71, 150), slice(150, 200)]
    results = ranks.run(in_parts, batch, {"vocab": ("world", parts)}, {})
    for out, _ in results:
        assert relative_error(answer_logps(out), answer_logps(truth)) <= 2 * fair + 1e-6
        assert relative_error(out.loss.detach(), truth.loss.detach()) <= 2 * fair + 1e-6
    for name, true in true_grads.items():
        ours = joined([(out, {k: g.double() for k, g in grads.items()}) for out, grads in results],
                      {"vocab": ("world", parts)}, name, true)  # fmt: skip
        assert relative_error(ours, true) <= 2 * relative_error(plain_grads[name], true) + 1e-6, name


def test_a_confident_row_stays_right(ranks):
    """A logit gap of 60, where p rounds to 1: the target's rank alone knows it."""
    batch = example(pairs=1, length=2, vocab=16)
    weight = torch.zeros_like(batch.weight)
    weight[5, 0] = 60.0
    hidden = torch.zeros_like(batch.hidden)
    hidden[..., 0] = 1.0
    labels = torch.full_like(batch.labels, 5)
    labels[1] = 9
    check(ranks, replace(batch, weight=weight, hidden=hidden, labels=labels),
          {"vocab": ("world", [slice(4 * i, 4 * i + 4) for i in range(4)])}, beta=1.0)  # fmt: skip


def test_token_logps(ranks):
    batch = example().to(FP32)
    upstream = torch.randn(batch.labels.shape, generator=torch.Generator().manual_seed(1))
    for train_weight in (True, False):
        hidden, weight = batch.hidden.clone().requires_grad_(), batch.weight.clone().requires_grad_(train_weight)
        logps = token_logps(hidden, weight, batch.labels)
        logps.backward(upstream)
        parts = cut(37, 4, torch.Generator().manual_seed(2), least=2)
        results = ranks.run(sharded_logps, batch, parts, upstream, train_weight)
        for theirs, of_hidden, _ in results:
            torch.testing.assert_close(theirs, logps.detach(), rtol=1e-6, atol=1e-6)
            assert relative_error(of_hidden, hidden.grad) <= 1e-5
        if train_weight:
            assert relative_error(torch.cat([grad for *_, grad in results]), weight.grad) <= 1e-5


def sharded_logps(batch: Batch, parts: list[slice], upstream: Tensor, train_weight: bool) -> tuple:
    hidden = batch.hidden.clone().requires_grad_()
    weight = batch.weight[parts[place("world")]].clone().requires_grad_(train_weight)
    groups = {"vocab_group": group_of("world"), "data_group": group_of("world"), "sequence_group": group_of("world")}
    logps = token_logps(hidden, weight, batch.labels, **groups)
    logps.backward(upstream)
    return logps.detach(), hidden.grad, weight.grad


@pytest.mark.parametrize("weighted", [False, True])
def test_rows_of_any_layout(ranks, weighted):
    """`orpo_loss_from_rows` and LoRA's columns, with the rows of every sequence anywhere on four ranks."""
    generator = torch.Generator().manual_seed(4)
    rows = random_rows(generator, 20, 23, 3, 40, weighted)
    hidden, weight = torch.randn(20, 7, generator=generator), torch.randn(23, 5, generator=generator)
    low_rank = torch.randn(23, 2, generator=generator, requires_grad=True)
    hidden.requires_grad_()
    out = orpo_loss_from_rows(hidden, weight, rows, low_rank=low_rank)
    out.loss.backward()
    owner = torch.randint(2, (40,), generator=generator)
    results = ranks.run(some_rows, hidden.detach(), weight, low_rank.detach(), rows, owner)
    for loss, *_ in results:
        assert abs(float(loss - out.loss)) <= 1e-6
    of_hidden = torch.stack([grad for _, grad, _ in results]).sum(0) / 4  # over sequences summed, / 2; twice each
    assert relative_error(of_hidden, hidden.grad) <= 1e-5
    of_columns = torch.cat([(results[i][2] + results[i + 2][2]) / 2 for i in range(2)])
    assert relative_error(of_columns, low_rank.grad) <= 1e-5


def some_rows(hidden: Tensor, weight: Tensor, low_rank: Tensor, rows: Any, owner: Tensor) -> tuple:
    """The mesh's outer dimension splits the sequences, the inner one the vocabulary."""
    columns = [slice(0, 9), slice(9, 23)][place("inner")]
    leaves = hidden.clone().requires_grad_(), low_rank[columns].clone().requires_grad_()
    mine = rows.select(owner == place("outer"))
    groups = {"sequence_group": group_of("outer"), "vocab_group": group_of("inner")}
    loss = orpo_loss_from_rows(leaves[0], weight[columns], mine, low_rank=leaves[1], **groups).loss
    loss.backward()
    return loss.detach(), leaves[0].grad, leaves[1].grad


def test_distributed_data_parallel(ranks):
    """DDP itself around a body, a shard of uneven size on every rank, two micro-batches of which one is not synced."""
    batch = example(pairs=9).to(FP32)
    model = Whole()
    loss = model(batch)
    loss.backward()
    counts = (batch.labels[:9] != IGNORE).sum(), torch.tensor(9)
    losses, found = zip(*ranks.run(with_ddp, model.state_dict(), batch, *counts), strict=True)
    assert abs(sum(losses) / 4 - float(loss)) <= 1e-6
    for grads in found:
        for name, parameter in model.named_parameters():
            assert relative_error(grads[name], parameter.grad) <= 1e-5, name


class Whole(torch.nn.Module):
    """Body, head and loss in one forward, as DistributedDataParallel asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 37, bias=False)

    def forward(self, batch: Batch, **options: Any) -> Tensor:
        return orpo_loss(self.body(batch.hidden), self.head.weight, batch.labels, **options).loss


def with_ddp(state: dict[str, Tensor], batch: Batch, nll: Tensor, pairs: Tensor) -> tuple[float, dict[str, Tensor]]:
    model = Whole()
    model.load_state_dict(state)
    parallel_model = torch.nn.parallel.DistributedDataParallel(model)
    first, second = [
        (slice(0, 1), slice(1, 4)),
        (slice(4, 4), slice(4, 5)),
        (slice(5, 8), slice(8, 8)),
        (slice(8, 9), slice(9, 9)),
    ][place("world")]
    options = {"data_group": group_of("world"), "nll_denominator": nll, "pair_denominator": pairs}
    with parallel_model.no_sync():
        loss = parallel_model(some_pairs(batch, first), **options)
        loss.backward()
    last = parallel_model(some_pairs(batch, second), **options)
    last.backward()
    return float(loss + last), {name: parameter.grad for name, parameter in model.named_parameters()}


# --- bad input -----------------------------------------------------------------------------------------------------


def refused(make: str) -> str:
    batch, rank = example().to(FP32), place("world")
    world = group_of("world")
    options: dict[str, Any] = {
        "one shard of one row": {"vocab_group": world},
        "rows": {"vocab_group": world},
        "requires grad": {"vocab_group": world},
        "mesh": {"data_group": topology().mesh},
        "not a group": {"data_group": "world"},
        "shift": {"sequence_group": world, "shift": True},
        "labels": {"data_group": world},
        "global labels": {"vocab_group": world},
    }[make]
    weight, labels = batch.weight, batch.labels.clone()
    if make == "one shard of one row":
        weight = weight[:1] if rank == 2 else weight
    if make == "rows" and rank == 1:
        labels[0] = IGNORE
    if make in ("labels", "global labels") and rank == 3:
        labels[0, 0] = 4 * 37
    weight = weight.clone().requires_grad_(make == "requires grad" and rank == 0)
    try:
        orpo_loss(batch.hidden.requires_grad_(), weight, labels, **options)
    except (ValueError, TypeError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        ("one shard of one row", r"ValueError: .*\[37, 37, 1, 37\] rows of the lm-head, each must have at least 2"),
        ("rows", "ValueError: the number of rows differs between the ranks of vocab_group"),
        ("requires grad", "ValueError: the number of GEMMs.* differs between the ranks of vocab_group"),
        ("mesh", r"ValueError: data_group is a DeviceMesh of 2 dimensions \('outer', 'inner'\)"),
        ("not a group", "TypeError: data_group is a str, it must be a ProcessGroup"),
        ("shift", "ValueError: shift is True, but with a sequence_group"),
    ],
)
def test_what_no_rank_can_do_all_refuse(ranks, make, message):
    for answer in ranks.run(refused, make):
        assert re.match(message, answer), answer


@pytest.mark.parametrize("make", ["labels", "global labels"])
def test_what_one_rank_refuses_all_refuse(ranks, make):
    *others, refuser = ranks.run(refused, make)
    assert refuser.startswith("ValueError: labels holds token ids"), refuser
    assert all(answer.startswith("PeerError: rank 3 of") for answer in others), others


# --- DTensors: FSDP2 and tensor parallelism of the head alone ------------------------------------------------------


@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("layout", ["fsdp", "hsdp", "tp", "fsdp x tp"])
def test_a_sharded_head(ranks, layout, bias):
    """The head as FSDP2 and DTensor hold it: 37 rows are uneven shards of all kinds."""
    batch = example(pairs=6, bias=torch.randn(37, dtype=torch.float64) if bias else None).to(FP32)
    out, grads = batch.run(orpo_loss)
    results = ranks.run(with_sharded_head, batch, layout)
    assert abs(float(torch.stack([loss for loss, *_ in results]).mean() - out.loss)) <= 1e-6
    for _, of_head in results:
        for name, grad in of_head.items():
            assert relative_error(grad, grads[name]) <= 1e-5, name


def with_sharded_head(batch: Batch, layout: str) -> tuple[Tensor, dict[str, Tensor]]:
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh, groups = topology().mesh, {}
    head = torch.nn.Linear(8, 37, bias=batch.bias is not None)
    head.weight.data.copy_(batch.weight)
    if batch.bias is not None:
        head.bias.data.copy_(batch.bias)
    if "tp" in layout:
        own = mesh["inner"]
        for name, parameter in list(head.named_parameters()):
            setattr(head, name, torch.nn.Parameter(distribute_tensor(parameter.data, own, [Shard(0)])))
        groups["vocab_group"] = own
    if "fsdp" in layout:
        fully_shard(head, mesh=mesh["outer"] if "tp" in layout else topology().mesh._flatten("all"))
    if layout == "hsdp":
        fully_shard(head, mesh=mesh)
    if layout == "tp":
        groups["data_group"] = mesh["outer"]
    else:
        groups["data_group"] = mesh["outer"] if "tp" in layout else group_of("world")
    at, of = (place("outer"), 2) if "tp" in layout else (place("world"), 4)
    mine = some_pairs(batch, slice(5 * at // of, 5 * (at + 1) // of + (at + 1 == of)))
    loss = orpo_loss(mine.hidden, head.weight, mine.labels, bias=head.bias, **groups).loss
    loss.backward()
    grads = {}
    for name, parameter in head.named_parameters():
        grads[name] = parameter.grad.full_tensor()
        if layout == "tp":  # nothing averages over the data group here
            dist.all_reduce(grads[name], group=mesh["outer"].get_group())
            grads[name] /= 2
    return loss.detach(), grads


# --- how much is exchanged -----------------------------------------------------------------------------------------


def counted(batch: Batch, split: dict[str, tuple[str, list[slice]]], options: dict[str, Any]) -> dict[tuple, int]:
    """The bytes this rank puts into collectives, by group and kind, as torch.distributed is handed them."""
    sizes: dict[tuple, int] = {}
    names = {group_of(group).get_group().group_name: kind for kind, (group, _) in split.items()}

    def counting(collective: Any) -> Any:
        def count(*args: Any, group: Any, **others: Any) -> Any:
            tensor = args[-1] if collective.__name__ == "all_gather" else args[0]
            key = names[group.group_name], collective.__name__
            sizes[key] = sizes.get(key, 0) + tensor.numel() * tensor.element_size()
            return collective(*args, group=group, **others)

        return count

    with pytest.MonkeyPatch.context() as patch:
        for collective in (dist.all_reduce, dist.all_gather):
            patch.setattr(dist, collective.__name__, counting(collective))
        in_parts(batch, split, options)
    return sizes


@pytest.mark.parametrize("schedule", ["single_pass", "resident", "recompute", "evaluation"])
@pytest.mark.parametrize("kinds", TWO_KINDS)
def test_bytes_are_those_of_the_page(ranks, kinds, schedule):
    """The arithmetic of docs/distributed.md, chunk by chunk or not."""
    batch = example(pairs=4, train_hidden=schedule != "evaluation", train_weight=schedule in ("resident", "recompute"))
    split = {
        "data": ("outer", [slice(0, 1), slice(1, 4)]),
        "vocab": ("inner", [slice(0, 20), slice(20, 37)]),
        "sequence": ("inner" if kinds[1] == "sequence" else "outer", [slice(0, 2), slice(2, 6)]),
    }
    split = {kind: split[kind] for kind in kinds}
    asked = {"schedule": schedule if schedule != "evaluation" else "auto"}
    for rank, sizes in enumerate(ranks.run(counted, batch.to(FP32), split, asked)):
        mine = batch
        for kind, (group, parts) in split.items():
            at = {"outer": rank // 2, "inner": rank % 2}[group]
            mine = {"data": some_pairs, "vocab": some_columns, "sequence": some_positions}[kind](mine, parts[at])
        expected: dict[tuple, int] = {}
        for message in messages(
            int((mine.labels != IGNORE).sum()),
            len(mine.labels) // 2,
            8,
            **dict.fromkeys(kinds, True),
            gradient_itemsize=4,
            needs_hidden=schedule != "evaluation",
            on_cpu=True,
        ):
            key = message.group, message.collective
            expected[key] = expected.get(key, 0) + message.payload
        assert sizes == expected


def test_the_page_is_what_the_command_writes():
    pytest.importorskip("triton", reason="the page plans for Triton's kernels")
    page = PAGE.read_text()
    assert with_tables(page) == page


@pytest.mark.parametrize(
    ("schedule", "order"),
    [
        # s: an exchange starts, w: one is waited for, G: a GEMM. Two chunks of rows.
        ("single_pass", "G s G w s s w G s w s w G s w w"),
        ("resident", "G s G w s s w w s w - G s G w"),
    ],
)
def test_exchanges_overlap_with_gemms(ranks, schedule, order):
    """What starts before a GEMM is waited for behind it."""
    batch = example(pairs=1, length=2, train_weight=schedule == "resident")
    batch = replace(batch, labels=torch.full_like(batch.labels, 5))
    for events in ranks.run(order_of_events, batch.to(FP32)):
        assert events == order


def order_of_events(batch: Batch) -> str:
    from orpo_kernels.engine import gemm
    from orpo_kernels.engine.schedules import resident, single_pass
    from orpo_kernels.parallel import sharded

    events: list[str] = []

    def noting(mark: str, function: Any) -> Any:
        return lambda *args, **options: (events.append(mark), function(*args, **options))[1]

    columns = [slice(0, 20), slice(20, 37)][place("inner")]
    leaves = batch.hidden.clone().requires_grad_(), batch.weight[columns].clone().requires_grad_(batch.train_weight)
    limits = Limits(chunk_rows=4)  # two chunks at a time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "project", noting("G", gemm.project))
        for schedule in (single_pass, resident):
            patch.setattr(schedule, "matmul_into", noting("G", gemm.matmul_into))
        patch.setattr(parallel.Group, "all_reduce", noting("s", parallel.Group.all_reduce))
        patch.setattr(parallel.Pending, "wait", noting("w", parallel.Pending.wait))
        loss = orpo_loss(*leaves, batch.labels, vocab_group=group_of("inner"), limits=limits).loss
        if batch.train_weight:
            events.append("-")
            loss.backward()
    return " ".join(events)


# --- the sparse backward pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("train_weight", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.slow if name == "triton" else ()) for name in BACKENDS]
)
def test_the_sparse_backward_pass_of_a_vocabulary_group(ranks, backend, train_weight):
    """As far from the exact gradient as one process is, and exact where nothing is left out."""
    batch = example(pairs=2, vocab=2048, size=16, train_weight=train_weight)
    batch = replace(batch, hidden=3 * batch.hidden)  # most of a row's probability is in few tokens
    parts = [slice(0, 700), slice(700, 900), slice(900, 1500), slice(1500, 2048)]
    split: dict[str, tuple[str, list[slice]]] = {"vocab": ("world", parts)}
    out, exact = batch.run(orpo_loss)
    for eps in (1e-12, 1e-2):
        options = {"sparse_eps": eps, "backend": backend}
        _, grads = batch.to(FP32).run(orpo_loss, **options)
        results = ranks.run(in_parts, batch.to(FP32), split, options)
        for theirs, _ in results:
            assert abs(float(theirs.loss - out.loss)) <= 1e-6 * float(out.loss)
        for name, grad in exact.items():
            error = relative_error(joined(results, split, name, grad), grad)
            of_one = relative_error(grads[name], grad)
            assert (of_one > 1e-4) == (eps > 1e-3), name
            assert error <= 2 * of_one + 1e-5, name


# --- a rank that fails ----------------------------------------------------------------------------------------------

SECONDS = 5  # the groups' timeout, which bounds how long a rank waits for one that is alive but elsewhere


def failing_step(failure: str | None) -> None:
    """One forward and backward pass, in which rank 1 may fail: then the others stop, with an error that says so."""
    batch = example().to(FP32)
    hidden, weight = batch.hidden.requires_grad_(), batch.weight.requires_grad_()
    fails = failure is not None and dist.get_rank() == 1
    if fails and failure == "raises":
        raise MemoryError("as much as there is")
    loss = orpo_loss(hidden, weight, batch.labels, vocab_group=topology().world).loss
    if fails and failure == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    loss.backward()


@pytest.mark.parametrize(
    ("failure", "exchanged"),
    [("killed", "the gradient of the hidden states"), ("raises", "the sizes of the lm-head's shards")],
)
def test_the_others_stop(failure, exchanged):
    with Ranks(3, timeout=SECONDS) as ranks:
        ranks.run(failing_step, None)
        with pytest.raises(RankError) as found:
            ranks.run(failing_step, failure)
    said = str(found.value)
    assert ("rank 1: the process has died" if failure == "killed" else "MemoryError: as much as there is") in said
    for rank in (0, 2):
        assert f"PeerError: rank {rank} of 3 of vocab_group lost the others while it exchanged {exchanged}" in said
