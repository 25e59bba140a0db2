"""LayerNorm, alone and with the dropout and residual add before it.

Shape letters: N rows, C channels, P programs of the backward.

Memory bandwidth is the limit, so every element is read and written once, in one pass with a row in registers.
With z the row that is normalised, x^ = (z - mean) * rstd, g = dy * weight and <.> the mean over a row,

    dz = rstd * (g - <g> - x^ * <g * x^>),  dweight = sum over rows of dy * x^,  dbias = sum of dy.

A tile is (CHUNKS, ROWS, WIDTH): column chunk * WIDTH + i of each row. The compiler gives the last axis to the
lanes of a warp and ROWS to the warps, so up to 1,024 columns a row belongs to one warp: its means need no
barrier, and warps wait for memory each on its own. Triton 3.6 gives the first axis to the warps: there a tile
is (ROWS, CHUNKS, WIDTH).

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
from fusedgpt.kernels.common import block_size, contiguous_like
from fusedgpt.kernels.dropout import dropout_arguments, philox_lanes
from fusedgpt.kernels.library import register_op

MAX_C = 8192
_TILE = 4096  # elements: narrow rows share one
_WARPS_PER_SM = 8  # of the backward: at its 255 registers per thread no more fit at once
_ROWS_AXIS = tl.constexpr(0 if triton.__version__.startswith("3.6.") else 1)
_CHUNKS_AXIS = tl.constexpr(1 - _ROWS_AXIS.value)


@triton.jit
def _columns(CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """The columns of a tile: (CHUNKS, 1, WIDTH)."""
    chunks = tl.expand_dims(tl.arange(0, CHUNKS), (_ROWS_AXIS, 2))
    return chunks * WIDTH + tl.arange(0, WIDTH)[None, None, :]


@triton.jit
def _of_rows(x):
    """x (ROWS,) along the rows of a tile: (1, ROWS, 1)."""
    return tl.expand_dims(x, (_CHUNKS_AXIS, 2))


@triton.jit
def _load_vector(x_ptr, C: tl.constexpr, CHUNKS: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A vector (C,) in fp32, repeated for every row so that it gets a tile's layout."""
    offs_c = _columns(CHUNKS, WIDTH) + _of_rows(tl.zeros((ROWS,), tl.int32))
    return tl.load(x_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)


@triton.jit
def _row_means(x, C: tl.constexpr):
    """The row means of a tile, along its rows: (1, ROWS, 1)."""
    return _of_rows(tl.sum(tl.sum(x, axis=_CHUNKS_AXIS), axis=1) / C)


