"""The benchmark of the row-wise passes runs, and measures what it says."""

from __future__ import annotations

import io
import json

import pytest
import torch

pytest.importorskip("rich", reason="the benchmarks print with rich: pip install 'orpo-kernels[bench]'")

from rich.console import Console

from benchmarks.kernels import rowwise
from orpo_kernels.ops import why_not

REASON = why_not("native", torch.device("cpu"))
built = pytest.mark.skipif(REASON is not None, reason=str(REASON))


@built
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_pass_beside_its_bounds(dtype: torch.dtype) -> None:
    results = rowwise.measure(dtype, 300, rounds=2, chunk_bytes=2**16)
    assert [result.name for result in results] == list(rowwise.PASSES)
    for result in results:
        size = result.rows * 300 * dtype.itemsize
        assert result.nbytes == (size if result.name == "statistics" else 2 * size)
        assert set(result.seconds) == {"ours", "eager", "copy", "exp"}
        assert all(seconds > 0 for seconds in result.seconds.values())
    shown = io.StringIO()
    Console(file=shown, width=200).print(rowwise.table(results, "avx2").rich())
    assert "recomputed" in shown.getvalue()
    assert json.loads(json.dumps(rowwise.as_json(results, "avx2")))["results"][0]["share"] == results[0].share


@built
@pytest.mark.parametrize("name", ["residual", "recomputed"])
def test_ours_and_the_eager_pass_do_the_same_work(name: str) -> None:
    chunk = rowwise.Chunk(4, 700, torch.float32)
    chunk.fill()
    chunk.eager(name)
    eager = chunk.logits.clone()
    chunk.fill()
    chunk.ours(name)
    torch.testing.assert_close(chunk.logits, eager)


def test_the_share_is_that_of_the_bound_that_binds() -> None:
    seconds = {"ours": 2.0, "eager": 8.0, "copy": 1.0, "exp": 1.5}
    result = rowwise.Result("residual", "bfloat16", 10, 100, nbytes=4 * 10**9, seconds=seconds)
    assert (result.gigabytes_per_second, result.share, result.speedup) == (2.0, 0.75, 4.0)
    assert result.share_in_turn == 1.25
