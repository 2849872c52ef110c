"""The settings of a run. Their fields are the flags of the command line, and the lines of a configuration file."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from ..errors import UserError

MethodName = Literal["orpo", "sft", "dpo", "simpo", "cpo"]
DType = Literal["auto", "float32", "fp32", "bfloat16", "bf16"]
DataLayout = Literal["auto", "text", "chat", "conversation", "transcript"]

LARGEST_COUNT = 2**31 - 1
LARGEST_SEED = 2**32 - 1  # NumPy's


def setting(default: Any = dataclasses.MISSING, help: str = "", **options: Any) -> Any:
    """A field with its help text. `argument=True`: given by its place. Other options are those of `typer.Option`."""
    return dataclasses.field(default=default, metadata={"help": help, **options})


def flag_of(name: str) -> str:
    """The flag of the command line for a field."""
    return f"--{name.replace('_', '-')}"


@dataclass(frozen=True)
class DataSettings:
    """Which model, which pairs, and how they become tokens.

    Raises `UserError` for values that cannot work.
    """

    model: str = setting(
        help="The model: a folder (of a model, an adapter or a run), or a name on the hub.", argument=True
    )
    data: str = setting(
        help="The pairs: a .jsonl, .json, .parquet or .csv file, or the name of a data set.", argument=True
    )
    split: str = setting("train", "Which split of a data set to take.", rich_help_panel="Data")
    layout: DataLayout = setting(
        "auto",
        "How a row holds its pair. auto: recognised row by row. chat: a prompt that is a string becomes a message.",
        rich_help_panel="Data",
    )
    columns: str = setting(
        "",
        "Which columns to read, where they are not recognised: prompt=...,chosen=...,rejected=...,system=...",
        metavar="FIELD=COLUMN,...",
        rich_help_panel="Data",
    )
    ignore_columns: str = setting(
        "",
        "Text columns to ignore. A row with other text that is no part of its pair is refused.",
        metavar="COLUMN,...",
        rich_help_panel="Data",
    )
    max_length: int = setting(
        1024, "The most tokens that a prompt and an answer may have together.", rich_help_panel="Data"
    )
    too_long: Literal["cut", "leave-out"] = setting(
        "cut", "What becomes of pairs with more tokens: cut, or left out and named as problems.", rich_help_panel="Data"
    )
    dtype: DType = setting(
        "auto", "The dtype the model computes in. auto: bfloat16 on a GPU that has it, else float32."
    )

    def __post_init__(self) -> None:
        check_counts(self, 2, "max_length")
        self.column_names()
        flags = [field for field in dataclasses.fields(self) if field.metadata]
        self.check_company({field.name for field in flags if getattr(self, field.name) != field.default})

    def check_company(self, given: Collection[str]) -> None:
        """Refuse what has no effect beside the other settings, if it is among the names `given`."""
        for name, why in self._idle():
            if name in given:
                raise UserError(f"{flag_of(name)} {why}.")

    def _idle(self) -> Iterator[tuple[str, str]]:
        """Settings that have no effect beside the others, each with the end of a sentence that begins with its name."""
        if Path(self.data).is_file():
            yield "split", f"is for data sets, but {self.data} is a file; leave it out"

    def ignored_columns(self) -> list[str]:
        """`ignore_columns` as a list."""
        return _words_in(self.ignore_columns)

    def column_names(self) -> dict[str, str]:
        """`columns` as a mapping of field to column."""
        parts = [part.partition("=") for part in _words_in(self.columns)]
        if not all(field.strip() and column.strip() for field, _, column in parts):
            raise UserError(f"--columns is {self.columns!r}; write it like prompt=question,chosen=good,rejected=bad.")
        return {field.strip(): column.strip() for field, _, column in parts}


@dataclass(frozen=True)
class InspectSettings(DataSettings):
    """Which data to look at, and with whose tokenizer."""

    model: str = setting(
        help="The model whose tokenizer is used: a folder (of a model, an adapter or a run), or a name on the hub."
    )
    dtype: DType = "auto"  # nothing is computed, so it is no flag
    show: int = setting(2, "How many pairs to show token by token.")
    rows: str = setting(
        "", "Numbers of the rows to show, with commas. By default the first rows that are pairs.", metavar="NUMBERS"
    )
    whole: bool = setting(False, "Show long prompts in full.")
    output: Path = setting(
        Path("runs/inspect"), "The folder for the problems and the plot of lengths.", metavar="FOLDER"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, 0, "show")
        self.row_numbers()

    def row_numbers(self) -> list[int]:
        """`rows` as numbers."""
        parts = _words_in(self.rows)
        if not all(part.isdecimal() and int(part) for part in parts):
            raise UserError(f"--rows is {self.rows!r}; write numbers of rows, from 1, with commas, like 3,17.")
        return [int(part) for part in parts]


@dataclass(frozen=True)
class TrainSettings(DataSettings):
    """How to train."""

    output: Path = setting(Path("runs/train"), "The run folder.", metavar="FOLDER")
    resume: bool = setting(False, "Go on with the run in the run folder, if there is one.")
    method: MethodName = setting("orpo", "The method, which decides the loss.", rich_help_panel="Loss")
    beta: float | None = setting(
        None,
        "Strength of the preference (ORPO's lambda). By default the method's own: 0.1, of simpo 2.",
        rich_help_panel="Loss",
    )
    gamma: float | None = setting(None, "SimPO's margin. By default 1.", rich_help_panel="Loss")
    prompt_nll: bool | None = setting(
        None,
        "Whether the NLL covers the prompt as well. By default it does for orpo alone, as in TRL.",
        rich_help_panel="Loss",
        both=True,
    )
    sparse_eps: float | None = setting(
        None, "Approximate the backward pass: leave out probabilities below this.", rich_help_panel="Loss"
    )
    lr: float | None = setting(None, "Peak learning rate. By default 1e-5, with --lora 1e-4.")
    epochs: int = setting(1, "Passes over the training pairs.")
    max_steps: int | None = setting(None, "Stop after so many optimizer steps.")
    batch_size: int = setting(8, "Pairs in a micro-batch, in each process.")
    grad_accum: int = setting(1, "Micro-batches in an optimizer step.")
    eval_split: str = setting(
        "0.1", "What to hold out: a share, a number of pairs (0: none), another split of the data set, or a file."
    )
    eval_every: int | None = setting(None, "Steps between two evaluations. By default a quarter of the run.")
    save_every: int | None = setting(None, "Steps between two checkpoints. By default a tenth of the run.")
    lora: bool = setting(False, "Train low-rank adapters (LoRA) of the linear layers in place of the weights.")
    lora_rank: int = setting(16, "Rank of the adapters.")
    freeze_vision: bool = setting(False, "For a model that sees pictures: train its language part alone.")
    merge: bool = setting(False, "With --lora: also save the model with the adapters merged into it.")
    gradient_checkpointing: bool = setting(
        False, "Take less memory and more time: keep few activations, compute the others again."
    )
    packing: Literal["auto", "measure", "shared", "padded"] = setting(
        "auto",
        "Whether both answers share one prompt (shared) or each has its own (padded). auto: shared where that is exact "
        "and fast; measure: both are timed first.",
    )
    group_by_length: bool = setting(
        False, "Put pairs of similar length into one batch: less padding, but an order that is less random."
    )
    seed: int = setting(0, "The seed of the split, of the order of the pairs, and of the adapters.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(
            self, 1, "epochs", "max_steps", "batch_size", "grad_accum", "eval_every", "save_every", "lora_rank"
        )
        _check_seed(self)
        if self.beta is not None and not 0 <= self.beta < math.inf:
            raise UserError(f"--beta is {self.beta}, but has to be at least 0 and finite.")
        if self.gamma is not None and not math.isfinite(self.gamma):
            raise UserError(f"--gamma is {self.gamma}, but has to be finite.")
        if self.lr is not None and not 0 < self.lr < math.inf:
            raise UserError(f"--lr is {self.lr}, but has to be above 0 and finite.")
        if self.sparse_eps is not None and not 0 < self.sparse_eps < 1:
            raise UserError(f"--sparse-eps is {self.sparse_eps}, but has to be between 0 and 1, like 2e-4.")
        held_out_number(self.eval_split)

    def _idle(self) -> Iterator[tuple[str, str]]:
        yield from super()._idle()
        if not self.lora:
            for name in ("merge", "lora_rank"):
                yield name, "is for adapters; give --lora as well, or leave it out"
        if self.method != "simpo":
            yield "gamma", f"is SimPO's, but the method is {self.method}; leave it out, or give --method simpo"
        if self.method == "sft":
            yield "beta", "is the strength of a preference, which sft does not look at; leave it out"
        if self.method in ("dpo", "simpo") and self.prompt_nll:  # what the others say they do anyway
            yield "prompt_nll", f"is for losses with an NLL, which {self.method} has not; leave it out"
        if held_out_number(self.eval_split) == 0:
            why = f"is for held-out pairs, but --eval-split {self.eval_split} holds out none; leave it out"
            yield "eval_every", why
        if self.max_steps is not None:
            yield "epochs", "and --max-steps both say how long to train; give one of them"

    def loss_options(self) -> dict[str, float | bool]:
        """What is set of the loss's options, beside beta."""
        options = {"gamma": self.gamma, "prompt_nll": self.prompt_nll, "sparse_eps": self.sparse_eps}
        return {name: value for name, value in options.items() if value is not None}

    @property
    def peak_lr(self) -> float:
        return self.lr or (1e-4 if self.lora else 1e-5)


