"""From settings to the model, the tokenizer and the tokenised pairs. What cannot be had is a `UserError`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from ..data import Preferences, load_preferences, split_pairs
from ..errors import UserError
from ..transformers import TokenizedPair, UnusablePair, tokenize_pair
from .settings import DataSettings, TrainSettings

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}


# --- model ---------------------------------------------------------------------------------------------------------


def model_folder(name: str) -> str:
    """`name`, a folder or a name on the hub; of a run folder, the model in it."""
    if not Path(name).is_dir():
        if name.startswith((".", "/", "~")):
            raise UserError(f"There is no folder {name}.")
        return name
    for folder in (Path(name), Path(name) / "model"):
        if (folder / "config.json").exists() or (folder / "adapter_config.json").exists():
            return str(folder)
    raise UserError(f"{name} holds no model: there is no config.json in it, nor in a folder model there.")


def compute_dtype(name: str) -> torch.dtype:
    """The dtype that a `--dtype` stands for on this machine."""
    if name == "auto":
        return torch.bfloat16 if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else torch.float32
    return DTYPES[name]


def load_tokenizer(name: str) -> Any:
    folder = model_folder(name)
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise _not_loaded(name, "a tokenizer", error) from error


def load_model(name: str, dtype: torch.dtype) -> Any:
    """The causal LM, in evaluation mode; adapters, if that is what the folder holds, are merged into their base."""
    folder = model_folder(name)
    try:
        if (Path(folder) / "adapter_config.json").exists():
            from peft import AutoPeftModelForCausalLM

            return AutoPeftModelForCausalLM.from_pretrained(folder, dtype=dtype).merge_and_unload().eval()
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise _not_loaded(name, "a causal language model", error) from error


def _not_loaded(name: str, what: str, error: Exception) -> UserError:
    reason = str(error).strip().partition("\n")[0].rstrip(".")
    return UserError(f"{name} cannot be loaded as {what}, neither as a folder nor from the hub: {reason}.")


def with_adapters(model: Any, rank: int) -> Any:
    """LoRA on every linear layer of the body (Hu et al. 2021, arXiv 2106.09685), scaled by 2."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    return get_peft_model(model, config)


# --- pairs ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Preferences, and what the tokenizer made of each."""

    preferences: Preferences
    tokenized: list[TokenizedPair]


def load_pairs(settings: DataSettings, tokenizer: Any, console: Console, source: str = "", split: str = "") -> Pairs:
    """Read and tokenise `source` (by default `settings.data`), and say what was recognised and what not."""
    preferences = load_preferences(
        source or settings.data,
        split=split or settings.split,
        layout=settings.layout,
        columns=settings.column_names(),
    )
    tokenized, refused = [], {}
    shown = track(preferences.pairs, "Tokenising", console=console, transient=True, disable=not console.is_terminal)
    for index, pair in enumerate(shown):
        try:
            tokenized.append(tokenize_pair(pair, tokenizer, max_length=settings.max_length))
        except UnusablePair as unusable:
            refused[index] = str(unusable)
        except (ValueError, TypeError) as error:  # of the tokenizer: no offsets, no EOS, no template
            raise UserError(f"{settings.model} has no tokenizer for these pairs. {error}") from error
    pairs = Pairs(preferences.without(refused), tokenized)
    console.print(pairs.preferences.describe(), markup=False, soft_wrap=True)
    if not tokenized:
        raise UserError(f"{settings.data} has no pair that the tokenizer of {settings.model} can take.")
    if "text" in preferences.layouts and tokenizer.chat_template:
        console.print("Plain text for a model with a chat template: --layout chat would make messages of it.")
    return pairs


def load_split(settings: TrainSettings, tokenizer: Any, console: Console) -> tuple[Pairs, list, list]:
    """(all pairs, those to train on, those held out), the latter two tokenised."""
    pairs = load_pairs(settings, tokenizer, console)
    try:
        held_out = float(settings.eval_split)
    except ValueError:
        return pairs, pairs.tokenized, _elsewhere(settings, tokenizer, console).tokenized
    if not 0 <= held_out < len(pairs.tokenized):
        raise UserError(
            f"--eval-split {settings.eval_split} cannot be held out of {len(pairs.tokenized)} pairs: give a share "
            "below 1, a smaller number, a split of the data set, or a file."
        )
    training, evaluation = split_pairs(pairs.preferences.pairs, held_out, settings.seed)
    if not training:
        raise UserError(
            f"--eval-split {settings.eval_split} leaves no pair of {settings.data} to train on: give a smaller one."
        )
    return pairs, [pairs.tokenized[i] for i in training], [pairs.tokenized[i] for i in evaluation]


def _elsewhere(settings: TrainSettings, tokenizer: Any, console: Console) -> Pairs:
    """Held-out pairs in a file, or in another split of the data set."""
    if Path(settings.eval_split).is_file():
        return load_pairs(settings, tokenizer, console, source=settings.eval_split)
    if Path(settings.data).is_file():
        raise UserError(
            f"--eval-split {settings.eval_split} is no number and no file, and {settings.data} has no splits."
        )
    return load_pairs(settings, tokenizer, console, split=settings.eval_split)
