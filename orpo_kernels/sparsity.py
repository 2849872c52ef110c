"""What a sparse backward pass (`sparse_eps`) left out, measured as it runs.

>>> with measured_sparsity() as measured:
...     orpo_loss(hidden, weight, labels, sparse_eps=2**-14).loss.backward()
>>> measured.active_share, measured.dropped_mass.max()
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .devices import statistics_dtype


@dataclass
class Sparsity:
    """The forward passes inside one `measured_sparsity`.

    With g_t = dloss/dlogp_t, and mass_t the row's `dropped_mass`, the gradients are off by no more than

        |error of dh_t| <= 2 |g_t| mass_t logit_scale max_j |W_j|
        |error of dW|_F <= 2 logit_scale sum_t |g_t| mass_t |h_t|

    since the tail replaces as much as was dropped: the difference has an L1 norm of at most twice the mass. What the
    tail explains of it is not in these bounds, which are several times the errors.

    Attributes:
        shares: of the vocabulary, that each block of rows took through its products; 1 for a dense chunk.
        sizes: rows of each of these blocks.
        masses: (B,) for each of them, the probability that a row's left-out columns had; 0 where dense.
    """

    shares: list[float] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    masses: list[Tensor] = field(default_factory=list)

    @property
    def dropped_mass(self) -> Tensor:
        """(R,), of all rows in their order."""
        return torch.cat(self.masses) if self.masses else torch.zeros(0, dtype=torch.float64)

    @property
    def active_share(self) -> float:
        """Of the products of the backward pass, what was done; 1 is exact, and is what no rows at all give."""
        rows = sum(self.sizes)
        return sum(share * size for share, size in zip(self.shares, self.sizes, strict=True)) / rows if rows else 1.0

    def bounds(
        self, upstream: Tensor, hidden: Tensor, weight: Tensor, logit_scale: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The right-hand sides above: (R,) of the rows of dh, and 0-d of the norm of dW.

        upstream: (R,) dloss/dlogp of the rows; hidden: (R, H) their hidden states; weight: (V, H).
        """
        dtype = statistics_dtype(hidden.device)
        share = 2 * logit_scale * upstream.to(dtype).abs() * self.dropped_mass
        longest = torch.linalg.vector_norm(weight, dim=1, dtype=dtype).amax()
        lengths = torch.linalg.vector_norm(hidden, dim=1, dtype=dtype)
        return share * longest, share @ lengths


_measured: ContextVar[Sparsity | None] = ContextVar("measured_sparsity", default=None)


@contextmanager
def measured_sparsity(measured: Sparsity | None = None) -> Iterator[Sparsity]:
    """Inside, every forward pass with `sparse_eps` in this thread writes down what it leaves out.

    measured: where to go on; by default, with nothing.
    """
    measured = Sparsity() if measured is None else measured
    token = _measured.set(measured)
    try:
        yield measured
    finally:
        _measured.reset(token)


def record_block(share: float, dropped_mass: Tensor) -> None:
    """Called by the schedule."""
    if (measured := _measured.get()) is not None:
        measured.shares.append(share)
        measured.sizes.append(dropped_mass.shape[0])
        measured.masses.append(dropped_mass)
