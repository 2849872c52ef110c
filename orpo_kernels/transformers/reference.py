"""The log-probabilities of the reference model, which DPO compares with: computed once, before training, and kept.

A pair's two numbers depend on the reference model and on the pair's tokens alone, so they are stored under a hash of
both: a run that goes on, or another one over the same data, reads them. The reference of a `peft` model is the model
with its adapters disabled, which costs no second copy of the weights.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from .body import unwrap
from .causal_lm import causal_lm_answers
from .collator import REFERENCE, PreferenceCollator, UnusablePair
from .probe import undisturbed


class ReferencedPairs(Dataset):
    """Preference pairs with the two columns `REFERENCE` added. `logps` is (pairs, 2) float64, chosen and rejected."""

    def __init__(self, pairs: Any, logps: np.ndarray):
        self.pairs, self.logps = pairs, logps

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.pairs[index], **dict(zip(REFERENCE, self.logps[index].tolist(), strict=True))}


def has_reference(pairs: Any) -> bool:
    """Whether the pairs bring the reference's log-probabilities along, or nobody can look because they are a stream."""
    if not hasattr(pairs, "__len__") or not hasattr(pairs, "__getitem__"):
        return True
    return isinstance(pairs, ReferencedPairs) or len(pairs) == 0 or all(name in pairs[0] for name in REFERENCE)


def reference_logps(
    model: nn.Module,
    pairs: Sequence[Any],
    collator: PreferenceCollator,
    accelerator: Accelerator,
    *,
    folder: Path,
    batch_size: int,
    show_progress: bool = True,
    **options: Any,
) -> np.ndarray:
    """Summed log-probabilities (pairs, 2) float64 of chosen and rejected answers, read from `folder` or computed.

    Several processes share the work. `options` are those of `causal_lm_answers`. Raises `ValueError`, naming the pair,
    where one cannot be used.
    """
    data_hash, lengths = _read_through(pairs, collator)
    file = folder / "reference_logps" / f"{_model_hash(model)}-{data_hash}.npy"
    found = torch.tensor(int(file.exists()), device=accelerator.device)
    if int(accelerator.reduce(found, "sum")) == accelerator.num_processes:
        return np.load(file)
    logps = _compute(model, pairs, lengths, collator, accelerator, batch_size, show_progress, **options)
    if accelerator.is_main_process:
        _write_whole(file, logps)
    return logps


def _compute(
    model: nn.Module,
    pairs: Sequence[Any],
    lengths: list[int],
    collator: PreferenceCollator,
    accelerator: Accelerator,
    batch_size: int,
    show_progress: bool,
    **options: Any,
) -> np.ndarray:
    """The longest pairs first: what does not fit the memory does not fit it at once."""
    order = sorted(range(len(pairs)), key=lambda index: -lengths[index])
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    own = batches[accelerator.process_index :: accelerator.num_processes]
    logps = torch.zeros(len(pairs), 2, dtype=torch.float64)
    bar = tqdm(own, "reference log-probabilities", disable=not (show_progress and accelerator.is_local_main_process))
    with undisturbed(model), without_adapters(model), accelerator.autocast():
        for indices in bar:
            batch = _on(collator([pairs[index] for index in indices]), accelerator.device)
            logps[indices] = causal_lm_answers(model, **batch, **options).logps.view(2, -1).T.cpu()
    return accelerator.reduce(logps.to(accelerator.device), "sum").cpu().numpy()


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """The base model of a `peft` model; any other model as it is."""
    disabled: Any = getattr(model, "disable_adapter", None)
    with nullcontext() if disabled is None else disabled():
        yield


def _on(batch: dict[str, Any], device: torch.device) -> dict[str, Any]:
    return {name: value.to(device) for name, value in batch.items()}


# --- the cache -----------------------------------------------------------------------------------------------------


def _read_through(pairs: Sequence[Any], collator: PreferenceCollator) -> tuple[str, list[int]]:
    """The hash of all tokens and labels, and the length of every pair."""
    digest, lengths = hashlib.blake2b(digest_size=8), []
    for index in range(len(pairs)):
        try:
            pair = collator.tokenized(pairs[index])
        except UnusablePair as unusable:
            raise ValueError(f"Pair {index} of the data cannot be used: {unusable}.") from unusable
        sides = [list(pair[f"{side}_{part}"]) for side in ("chosen", "rejected") for part in ("input_ids", "labels")]
        digest.update(json.dumps(sides).encode())
        lengths.append(len(sides[0]) + len(sides[2]))
    return digest.hexdigest(), lengths


def _model_hash(model: nn.Module) -> str:
    """The hash of the config, the dtypes and all weights, but those of adapters."""
    inner = unwrap(model)
    config = {key: value for key, value in inner.config.to_dict().items() if key not in ("_name_or_path", "use_cache")}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8)
    adapters = {name for module in inner.modules() for name in getattr(module, "adapter_layer_names", ())}
    adapters |= {"modules_to_save"}
    for name, tensor in inner.state_dict().items():
        if adapters.isdisjoint(name.split(".")):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(_bytes_of(tensor))
    return digest.hexdigest()


def _bytes_of(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def _write_whole(file: Path, values: np.ndarray) -> None:
    """Under another name first: an interruption leaves no half of a file under this one."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(f".{os.getpid()}.partial")
    with partial.open("wb") as stream:
        np.save(stream, values)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)
