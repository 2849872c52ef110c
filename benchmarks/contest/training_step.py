"""A whole training step, forward to optimizer: ours and TRL's ORPOTrainer by turns, on one model and the same batches.

    python -m benchmarks.contest.training_step            # SmolLM2-135M on LLMBar and on dpo_en_demo; plot in runs/
    python -m benchmarks.contest.training_step --quick    # LLMBar in fp32, 3 rounds, no memory
    python -m benchmarks.contest.training_step --case dpo --dtype float32 bfloat16 --json training_step.json

TRL's step is that of its own trainer: `training_step`, then clipping and AdamW. So is ours, through the drop-in of
`orpo_kernels.trl`: on padded batches as TRL makes them, and, its default, with shared prompts. All take the same pairs,
those that fit whole, through one model and one optimizer whose learning rate is 0: the work is the same, nobody's step
changes the next one's, and every loss has to agree before anything is timed.

The parts of a step: *body* is the transformer's forward and backward; *optimizer* is clipping, AdamW and zero_grad; all
the rest is *head + loss*. bf16 is autocast, as TRL has it. Peak memory is the most that a fresh process with one
contestant holds during its steps on the widest batch: resident set on a CPU, allocated bytes on a GPU. Table, plot and
records are those of the cases `step/*` of `python -m benchmarks`.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import random
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress
from torch import nn

from benchmarks.contest.process import ProcessPeak, last_line
from benchmarks.contest.workloads import DPO_EN_DEMO, LLMBAR, NEEDS_REAL_DATA, have_real_data, preference_pairs
from benchmarks.timing import synchronize
from orpo_kernels.app import machine

TRL, OURS, SHARED = "TRL ORPOTrainer", "ours", "ours, prompts shared"
BETA, MAX_GRAD_NORM = 0.1, 1.0
WARM_UP = 2  # steps of each contestant
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2}  # of a loss, relative, to TRL's
PARTS = ("body", "head_and_loss", "optimizer")


@dataclass(frozen=True)
class Case:
    """Which pairs, cut to batches of `pairs`; `max_length` tokens at most."""

    name: str
    file: str
    max_length: int
    pairs: int

    def __str__(self) -> str:
        return f"{self.name}, max_length {self.max_length}, {self.pairs} pairs"


CASES = {"llmbar": Case("LLMBar", LLMBAR, 256, 4), "dpo": Case("dpo_en_demo", DPO_EN_DEMO, 1024, 2)}


@dataclass(frozen=True)
class Step:
    """One step: its loss, and the seconds of its parts."""

    loss: float
    body: float
    head_and_loss: float
    optimizer: float


# ---------------------------------------------------------------------------------------------------------------------
# The steps
# ---------------------------------------------------------------------------------------------------------------------


class Bench:
    """One model, one optimizer, and a step of each contestant on any of the batches."""

    def __init__(self, model: Any, tokenizer: Any, examples: list[dict[str, Any]], case: Case, dtype: str) -> None:
        examples = whole(examples, tokenizer, case.max_length)
        self.batches = len(examples) // case.pairs
        if not self.batches:
            raise ValueError(f"{len(examples)} pairs fit into {case.max_length} tokens, but a batch needs {case.pairs}")
        self.model, self.case = model, case
        self.trainers = _trainers(model, tokenizer, examples, case, dtype)
        self.device = self.trainers[OURS].accelerator.device
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
        self.names = list(self.trainers)

    def batch(self, name: str, index: int) -> dict[str, Any]:
        """The pairs of the batch as the contestant's own collator makes them."""
        start = index % self.batches * self.case.pairs
        places = range(start, start + self.case.pairs)
        trainer = self.trainers[name]
        return trainer.data_collator([trainer.train_dataset[place] for place in places])

    def step(self, name: str, index: int) -> Step:
        """A step on that batch; making the batch is not in it."""
        batch, clock = self.batch(name, index), Clock(self.device)
        with clock.watching(self.model.base_model):
            clock.mark("begin")
            loss = self.trainers[name].training_step(self.model, batch)
            clock.mark("backward")
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_GRAD_NORM)
            self.optimizer.step()
            self.optimizer.zero_grad()
            clock.mark("end")
        return clock.step(loss.item())

    def widest(self) -> int:
        """The batch with the longest sequence."""
        return max(range(self.batches), key=lambda index: _width(self.batch(OURS, index)))


