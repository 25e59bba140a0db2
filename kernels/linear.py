"""x W^T + b. The gradient of b is summed straight into b's dtype, which may be wider than the others'.

torch.compile sees the plain op and makes its own choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fusedgpt.kernels import reference
from fusedgpt.kernels.cpu.linear import matmul_nt, matmul_tn, product, takes_onednn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.bias_dtype = None if bias is None else bias.dtype
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dys[0].flatten(0, -2)  # (N, K)
        dx = matmul_nt(dy, weight.T).view(x.shape)
        dweight = matmul_tn(dy, x.flatten(0, -2))
        dbias = None if ctx.bias_dtype is None else dy.sum(0, dtype=ctx.bias_dtype)
        return dx, dweight, dbias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C), weight (K, C) of x's dtype, bias (K,) -> (..., K); see ops.linear."""
    on_cpu = x.device.type == "cpu" and not takes_onednn(x)  # sum would copy dy to the wider dtype first
    if on_cpu or x.numel() == 0 or torch.compiler.is_compiling():
        return reference.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        return product(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y