@dataclass(frozen=True)
class EvaluateSettings(DataSettings):
    """What to evaluate."""

    against: str = setting("", "Another model to compare with, such as the one before training.", metavar="MODEL")
    eval_split: str = setting(
        "",
        "Evaluate held-out pairs alone: those that the model's run has held out; without a run, those that `train` "
        "would hold out with this --eval-split and --seed. By default all pairs are evaluated.",
        metavar="SHARE|NUMBER",
    )
    seed: int = setting(0, "The seed of the split and of the intervals.")
    batch_size: int = setting(8, "Pairs in a batch.")
    output: Path = setting(Path("runs/evaluate"), "The folder for figures, values and histogram.", metavar="FOLDER")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, 1, "batch_size")
        _check_seed(self)
        if self.against == self.model:
            raise UserError(f"--against is {self.against}, the very model to be evaluated; give another one.")
        if self.eval_split and held_out_number(self.eval_split) is None:
            raise UserError(f"--eval-split is {self.eval_split!r}; give the share or number of `train`.")
        if self.eval_split and held_out_number(self.eval_split) == 0:
            raise UserError(f"--eval-split {self.eval_split} holds out no pair; leave it out to evaluate all.")


@dataclass(frozen=True)
class SweepSettings(TrainSettings):
    """What to try; all else as in training."""

    beta: float = 0.1  # given by `betas`, and no flag
    output: Path = setting(Path("runs/sweep"), "The folder of the runs.", metavar="FOLDER")
    resume: bool = setting(False, "Go on with the sweep in the folder, if there is one.")
    betas: str = setting("0,0.05,0.1,0.3,1", "Lambdas to try, with commas.", metavar="FLOATS")
    lrs: str = setting("", "Learning rates to try, with commas. By default --lr alone.", metavar="FLOATS")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.beta_values(), self.lr_values()
        if self.method == "sft":
            raise UserError("--method is sft, which has no lambda to be swept; choose another method.")
        _check_holds_out(self)

    def _idle(self) -> Iterator[tuple[str, str]]:
        yield from super()._idle()
        if self.lrs:
            yield "lr", "and --lrs both give learning rates; leave one of them out"

    def beta_values(self) -> list[float]:
        return _numbers("--betas", self.betas, least=0)

    def lr_values(self) -> list[float]:
        return _numbers("--lrs", self.lrs, least=1e-30) if self.lrs else [self.peak_lr]


