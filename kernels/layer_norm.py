"""LayerNorm, alone and with the dropout and residual add before it.

Shape letters: N rows, C channels, P programs of the backward.

Memory bandwidth is the limit, so every element is read and written once, in one pass with a row in registers.
With z the row that is normalised, x^ = (z - mean) * rstd, g = dy * weight and <.> the mean over a row,

    dz = rstd * (g - <g> - x^ * <g * x^>),  dweight = sum over rows of dy * x^,  dbias = sum of dy.

Each program of the backward loops over rows and keeps partial sums over them in fp32; a second kernel adds
them in a fixed order: no atomics, and the same call gives the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgpt.kernels import tuning
from fusedgpt.kernels.common import block_size, contiguous_like, load_columns, row_blocks, row_tile
from fusedgpt.kernels.dropout import dropout_arguments, philox_lanes
from fusedgpt.kernels.library import register_op

MAX_C = 8192
_WARPS_PER_SM = 16  # of the backward: at its 128 registers per thread no more fit at once


@triton.jit
def _row_means(a, b, C: tl.constexpr):
    """The row means of a and b (ROWS, BLOCK_C), with one exchange between warps for both: (ROWS, 1) each."""
    mean_a, mean_b = tl.split(tl.sum(tl.join(a, b), axis=1) / C)
    return mean_a[:, None], mean_b[:, None]


@triton.jit
def _keep_rows(seed, offset, rows, threshold, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """The dropout mask (ROWS, BLOCK_C) of `rows`; see dropout.py."""
    blocks = (offset + rows * tl.cdiv(C, 8))[:, None] + tl.arange(0, BLOCK_C // 8)[None, :]
    lanes = philox_lanes(seed, blocks)  # (ROWS, BLOCK_C / 8, 2, 2, 2)
    return tl.reshape(lanes, [rows.shape[0], BLOCK_C]) >= threshold


@triton.jit(do_not_specialize=["N", "threshold"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (N, C)
    residual_ptr,  # (N, C) or None
    weight_ptr,  # (C,)
    bias_ptr,  # (C,)
    y_ptr,  # (N, C)
    new_residual_ptr,  # (N, C), None without residual
    mean_ptr,  # (N,) fp32
    rstd_ptr,  # (N,) fp32
    seed_ptr,  # int64 scalar, None without dropout
    offset_ptr,  # int64 scalar, None without dropout
    N,
    eps,
    threshold,
    keep_scale,  # 1 / (1 - p)
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    rows, offs, mask = row_tile(tl.program_id(0) * ROWS, 0, N, C, ROWS, BLOCK_C)
    weight = load_columns(weight_ptr, 0, C, ROWS, BLOCK_C)
    bias = load_columns(bias_ptr, 0, C, ROWS, BLOCK_C)
    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if seed_ptr is not None:
        keep = _keep_rows(tl.load(seed_ptr), tl.load(offset_ptr), rows, threshold, C, BLOCK_C)
        z = tl.where(keep, z * keep_scale, 0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
        rounded = (z + residual.to(tl.float32)).to(residual.dtype)
        tl.store(new_residual_ptr + offs, rounded, mask=mask)
        z = rounded.to(tl.float32)  # what the backward will read
    mean = tl.sum(z, axis=1) / C
    centred = tl.where(tl.arange(0, BLOCK_C)[None, :] < C, z - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, axis=1) / C + eps)
    tl.store(mean_ptr + rows, mean, mask=rows < N)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)
    tl.store(y_ptr + offs, centred * rstd[:, None] * weight + bias, mask=mask)


@triton.jit(do_not_specialize=["N", "threshold"])
def _layer_norm_bwd_kernel(
    dy_ptr,  # (N, C)
    dnew_residual_ptr,  # (N, C) or None: what reaches z past the norm
    z_ptr,  # (N, C), the rows that were normalised
    weight_ptr,  # (C,)
    mean_ptr,  # (N,) fp32
    rstd_ptr,  # (N,) fp32
    dz_ptr,  # (N, C)
    dx_ptr,  # (N, C), dz through the dropout; None without dropout
    partial_ptr,  # (2, P, C) fp32, partial sums of dweight and dbias
    seed_ptr,  # int64 scalar, None without dropout
    offset_ptr,  # int64 scalar, None without dropout
    N,
    threshold,
    keep_scale,  # 1 / (1 - p)
    C: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
):
    program, P = tl.program_id(0), tl.num_programs(0)
    weight = load_columns(weight_ptr, 0, C, ROWS, BLOCK_C)
    if seed_ptr is not None:
        seed, offset = tl.load(seed_ptr), tl.load(offset_ptr)
    dweight = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK_C), dtype=tl.float32)
    for first_row in tl.range(program * ROWS, N, P * ROWS, num_stages=STAGES):
        rows, offs, mask = row_tile(first_row, 0, N, C, ROWS, BLOCK_C)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < N, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)[:, None]
        normed = (z - mean) * rstd  # where there is no column dy is 0, and so is all that follows
        dweight += dy * normed
        dbias += dy
        g = dy * weight
        mean_g, mean_gn = _row_means(g, g * normed, C)
        dz = (g - mean_g - normed * mean_gn) * rstd
        if dnew_residual_ptr is not None:
            dz += tl.load(dnew_residual_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dz_ptr + offs, dz, mask=mask)
        if seed_ptr is not None:
            keep = _keep_rows(seed, offset, rows, threshold, C, BLOCK_C)
            tl.store(dx_ptr + offs, tl.where(keep, dz * keep_scale, 0.0), mask=mask)
    offs_c = tl.arange(0, BLOCK_C)
    offs = program * C + offs_c  # P is a few hundred: no int64
    tl.store(partial_ptr + offs, tl.sum(dweight, axis=0), mask=offs_c < C)
    tl.store(partial_ptr + P * C + offs, tl.sum(dbias, axis=0), mask=offs_c < C)


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    partial_ptr,  # (2, P, C) fp32
    dweight_ptr,  # (C,)
    dbias_ptr,  # (C,)
    P,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    dweight = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & mask_c[None, :]
        offs = (offs_p * C)[:, None] + offs_c[None, :]
        dweight += tl.load(partial_ptr + offs, mask=mask, other=0.0)
        dbias += tl.load(partial_ptr + P * C + offs, mask=mask, other=0.0)
    tl.store(dweight_ptr + offs_c, tl.sum(dweight, axis=0), mask=mask_c)
    tl.store(dbias_ptr + offs_c, tl.sum(dbias, axis=0), mask=mask_c)


def layer_norm_fwd(
    x: Tensor,  # (..., C)
    residual: Tensor | None,  # (..., C)
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float,
    p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch; (y, new_residual, mean, rstd), of which new_residual is empty without residual."""
    x, weight, bias = x.contiguous(), weight.contiguous(), bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x if residual is None else residual)
    new_residual = y.new_empty(0) if residual is None else torch.empty_like(y)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    N, blocks = mean.numel(), row_blocks(x.shape[-1], MAX_C)
    if N == 0:
        return y, new_residual, mean, rstd
    with torch.cuda.device_of(x):
        _layer_norm_fwd_kernel[(triton.cdiv(N, blocks["ROWS"]),)](
            x,
            residual,
            weight,
            bias,
            y,
            None if residual is None else new_residual,
            mean,
            rstd,
            N=N,
            eps=eps,
            **dropout_arguments(p, seed, offset),
            **blocks,
        )
    return y, new_residual, mean, rstd


