"""Dropout + residual + LayerNorm for a CPU: dropout and sum in one pass.

The norm is the reference's: torch's own in bf16 sums the gradients of weight and bias in bf16, 1% off.
"""

from __future__ import annotations

from torch import Tensor

from fusedgpt.kernels import reference
from fusedgpt.kernels.cpu.dropout import add_dropout, dropout_mask
from fusedgpt.kernels.reference import on_eager_cpu


def dropout_add_layer_norm(
    x: Tensor,  # (..., C)
    residual: Tensor,  # (..., C)
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float,
    dropout_p: float,
    seed: Tensor | None,
    offset: Tensor | None,
    x_bias: Tensor | None,  # (C,)
) -> tuple[Tensor, Tensor]:
    """See ops.dropout_add_layer_norm."""
    one_pass = x_bias is None and x.dtype == residual.dtype and on_eager_cpu(x)
    if dropout_p == 0.0 or not one_pass:
        return reference.dropout_add_layer_norm(
            x, residual, weight, bias, eps, dropout_p, seed, offset, x_bias, dropout_mask
        )
    assert seed is not None
    assert offset is not None
    residual = add_dropout(residual, x, dropout_p, seed, offset)
    return reference.layer_norm(residual, weight, bias, eps), residual
