"""GELU with and without the bias of the layer before, at the inner widths of the GPT-2s."""

from __future__ import annotations

import pytest

from benchmarks.kernels.harness import DIRECTIONS, DTYPE, Bench, choose, phases
from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.tools import cases

SHAPES = choose([(65536, 3072), (16384, 6400)], [(8, 64)])
CHECKED = choose((1024, 3072), (3, 64))
CASE, BIAS_CASE = cases.gelu_case(*CHECKED), cases.bias_gelu_case(*CHECKED)
PASSES = {"forward": 2, "backward": 3, "both": 5}  # tensors (N, C) read and written: x, y; dy, x, dx
FLOPS = {"forward": 10, "backward": 18, "both": 28}  # an element, about
CONTENDERS = ["ours", "eager", "compiled"]


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("N", "C"), SHAPES)
def test_gelu(contender: str, N: int, C: int, direction: str, bench: Bench) -> None:
    function = bench.contender(contender, "gelu", ours=ops.gelu, eager=reference.gelu)
    prepare, call = phases(function, {"x": bench.randn(N, C)}, direction)
    size, flops = PASSES[direction] * N * C * DTYPE.itemsize, FLOPS[direction] * N * C
    bench.run(CASE, contender, direction, f"({N}, {C})", prepare, call, flops=flops, bytes_=size)


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("N", "C"), SHAPES)
def test_bias_gelu(contender: str, N: int, C: int, direction: str, bench: Bench) -> None:
    function = bench.contender(contender, "bias_gelu", ours=ops.bias_gelu, eager=reference.bias_gelu)
    prepare, call = phases(function, {"x": bench.randn(N, C), "bias": bench.weight(C)}, direction)
    size, flops = PASSES[direction] * N * C * DTYPE.itemsize, FLOPS[direction] * N * C
    bench.run(BIAS_CASE, contender, direction, f"({N}, {C})", prepare, call, flops=flops, bytes_=size)