@dataclass(frozen=True)
class CompareSettings(TrainSettings):
    """Which methods; all else as in training, and the same for each of them."""

    method: MethodName = "orpo"  # given by `methods`, and no flag, as is what only one of them has
    beta: float | None = None
    gamma: float | None = None
    prompt_nll: bool | None = None
    output: Path = setting(Path("runs/compare"), "The folder of the runs.", metavar="FOLDER")
    resume: bool = setting(False, "Go on with the comparison in the folder, if there is one.")
    methods: str = setting("sft,orpo,dpo,simpo,cpo", "Methods to compare, with commas.", metavar="NAMES")

    def __post_init__(self) -> None:
        super().__post_init__()
        self.method_names()
        _check_holds_out(self)

    def method_names(self) -> list[MethodName]:
        names = [name.strip() for name in self.methods.split(",")]
        if unknown := [name for name in names if name not in get_args(MethodName)]:
            raise UserError(f"--methods has {unknown[0]!r}, but the methods are {', '.join(get_args(MethodName))}.")
        return list(dict.fromkeys(names))  # type: ignore[arg-type]


def train_arguments(settings: TrainSettings) -> list[str]:
    """What to type behind `orpo-kernels` to train so."""
    return ["train", *_words(settings, TrainSettings)]


def resuming_command(command: str, settings: TrainSettings) -> list[str]:
    """What to type to go on with a `command` that was stopped."""
    return ["orpo-kernels", command, *_words(dataclasses.replace(settings, resume=True), type(settings))]