@triton.jit
def _keep_rows(seed, offset, rows, threshold, C: tl.constexpr, CHUNKS: tl.constexpr, WIDTH: tl.constexpr):
    """The dropout mask of a tile; see dropout.py."""
    blocks = _of_rows(offset + rows * tl.cdiv(C, 8)) + _columns(CHUNKS, WIDTH // 8)
    lanes = philox_lanes(seed, blocks)  # (CHUNKS, ROWS, WIDTH / 8, 2, 2, 2)
    return tl.reshape(lanes, (_of_rows(rows) + _columns(CHUNKS, WIDTH)).shape) >= threshold


@triton.jit(do_not_specialize=["N", "threshold"])
def _layer_norm_fwd_kernel(
    x_ptr,  # (N, C)
    x_bias_ptr,  # (C,) or None
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
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    offs_c = _columns(CHUNKS, WIDTH)
    offs, mask = _of_rows(rows * C) + offs_c, _of_rows(rows < N) & (offs_c < C)
    z = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if x_bias_ptr is not None:
        z += _load_vector(x_bias_ptr, C, CHUNKS, ROWS, WIDTH)
    if seed_ptr is not None:
        keep = _keep_rows(tl.load(seed_ptr), tl.load(offset_ptr), rows, threshold, C, CHUNKS, WIDTH)
        z = tl.where(keep, z * keep_scale, 0.0)
    if residual_ptr is not None:
        residual = tl.load(residual_ptr + offs, mask=mask, other=0.0)
        rounded = (z + residual.to(tl.float32)).to(residual.dtype)
        tl.store(new_residual_ptr + offs, rounded, mask=mask)
        z = rounded.to(tl.float32)  # what the backward will read
    mean = _row_means(z, C)  # columns beyond C are 0
    centred = tl.where(offs_c < C, z - mean, 0.0)
    rest = _row_means(centred, C)  # of a mean far from zero, which was rounded coarsely
    rstd = tl.rsqrt(_row_means(centred * centred, C) - rest * rest + eps)
    tl.store(mean_ptr + _of_rows(rows), mean + rest, mask=_of_rows(rows < N))
    tl.store(rstd_ptr + _of_rows(rows), rstd, mask=_of_rows(rows < N))
    weight = _load_vector(weight_ptr, C, CHUNKS, ROWS, WIDTH)
    bias = _load_vector(bias_ptr, C, CHUNKS, ROWS, WIDTH)
    normed = (centred - rest) * rstd
    tl.store(y_ptr + offs, normed * weight + bias, mask=mask)


@triton.jit
def _store_partial(partial_ptr, sums, offs_c, C: tl.constexpr):
    """A program's row of the partial sums (P, C), from (CHUNKS, ROWS, WIDTH)."""
    offs = tl.program_id(0) * C + offs_c  # P is a few hundred: no int64
    tl.store(partial_ptr + offs, tl.sum(sums, axis=_ROWS_AXIS, keep_dims=True), mask=offs_c < C)


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
    dweight_ptr,  # (P, C) fp32 partial sums
    dbias_ptr,  # (P, C) fp32 partial sums
    dx_bias_ptr,  # (P, C) fp32 partial sums or None
    seed_ptr,  # int64 scalar, None without dropout
    offset_ptr,  # int64 scalar, None without dropout
    N,
    threshold,
    keep_scale,  # 1 / (1 - p)
    C: tl.constexpr,
    CHUNKS: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    offs_c = _columns(CHUNKS, WIDTH)
    if seed_ptr is not None:
        seed, offset = tl.load(seed_ptr), tl.load(offset_ptr)
    shape: tl.constexpr = (offs_c + _of_rows(tl.arange(0, ROWS))).shape
    dweight = tl.zeros(shape, tl.float32)
    dbias = tl.zeros(shape, tl.float32)
    dx_bias = tl.zeros(shape, tl.float32)
    for first_row in tl.range(tl.program_id(0) * ROWS, N, tl.num_programs(0) * ROWS, num_stages=1):
        rows = first_row + tl.arange(0, ROWS).to(tl.int64)
        offs, mask = _of_rows(rows * C) + offs_c, _of_rows(rows < N) & (offs_c < C)
        # All loads first, to wait for memory once.
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        if dnew_residual_ptr is not None:
            dnew_residual = tl.load(dnew_residual_ptr + offs, mask=mask, other=0.0)
        mean = _of_rows(tl.load(mean_ptr + rows, mask=rows < N, other=0.0))
        rstd = _of_rows(tl.load(rstd_ptr + rows, mask=rows < N, other=0.0))
        weight = _load_vector(weight_ptr, C, CHUNKS, ROWS, WIDTH)  # from L1: registers are scarce
        normed = (z - mean) * rstd  # where there is no column dy is 0, and so is what is summed
        dweight += dy * normed
        dbias += dy
        g = dy * weight
        mean_g, mean_gn = _row_means(g, C), _row_means(g * normed, C)
        dz = g * rstd - (normed * (mean_gn * rstd) + mean_g * rstd)
        if dnew_residual_ptr is not None:
            dz += dnew_residual.to(tl.float32)
        tl.store(dz_ptr + offs, dz, mask=mask)
        if seed_ptr is not None:
            keep = _keep_rows(seed, offset, rows, threshold, C, CHUNKS, WIDTH)
            dz = tl.where(keep, dz * keep_scale, 0.0)
            tl.store(dx_ptr + offs, dz, mask=mask)
        if dx_bias_ptr is not None:
            dx_bias += dz  # 0 where there is no row, because rstd is
    _store_partial(dweight_ptr, dweight, offs_c, C)
    _store_partial(dbias_ptr, dbias, offs_c, C)
    if dx_bias_ptr is not None:
        _store_partial(dx_bias_ptr, dx_bias, offs_c, C)


@triton.jit
def _sum_columns(partial_ptr, out_ptr, P, C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    offs_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    sums = tl.zeros((BLOCK_P, BLOCK_C), dtype=tl.float32)
    for first in range(0, P, BLOCK_P):
        offs_p = first + tl.arange(0, BLOCK_P)
        mask = (offs_p < P)[:, None] & (offs_c < C)[None, :]
        sums += tl.load(partial_ptr + (offs_p * C)[:, None] + offs_c[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + offs_c, tl.sum(sums, axis=0), mask=offs_c < C)


@triton.jit(do_not_specialize=["P"])
def _sum_partials_kernel(
    dweight_partial_ptr,  # (P, C) fp32
    dbias_partial_ptr,  # (P, C) fp32
    dx_bias_partial_ptr,  # (P, C) fp32 or None
    dweight_ptr,  # (C,)
    dbias_ptr,  # (C,)
    dx_bias_ptr,  # (C,) or None
    P,
    C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    if tl.program_id(1) == 0:
        _sum_columns(dweight_partial_ptr, dweight_ptr, P, C, BLOCK_P, BLOCK_C)
    elif tl.program_id(1) == 1:
        _sum_columns(dbias_partial_ptr, dbias_ptr, P, C, BLOCK_P, BLOCK_C)
    elif dx_bias_ptr is not None:
        _sum_columns(dx_bias_partial_ptr, dx_bias_ptr, P, C, BLOCK_P, BLOCK_C)


def row_blocks(C: int, element_size: int) -> dict[str, int]:
    """The constants of a launch over rows of C: chosen by width and dtype alone, whatever the number of rows.

    A thread has 32 elements, in 16-byte loads of half precision; 16 where a warp would get two rows, loads
    are narrower or values wider: more would not fit into registers.
    """
    BLOCK_C = block_size(C)
    WIDTH, ROWS = max(min(BLOCK_C, 256), BLOCK_C // 4), max(1, _TILE // BLOCK_C)
    per_thread = 32 if C * element_size % 16 == 0 and element_size == 2 and BLOCK_C > 512 else 16
    num_warps = ROWS * BLOCK_C // (32 * per_thread)
    return {"C": C, "CHUNKS": BLOCK_C // WIDTH, "ROWS": ROWS, "WIDTH": WIDTH, "num_warps": num_warps}


def layer_norm_fwd(
    x: Tensor,  # (..., C)
    x_bias: Tensor | None,  # (C,)
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
    x_bias = None if x_bias is None else x_bias.contiguous()
    residual = None if residual is None else residual.contiguous()
    y = torch.empty_like(x if residual is None else residual)
    new_residual = y.new_empty(0) if residual is None else torch.empty_like(y)
    mean, rstd = (x.new_empty(x.shape[:-1], dtype=torch.float32) for _ in range(2))
    N, blocks = mean.numel(), row_blocks(x.shape[-1], x.element_size())
    if N == 0:
        return y, new_residual, mean, rstd
    with torch.cuda.device_of(x):
        _layer_norm_fwd_kernel[(triton.cdiv(N, blocks["ROWS"]),)](
            x,
            x_bias,
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
    x_bias_dtype: torch.dtype | None,  # None without x_bias
    p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Launch; (dz, dx, dweight, dbias, dx_bias).

    dx is empty unless p > 0, since an op may not return dz twice; dx_bias is empty without x_bias.
    """
    dy, z, weight = dy.contiguous(), z.contiguous(), weight.contiguous()
    dnew_residual = None if dnew_residual is None else dnew_residual.contiguous()
    N, C, blocks = mean.numel(), z.shape[-1], row_blocks(z.shape[-1], z.element_size())
    has_x_bias, x_bias_dtype = x_bias_dtype is not None, x_bias_dtype or weight.dtype
    dz = torch.empty_like(z)
    dx = torch.empty_like(z, dtype=x_dtype) if p > 0.0 else z.new_empty(0, dtype=x_dtype)
    dweight, dbias = z.new_empty(C, dtype=weight.dtype), z.new_empty(C, dtype=bias_dtype)
    dx_bias = z.new_empty(C if has_x_bias else 0, dtype=x_bias_dtype)
    if N == 0:
        return dz, dx, dweight.zero_(), dbias.zero_(), dx_bias.zero_()
    BLOCK_C = block_size(C // 64)  # of the second kernel: few columns each, to have many programs
    programs = max(1, _WARPS_PER_SM // blocks["num_warps"]) * tuning.multiprocessor_count(z.device)
    P = min(triton.cdiv(N, blocks["ROWS"]), programs)
    partial = list(z.new_empty((3 if has_x_bias else 2, P, C), dtype=torch.float32))
    partials = (*partial, *[None] * (3 - len(partial)))
    wide = z.element_size() == 4  # 8 warps fill the grid's share; Triton 3.6 would spill to fit 16
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
            *partials,
            N=N,
            **dropout_arguments(p, seed, offset),
            **blocks,
            maxnreg=255 if wide else None,
        )
        _sum_partials_kernel[(triton.cdiv(C, BLOCK_C), len(partial))](
            *partials,
            dweight,
            dbias,
            dx_bias if has_x_bias else None,
            P,
            C=C,
            BLOCK_P=8192 // BLOCK_C,
            BLOCK_C=BLOCK_C,
            num_warps=8,
        )
    return dz, dx, dweight, dbias, dx_bias


def _fwd_fake(
    x: Tensor, x_bias: Tensor | None, residual: Tensor | None, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    x_bias_dtype: torch.dtype | None,
    p: float = 0.0,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    dx = contiguous_like(z, x_dtype) if p > 0.0 else z.new_empty(0, dtype=x_dtype)
    dweight, dbias = contiguous_like(weight), contiguous_like(weight, bias_dtype)
    dx_bias = weight.new_empty(0) if x_bias_dtype is None else contiguous_like(weight, x_bias_dtype)
    return contiguous_like(z), dx, dweight, dbias, dx_bias


_fwd_op = register_op("layer_norm", layer_norm_fwd, _fwd_fake)
_bwd_op = register_op("layer_norm_bwd", layer_norm_bwd, _bwd_fake)


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (..., C)
        x_bias: Tensor | None,  # (C,)
        residual: Tensor | None,  # (..., C)
        weight: Tensor,  # (C,)
        bias: Tensor,  # (C,)
        eps: float,
        p: float,
        seed: Tensor | None,
        offset: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        y, new_residual, mean, rstd = _fwd_op(x, x_bias, residual, weight, bias, eps, p, seed, offset)
        ctx.p, ctx.has_residual = p, residual is not None
        ctx.dtypes = bias.dtype, x.dtype, None if x_bias is None else x_bias.dtype
        ctx.set_materialize_grads(False)  # the final norm's new residual is unused: no zeros to read
        z = x if residual is None else new_residual
        ctx.save_for_backward(z, weight, mean, rstd, seed, offset)
        return y, None if residual is None else new_residual

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dnew_residual: Tensor | None) -> tuple[Tensor | None, ...]:
        z, weight, mean, rstd, seed, offset = ctx.saved_tensors
        dy = torch.zeros_like(z) if dy is None else dy
        dz, dx, dweight, dbias, dx_bias = _bwd_op(
            dy, dnew_residual, z, weight, mean, rstd, *ctx.dtypes, ctx.p, seed, offset
        )
        _, x_dtype, x_bias_dtype = ctx.dtypes
        dx = dx if ctx.p > 0.0 else dz.to(x_dtype)
        dx_bias = None if x_bias_dtype is None else dx_bias
        return dx, dx_bias, dz if ctx.has_residual else None, dweight, dbias, *[None] * 4


layer_norm: Callable[..., tuple[Tensor, Tensor]] = _LayerNorm.apply