def layer_norm_bwd(
    dy: Tensor,  # (..., C)
    dnew_residual: Tensor | None,  # (..., C)
    z: Tensor,  # (..., C), the rows that were normalised
    weight: Tensor,  # (C,)
    mean: Tensor,  # (...)
    rstd: Tensor,  # (...)
    bias_dtype: torch.dtype,
    x_dtype: torch.dtype,
    p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Launch; (dz, dx, dweight, dbias), of which dx is empty unless p > 0: an op may not return dz twice."""
    dy, z, weight = dy.contiguous(), z.contiguous(), weight.contiguous()
    dnew_residual = None if dnew_residual is None else dnew_residual.contiguous()
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if p > 0.0 else z.new_empty(0, dtype=x_dtype)
    N, C, blocks = mean.numel(), z.shape[-1], row_blocks(z.shape[-1], MAX_C)
    per_sm = _WARPS_PER_SM // blocks["num_warps"]
    P = min(triton.cdiv(N, blocks["ROWS"]), per_sm * tuning.multiprocessor_count(z.device))
    partial = z.new_empty((2, P, C), dtype=torch.float32)
    dweight, dbias = z.new_empty(C, dtype=weight.dtype), z.new_empty(C, dtype=bias_dtype)
    if N == 0:
        return dz, dx, dweight.zero_(), dbias.zero_()
    BLOCK_C = block_size(blocks["BLOCK_C"] // 128)  # the last step: few columns each, to have many programs
    stages = 1 if C * z.element_size() % 16 and z.dtype == torch.float32 else 2  # else too many registers
    with torch.cuda.device_of(z):
        _layer_norm_bwd_kernel[(P,)](
            dy,
            dnew_residual,
            z,
            weight,
            mean,
            rstd,
            dz,
            dx if p > 0.0 else None,
            partial,
            N=N,
            **dropout_arguments(p, seed, offset),
            STAGES=stages,
            **blocks,
        )
        _sum_partials_kernel[(triton.cdiv(C, BLOCK_C),)](
            partial, dweight, dbias, P, C=C, BLOCK_P=4096 // BLOCK_C, BLOCK_C=BLOCK_C, num_warps=8
        )
    return dz, dx, dweight, dbias


def _fwd_fake(x: Tensor, residual: Tensor | None, *_: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    y = contiguous_like(x if residual is None else residual)
    new_residual = y.new_empty(0) if residual is None else contiguous_like(residual)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    return y, new_residual, mean, rstd


def _bwd_fake(
    dy: Tensor,
    dnew_residual: Tensor | None,
    z: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    bias_dtype: torch.dtype,
    x_dtype: torch.dtype,
    p: float = 0.0,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx = contiguous_like(z, x_dtype) if p > 0.0 else z.new_empty(0, dtype=x_dtype)
    return contiguous_like(z), dx, contiguous_like(weight), contiguous_like(weight, bias_dtype)


_fwd_op = register_op("layer_norm", layer_norm_fwd, _fwd_fake)
_bwd_op = register_op("layer_norm_bwd", layer_norm_bwd, _bwd_fake)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., C)
        residual: Tensor | None,  # (..., C)
        weight: Tensor,  # (C,)
        bias: Tensor,  # (C,)
        eps: float,
        p: float,
        seed: Tensor | None,
        offset: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y, new_residual, mean, rstd = _fwd_op(x, residual, weight, bias, eps, p, seed, offset)
        ctx.p, ctx.x_dtype, ctx.bias_dtype, ctx.has_residual = p, x.dtype, bias.dtype, residual is not None
        ctx.set_materialize_grads(False)  # the final norm's new residual is unused: no zeros to read
        z = x if residual is None else new_residual
        ctx.save_for_backward(z, weight, mean, rstd, seed, offset)
        return y, None if residual is None else new_residual

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dnew_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        z, weight, mean, rstd, seed, offset = ctx.saved_tensors
        dy = torch.zeros_like(z) if dy is None else dy
        dz, dx, dweight, dbias = _bwd_op(
            dy, dnew_residual, z, weight, mean, rstd, ctx.bias_dtype, ctx.x_dtype, ctx.p, seed, offset
        )
        dx = dx if ctx.p > 0.0 else dz.to(ctx.x_dtype)
        return dx, dz if ctx.has_residual else None, dweight, dbias, *[None] * 4


layer_norm: Callable[..., tuple[Tensor, Tensor]] = _LayerNorm.apply
