"""One token per sequence against its cache: every key and value is read once."""

from __future__ import annotations

import pytest
import torch

from benchmarks.kernels.harness import DEVICE, DTYPE, Bench, choose, randn
from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.tools import cases

CASE = cases.decode_attention_case(*choose((8, 1024, 12, 64), (2, 65, 1, 16)))
SHAPES = choose(
    [(1, 1024, 12, 64), (32, 1024, 12, 64), (256, 1024, 12, 64), (8, 8192, 16, 128)], [(2, 64, 2, 16)]
)


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled"])
@pytest.mark.parametrize(("B", "T", "H", "D"), SHAPES)
def test_decode_attention(contender: str, B: int, T: int, H: int, D: int, bench: Bench) -> None:
    cache = {"k_cache": randn(B, T, H, D), "v_cache": randn(B, T, H, D)}
    lengths = torch.full((B,), T, dtype=torch.int32, device=DEVICE)
    bench.contend(
        CASE,
        contender,
        {"q": randn(B, H, D), **cache, "lengths": lengths},
        shape=(B, T, H, D),
        flops=4 * B * T * H * D,
        bytes_=2 * B * T * H * D * DTYPE.itemsize,
        ours=ops.decode_attention,
        eager=reference.decode_attention,
    )
