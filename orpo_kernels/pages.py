"""Large matrices on a CPU in huge pages.

Linux hands out memory when it is first written, by pages of 4 KiB: 25 thousand page faults for a matrix of 100 MB,
which cost as much as several passes over it, again in every step. Asked for pages of 2 MiB, it takes 50.
"""

from __future__ import annotations

import ctypes
import sys

from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

HUGE_PAGE = 2 * 2**20
LEAST_BYTES = 8 * HUGE_PAGE  # of a matrix; the allocator may have written to a smaller one before
MADV_HUGEPAGE = 14


def on_huge_pages(matrix: Tensor) -> Tensor:
    """`matrix`, just allocated and not written yet. Only a wish: without effect on other systems and devices."""
    size = matrix.numel() * matrix.element_size()
    if sys.platform != "linux" or matrix.device.type != "cpu" or size < LEAST_BYTES or isinstance(matrix, FakeTensor):
        return matrix
    begin = -(-matrix.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (matrix.data_ptr() + size) // HUGE_PAGE * HUGE_PAGE
    ctypes.CDLL(None).madvise(ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), MADV_HUGEPAGE)
    return matrix
