"""What is ours of a call on several threads: all but the library's matrix products."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
PRODUCTS = (aten.mm, aten.addmm, aten.bmm, aten.baddbmm, aten.mv, aten.addmv, aten.dot)


class ProductsOnOneThread(TorchDispatchMode):
    """Inside, all runs on as many threads, but the library's products on one: they have other bits on more."""

    def __init__(self, threads: int) -> None:
        super().__init__()
        self.threads = threads

    def __enter__(self) -> ProductsOnOneThread:
        torch.set_num_threads(self.threads)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.set_num_threads(1)

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if operation.overloadpacket not in PRODUCTS:
            return operation(*args, **(kwargs or {}))
        torch.set_num_threads(1)
        try:
            return operation(*args, **(kwargs or {}))
        finally:
            torch.set_num_threads(self.threads)


def assert_same_bits_on_any_number_of_threads(run: Callable[[], list[Tensor]]) -> None:
    results = []
    for threads in (1, 2, 3, 7):
        with ProductsOnOneThread(threads):
            results.append(run())
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
