"""The settings of a run. Their fields are the flags of the command line, and the lines of a configuration file."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import UserError

Method = Literal["orpo"]
DType = Literal["auto", "float32", "bfloat16"]
Packing = Literal["auto", "shared", "padded"]


def setting(default: Any = dataclasses.MISSING, help: str = "", **options: Any) -> Any:
    """A field with its help text. `argument=True`: given by its place. Other options are those of `typer.Option`."""
    return dataclasses.field(default=default, metadata={"help": help, **options})


@dataclass(frozen=True)
class TrainSettings:
    """How to train.

    Raises `UserError` for values that cannot work.
    """

    model: str = setting(help="A folder, or a name on the Hugging Face hub.", argument=True)
    data: str = setting(help="A .jsonl, .json, .parquet or .csv file, or the name of a data set.", argument=True)
    output: Path = setting(Path("runs/train"), "The run folder.", metavar="FOLDER")
    resume: bool = setting(False, "Go on with the run in the run folder, if there is one.")
    method: Method = setting("orpo", "The loss.")
    beta: float = setting(0.1, "Weight of the preference loss (ORPO's lambda).")
    lr: float | None = setting(None, "Peak learning rate. By default 1e-5, with --lora 1e-4.", metavar="FLOAT")
    epochs: int = setting(1, "Passes over the training pairs.")
    max_steps: int | None = setting(None, "Stop after so many optimizer steps.", metavar="INTEGER")
    batch_size: int = setting(8, "Pairs in a micro-batch.")
    grad_accum: int = setting(1, "Micro-batches in an optimizer step.")
    max_length: int = setting(1024, "Tokens of prompt and response; longer ones are cut.")
    eval_split: str = setting(
        "0.1", "What to hold out: a share, a number of pairs, a split of the data set, or a file."
    )
    lora: bool = setting(False, "Train low-rank adapters of the linear layers, not the weights.")
    lora_rank: int = setting(16, "Rank of the adapters.")
    merge: bool = setting(False, "Save adapters merged into the weights as well.")
    dtype: DType = setting("auto", "Of the computation. auto: bfloat16 on a GPU that has it, else float32.")
    gradient_checkpointing: bool = setting(False, "Compute activations twice, hold few of them.")
    packing: Packing = setting("auto", "Whether the answers share their prompt. auto: if the model allows it.")
    sparse_eps: float | None = setting(
        None, "Leave out probabilities below this in the backward pass.", metavar="FLOAT"
    )
    seed: int = setting(0, "Of the order of pairs, the split, and the adapters.")

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "grad_accum", "max_steps", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"--{name.replace('_', '-')} is {value}, but has to be at least 1.")
