"""GELU with the bias of the layer before, at the inner widths of the GPT-2s."""

from __future__ import annotations

import pytest

from benchmarks.kernels.harness import DIRECTIONS, DTYPE, Bench, choose, randn, weight
from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.tools import cases

SHAPES = choose([(65536, 3072), (16384, 6400)], [(8, 64)])
CHECKED = choose((1024, 3072), (3, 64))
CASE = cases.bias_gelu_case(*CHECKED)
PASSES = {"forward": 2, "backward": 3, "both": 5}  # tensors (N, C) read and written: x, y; dy, x, dx
FLOPS = {"forward": 10, "backward": 18, "both": 28}  # per element, roughly


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("N", "C"), SHAPES)
def test_bias_gelu(contender: str, N: int, C: int, direction: str, bench: Bench) -> None:
    bench.contend(
        CASE,
        contender,
        {"x": randn(N, C), "bias": weight(C)},
        direction,
        shape=(N, C),
        flops=FLOPS[direction] * N * C,
        bytes_=PASSES[direction] * N * C * DTYPE.itemsize,
        ours=ops.bias_gelu,
        eager=reference.bias_gelu,
    )