def _words(settings: TrainSettings, kind: type[TrainSettings]) -> list[str]:
    """The arguments, the flags of `kind` that are not at its defaults, and the output."""
    words = [settings.model, settings.data]
    for field in dataclasses.fields(kind):
        value = getattr(settings, field.name)
        if not field.metadata or field.name in ("model", "data", "output") or value == field.default:
            continue
        flag = flag_of(field.name)
        words += ([flag] if value else [f"--no-{flag[2:]}"]) if isinstance(value, bool) else [flag, f"{value}"]
    return [*words, "--output", f"{settings.output}"]


def _words_in(text: str) -> list[str]:
    """What stands between commas."""
    return [word for part in text.split(",") if (word := part.strip())]


def held_out_number(text: str) -> float | None:
    """The share (below 1) or number of pairs that an `eval_split` means; None if it is no number but a name.

    Raises `UserError` for a number that is neither.
    """
    try:
        number = float(text)
    except ValueError:
        return None
    if not (0 <= number < 1 or (1 <= number < math.inf and number == int(number))):  # NaN is neither
        raise UserError(
            f"--eval-split is {text}, but has to be a share, at least 0 and below 1, or a whole number of pairs."
        )
    return number


def _numbers(flag: str, text: str, least: float) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = []
    if not values or not all(least <= value < math.inf for value in values):
        raise UserError(f"{flag} is {text!r}; write numbers of at least {least:g} with commas, like 0.05,0.1,0.3.")
    return list(dict.fromkeys(values))


def check_counts(settings: Any, least: int, *names: str) -> None:
    """Raise `UserError` for a setting that is below `least`, or no count that a machine has."""
    for name in names:
        value = getattr(settings, name)
        if value is not None and not least <= value <= LARGEST_COUNT:
            bound = f"at most {LARGEST_COUNT}" if value > least else f"at least {least}"
            raise UserError(f"{flag_of(name)} is {value}, but has to be {bound}.")


def _check_seed(settings: Any) -> None:
    if not 0 <= settings.seed <= LARGEST_SEED:
        raise UserError(f"--seed is {settings.seed}, but has to be from 0 to {LARGEST_SEED}.")


def _check_holds_out(settings: TrainSettings) -> None:
    if held_out_number(settings.eval_split) == 0:
        raise UserError("Runs are compared by the held-out pairs, but --eval-split holds out none: give 0.1 or so.")
