"""A model that is given: loaded whole or refused, and written as it came.

A checkpoint can be incomplete in ways that no library calls an error: a head or a layer that is missing is made up at
random, one too many is left out, NaN is loaded like any number. All of that is a `UserError` here.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from transformers import (
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)
from transformers.utils import cached_file

from ...transformers.fitting import positions_of
from ...transformers.images import Processor
from ..data.opening import is_pointer
from ..errors import UserError, first_line
from .manifest import Manifest, manifest
from .remarks import say

logger = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "fp32": torch.float32, "bfloat16": torch.bfloat16, "bf16": torch.bfloat16}
# Files beside the weights that make the model what it is; and of those, what does not.
COMPANIONS = ("*.json", "*.jinja", "*.py", "*.txt", "*.model", "*.tiktoken", "LICENSE*", "NOTICE*")
NO_COMPANIONS = ("*.index.json", "adapter_*", "trainer_state.json", "*_results.json", "README*", "requirements.txt")
TOKENIZER = (
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt"),
    *("*.jinja", "*.model", "*.tiktoken"),
)


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
    """The tokenizer; of a model that sees pictures, the processor, if it can be loaded and served."""
    folder = _checked_folder(name)
    if _sees_pictures(config_of(name)):
        try:
            processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trusts_code())
            Processor(processor)
        except Exception as error:  # of any library: a model of text may be all that is wanted
            told = "%s has no processor for pictures, so that only text is served: %.300s"
            logger.warning(told, name, first_line(error))
        else:
            return processor
    with _loading(name, "a tokenizer"):
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_code())


def config_of(name: str) -> Any:
    """The config of a model, or of the base of adapters."""
    with _loading(name, "a model"):
        return AutoConfig.from_pretrained(model_folder(base_of(name) or name), trust_remote_code=trusts_code())


def _sees_pictures(config: Any) -> bool:
    """Whether the model takes pictures beside text."""
    has_tower = config.get_text_config(decoder=True) is not config and not config.is_encoder_decoder
    return has_tower and type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING


def load_model(name: str, dtype: torch.dtype, console: Console | None = None) -> Any:
    """The language model, in evaluation mode; adapters, if that is what the folder holds, are merged into their base.

    What the checkpoint has beside the model is told on `console`. Raises `UserError` for weights that are missing, cut
    off, of another shape, not finite, or of layers that the model does not have.
    """
    folder, base = _checked_folder(name), base_of(name)
    if base is None:
        model = _load_whole(name, folder, dtype, console)
    else:
        model = _with_merged_adapters(name, folder, base, dtype, console)
    if bad := not_finite(model):
        raise UserError(
            f"{name} has values that are not finite (NaN or infinite) in {_some(bad)}: a run that diverged, or a "
            "damaged file. Take another checkpoint."
        )
    return model.eval()


def with_adapters(model: Any, rank: int, without: Iterable[str] = ()) -> Any:
    """LoRA on every linear layer of the body (Hu et al. 2021, arXiv 2106.09685), scaled by 2.

    without: modules that get none, by name.
    """
    from peft import LoraConfig, get_peft_model

    left_out = [rf"{re.escape(name)}(\..*)?" for name in without]
    config = LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules="all-linear",
        exclude_modules="|".join(left_out) or None,
        task_type="SEQ_2_SEQ_LM" if model.config.is_encoder_decoder else "CAUSAL_LM",
    )
    return get_peft_model(model, config)


def not_finite(model: nn.Module) -> list[str]:
    """The names of the weights that have NaN or infinite values."""
    weights = {name: weight.detach() for name, weight in model.named_parameters() if weight.numel()}
    # Both ends are NaN, if there is any; and this makes no mask as large as the weight.
    ends = {name: torch.aminmax(weight) for name, weight in weights.items() if weight.dtype in _HEADER.values()}
    return [name for name, (low, high) in ends.items() if not low.isfinite() & high.isfinite()]


def trusts_code() -> bool | None:
    """None on a terminal, where `transformers` asks before it runs code that comes with a model; elsewhere False.

    There nobody answers, and the question would stand in what a machine reads.
    """
    return None if all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout)) else False


# --- loaded whole, or refused --------------------------------------------------------------------------------------


@contextmanager
def _loading(name: str, what: str) -> Iterator[None]:
    """Whatever the libraries raise on what they are given, as a sentence."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = f"{name} cannot be loaded as {what}, neither as a folder nor from the hub: {first_line(error)}."
        raise UserError(told) from error


