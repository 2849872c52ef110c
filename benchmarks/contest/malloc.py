"""A process whose malloc keeps what is freed.

glibc's malloc gives large blocks back to the kernel and asks for them again at the next call: every page of a matrix of
logits comes by a page fault then, zeroed, each time. jemalloc and tcmalloc, which torch recommends on CPUs, keep them.
That is not the loss's business, but half of what stands between us and the bare matrix products is page faults, and
more of what stands between the others and us: so it is measured both ways.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # malloc.h
DEFAULTS = {M_MMAP_MAX: 65536, M_TRIM_THRESHOLD: 128 * 1024}
ONLY_GLIBC = "only glibc's malloc can be told to keep its pages, and this process runs on another libc"


def available() -> bool:
    """Whether the process runs on glibc, whose malloc can be told."""
    return hasattr(ctypes.CDLL(None), "gnu_get_libc_version")


@contextmanager
def kept_pages() -> Iterator[None]:
    """Inside, nothing that is freed goes back to the kernel; afterwards all of it does.

    Raises:
        RuntimeError: another libc than glibc.
    """
    if not available():
        raise RuntimeError(ONLY_GLIBC)
    libc = ctypes.CDLL(None)
    libc.mallopt(M_MMAP_MAX, 0)  # large blocks come from the heap, like small ones,
    libc.mallopt(M_TRIM_THRESHOLD, -1)  # whose end is never cut off
    try:
        yield
    finally:
        for option, value in DEFAULTS.items():
            libc.mallopt(option, value)
        libc.malloc_trim(0)
