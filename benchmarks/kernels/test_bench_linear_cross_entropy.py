"""The output projection and the loss: 64k tokens and GPT-2's vocabulary; time and memory."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.harness import DEVICE, DTYPE, Bench, choose, liger, randn, weight
from fusedgpt.kernels import ops
from fusedgpt.kernels.tools import cases

CASE = cases.linear_cross_entropy_case(*choose((512, 768, 50257), (5, 16, 65)))
SHAPES = choose([(65536, 768, 50304), (16384, 1600, 50304), (16384, 4096, 128256)], [(16, 32, 128)])


def materialised(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once."""
    return F.cross_entropy((hidden @ weight.to(hidden.dtype).T).float(), targets)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch >= 2.13's own, in chunks."""
    options = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(hidden, weight.to(hidden.dtype), targets, options=options)


def ligers(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Liger-Kernel's, in chunks, with its gradients computed in the forward pass."""
    return liger("liger_fused_linear_cross_entropy")(hidden, weight.to(hidden.dtype), targets)


@pytest.mark.parametrize("contender", ["ours", "eager", "compiled", "torch_chunked", "liger"])
@pytest.mark.parametrize("direction", ["forward", "both"])  # ours computes gradients along with the loss
@pytest.mark.parametrize(("N", "C", "V"), SHAPES)
def test_linear_cross_entropy(contender: str, N: int, C: int, V: int, direction: str, bench: Bench) -> None:
    if contender == "torch_chunked" and not hasattr(F, "linear_cross_entropy"):
        pytest.skip("F.linear_cross_entropy needs torch 2.13")
    targets = torch.randint(V, (N,), device=DEVICE)
    bench.contend(
        CASE,
        contender,
        {"hidden": randn(N, C), "weight": weight(V, C), "targets": targets},
        direction,
        shape=(N, C, V),
        flops=(2 if direction == "forward" else 6) * N * C * V,
        bytes_=(1 if direction == "forward" else 2) * (N * C * DTYPE.itemsize + 4 * V * C),  # and gradients
        ours=ops.linear_cross_entropy,
        eager=materialised,
        torch_chunked=chunked,
        liger=ligers,
    )