def _load_whole(name: str, folder: str, dtype: torch.dtype, console: Console | None, **options: Any) -> Any:
    with _loading(name, "a language model"):
        options["trust_remote_code"] = trusts_code()
        config = AutoConfig.from_pretrained(folder, **options)
        model_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
        model_class = AutoModelForImageTextToText if _sees_pictures(config) else model_class
        model, found = model_class.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    _check_complete(name, model, found, console)
    return model


def _check_complete(name: str, model: nn.Module, found: Mapping[str, Any], console: Console | None) -> None:
    """`found`: what `from_pretrained` has to say about the weights."""
    missing, unexpected = sorted(found["missing_keys"]), sorted(found["unexpected_keys"])
    beside = f" It has {_some(unexpected)} instead: it was made for another task." if unexpected else ""
    if missing:
        raise UserError(
            f"{name} is incomplete: of a {type(model).__name__} it lacks {_some(missing)}, which would be random."
            f"{beside} Take a complete one."
        )
    if mismatched := sorted(found["mismatched_keys"], key=str):
        weight, stored, wanted = mismatched[0]
        raise UserError(
            f"The weights in {name} do not fit its config.json: {weight} is {_shape(stored)}, and by the config "
            f"{_shape(wanted)}. Take both from one model."
        )
    layers = {_numberless(key) for key, _ in model.named_parameters()}
    if surplus := [key for key in unexpected if re.search(r"\.\d+\.", key) and _numberless(key) in layers]:
        raise UserError(
            f"{name} has weights of layers that its config.json leaves out, such as {_some(surplus)}: mend the config "
            "(num_hidden_layers)."
        )
    if unexpected and console is not None:
        say(console, f"{name} has more than a {type(model).__name__}: {_some(unexpected)}.")


def _numberless(key: str) -> str:
    return re.sub(r"\.\d+\.", ".N.", key)


def _shape(size: Iterable[int]) -> str:
    return " x ".join(map(str, size))


def _some(names: list[str]) -> str:
    """The first of them, and how many more there are."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _with_merged_adapters(name: str, folder: str, base_name: str, dtype: torch.dtype, console: Console | None) -> Any:
    with _loading(name, "adapters"):
        from peft import PeftConfig, PeftModel

        config = PeftConfig.from_pretrained(folder)
    base = _load_whole(base_name, _checked_folder(base_name), dtype, console, revision=config.revision or "main")
    with _loading(name, "adapters"):
        if (rows := _rows_with_adapters(folder, base.config)) > len(base.get_input_embeddings().weight):
            base.resize_token_embeddings(rows)
        adapted = PeftModel.from_pretrained(base, folder)
        _check_adapters_complete(name, adapted, folder)
        return adapted.merge_and_unload().requires_grad_(True)  # `peft` has frozen the base


def _rows_with_adapters(folder: str, config: Any) -> int:
    """Of the embedding. A tokenizer beside the adapters that has more tokens than the base makes it larger (`peft`)."""
    rows = config.get_text_config(decoder=True).vocab_size
    if not (Path(folder) / "tokenizer_config.json").exists():
        return rows
    return max(rows, len(AutoTokenizer.from_pretrained(folder, trust_remote_code=trusts_code())))


def _check_adapters_complete(name: str, adapted: Any, folder: str) -> None:
    from peft import get_peft_model_state_dict
    from peft.utils import load_peft_weights

    stored = load_peft_weights(folder, device="cpu").keys()
    wanted = get_peft_model_state_dict(adapted, save_embedding_layers=False).keys()
    if missing := sorted(wanted - stored):
        raise UserError(f"{name} is incomplete: of its adapters it lacks {_some(missing)}. Take all of them.")
    if surplus := sorted(key for key in stored - wanted if "lora_" in key):
        raise UserError(
            f"{name} has adapters for what its base does not have, such as {_some(surplus)}: take the base that they "
            "were trained on."
        )


# --- its files -----------------------------------------------------------------------------------------------------


def weight_files(folder: Path) -> list[Path]:
    """The weights that would be loaded: safetensors, or else PyTorch's."""
    for patterns in (("*.safetensors",), ("pytorch_model*.bin", "adapter_model*.bin")):
        if found := [path for pattern in patterns for path in sorted(folder.glob(pattern))]:
            return found
    return []


def files_folder(name: str) -> Path:
    """Where the files of a model lie: its folder, or its snapshot in the cache of the hub."""
    folder = Path(model_folder(name))
    if folder.is_dir():
        return folder
    with _loading(name, "a model"):
        return Path(str(cached_file(name, "config.json"))).parent