class Clock:
    """When what of a step began, by hooks on the body: before, after, and when the gradient comes back to it."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.times = device, {}  # type: tuple[torch.device, dict[str, float]]

    def mark(self, name: str) -> None:
        synchronize(self.device)
        self.times[name] = time.perf_counter()

    @contextmanager
    def watching(self, body: nn.Module) -> Iterator[None]:
        def after(module: nn.Module, args: tuple, output: Any) -> None:
            self.mark("body_end")
            if output[0].requires_grad:  # not in the probe of a model that is seen for the first time
                output[0].register_hook(lambda grad: self.mark("grad"))

        handles = (
            body.register_forward_pre_hook(lambda *_: self.mark("body")),
            body.register_forward_hook(after),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def step(self, loss: float) -> Step:
        t = self.times
        body = (t["body_end"] - t["body"]) + (t["backward"] - t["grad"])
        head_and_loss = (t["body"] - t["begin"]) + (t["grad"] - t["body_end"])
        return Step(loss, body, head_and_loss, t["end"] - t["backward"])


def whole(examples: list[dict[str, Any]], tokenizer: Any, max_length: int) -> list[dict[str, Any]]:
    """The pairs that nobody has to truncate, shuffled. Both trainers and the collator make the same ids of them."""
    from orpo_kernels.transformers import tokenize_pairs

    examples = [{field: example[field] for field in ("prompt", "chosen", "rejected")} for example in examples]
    pairs, refused = tokenize_pairs(examples, tokenizer, end="trl")
    unusable = {refusal.index for refusal in refused}
    usable = [example for index, example in enumerate(examples) if index not in unusable]
    lengths = [max(len(pair["chosen_input_ids"]), len(pair["rejected_input_ids"])) for pair in pairs]
    kept = [example for example, length in zip(usable, lengths, strict=True) if length <= max_length]
    random.Random(0).shuffle(kept)
    return kept


def _trainers(model: Any, tokenizer: Any, examples: list, case: Case, dtype: str) -> dict[str, Any]:
    """TRL's trainer and ours around one model, as their `train` would prepare it; ours alone where TRL is missing."""
    arguments: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(prefix="training_step-"),
        "per_device_train_batch_size": case.pairs,
        "bf16": dtype == "bfloat16",
        "gradient_checkpointing": False,
        "use_cpu": not torch.cuda.is_available(),
        "report_to": "none",
        "remove_unused_columns": False,
    }
    packings: dict[str, Any] = {OURS: "padded", SHARED: "shared"}
    if importlib.util.find_spec("trl") is None:
        from transformers import TrainingArguments

        from orpo_kernels.transformers import ORPOTrainer, PreferenceCollator

        options = {"args": TrainingArguments(**arguments), "train_dataset": examples, "beta": BETA}
        trainers: dict[str, Any] = {}
        for name, packing in packings.items():
            collator = PreferenceCollator(tokenizer, max_length=case.max_length, packing=packing)
            trainers[name] = ORPOTrainer(model, data_collator=collator, **options)
    else:
        os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
        from datasets import Dataset, disable_progress_bars
        from trl.experimental.orpo import ORPOTrainer as TRLTrainer

        from orpo_kernels.trl import ORPOConfig
        from orpo_kernels.trl import ORPOTrainer as DropIn

        disable_progress_bars()
        config = ORPOConfig(**arguments, max_length=case.max_length, beta=BETA)
        options = {"args": config, "train_dataset": Dataset.from_list(examples), "processing_class": tokenizer}
        trainers = {TRL: TRLTrainer(model, **options)}
        trainers |= {name: DropIn(model, packing=packing, **options) for name, packing in packings.items()}
    for trainer in trainers.values():
        trainer.accelerator.prepare_model(model)
        trainer.current_gradient_accumulation_steps = 1
    return trainers


def _width(batch: dict[str, Any]) -> int:
    return max(ids.shape[1] for name, ids in batch.items() if name.endswith("input_ids"))


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------


