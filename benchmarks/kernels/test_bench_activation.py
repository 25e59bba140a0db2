"""GELU with and without the bias of the layer before, at the inner widths of the GPT-2s."""

from __future__ import annotations

import pytest

from benchmarks.kernels.harness import DIRECTIONS, DTYPE, Bench, choose, randn, weight
from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.tools import cases

SHAPES = choose([(65536, 3072), (16384, 6400)], [(8, 64)])
CHECKED = choose((1024, 3072), (3, 64))
CASES = {"gelu": cases.gelu_case(*CHECKED), "bias_gelu": cases.bias_gelu_case(*CHECKED)}
PASSES = {"forward": 2, "backward": 3, "both": 5}  # tensors (N, C) read and written: x, y; dy, x, dx
FLOPS = {"forward": 10, "backward": 18, "both": 28}  # per element, roughly


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("N", "C"), SHAPES)
@pytest.mark.parametrize("op", list(CASES))
def test_activation(contender: str, op: str, N: int, C: int, direction: str, bench: Bench) -> None:
    bench.contend(
        CASES[op],
        contender,
        {"x": randn(N, C)} | ({"bias": weight(C)} if op == "bias_gelu" else {}),
        direction,
        shape=(N, C),
        flops=FLOPS[direction] * N * C,
        bytes_=PASSES[direction] * N * C * DTYPE.itemsize,
        ours=getattr(ops, op),
        eager=getattr(reference, op),
    )
