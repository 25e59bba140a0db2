"""Dropout + residual + LayerNorm on a CPU, against float64 with the same mask."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt.kernels import ops
from fusedgpt.kernels.cpu.dropout import dropout_mask

SEED, OFFSET, P = torch.tensor(3), torch.tensor(1 << 33), 0.25
ROWS, C = 512, 48


def outputs_and_gradients(function: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> list[Tensor]:
    """Of each output, weighted at random, and of each input."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = function(*leaves)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(y.shape, generator=generator).bfloat16().to(y.dtype) for y in outputs]
    torch.autograd.backward(outputs, weights)
    return [*outputs, *(x.grad for x in leaves)]


@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 2e-6), (torch.bfloat16, 4e-3)])
def test_against_float64(dtype: torch.dtype, limit: float) -> None:
    """torch's LayerNorm in bf16 is 2% off in the weight's gradient."""
    x, residual = torch.randn(ROWS, C).to(dtype), (torch.randn(ROWS, C) + 2).to(dtype)
    weight, bias = 1 + 0.1 * torch.randn(C), torch.randn(C)
    factor = dropout_mask(x.shape, P, SEED, OFFSET).double() / (1 - P)

    def exact(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        z = residual + x * factor
        return F.layer_norm(z, (C,), weight, bias), z

    def ours(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        return ops.dropout_add_layer_norm(x, residual, weight, bias, 1e-5, P, SEED, OFFSET)

    inputs = x, residual, weight, bias
    found = outputs_and_gradients(ours, *inputs)
    truth = outputs_and_gradients(exact, *(t.double() for t in inputs))
    errors = [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, truth, strict=True)]
    assert max(errors) < limit, errors
    assert [t.dtype for t in found] == [dtype] * 4 + [torch.float32] * 2