def base_of(name: str) -> str | None:
    """The model that adapters are for; None for a model."""
    settings = files_folder(name) / "adapter_config.json"
    if not settings.exists():
        return None
    with _loading(name, "adapters"):
        base = json.loads(settings.read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{settings} names no base (base_model_name_or_path), so that the adapters fit nothing.")
    return str(base)


def model_manifest(name: str) -> Manifest:
    """Of the files that decide what is trained: config, weights and tokenizer; of adapters, those of the base too."""
    folder, base = files_folder(name), base_of(name)
    configs_and_tokenizer = _matching(folder, ("config.json", "adapter_config.json", *TOKENIZER))
    found = manifest(folder, {*configs_and_tokenizer, *weight_files(folder)})
    below = model_manifest(base) if base else {}
    return {**found, **{f"{base}/{file}": entry for file, entry in below.items()}}


def _checked_folder(name: str) -> str:
    """`model_folder`. Raises `UserError` for files in it that are not what they are called."""
    folder = Path(model_folder(name))
    if not folder.is_dir():
        return name
    for path in {*weight_files(folder), *_matching(folder, COMPANIONS)}:
        if is_pointer(path):
            raise UserError(
                f"{path} is a pointer of Git LFS, not the file itself: run `git lfs pull` in {folder}, or download "
                f"{path.name}."
            )
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            _header(path)
    return str(folder)


def _matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    return [path for path in folder.iterdir() if path.is_file() and any(fnmatch(path.name, one) for one in patterns)]


_HEADER = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _header(path: Path) -> dict[str, dict[str, Any]]:
    """dtype, shape and data_offsets of each tensor in a safetensors file. Raises `UserError` if it is cut off."""
    there = path.stat().st_size
    try:
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length)) if length <= there else {}
        tensors = {name: entry for name, entry in header.items() if name != "__metadata__"}
        needed = 8 + length + max((entry["data_offsets"][1] for entry in tensors.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError, struct.error) as error:
        raise UserError(f"{path} is damaged: its header cannot be read. Get the file anew.") from error
    if there < needed:
        raise UserError(f"{path} is cut off: it has {there:,} bytes of {needed:,}. Get the file anew.")
    return tensors


# --- written as it came --------------------------------------------------------------------------------------------


def save_as_it_came(model: Any, name: str, folder: Path) -> None:
    """Write a model that was loaded from `name` and trained: in the dtypes it had there, with the files beside it.

    Casts the model itself. Raises `UserError` if a value is beyond its dtype.
    """
    stored = stored_dtypes(name)
    usual = Counter(stored.values()).most_common(1)[0][0] if stored else torch.float32
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.dtype in _HEADER.values():
            tensor.data = tensor.data.to(stored.get(key, usual))
    if bad := not_finite(model):
        raise UserError(f"{bad[0]} is beyond the range of {name}'s dtype, {model.get_parameter(bad[0]).dtype}.")
    files = companions(name)
    if "generation_config.json" in files:
        model.generation_config = GenerationConfig()  # the file is copied as it is, valid or not
    model.save_pretrained(folder)
    for path in files.values():
        if path.name == "generation_config.json" or not (folder / path.name).exists():
            shutil.copyfile(path, folder / path.name)


def companions(name: str) -> dict[str, Path]:
    """By their names, the files that belong to a model beside its weights: tokenizer, processor, code, templates."""
    folder, base = files_folder(name), base_of(name)
    found = [path for path in _matching(folder, COMPANIONS) if not any(fnmatch(path.name, no) for no in NO_COMPANIONS)]
    below = companions(base) if base else {}
    return {**below, **{path.name: path for path in found}}


def stored_dtypes(name: str) -> dict[str, torch.dtype]:
    """Of each floating-point weight, the dtype it has in its file; of adapters, those of their base."""
    if base := base_of(name):
        return stored_dtypes(base)
    dtypes: dict[str, Any] = {}
    for path in weight_files(files_folder(name)):
        if path.suffix == ".safetensors":
            dtypes |= {key: _HEADER.get(entry["dtype"]) for key, entry in _header(path).items()}
        else:
            weights = torch.load(path, map_location="meta", weights_only=True)
            dtypes |= {key: weight.dtype for key, weight in weights.items()}
    return {key: dtype for key, dtype in dtypes.items() if dtype in _HEADER.values()}


# --- what fits it --------------------------------------------------------------------------------------------------


def rows_and_positions(name: str) -> tuple[int | None, int | None]:
    """How many tokens the embedding of a model has, and how many positions; None for what its config does not say."""
    config = config_of(name)
    with _loading(name, "a model"):
        vocabulary = getattr(config.get_text_config(decoder=True), "vocab_size", None)
        rows = _rows_with_adapters(model_folder(name), config) if base_of(name) else vocabulary
    return rows, positions_of(config)
