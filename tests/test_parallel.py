"""Several processes against one: data, vocabulary and sequence groups, alone and together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from orpo_kernels import ORPOLoss, ORPOOutput, orpo_loss, orpo_loss_from_rows, parallel, planning, token_logps

from .batches import IGNORE, Batch, batches, plain_loss, random_labels, random_rows, relative_error
from .ranks import RankError, Ranks, topology

if not dist.is_available():
    pytest.skip("torch.distributed is not in this build of torch", allow_module_level=True)

FP32 = torch.float32
LAYOUTS = ("pair", "world")  # two processes (twice), and four
SMALL_CHUNKS = {"CHUNK_ROWS": {"cpu": 3, "other": 3}, "CHUNK_BYTES": {"cpu": 512, "other": 512}, "MIN_SLICE": 5}
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

    nll_labels = None if batch.nll_labels is None else batch.nll_labels[pairs]
    return replace(
        batch, hidden=of_both_halves(batch.hidden), labels=of_both_halves(batch.labels), nll_labels=nll_labels
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
    planned = {name: getattr(planning, name) for name in SMALL_CHUNKS}
    if small:
        vars(planning).update(SMALL_CHUNKS)
    try:
        out, grads = batch.run(orpo_loss, **options)
    finally:
        vars(planning).update(planned)
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
    replicas = 1
    for kind, (group, parts) in split.items():
        replicas *= len(parts) if kind != "vocab" else 1
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
        assert relative_error(joined(results, split, name, grad), grad) <= 1e-5, name


seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("group", LAYOUTS)
@properties
@given(batches(), seeds)
def test_data(ranks, group, batch, seed):
    """Any number of pairs on a rank, none included; and answers without a label."""
    parts = cut(len(batch.labels) // 2, 2 if group == "pair" else 4, torch.Generator().manual_seed(seed))
    check(ranks, batch, {"data": (group, parts)})


@pytest.mark.parametrize("group", LAYOUTS)
@properties
@given(batches(), seeds, st.sampled_from(["auto", "resident", "recompute"]), st.sampled_from(["torch", "native"]))
def test_vocabulary(ranks, group, batch, seed, schedule, backend):
    """Uneven shards, every schedule: a frozen head's is single_pass by itself."""
    size = 2 if group == "pair" else 4
    if len(batch.weight) < 2 * size:
        batch = replace(
            batch, weight=batch.weight.repeat(4, 1), bias=batch.bias.repeat(4) if batch.bias is not None else None
        )
    parts = cut(len(batch.weight), size, torch.Generator().manual_seed(seed), least=2)
    if not batch.train_weight and not batch.train_bias:
        schedule = "auto"
    check(ranks, batch, {"vocab": (group, parts)}, schedule=schedule, backend=backend)


@pytest.mark.parametrize("group", LAYOUTS)
@properties
@given(batches(), seeds)
def test_sequences(ranks, group, batch, seed):
    """Cut anywhere, also so that a rank has no position at all."""
    batch = shifted(batch)
    parts = cut(batch.labels.shape[1], 2 if group == "pair" else 4, torch.Generator().manual_seed(seed))
    check(ranks, batch, {"sequence": (group, parts)})


@pytest.mark.parametrize("kinds", [("data", "vocab"), ("sequence", "vocab"), ("data", "sequence")])
@properties
@given(batches(), seeds)
def test_two_kinds_on_a_mesh(ranks, kinds, batch, seed):
    batch, generator = shifted(batch), torch.Generator().manual_seed(seed)
    if len(batch.weight) < 4:
        batch = replace(
            batch, weight=batch.weight.repeat(2, 1), bias=batch.bias.repeat(2) if batch.bias is not None else None
        )
    totals = {"data": len(batch.labels) // 2, "vocab": len(batch.weight), "sequence": batch.labels.shape[1]}
    split = {
        kind: (group, cut(totals[kind], 2, generator, least=2 if kind == "vocab" else 0))
        for kind, group in zip(kinds, ("outer", "inner"), strict=True)
    }
    check(ranks, batch, split)
