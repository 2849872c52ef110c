"""The log-probabilities of the reference model, which DPO compares with: computed once, before training, and kept.

A pair's two numbers depend on the reference model and on the pair's tokens alone, so they are stored under a hash of
both, batch by batch: a run that goes on, or another one over the same data, reads what there is.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..devices import moved, statistics_dtype
from ..text.pictures import fingerprint
from .batches import batch_on
from .body import unwrap
from .causal_lm import causal_lm_answers
from .collator import PreferenceCollator
from .packing import COLUMNS
from .pairs import is_stream
from .probe import undisturbed
from .rendering import REFERENCE, UnusablePair


class ReferencedPairs(Dataset):
    """Preference pairs with the two columns `REFERENCE` added. `logps` is (pairs, 2) float64, chosen and rejected."""

    def __init__(self, pairs: Any, logps: np.ndarray):
        self.pairs, self.logps = pairs, logps

    @property
    def lengths(self) -> Any:
        return getattr(self.pairs, "lengths", None)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.pairs[index], **dict(zip(REFERENCE, self.logps[index].tolist(), strict=True))}


def has_reference(pairs: Any) -> bool:
    """Whether the pairs bring the reference's log-probabilities along, or nobody can look because they are a stream."""
    known = is_stream(pairs) or isinstance(pairs, ReferencedPairs) or len(pairs) == 0
    return known or all(name in pairs[0] for name in REFERENCE)


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

    Several processes share the work; the main one reads what is there already. `options` are those of
    `causal_lm_answers`. Raises `ValueError`, naming the pair, where one cannot be used.
    """
    data_hash, lengths = _read_through(pairs, collator)
    name = f"{_model_hash(model, accelerator.mixed_precision)}-{data_hash}"
    own_file = folder / "reference_logps" / f"{name}.{accelerator.process_index}.jsonl"
    own_file.parent.mkdir(parents=True, exist_ok=True)
    files = sorted(own_file.parent.glob(f"{name}.*.jsonl")) if accelerator.is_main_process else []
    known = _exchanged(broadcast, _read(files, len(pairs)), accelerator.device)
    # The longest pairs first: what does not fit the memory does not fit it at once.
    missing = sorted(known.isnan().any(1).nonzero().flatten().tolist(), key=lambda index: -lengths[index])
    if not missing:
        return known.numpy()
    batches = [missing[start : start + batch_size] for start in range(0, len(missing), batch_size)]
    own = batches[accelerator.process_index :: accelerator.num_processes]
    bar = tqdm(own, "reference log-probabilities", disable=not (show_progress and accelerator.is_local_main_process))
    computed = torch.zeros_like(known)
    base: Any = getattr(model, "disable_adapter", nullcontext)  # of a `peft` model without its adapters
    with undisturbed(model), base(), accelerator.autocast():
        for indices in bar:
            batch = batch_on(collator([pairs[index] for index in indices]), accelerator.device)
            computed[indices] = causal_lm_answers(model, **batch, **options).logps.view(2, -1).T.cpu()
            _append(own_file, indices, computed[indices])
    computed = _exchanged(accelerator.reduce, computed, accelerator.device)
    if accelerator.is_main_process and accelerator.num_processes > 1:  # the others may write on other machines
        _append(own_file, missing, computed[missing])
    return torch.where(known.isnan(), computed, known).numpy()


def _exchanged(exchange: Callable[[Tensor], Any], logps: Tensor, device: torch.device) -> Tensor:
    """`exchange(logps)` on the device, in the dtype that there is, and back on the host."""
    return exchange(moved(logps, device, statistics_dtype(device))).cpu().double()


# --- the cache -----------------------------------------------------------------------------------------------------


def _read_through(pairs: Sequence[Any], collator: PreferenceCollator) -> tuple[str, list[int]]:
    """The hash of all tokens and labels, and the length of every pair."""
    digest, lengths = hashlib.blake2b(digest_size=8), []
    for index in range(len(pairs)):
        try:
            pair = collator.tokenized(pairs[index])
        except UnusablePair as unusable:
            raise ValueError(f"Pair {index} of the data cannot be used: {unusable}.") from unusable
        sides = [list(pair[column]) for column in COLUMNS]
        digest.update(json.dumps(sides).encode())
        for picture in pair.get("images", ()):
            digest.update(fingerprint(picture).encode())
        lengths.append(len(sides[0]) + len(sides[2]))
    return digest.hexdigest(), lengths


def _model_hash(model: nn.Module, mixed_precision: str) -> str:
    """The hash of the config, the dtypes and all weights, but those of adapters; and of autocast, if there is one."""
    inner = unwrap(model)
    config = {key: value for key, value in inner.config.to_dict().items() if key not in ("_name_or_path", "use_cache")}
    digest = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=8)
    digest.update(mixed_precision.encode())
    adapters = {name for module in inner.modules() for name in getattr(module, "adapter_layer_names", ())}
    adapters |= {"modules_to_save"}
    for name, tensor in inner.state_dict().items():
        if adapters.isdisjoint(name.split(".")):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _read(files: Sequence[Path], pairs: int) -> Tensor:
    """(pairs, 2) float64, NaN where nothing is known. A line that the end of a process tore apart is none."""
    logps = torch.full((pairs, 2), torch.nan, dtype=torch.float64)
    for path in files:
        for line in path.read_text(errors="replace").splitlines():
            with suppress(ValueError):
                batch = json.loads(line)
                logps[batch["pairs"]] = torch.tensor(batch["logps"], dtype=torch.float64)
    return logps


def _append(file: Path, indices: list[int], logps: Tensor) -> None:
    """A line for a batch, in a file of this process alone."""
    line = json.dumps({"pairs": indices, "logps": logps.tolist()})
    with file.open("a") as stream:
        stream.write(f"\n{line}\n")  # the line before may be torn
