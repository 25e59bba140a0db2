"""LayerNorm, alone and with residual and dropout, at the widths of the GPT-2s and at 4096."""

from __future__ import annotations

from functools import partial

import pytest

from benchmarks.kernels.harness import DIRECTIONS, DTYPE, Bench, choose, counters, liger, randn, weight
from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.tools import cases

SHAPES = choose([(65536, 768), (16384, 1024), (16384, 1600), (16384, 4096)], [(8, 64)])
CHECKED = choose((1024, 768), (3, 64))
CASE, FUSED_CASE = cases.layer_norm_case(*CHECKED), cases.dropout_add_layer_norm_case(*CHECKED)
# Tensors (N, C) read and written: x, y; dy, x, dx. Then x, residual, y, sum; dy, dsum, sum, dx, dresidual.
PASSES = {"forward": 2, "backward": 3, "both": 5}
FUSED_PASSES = {"forward": 4, "backward": 5, "both": 9}
# Per element, roughly.
FLOPS = {"forward": 8, "backward": 11, "both": 19}
FUSED_FLOPS = {"forward": 11, "backward": 13, "both": 24}
CONTENDERS = ["ours", "eager", "compiled"]


@pytest.mark.parametrize("contender", [*CONTENDERS, "liger"])
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("N", "C"), SHAPES)
def test_layer_norm(contender: str, N: int, C: int, direction: str, bench: Bench) -> None:
    bench.contend(
        CASE,
        contender,
        {"x": randn(N, C), "weight": weight(C), "bias": weight(C)},
        direction,
        shape=(N, C),
        flops=FLOPS[direction] * N * C,
        bytes_=PASSES[direction] * N * C * DTYPE.itemsize,
        ours=ops.layer_norm,
        eager=reference.layer_norm,
        liger=lambda x, weight, bias: liger("liger_layer_norm")(x, weight, bias, 1e-5),
    )


@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize(("N", "C"), SHAPES)
def test_dropout_add_layer_norm(contender: str, N: int, C: int, direction: str, bench: Bench) -> None:
    options = {"dropout_p": 0.1, **counters()}
    bench.contend(
        FUSED_CASE,
        contender,
        {"x": randn(N, C), "residual": randn(N, C), "weight": weight(C), "bias": weight(C)},
        direction,
        shape=(N, C),
        flops=FUSED_FLOPS[direction] * N * C,
        bytes_=FUSED_PASSES[direction] * N * C * DTYPE.itemsize,
        ours=partial(ops.dropout_add_layer_norm, **options),
        eager=partial(reference.dropout_add_layer_norm, **options),
    )
