"""What the loss costs beyond one device: bytes on each, and bytes between them. Arithmetic, nothing is measured.

    python -m benchmarks.estimates.distributed            # the tables of docs/distributed.md
    python -m benchmarks.estimates.distributed --write    # put them there

`messages` is every exchange of one call of the loss; a test counts what really crosses between processes and compares.
The memory of the loss is that of its `plan`. What a training step holds beside it is counted the usual way for AdamW
with fp32 master weights, 16 bytes a parameter, and bf16 for what is gathered.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from orpo_kernels import Plan, plan

PAGE = Path(__file__).parents[2] / "docs" / "distributed.md"
DEVICES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
ROWS, PAIRS = 8192, 8  # of a device (or of a vocabulary group, which works on the same rows)
BUDGET = 5 * 2**30  # a sixteenth of 80 GiB
NUMBER = 8  # bytes of an int64 or a float64
BF16 = 2


# ---------------------------------------------------------------------------------------------------------------------
# The messages of one call
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    """Exchanges of one kind in one call: what each rank puts into them, in bytes, all together."""

    group: str
    collective: str
    what: str
    payload: int

    def sent(self, ranks: int) -> float:
        """Bytes that each rank sends, with the ring algorithms of gloo and NCCL."""
        share = {"all_reduce": 2 * (ranks - 1) / ranks, "all_gather": ranks - 1, "reduce_scatter": (ranks - 1) / ranks}
        return share[self.collective] * self.payload


def messages(
    rows: int,
    pairs: int,
    hidden_size: int,
    *,
    data: bool = False,
    vocab: bool = False,
    sequence: bool = False,
    gradient_itemsize: int = BF16,
    needs_hidden: bool = True,
    on_cpu: bool = False,
    given_denominators: bool = False,
) -> list[Message]:
    """What one call of `orpo_loss` and its backward pass exchange in each kind of group.

    Args:
        rows: N, the rows that matter on a rank.
        gradient_itemsize: bytes of an element of residual @ weight: the GEMM's dtype, fp32 for the recompute schedule.
        needs_hidden: whether the hidden states get a gradient.
        on_cpu: whether the tensors are on a CPU, where a data group also asks whether all inputs are in order.
        given_denominators: whether the counts come from the caller.
    """
    found = []
    if vocab:
        found += [
            Message("vocab", "all_gather", "sizes of the shards, and whether they and all inputs fit", 9 * NUMBER),
            Message("vocab", "all_reduce", "largest logit of every row", rows * NUMBER),
            Message("vocab", "all_reduce", "sum and target logit of every row", 2 * rows * NUMBER),
        ]
        if needs_hidden:
            found.append(Message("vocab", "all_reduce", "dh", rows * hidden_size * gradient_itemsize))
    if sequence:
        found.append(Message("sequence", "all_gather", "whether all inputs fit", 2 * NUMBER))
        if not given_denominators:
            found.append(
                Message("sequence", "all_reduce", "rows of every sequence, NLL rows", (2 * pairs + 1) * NUMBER)
            )
        found.append(Message("sequence", "all_reduce", "sums of every sequence", 3 * 2 * pairs * NUMBER))
    if data:
        if on_cpu:
            found.append(Message("data", "all_gather", "whether all inputs fit", NUMBER))
        if not given_denominators:
            found.append(Message("data", "all_reduce", "NLL rows and pairs", 2 * NUMBER))
    return found


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    name: str
    parameters: float
    hidden_size: int
    vocab_size: int

    @property
    def head_bytes(self) -> int:
        return self.vocab_size * self.hidden_size * BF16


MODELS = (Model("Llama-3-8B", 8.030e9, 4096, 128256), Model("Llama-3-70B", 70.554e9, 8192, 128256))
STATE_BYTES = 16  # a parameter: fp32 weight and gradient, two moments of AdamW
VOCAB_RANKS = 8  # inside a node


def loss_plan(model: Model, ranks: int = 1) -> Plan:
    """A trained bf16 head, or a `ranks`-th of it, on a GPU of 80 GiB."""
    return plan(
        ROWS,
        model.hidden_size,
        -(-model.vocab_size // ranks),
        dtype=torch.bfloat16,
        device="cuda",
        backend="triton",
        memory_budget=BUDGET,
        sharded=ranks > 1,
    )


def rows_of(model: Model) -> Iterator[dict[str, str]]:
    """A line for each number of devices: FSDP2 alone, and FSDP2 x a vocabulary group inside the node."""
    for devices in DEVICES:
        ranks = min(devices, VOCAB_RANKS)
        state = model.parameters * STATE_BYTES / devices
        whole, shard = loss_plan(model), loss_plan(model, ranks)
        gathered = 2 * model.head_bytes if devices > 1 else 0  # the weight, and its gradient before it is scattered
        # All-gather of the weight, reduce-scatter of its gradient, both bf16: each sends what others hold.
        moved = 2 * model.head_bytes * (devices - 1) / devices
        itemsize = 4 if shard.schedule == "recompute" else BF16
        of_loss = messages(
            ROWS, PAIRS, model.hidden_size, vocab=ranks > 1, data=devices > ranks, gradient_itemsize=itemsize
        )
        crossed = sum(m.sent(ranks if m.group == "vocab" else devices // ranks) for m in of_loss)
        groups = devices // ranks
        shard_moved = 2 * model.head_bytes / ranks * (groups - 1) / groups
        shard_gathered = 2 * model.head_bytes // ranks if groups > 1 else 0
        yield {
            "devices": str(devices),
            "weights, gradients, AdamW": gib(state),
            "head gathered": gib(gathered),
            "loss": f"{gib(whole.peak_bytes)} ({whole.schedule})",
            "sent for the head": gib(moved),
            "shard gathered": gib(shard_gathered) if ranks > 1 else "",
            "loss, vocabulary over the node": f"{gib(shard.peak_bytes)} ({shard.schedule})" if ranks > 1 else "",
            "sent for the shard and the loss": gib(crossed + shard_moved) if ranks > 1 else "",
        }


def tables() -> str:
    """Markdown."""
    parts = [f"**{model.name}**, GiB a device\n\n{_markdown(list(rows_of(model)))}" for model in MODELS]
    model = MODELS[0]
    itemsize = 4 if loss_plan(model, VOCAB_RANKS).schedule == "recompute" else BF16
    everything = messages(
        ROWS, PAIRS, model.hidden_size, data=True, vocab=True, sequence=True, gradient_itemsize=itemsize
    )
    rows = [
        {
            "group": m.group,
            "collective": m.collective,
            "what": m.what,
            "bytes put in by a rank": f"{m.payload:,}",
            "sent by each of 8": f"{m.sent(8):,.0f}",
        }
        for m in everything
    ]
    parts.append(f"**One call**, {model.name}, {ROWS} rows, {PAIRS} pairs, groups of 8\n\n{_markdown(rows)}")
    return "\n\n".join(parts)


def _markdown(rows: list[dict[str, str]]) -> str:
    """A table of rows, each by column."""
    lines = [f"| {' | '.join(cells)} |" for cells in (rows[0], *(row.values() for row in rows))]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def gib(size: float) -> str:
    return f"{size / 2**30:.3g}"


MARKS = ("<!-- begin: python -m benchmarks.estimates.distributed --write -->", "<!-- end -->")


def with_tables(page: str) -> str:
    """`page` with what is between its marks renewed."""
    before, rest = page.split(MARKS[0])
    return f"{before}{MARKS[0]}\n\n{tables()}\n\n{MARKS[1]}{rest.split(MARKS[1])[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help=f"into docs/{PAGE.name}")
    if parser.parse_args().write:
        PAGE.write_text(with_tables(PAGE.read_text()))
    else:
        print(tables())


if __name__ == "__main__":
    main()
