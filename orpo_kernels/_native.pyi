"""The C++ module that `native/module.cpp` defines; it is there where a compiler was when the package was installed.

Matrices may have rows that lie apart. Whatever the kernels write into comes as an argument.
"""

from torch import Tensor

def residual_(
    logits: Tensor, target: Tensor, log_odds: Tensor, scale: float, softcap: float | None, threads: int
) -> None: ...
def statistics(
    logits: Tensor,
    target: Tensor,
    log_odds: Tensor,
    lse_others: Tensor,
    scale: float,
    softcap: float | None,
    threads: int,
) -> None: ...
def recomputed_residual_(
    logits: Tensor, target: Tensor, lse_others: Tensor, scale: float, softcap: float | None, threads: int
) -> None: ...
def column_statistics(residual: Tensor, row_weight: Tensor, peak: Tensor, mass: Tensor, threads: int) -> None: ...
def gather_columns(residual: Tensor, columns: Tensor, out: Tensor, sums: Tensor, threads: int) -> None: ...
def gather_rows(hidden: Tensor, position: Tensor, coefficient: Tensor | None, out: Tensor, threads: int) -> None: ...
def scatter_rows_(out: Tensor, position: Tensor, rows: Tensor, coefficient: Tensor, threads: int) -> None: ...
def sequence_sums(
    log_odds: Tensor,
    sequence: Tensor,
    scored: Tensor,
    nll_weight: Tensor,
    sums: Tensor,
) -> None:
    """sums: (6B,), the mean log-probabilities of the sequences, their numbers of scored rows, and their NLL."""

def odds_ratio(
    log_odds: Tensor,
    sequence: Tensor,
    scored: Tensor,
    nll_weight: Tensor,
    sums: Tensor | None,
    pair_weight: Tensor | None,
    alpha: float,
    beta: float,
    nll_count: Tensor,
    pair_count: Tensor,
    numbers: Tensor,
    valid: Tensor,
    grad: Tensor,
) -> None: ...
def label_rows(
    labels: Tensor,
    nll_labels: Tensor | None,
    shift: bool,
    ignore_index: int,
    per_sequence: bool,
    integers: Tensor,
    scored: Tensor,
    nll_weight: Tensor,
    offsets: Tensor,
    counts: Tensor,
) -> tuple[int, bool]:
    """How many rows were written, and whether no position occurs twice.

    integers: (3 * most,), the positions, targets and sequences; counts: (2,), as `count_rows`.
    """

def count_rows(sequence: Tensor, scored: Tensor, nll_weight: Tensor, pairs: int, out: Tensor) -> None: ...
def are_within(position: Tensor, num_positions: int, target: Tensor, vocab_size: int) -> bool: ...
def exp(x: Tensor, out: Tensor, repeats: int, threads: int) -> None:
    """exp(x) into `out`, which has room for it once a thread; to be tested, and timed by `repeats`."""

def isa() -> str:
    """The instruction set whose kernels run."""

def isas() -> list[str]:
    """The instruction sets that this processor has kernels for, the best first."""

def thread_source() -> str:
    """The OpenMP library whose threads are used, or "std::thread"."""
