"""x W^T + b, with fp32 on a CPU computed by oneDNN.

torch sends fp32 matmuls on x86 to MKL. On an AMD CPU with AVX-512 oneDNN, which torch carries too, is twice
as fast (docs/experiments.md, "oneDNN for fp32 matmuls"). bf16 goes to oneDNN anyway. torch.compile sees the
plain op and chooses by itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedgpt.kernels import reference

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for a (M, K) and b (N, K), any strides, no autograd."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and HAS_ONEDNN:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.T


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return y

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dys[0].flatten(0, -2)  # (N, K)
        dx = matmul_nt(dy, weight.T).view(x.shape)
        dweight = matmul_nt(dy.T, x.flatten(0, -2).T)
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C), weight (K, C), bias (K,), one dtype -> (..., K); see ops.linear."""
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling()
    if plain or not HAS_ONEDNN or x.numel() == 0:
        return reference.linear(x, weight, bias)
    y: Tensor = _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y
