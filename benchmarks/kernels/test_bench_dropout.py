"""Dropout on its own: reads and writes every element once, each way."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.kernels.harness import DIRECTIONS, DTYPE, Bench, choose, counters, randn
from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.tools import cases

CASE = cases.dropout_case(*choose((1024, 768), (3, 64)))
PASSES = {"forward": 2, "backward": 2, "both": 4}  # and as many FLOPs per element


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("N", "C"), choose([(16384, 768), (65536, 768), (16384, 4096)], [(8, 64)]))
def test_dropout(contender: str, N: int, C: int, direction: str, bench: Bench) -> None:
    options = {"p": 0.1, **counters()}
    bench.contend(
        CASE,
        contender,
        {"x": randn(N, C)},
        direction,
        shape=(N, C),
        flops=PASSES[direction] * N * C,
        bytes_=PASSES[direction] * N * C * DTYPE.itemsize,
        ours=partial(ops.dropout, **options),
        eager=partial(reference.dropout, **options),
    )
