"""Labels to rows: two launches, and one number that the host reads between the labels and the loss.

The rows lie in the order of `rows.label_rows`, sequence after sequence: those of its labels, then the NLL's with a
target of their own. One program a sequence counts its rows; the second launch adds up the counts of the sequences
before each, and writes every row to its place: deterministic, without atomics. The vectors are made for as many rows as
there are labels, so that they are filled before the host knows how many there are.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ...rows import DTYPES, Rows
from .launch import launch

BLOCK = 1024


@triton.jit
def labels_at(
    LABELS,  # (2B, T) int64
    NLL_LABELS,  # (B, T) int64, or None: those of the labels
    i_sequence,
    o_t,  # positions of the hidden states
    num_pairs,
    T,
    ignore_index,
    SHIFT: tl.constexpr,
):
    """The target of every position, that of the NLL, whether there is the one, and the other."""
    mask = o_t < T - SHIFT
    place = i_sequence.to(tl.int64) * T + o_t + SHIFT
    label = tl.load(LABELS + place, mask=mask, other=0)
    is_chosen = o_t < tl.where(i_sequence < num_pairs, T - SHIFT, 0)
    nll_label = label
    if NLL_LABELS is not None:
        nll_label = tl.load(NLL_LABELS + place, mask=is_chosen, other=0)
    return label, nll_label, mask & (label != ignore_index), is_chosen & (nll_label != ignore_index)


@triton.jit
def store_rows(POSITION, TARGET, SEQUENCE, SCORED, o_r, mask, position, target, i_sequence, scored):
    """All of the rows at `o_r` but their weights."""
    tl.store(POSITION + o_r, position, mask=mask)
    tl.store(TARGET + o_r, target, mask=mask)
    tl.store(SEQUENCE + o_r, tl.zeros_like(position) + i_sequence, mask=mask)
    tl.store(SCORED + o_r, scored, mask=mask)


SIZES = ["num_pairs", "T", "ignore_index"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=["LABELS", "NLL_LABELS", "COUNTS"])
def count_labels_kernel(
    LABELS,  # (2B, T) int64
    NLL_LABELS,  # (B, T) int64 or None
    COUNTS,  # (3, 2B) int64, out, of each sequence: rows of the labels, the NLL's other rows, all rows of the NLL
    num_pairs,
    T,
    ignore_index: tl.int64,
    SHIFT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sequence = tl.program_id(0)
    first = tl.zeros((BLOCK,), tl.int32)
    others = tl.zeros((BLOCK,), tl.int32)
    nll = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, T - SHIFT, BLOCK):
        o_t = start + tl.arange(0, BLOCK)
        label, nll_label, scored, in_nll = labels_at(
            LABELS, NLL_LABELS, i_sequence, o_t, num_pairs, T, ignore_index, SHIFT
        )
        first += (scored | in_nll).to(tl.int32)
        others += (scored & in_nll & (label != nll_label)).to(tl.int32)
        nll += in_nll.to(tl.int32)
    tl.store(COUNTS + i_sequence, tl.sum(first, 0).to(tl.int64))
    tl.store(COUNTS + 2 * num_pairs + i_sequence, tl.sum(others, 0).to(tl.int64))
    tl.store(COUNTS + 4 * num_pairs + i_sequence, tl.sum(nll, 0).to(tl.int64))


INPUTS = ["LABELS", "NLL_LABELS", "COUNTS"]
OUTPUTS = ["POSITION", "TARGET", "SEQUENCE", "SCORED", "NLL_WEIGHT", "OFFSETS"]


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=INPUTS + OUTPUTS)
def label_rows_kernel(
    # data
    LABELS,  # (2B, T) int64
    NLL_LABELS,  # (B, T) int64 or None
    COUNTS,  # (3, 2B) int64, of `count_labels_kernel`
    POSITION,  # (R,) int64, out, as all of these
    TARGET,  # (R,) int64
    SEQUENCE,  # (R,) int64
    SCORED,  # (R,) bool
    NLL_WEIGHT,  # (R,) float64
    OFFSETS,  # (2B + 1,) int64, where the rows of each sequence begin, and the number of rows
    # shapes
    num_pairs,
    T,
    # constants
    ignore_index: tl.int64,
    SHIFT: tl.constexpr,
    PER_SEQUENCE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    i_sequence = tl.program_id(0)
    before = tl.zeros((BLOCK,), tl.int64)
    total = tl.zeros((BLOCK,), tl.int64)
    for start in range(0, 2 * num_pairs, BLOCK):
        o_s = start + tl.arange(0, BLOCK)
        rows = tl.load(COUNTS + o_s, mask=o_s < 2 * num_pairs, other=0)
        rows += tl.load(COUNTS + 2 * num_pairs + o_s, mask=o_s < 2 * num_pairs, other=0)
        before += tl.where(o_s < i_sequence, rows, 0)
        total += rows
    i_row = tl.sum(before, 0)
    i_other = i_row + tl.load(COUNTS + i_sequence)
    tl.store(OFFSETS + i_sequence, i_row)
    if i_sequence == 0:
        tl.store(OFFSETS + 2 * num_pairs, tl.sum(total, 0))

    weight = tl.full((), 1.0, tl.float64)
    if PER_SEQUENCE:
        nll_rows = tl.load(COUNTS + 4 * num_pairs + i_sequence)
        weight = 1.0 / tl.where(nll_rows > 0, nll_rows, 1).to(tl.float64)
    for start in range(0, T - SHIFT, BLOCK):
        o_t = start + tl.arange(0, BLOCK)
        label, nll_label, scored, in_nll = labels_at(
            LABELS, NLL_LABELS, i_sequence, o_t, num_pairs, T, ignore_index, SHIFT
        )
        position = i_sequence.to(tl.int64) * T + o_t
        target = tl.where(scored, label, nll_label)
        same = in_nll & (target == nll_label)
        is_row = scored | in_nll
        o_r = i_row + tl.cumsum(is_row.to(tl.int32), 0) - 1
        store_rows(POSITION, TARGET, SEQUENCE, SCORED, o_r, is_row, position, target, i_sequence, scored)
        tl.store(NLL_WEIGHT + o_r, tl.where(same, weight, 0.0), mask=is_row)
        i_row += tl.sum(is_row.to(tl.int32), 0)
        if NLL_LABELS is not None:
            is_other = in_nll & (target != nll_label)
            o_r = i_other + tl.cumsum(is_other.to(tl.int32), 0) - 1
            store_rows(POSITION, TARGET, SEQUENCE, SCORED, o_r, is_other, position, nll_label, i_sequence, False)
            tl.store(NLL_WEIGHT + o_r, tl.where(is_other, weight, 0.0), mask=is_other)
            i_other += tl.sum(is_other.to(tl.int32), 0)


def label_rows(labels: Tensor, nll_labels: Tensor | None, shift: bool, ignore_index: int, per_sequence: bool) -> Rows:
    """See `rows.label_rows`. The host reads the number of rows, and waits for the device here alone."""
    vectors, offsets = filled_rows(labels, nll_labels, shift, ignore_index, per_sequence)
    if not len(labels):
        offsets.zero_()  # without a sequence nothing was launched
    count = int(offsets[-1])
    position, target, sequence, scored, nll_weight = (vector[:count] for vector in vectors)
    rows = Rows(position, target, sequence, scored, nll_weight, len(labels) // 2)
    return rows.knowing(offsets=offsets, unique_positions=nll_labels is None)


def filled_rows(
    labels: Tensor, nll_labels: Tensor | None, shift: bool, ignore_index: int, per_sequence: bool
) -> tuple[list[Tensor], Tensor]:
    """The vectors of the rows, longer than their number, and the offsets of the sequences, (2B + 1,) int64."""
    labels = labels.contiguous()
    nll_labels = None if nll_labels is None else nll_labels.contiguous()
    sequences, length = labels.shape
    most = labels.numel() + (0 if nll_labels is None else nll_labels.numel())
    vectors = [labels.new_empty(most, dtype=dtype) for dtype in DTYPES.values()]
    counts, offsets = labels.new_empty(3, sequences), labels.new_empty(sequences + 1)
    sizes = sequences // 2, length, ignore_index
    options = {"SHIFT": int(shift), "BLOCK": BLOCK, "num_warps": 4}
    launch(count_labels_kernel, (sequences,), labels, nll_labels, counts, *sizes, **options)
    options["PER_SEQUENCE"] = per_sequence
    launch(label_rows_kernel, (sequences,), labels, nll_labels, counts, *vectors, offsets, *sizes, **options)
    return vectors, offsets
