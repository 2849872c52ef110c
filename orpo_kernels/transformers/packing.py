"""Several pairs in one row, every prompt once: [prompt | chosen | rejected | prompt | chosen | rejected | padding].

In a padded batch the prompt runs through the model twice and the shorter answers end in padding. Here

    segments      0     0     1      1     2      2    | 3 ...  (prompt, chosen, rejected of pair i: 3i, 3i+1, 3i+2)
    position_ids  0     1     2      3     2      3    | 0 ...  (both answers continue their prompt)

a token sees its own segment and its pair's prompt, never the other answer nor another pair. So every hidden state is
that of the sequence alone, in any model whose layers mix tokens by attention only and know places by `position_ids`
only. (`sharing.refuses_shared_prompt` tells which do.)

What is shared is what the two sequences have in common from their beginning: the prompt; less of it where a token
straddles its end or truncation cut the sides apart; more where the answers begin alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..rows import DTYPES, Rows, nll_weight

Packing = Literal["auto", "measure", "padded", "shared"]
IGNORE_INDEX = -100
PADDING = -1  # its segment
SIDES = ("chosen", "rejected")
COLUMNS = tuple(f"{side}_{part}" for side in SIDES for part in ("input_ids", "labels"))  # of a tokenised pair
# The width of a row at which attention costs as much as all else. By FLOP it is 6 times the hidden size, 3500 for the
# smallest models; masked attention runs at a lower rate than products with weights.
ATTENTION_LENGTH = 2000


_M = TypeVar("_M", bound="_Movable")


def prompt_length(labels: Sequence[int]) -> int:
    """How many labels there are in front of the first that is a target."""
    return next((place for place, label in enumerate(labels) if label != IGNORE_INDEX), len(labels))


class _Movable:
    """A dataclass of tensors, of numbers, and of others like it."""

    def to(self: _M, device: torch.device | str, non_blocking: bool = True) -> _M:
        return self._map(lambda field: field.to(device, non_blocking=non_blocking))

    def pin_memory(self: _M) -> _M:
        """For a `DataLoader(pin_memory=True)`."""
        return self._map(lambda field: field.pin_memory())

    def _map(self: _M, function: Callable[[Any], Any]) -> _M:
        values = (getattr(self, field.name) for field in fields(self))  # type: ignore[arg-type]
        return type(self)(*(value if isinstance(value, int) else function(value) for value in values))


@dataclass(frozen=True)
class Sequences(_Movable):
    """The rows as sequences for attention by variable lengths (`varlen.py`): N of them, [prompt chosen] or [rejected].

    What is padding at the end of a row is one, too.

    Attributes:
        cu_seqlens_q: (N + 1,) int32, where each begins among the R T tokens of all rows, and the end.
        cu_seqlens_k: (N + 1,) int32, the same of what each sees: itself, [rejected] also its prompt before it.
        key_index: (K,) int64, the tokens that are seen, flat places in the rows; those of prompts come twice.
        max_seqlen_q, max_seqlen_k: the longest.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_index: Tensor
    max_seqlen_q: int
    max_seqlen_k: int

    @classmethod
    def of(cls, lengths: Sequence[int], keys: Sequence[Tensor]) -> Sequences:
        """lengths: of the queries of each; keys: what they see. Those without queries are left out."""
        keys = [seen for length, seen in zip(lengths, keys, strict=True) if length]
        lengths = [length for length in lengths if length]

        def ends(sizes: Sequence[int]) -> Tensor:
            return torch.tensor([0, *accumulate(sizes)], dtype=torch.int32)

        seen = [len(one) for one in keys]
        return cls(ends(lengths), ends(seen), torch.cat(list(keys)), max(lengths), max(seen))


