"""Dropout on its own: reads and writes every element once, each way."""

from __future__ import annotations

import pytest

from benchmarks.kernels.harness import DIRECTIONS, DTYPE, Bench, choose, phases
from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.tools import cases

CASE = cases.dropout_case(*choose((1024, 768), (3, 64)))
PASSES = {"forward": 2, "backward": 2, "both": 4}  # and as many FLOPs an element


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("N", "C"), choose([(16384, 768), (65536, 768), (16384, 4096)], [(8, 64)]))
def test_dropout(contender: str, N: int, C: int, direction: str, bench: Bench) -> None:
    function = bench.contender(contender, "dropout", ours=ops.dropout, eager=reference.dropout)
    counters = bench.counters()
    prepare, call = phases(lambda x: function(x, 0.1, *counters), {"x": bench.randn(N, C)}, direction)
    flops = PASSES[direction] * N * C
    bench.run(
        CASE, contender, direction, f"({N}, {C})", prepare, call, flops=flops, bytes_=flops * DTYPE.itemsize
    )
