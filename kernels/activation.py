"""GELU in its tanh form of x + bias; the backward recomputes it from its inputs.

Shape letters: N rows, C channels, P programs of the backward that share a column.

0.5 (1 + tanh u) is sigmoid(2u), so gelu(x) = x sigmoid(s) with s = 2 sqrt(2 / pi) (x + 0.044715 x^3), and

    gelu'(x) = sigmoid(s) + x sigmoid(s) sigmoid(-s) ds/dx.

Both sigmoids come from exp(-|s|), which neither overflows nor, as 1 - sigmoid(s) would, cancels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgpt.kernels import tuning
from fusedgpt.kernels.common import contiguous_like, exp, load_columns, row_blocks, row_tile
from fusedgpt.kernels.library import register_op

_SLOPE = tl.constexpr(1.5957691216057308)  # 2 sqrt(2 / pi)
_CUBIC = tl.constexpr(0.044715)
_LARGEST_SQUARE = tl.constexpr(1e12)  # gelu is x or 0 long before: keeps x^2 finite, and so the slope
_MAX_BLOCK_C = 1024  # columns of a program at most
_PROGRAMS_PER_SM = 4  # of the backward that sums the bias gradient


@triton.jit
def _sigmoids(x):
    """sigmoid(s), sigmoid(-s) and ds/dx of fp32 x; x may be infinite."""
    square = tl.minimum(x * x, _LARGEST_SQUARE)
    s = x * (square * _CUBIC + 1.0) * _SLOPE
    small = exp(-tl.abs(s))  # in [0, 1]
    of_abs = 1.0 / (1.0 + small)
    of_minus_abs = small * of_abs
    above = s >= 0.0
    slope = (square * (3.0 * _CUBIC) + 1.0) * _SLOPE
    return tl.where(above, of_abs, of_minus_abs), tl.where(above, of_minus_abs, of_abs), slope


@triton.jit(do_not_specialize=["N"])
def _bias_gelu_fwd_kernel(
    x_ptr,  # (N, C)
    bias_ptr,  # (C,)
    out_ptr,  # (N, C)
    N,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    first_col = tl.program_id(1) * BLOCK_C
    bias = load_columns(bias_ptr, first_col, C, ROWS, BLOCK_C)
    _, offs, mask = row_tile(tl.program_id(0).to(tl.int64) * ROWS, first_col, N, C, ROWS, BLOCK_C)
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias
    sigmoid, _, _ = _sigmoids(x)
    tl.store(out_ptr + offs, x * sigmoid, mask=mask)


@triton.jit(do_not_specialize=["N"])
def _bias_gelu_bwd_kernel(
    dout_ptr,  # (N, C)
    x_ptr,  # (N, C)
    bias_ptr,  # (C,)
    dx_ptr,  # (N, C)
    partial_ptr,  # (P, C) fp32, partial sums of the bias gradient
    N,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, P = tl.program_id(0), tl.num_programs(0)
    first_col = tl.program_id(1) * BLOCK_C
    bias = load_columns(bias_ptr, first_col, C, ROWS, BLOCK_C)
    dbias = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    for first_row in tl.range(program * ROWS, N, P * ROWS, num_stages=STAGES):
        _, offs, mask = row_tile(first_row, first_col, N, C, ROWS, BLOCK_C)
        dout = tl.load(dout_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32) + bias
        sigmoid, complement, slope = _sigmoids(x)
        dx = dout * (sigmoid + x * sigmoid * complement * slope)
        dbias += dx  # 0 where there is no row, because dout is
        tl.store(dx_ptr + offs, dx, mask=mask)
    offs_c = first_col + tl.arange(0, BLOCK_C)
    tl.store(partial_ptr + program * C + offs_c, tl.sum(dbias, axis=0), mask=offs_c < C)


def bias_gelu_fwd(x: Tensor, bias: Tensor) -> Tensor:
    """Launch; x (..., C), bias (C,)."""
    x, bias = x.contiguous(), bias.contiguous()
    out = torch.empty_like(x)
    if x.numel() > 0:
        C, blocks = len(bias), row_blocks(len(bias), _MAX_BLOCK_C)
        grid = (triton.cdiv(x.numel() // C, blocks["ROWS"]), triton.cdiv(C, blocks["BLOCK_C"]))
        with torch.cuda.device_of(x):
            _bias_gelu_fwd_kernel[grid](x, bias, out, x.numel() // C, **blocks)
    return out


def bias_gelu_bwd(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Launch; (dx, dbias) for dout and x (..., C), bias (C,)."""
    dout, x, bias = dout.contiguous(), x.contiguous(), bias.contiguous()
    dx = torch.empty_like(x)
    if x.numel() == 0:
        return dx, torch.zeros_like(bias)
    N, C, blocks = x.numel() // len(bias), len(bias), row_blocks(len(bias), _MAX_BLOCK_C)
    columns = triton.cdiv(C, blocks["BLOCK_C"])
    programs = triton.cdiv(_PROGRAMS_PER_SM * tuning.multiprocessor_count(x.device), columns)
    P = min(triton.cdiv(N, blocks["ROWS"]), programs)
    partial = x.new_empty((P, C), dtype=torch.float32)
    with torch.cuda.device_of(x):
        _bias_gelu_bwd_kernel[(P, columns)](dout, x, bias, dx, partial, N, STAGES=2, **blocks)
    return dx, partial.sum(0).to(bias.dtype)


def _fwd_fake(x: Tensor, bias: Tensor) -> Tensor:
    return contiguous_like(x)


def _bwd_fake(dout: Tensor, x: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return contiguous_like(x), contiguous_like(bias)


_fwd_op = register_op("bias_gelu", bias_gelu_fwd, _fwd_fake)
_bwd_op = register_op("bias_gelu_bwd", bias_gelu_bwd, _bwd_fake)


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, bias)
        out: Tensor = _fwd_op(x, bias)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor, Tensor]:
        dx, dbias = _bwd_op(dout, *ctx.saved_tensors)
        return dx, dbias


bias_gelu: Callable[..., Tensor] = _BiasGelu.apply