@dataclass(frozen=True)
class PackedPairs(_Movable):
    """How the pairs of a batch lie in its rows; made by `pack_pairs` on the host, so that a GPU never waits for it.

    Attributes:
        segments: (R, T) int64, 3i, 3i+1 and 3i+2 on prompt, chosen and rejected answer of pair i, -1 on padding.
        position_ids: (R, T) int64, the place of a token in its own sequence; 0 on padding.
        answers: the rows that the answers' labels make, scored; those of the chosen side weigh 1 in the NLL.
        prompts: the rows that the rest of the chosen sequences makes: not scored, weight 1 in the NLL.
        sequences: the same for attention by variable lengths.
    """

    segments: Tensor
    position_ids: Tensor
    answers: Rows
    prompts: Rows
    sequences: Sequences

    def rows(self, prompt_nll: bool = True, nll_reduction: str = "token", media_tokens: tuple[int, ...] = ()) -> Rows:
        """What the loss takes: with the NLL over prompt and answer (TRL), or over the answer only (the paper).

        media_tokens: the ids that stand for pictures, which are no targets.
        """
        rows = _joined((self.answers, self.prompts)) if prompt_nll else self.answers
        if media_tokens:
            is_text = torch.isin(rows.target, rows.target.new_tensor(media_tokens), invert=True)
            rows = rows.select(is_text.nonzero().squeeze(1))
        rows = rows.by_sequence()
        weight = nll_weight(rows.nll_weight != 0, rows.sequence, 2 * rows.num_pairs, nll_reduction)
        return rows.with_nll_weight(weight)

    def order(self) -> list[int]:
        """The pairs in the order in which their prompts lie in the rows, read from left to right."""
        pairs = self.segments[self.segments >= 0] // 3
        return torch.unique_consecutive(pairs).tolist()

    def visible(self, row: Any, query: Any, key: Any, window: int | Tensor | None = None) -> Tensor:
        """Whether the token at place `query` of a row sees the one at `key`; indices of any shapes that broadcast."""
        own, other = self.segments[row, query], self.segments[row, key]
        visible = (key <= query) & ((other == own) | (other == own - own % 3))
        if window is None:
            return visible
        return visible & (self.position_ids[row, key] > self.position_ids[row, query] - window)

    def visible_bounds(self, window: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """The same as intervals, (R, T) each: the token at place q sees [own, q] and, of its prompt, [first, end)."""
        place = torch.arange(self.segments.shape[1], device=self.segments.device)

        def start_of(stretch: Tensor) -> Tensor:
            begins = F.pad(stretch[:, 1:] != stretch[:, :-1], (1, 0), value=True)
            return torch.where(begins, place, 0).cummax(1).values

        own, pair = start_of(self.segments), start_of(self.segments // 3)
        end = pair + self.position_ids.gather(1, own)  # an answer goes on where its prompt ends
        if window is None:
            return own, pair, end
        first = pair + (self.position_ids - window + 1).clamp(min=0)
        own = torch.where(self.segments >= 0, torch.maximum(own, place - window + 1), own)  # padding has no places
        return own, torch.minimum(first, end), end

    def attention_mask(self, window: int | None = None) -> Tensor:
        """(R, 1, T, T) bool, True where the query (third axis) sees the key: also none further back than `window`."""
        rows, width = self.segments.shape
        row, place = (torch.arange(size, device=self.segments.device) for size in (rows, width))
        return self.visible(row[:, None, None, None], place[:, None], place, window)


def aligned_width(width: int, steps: int = 8, coarsest: int | None = None) -> int:
    """The width rounded up to one of few that come again and again: `steps` of them from a power of two to the next.

    A GPU's libraries plan anew for every shape that they have not seen. At most 1 / steps is added, and less than
    `coarsest` if that is given.
    """
    multiple = max(8, 2 ** (width - 1).bit_length() // (2 * steps))
    multiple = multiple if coarsest is None else min(multiple, coarsest)
    return -(-width // multiple) * multiple


def aligned_row(width: int) -> int:
    """The width of rows that hold several pairs. It has few steps: the number of rows varies as well."""
    return aligned_width(width, steps=2, coarsest=256)


def pack_pairs(
    pairs: Sequence[Mapping[str, Any]], padding_id: int, capacity: int | None = None, aligned: bool = False
) -> dict[str, Any]:
    """The batch of tokenised pairs (see `TokenizedPair`): `input_ids` (R, T) int64, and `packed`, its `PackedPairs`.

    capacity: tokens of a row at the most, or those of the longest pair; None: what costs least (`cheapest_bins`).
    aligned: whether R and T are some of few, `aligned_row` and, without a capacity, `few_widths`.

    Raises `ValueError`, naming the pair, where a label is neither -100 nor the id at its place.
    """
    pieces = [_Piece.of(index, pair) for index, pair in enumerate(pairs)]
    sizes = [len(piece) for piece in pieces]
    if capacity is None:
        bins = cheapest_bins(sizes, aligned)
    else:
        bins = first_fit_decreasing(sizes, max(capacity, *sizes))
    width = row_width(bins, sizes, aligned)
    input_ids = torch.full((len(bins), width), padding_id, dtype=torch.int64)
    segments, position_ids = torch.full_like(input_ids, PADDING), torch.zeros_like(input_ids)
    answers, prompts = [], []
    lengths: list[int] = []  # of the sequences' queries
    keys: list[Tensor] = []
    for row, members in enumerate(bins):
        start = row * width
        for index in members:
            piece = pieces[index]
            both = piece.places(start)
            for side, places in enumerate(both):
                input_ids.view(-1)[places] = piece.ids[side]
                position_ids.view(-1)[places] = torch.arange(len(places))
                segments.view(-1)[places] = 3 * index + 1 + side
                answers.append(piece.rows(side, True, places, index, len(pieces)))
            segments.view(-1)[both[0][: piece.shared]] = 3 * index
            prompts.append(piece.rows(0, False, both[0], index, len(pieces)))
            keys += both
            lengths += [len(piece.ids[0]), len(piece.ids[1]) - piece.shared]
            start += len(piece)
        end = (row + 1) * width
        lengths.append(end - start)
        keys.append(torch.arange(start, end))
    packed = PackedPairs(segments, position_ids, _joined(answers), _joined(prompts), Sequences.of(lengths, keys))
    return {"input_ids": input_ids, "packed": packed}


def cheapest_bins(sizes: Sequence[int], aligned: bool = False) -> list[list[int]]:
    """Indices of `sizes` by rows, of the width that costs least among some.

    Wide rows leave little padding, but attention costs the square of the width, and pays for pairs that do not see each
    other.
    """
    longest, total = max(sizes), sum(sizes)
    widths = {min(total, longest * quarters // 4) for quarters in range(4, 17)} | {total}

    def cost(bins: list[list[int]]) -> float:
        width = row_width(bins, sizes, aligned)
        return len(bins) * width * (1 + width / ATTENTION_LENGTH)

    choice = few_widths(sizes) if aligned else sorted(widths)
    return min((first_fit_decreasing(sizes, width) for width in choice), key=cost)


def few_widths(sizes: Sequence[int]) -> list[int]:
    """The widths of aligned rows, of which there are 1, 2, 4, ..., at most half as many as pairs.

    So an epoch has few shapes. Wide rows cost little where they are used: on a GPU, by an attention that skips what no
    token sees.
    """
    widths, count = [], 1
    while count <= max(1, len(sizes) // 2):
        width = aligned_row(max(max(sizes), -(-sum(sizes) // count)))
        while len(first_fit_decreasing(sizes, width)) > count:
            width = aligned_row(width + 1)
        widths.append(width)
        count *= 2
    return widths


def row_width(bins: Sequence[Sequence[int]], sizes: Sequence[int], aligned: bool) -> int:
    """The width of rows that hold these bins."""
    width = max(sum(sizes[index] for index in members) for members in bins)
    return aligned_row(width) if aligned else width


def first_fit_decreasing(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of `sizes` in bins of at most `capacity`: the largest first, each into the first bin with room."""
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        fitting = next((b for b, left in enumerate(room) if left >= sizes[index]), None)
        if fitting is None:
            fitting = len(bins)
            bins.append([])
            room.append(capacity)
        bins[fitting].append(index)
        room[fitting] -= sizes[index]
    return bins


@dataclass(frozen=True)
class _Piece:
    """One pair as a stretch of a row: what its sides share, the rest of the chosen side, the rest of the rejected."""

    ids: tuple[Tensor, Tensor]  # of the chosen and the rejected sequence
    labels: tuple[Tensor, Tensor]
    shared: int  # tokens that both begin with

    @classmethod
    def of(cls, index: int, pair: Mapping[str, Any]) -> _Piece:
        def both(field: str) -> tuple[Tensor, Tensor]:
            chosen, rejected = (torch.as_tensor(pair[f"{side}_{field}"], dtype=torch.int64) for side in SIDES)
            return chosen, rejected

        ids, labels = both("input_ids"), both("labels")
        for side, own, label in zip(SIDES, ids, labels, strict=True):
            if (wrong := (label != IGNORE_INDEX) & (label != own)).any():
                at = int(wrong.nonzero()[0])
                raise ValueError(
                    f"Pair {index} of the batch cannot share its prompt: its {side}_labels holds {int(label[at])} at "
                    f"{at}, where its {side}_input_ids holds {int(own[at])}; a label is the id or {IGNORE_INDEX}."
                )
        shortest = min(len(ids[0]), len(ids[1]))
        differs = (ids[0][:shortest] != ids[1][:shortest]).nonzero()
        return cls(ids, labels, int(differs[0]) if len(differs) else shortest)

    def __len__(self) -> int:
        return len(self.ids[0]) + len(self.ids[1]) - self.shared

    def places(self, start: int) -> tuple[Tensor, Tensor]:
        """Where the tokens of both sequences lie, in a stretch that begins at `start`."""
        chosen = start + torch.arange(len(self.ids[0]))
        rest = start + len(chosen) + torch.arange(len(self.ids[1]) - self.shared)
        return chosen, torch.cat((chosen[: self.shared], rest))

    def rows(self, side: int, labelled: bool, places: Tensor, index: int, num_pairs: int) -> Rows:
        """Those of the side that have a label, or that have none. The first token of a sequence has no prediction."""
        own = (self.labels[side][1:] != IGNORE_INDEX) == labelled
        position = places[:-1][own]
        return Rows(
            position,
            self.ids[side][1:][own],
            torch.full_like(position, index + side * num_pairs),
            torch.full_like(position, labelled, dtype=torch.bool),
            torch.full_like(position, side == 0, dtype=torch.float64),
            num_pairs,
        )


def _joined(parts: Sequence[Rows]) -> Rows:
    vectors: Any = {name: torch.cat([getattr(part, name) for part in parts]) for name in DTYPES}
    return Rows(**vectors, num_pairs=parts[0].num_pairs)
