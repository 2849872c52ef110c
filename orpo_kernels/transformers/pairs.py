"""The pairs that a trainer goes through: each looked at before the first step, and left out by name if it is unusable.

A data set with a length is read once, here: what can be used of it is tokenised and kept (`UsablePairs`), and every
epoch, DPO's reference and every evaluation take that. Of a stream nobody can look ahead: there an unusable pair is left
out on the way (`UsableStream`).

**Items that change** from one reading to the next (a `datasets.Dataset` with a transform, a torch `Dataset` of your
own, which may draw anew what it returns) are looked at once as well, but not kept: each is read and tokenised whenever
it is asked for. Should one have become unusable then, the next usable one stands in for it.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, IterableDataset
from tqdm.auto import tqdm
from transformers.trainer_pt_utils import LengthGroupedSampler

from ..text.pictures import sources_of
from .collator import PreferenceCollator, padding_id
from .fitting import Extent
from .packing import COLUMNS, prompt_length
from .rendering import UnusablePair
from .tokenization import Refusal

NAMED = 5  # unusable pairs that a warning names

logger = logging.getLogger(__name__)


def is_stream(pairs: Any) -> bool:
    return isinstance(pairs, IterableDataset) or not hasattr(pairs, "__len__") or not hasattr(pairs, "__getitem__")


def of_each_set(pairs: Any, name: str, function: Callable[[Any, str], Any]) -> Any:
    """`function(pairs, name)`; of a dictionary of sets, of any class, for each by its own name; None for none."""
    if isinstance(pairs, dict):
        made = copy.copy(pairs)
        made.update({key: function(part, f"{name}_{key}") for key, part in pairs.items()})
        return made
    return pairs if pairs is None else function(pairs, name)


class UsablePairs(Dataset):
    """What can be used of `source`, in its order, as tokenised pairs, whose ids are kept as int32.

    Read where they are, and not kept, are pairs that came tokenised, and pictures: decoded once here, to know that they
    can be, and again where batches are made.

    Attributes:
        unusable: the pairs that are left out: their index in `source`, and why.
        lengths: (pairs,) tokens of each: the prompt and both answers.
        extent: the largest id, of padding as well, and the longest sequence.
        cut_pairs, cut_tokens: how many pairs `max_length` has cut here, and how many tokens that cost in all.
    """

    def __init__(self, source: Any, collator: PreferenceCollator, show_progress: bool = False):
        self.source, self.collator = source, collator
        self.unusable: list[Refusal] = []
        self.cut_pairs = self.cut_tokens = 0
        self.extent = Extent(padding_id(collator.tokenizer))
        self._may_change = _may_change(source)
        self._indices: list[int] = []
        self._kept: list[dict[str, Any] | None] = []
        lengths = []
        bar = tqdm(_items(source), "reading the pairs", total=len(source), disable=not show_progress, delay=1)
        for index, example in enumerate(bar):
            try:
                pair = collator.tokenized(example)
            except UnusablePair as unusable:
                self.unusable.append(Refusal(index, str(unusable)))
                continue
            came_tokenised = pair is example
            self._indices.append(index)
            self._kept.append(None if came_tokenised or self._may_change else _compact(pair))
            lengths.append(pair_length(pair))
            self.extent.add(pair["chosen_input_ids"], pair["rejected_input_ids"])
            if not came_tokenised:
                self.cut_pairs += "cut_tokens" in pair
                self.cut_tokens += pair.get("cut_tokens", 0)
        self.lengths = np.array(lengths, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if self._may_change:
            return self._read_anew(index)
        kept = self._kept[index]
        if kept is None:
            return self.source[self._indices[index]]
        pair = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in kept.items()}
        return pair | {"images": sources_of(self.source[self._indices[index]])} if "images" in kept else pair

    def _read_anew(self, index: int) -> dict[str, Any]:
        for place in (*range(index, len(self)), *range(index)):
            try:
                return dict(self.collator.tokenized(self.source[self._indices[place]]))
            except UnusablePair as unusable:
                logger.warning(
                    "Pair %d has changed and cannot be used now: %s. The next one stands in.",
                    self._indices[place],
                    unusable,
                )
        raise ValueError(f"None of the {len(self)} pairs can be used any more.")

    def __getattr__(self, name: str) -> Any:
        if name != "set_epoch" or "source" not in vars(self):
            raise AttributeError(name)
        return self.source.set_epoch  # which the data loader calls, if there is one


def _items(source: Any) -> Iterator[Any]:
    if isinstance(source, Sequence) or hasattr(source, "column_names"):  # a datasets.Dataset reads ahead
        return iter(source)
    return (source[index] for index in range(len(source)))


def _may_change(source: Any) -> bool:
    if hasattr(source, "column_names"):
        return source.format["type"] == "custom"  # set_transform
    return not isinstance(source, Sequence)


def _compact(pair: Any) -> dict[str, Any]:
    ids = {name: np.array(value, dtype=np.int32) for name, value in pair.items() if name in COLUMNS}
    rest = {name: value for name, value in pair.items() if name not in COLUMNS}
    return ids | rest | ({"images": None} if "images" in rest else {})


class UsableStream(IterableDataset):
    """The usable pairs of a stream, tokenised; `leave_out` is told of the others. What else it has is the source's.

    The index of a pair is its place among those that this process reads.
    """

    def __init__(self, source: Any, collator: PreferenceCollator, leave_out: Callable[[Refusal], None]):
        self.source, self.collator, self.leave_out = source, collator, leave_out

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index, example in enumerate(self.source):
            try:
                pair = dict(self.collator.tokenized(example))
            except UnusablePair as unusable:
                self.leave_out(Refusal(index, str(unusable)))
                continue
            yield pair

    def __getattr__(self, name: str) -> Any:  # set_epoch, ...
        if name.startswith("__") or "source" not in vars(self):
            raise AttributeError(name)
        return getattr(self.source, name)


def warn_of_unusable(unusable: Sequence[Refusal], total: int, name: str, say: bool = True) -> None:
    """Name the pairs of the set `name` that are left out, of `total`. Raises `ValueError` where none remains."""
    first = "; ".join(f"pair {one.index}: {one.reason}" for one in unusable[:NAMED])
    more = "; ..." if len(unusable) > NAMED else ""
    if total and len(unusable) == total:
        raise ValueError(f"None of the {total} pairs of the {name} set can be used ({first}{more}).")
    if unusable and say:
        logger.warning(
            "%d of the %d pairs of the %s set cannot be used and are left out (%s%s). trainer.unusable_pairs[%r] has "
            "them all.",
            *(len(unusable), total, name, first, more, name),
        )


# --- lengths -------------------------------------------------------------------------------------------------------


def pair_length(pair: Any) -> int:
    """Tokens of a tokenised pair: its prompt once, and both answers."""
    labels = pair["rejected_labels"]
    return len(pair["chosen_input_ids"]) + len(labels) - prompt_length(labels)


def lengths_of(pairs: Any) -> list[int] | None:
    """The length of every pair; None where nobody knows: of a stream, and of raw pairs for a collator of yours."""
    if pairs is None or is_stream(pairs) or len(pairs) == 0:
        return None
    if (lengths := getattr(pairs, "lengths", None)) is not None:
        return list(map(int, lengths))
    if not all(name in pairs[0] for name in COLUMNS):
        return None
    return [pair_length(pair) for pair in _items(pairs)]


class GroupedByLength(LengthGroupedSampler):
    """Pairs of similar length follow each other, in an order of each epoch's own, the same in all processes."""

    def __init__(self, batch_size: int, lengths: list[int], seed: int):
        super().__init__(batch_size, lengths=lengths)
        self.seed, self.epoch = seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self) -> Iterator[int]:
        self.generator = torch.Generator().manual_seed(self.seed + self.epoch)
        return super().__iter__()
