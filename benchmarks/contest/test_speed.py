"""pytest-benchmark cases: ours, the bare GEMMs and plain torch, forward + backward of head and loss.

    pytest benchmarks --benchmark-autosave        # keep a run
    pytest benchmarks --benchmark-compare         # the next beside it

`make test` does not collect them. Compare times of one machine only; `benchmarks.contest.regression` compares ratios.
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

pytest.importorskip("pytest_benchmark", reason="pip install 'orpo-kernels[bench]'")

from benchmarks.contest.suite import default_dtypes
from benchmarks.contest.turns import FLOOR, HEADS, Contest
from benchmarks.contest.workloads import Workload, synthetic


@functools.cache
def work(dtype: str) -> Workload:
    return synthetic(pairs=1).cast(getattr(torch, dtype))


@pytest.mark.parametrize("name", [FLOOR, "ours", "plain"])
@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("dtype", default_dtypes("cpu"))
def test_head_and_loss(benchmark: Any, dtype: str, head: str, name: str) -> None:
    benchmark.group = f"{dtype}, {head}"
    contest = Contest(work(dtype), head)
    contestant = contest.contestant(name)
    contest.run(contestant)
    benchmark.pedantic(contest.run, args=(contestant,), rounds=7)
    benchmark.extra_info["rows"] = contest.work.rows