def measure(bench: Bench, dtype: str, rounds: int, progress: Progress) -> dict[str, Any]:
    """Warm up, check the losses, then a step of each per round, in a new order every round: a record of the results."""
    task = progress.add_task(f"{bench.case.name}, {dtype}", total=(WARM_UP + rounds) * len(bench.names))
    steps: dict[str, list[Step]] = {name: [] for name in bench.names}
    order, shuffle = list(bench.names), random.Random(0).shuffle
    for index in range(WARM_UP + rounds):
        shuffle(order)
        taken = {}
        for name in order:
            taken[name] = bench.step(name, index)
            progress.advance(task)
        check_losses({name: step.loss for name, step in taken.items()}, TOLERANCE[dtype])
        if index >= WARM_UP:
            for name, step in taken.items():
                steps[name].append(step)
    progress.remove_task(task)
    contestants = [
        {"name": name, "steps": [asdict(step) for step in steps[name]], "peak_bytes": None} for name in bench.names
    ]
    return {"case": str(bench.case), "dtype": dtype, "contestants": contestants}


def check_losses(losses: dict[str, float], tolerance: float) -> None:
    """All losses of a batch are TRL's (without it, our padded batch's), or what is timed is not the same work."""
    first = TRL if TRL in losses else OURS
    for name, loss in losses.items():
        if not abs(loss - losses[first]) <= tolerance * abs(losses[first]):
            raise RuntimeError(
                f"The loss of {name} is {loss}, that of {first} {losses[first]}: not within {tolerance:.0e}"
            )


def add_memory(record: dict[str, Any], case: str, threads: int, progress: Progress) -> None:
    """To every contestant of a record, the peak bytes of a fresh process that runs it alone."""
    for one in progress.track(record["contestants"], description=f"memory, {record['dtype']}"):
        arguments = ("--peak-of", one["name"], "--case", case, "--dtype", record["dtype"], "--threads", str(threads))
        one["peak_bytes"] = int(last_line("benchmarks.contest.training_step", *arguments))


def peak_of_steps(bench: Bench, name: str) -> int:
    """Peak bytes of this process during two steps on the widest batch, the optimizer's state being there."""
    widest = bench.widest()
    bench.step(name, widest)
    with ProcessPeak(bench.device) as peak:
        for _ in range(2):
            bench.step(name, widest)
    return peak.nbytes


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> None:
    options = _options(arguments)
    torch.set_num_threads(options.threads)
    warnings.filterwarnings("ignore")
    if not have_real_data():
        raise SystemExit(NEEDS_REAL_DATA)
    if options.peak_of:
        print(peak_of_steps(load(CASES[options.case[0]], options.dtype[0]), options.peak_of))
        return
    from benchmarks.report import plots, tables

    console, cases = Console(width=max(Console().width, 110)), {}
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for key, dtype in itertools.product(options.case, options.dtype):
            record = cases[f"step/{key}/{dtype}"] = measure(load(CASES[key], dtype), dtype, options.rounds, progress)
            if options.memory:
                add_memory(record, key, options.threads, progress)
            console.print(tables.step_sheet(record).rich(), "")
            plots.step(cases).savefig(options.plot, dpi=110)  # after every case, for who interrupts it
            if options.json:
                options.json.write_text(json.dumps({"machine": machine.describe(), "cases": cases}, indent=1))
    console.print(f"Plot: {options.plot}", soft_wrap=True)


def load(case: Case, dtype: str) -> Bench:
    from examples.smollm2 import load_smollm2

    return Bench(*load_smollm2(), preference_pairs(case.file), case, dtype)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.contest.training_step",
        description="Time and memory of a training step, ours and TRL's.",
    )
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument(
        "--dtype", nargs="+", choices=list(TOLERANCE), help="default: float32, and bfloat16 where the hardware has it"
    )
    parser.add_argument("--rounds", type=int, default=12, help="timed steps of each (default: 12)")
    parser.add_argument("--quick", action="store_true", help="LLMBar in fp32, 3 rounds, no memory")
    parser.add_argument("--no-memory", dest="memory", action="store_false", help="without the processes for the memory")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="write every number, the machine and the versions here")
    parser.add_argument("--plot", type=Path, default=Path("runs/training_step.png"))
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)  # what a process of --memory is asked for
    options = parser.parse_args(arguments)
    if options.dtype is None:
        fast_bf16 = torch.cuda.is_available() or machine.has_bf16_gemm()
        options.dtype = ["float32", "bfloat16"] if fast_bf16 else ["float32"]
    if options.quick:
        options.case, options.dtype, options.rounds, options.memory = ["llmbar"], ["float32"], 3, False
    return options


if __name__ == "__main__":
    main()
