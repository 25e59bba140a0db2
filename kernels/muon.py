"""Muon over all matrices of one shape: momentum, orthogonalisation, weight decay, update in a few launches.

Shape letters: n matrices (R, C), M = min(R, C), N = max(R, C), K chunks, T tiles along a Gram matrix.

Of a wide X the Newton-Schulz iteration is

    A = X X^T,  P = a I + b A + c A A,  X <- P X

and X <- X P with A = X^T X of a tall one. Where N >= 2 M, X is multiplied only once:

    A = X X^T first, then A <- P A P,  Q <- P Q,  at the end X <- Q X

All but X are symmetric, as polynomials in A: kernels compute the tiles on and below the diagonal and store
each twice, which halves the FLOPs; cuBLAS computes P X. Everything is bf16, sums fp32. I belongs into P: with
it P X rounds once.

The first A also bounds the largest singular value of X, by its largest row sum: no pass over X normalises it,
A and P are scaled instead. It is a sharper bound than the Frobenius norm and saves iterations.

Bytes per bf16 parameter, besides the iterations: momentum and X 2 + 8 + 2, update 2 + 8 + 2, and the gradient
once more for its norm.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgpt.kernels import tuning
from fusedgpt.kernels.common import TRITON_DTYPES, block_size
from fusedgpt.kernels.numerics import fp32_sums
from fusedgpt.kernels.reference import NEWTON_SCHULZ, SMALLEST_SQUARE, muon_scale, takes_products
from fusedgpt.kernels.tensor_table import (
    COLUMNS,
    DECAY,
    EXP_AVG,
    GRAD,
    MASTER,
    PARAM,
    ROW,
    SIZE,
    STEP_SIZE,
    WEIGHT1,
    Batch,
    load,
    load_from,
    offsets,
    store,
    store_to,
)

_BLOCK = 512  # elements at a time; 1,024 spill in Triton 3.6
_PROGRAMS_PER_SM = 16
_TILE, _TILE_K = 128, 64  # of a Gram matrix, and of the sum over the columns of X


@triton.jit
def _update_factor(norm_ptr, grad_scale_ptr, max_norm):
    """What gradients are multiplied by: clipped, unscaled; not finite if the step is to be skipped."""
    norm, grad_scale = tl.load(norm_ptr), tl.load(grad_scale_ptr)
    clip = tl.where((max_norm > 0.0) & (norm > max_norm), max_norm / norm, 1.0) / grad_scale
    return tl.where(norm < float("inf"), clip, float("nan"))


@triton.jit
def _block(
    row_ptr,  # (8,) int64: a row of the table
    scalars_ptr,  # (8,) fp32
    x_ptr,
    factor,  # of the step, or of the gradient
    first,
    size,
    UPDATE: tl.constexpr,
    DTYPE: tl.constexpr,
    X_DTYPE: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block's new momentum and its X (Nesterov), or with UPDATE its step along X.

    The master is rounded once, as by AdamW.
    """
    offs, offs_x = offsets(32, BLOCK), offsets(X_DTYPE.primitive_bitwidth, BLOCK)
    offs_own = offsets(DTYPE.primitive_bitwidth, BLOCK)  # of the parameter, or the gradient
    left = size - first
    mask = None if FULL else offs < left
    mask_x, mask_own = None if FULL else offs_x < left, None if FULL else offs_own < left
    if UPDATE:
        x = load_from(x_ptr + first, offs_x, mask_x, X_DTYPE, BLOCK)
        master = load(row_ptr + MASTER, first, offs, mask, tl.float32, BLOCK)
        step = x * (tl.load(scalars_ptr + STEP_SIZE) * factor)
        master -= master * tl.load(scalars_ptr + DECAY) + step
        store(row_ptr + MASTER, first, offs, mask, master, tl.float32, BLOCK)
        if DTYPE.primitive_bitwidth == 16:
            store(row_ptr + PARAM, first, offs_own, mask_own, master, DTYPE, BLOCK)
    else:
        grad = load(row_ptr + GRAD, first, offs_own, mask_own, DTYPE, BLOCK) * factor
        momentum = load(row_ptr + EXP_AVG, first, offs, mask, tl.float32, BLOCK)
        weight = tl.load(scalars_ptr + WEIGHT1)
        momentum += weight * (grad - momentum)
        store(row_ptr + EXP_AVG, first, offs, mask, momentum, tl.float32, BLOCK)
        x = momentum + weight * (grad - momentum)
        store_to(x_ptr + first, offs_x, mask_x, x, X_DTYPE, BLOCK)


@triton.jit(do_not_specialize=["n_chunks"])
def _muon_kernel(
    table_ptr,  # (n, 8) int64, see tensor_table.py
    chunks_ptr,  # (K, 2) int32
    scalars_ptr,  # (n, 8) fp32
    x_ptr,  # (n, R, C), written by the momentum, read by the update
    norm_ptr,  # fp32 scalar
    grad_scale_ptr,  # fp32 scalar
    n_chunks,
    max_norm,
    scale,  # of the update
    UPDATE: tl.constexpr,  # else the momentum
    DTYPE: tl.constexpr,  # of the parameters for an update, of the gradients for the momentum
    X_DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Walks all chunks, as AdamW does; nothing is done in a step to be skipped."""
    clip = _update_factor(norm_ptr, grad_scale_ptr, max_norm)
    factor = scale if UPDATE else clip
    for chunk in tl.range(tl.program_id(0), tl.where(clip == clip, n_chunks, 0), tl.num_programs(0)):
        tensor = tl.load(chunks_ptr + 2 * chunk)
        row_ptr, tensor_scalars_ptr = table_ptr + tensor * COLUMNS, scalars_ptr + tensor * COLUMNS
        start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
        size = tl.load(row_ptr + SIZE)
        matrix_ptr = x_ptr + tensor * size
        addresses = tl.load(row_ptr + PARAM) | tl.load(row_ptr + GRAD) | tl.load(row_ptr + MASTER)
        aligned = (addresses | tl.load(row_ptr + EXP_AVG) | matrix_ptr.to(tl.int64)) % 16 == 0
        for first in tl.range(start, tl.minimum(start + CHUNK, size), BLOCK):
            if aligned & (first + BLOCK <= size):
                _block(
                    row_ptr, tensor_scalars_ptr, tl.multiple_of(matrix_ptr, 16), factor, first, size,
                    UPDATE, DTYPE, X_DTYPE, True, BLOCK,
                )  # fmt: skip
            else:
                for part in tl.range(first, tl.minimum(first + BLOCK, size), ROW):
                    _block(
                        row_ptr, tensor_scalars_ptr, matrix_ptr, factor, part, size,
                        UPDATE, DTYPE, X_DTYPE, False, ROW,
                    )  # fmt: skip


@triton.jit
def _triangle(tile):
    """(i, j), i >= j, of the tiles on and below the diagonal, numbered row by row."""
    i = ((tl.sqrt(8.0 * tile + 1.0) - 1.0) * 0.5).to(tl.int32)  # exact up to 2^20 tiles
    return i, tile - i * (i + 1) // 2


@triton.jit
def _tile_of_product(x_ptr, y_ptr, stride_m, stride_n, i, j, M, N, TILE: tl.constexpr, TILE_K: tl.constexpr):
    """Tile (i, j) of X Y^T for X and Y (M, N) of the same strides, fp32."""
    offs_i, offs_j = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    offs_k = tl.arange(0, TILE_K)
    x_ptrs = x_ptr + offs_i[:, None].to(tl.int64) * stride_m + offs_k[None, :] * stride_n
    y_ptrs = y_ptr + offs_j[None, :].to(tl.int64) * stride_m + offs_k[:, None] * stride_n
    acc = tl.zeros((TILE, TILE), tl.float32)
    for k in tl.range(0, N, TILE_K):
        left = N - k
        x = tl.load(x_ptrs, mask=(offs_i[:, None] < M) & (offs_k[None, :] < left), other=0.0)
        y = tl.load(y_ptrs, mask=(offs_j[None, :] < M) & (offs_k[:, None] < left), other=0.0)
        acc = tl.dot(x, y, acc, input_precision="ieee")
        x_ptrs += TILE_K * stride_n
        y_ptrs += TILE_K * stride_n
    return acc


@triton.jit
def _store_twice(out_ptr, value, i, j, M, TILE: tl.constexpr):
    """Tile (i, j), i >= j, of a symmetric (M, M), and (j, i); on the diagonal its lower half, twice.

    Exactly symmetric: else the rounding errors of products with transposes do not commute, and add up.
    """
    offs_i, offs_j = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
    value = value.to(out_ptr.dtype.element_ty)
    lower = (offs_i[:, None] < M) & (offs_j[None, :] <= offs_i[:, None])
    tl.store(out_ptr + offs_i[:, None] * M + offs_j[None, :], value, mask=lower)
    upper = (offs_i[None, :] < M) & (offs_j[:, None] < offs_i[None, :])
    tl.store(out_ptr + offs_j[:, None] * M + offs_i[None, :], tl.trans(value), mask=upper)


@triton.jit
def _symmetric_product_kernel(
    x_ptr,  # (n, M, N), any strides
    y_ptr,  # (n, M, N), the same strides
    out_ptr,  # (n, M, M), written
    row_sums_ptr,  # (n, T, M) fp32, written if not None: of |out| along rows, a tile's columns at a time
    stride_x,
    stride_m,
    stride_n,
    M,
    N,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """X Y^T, which is symmetric."""
    i, j = _triangle(tl.program_id(0))
    matrix = tl.program_id(1).to(tl.int64)
    first = matrix * stride_x
    out = _tile_of_product(x_ptr + first, y_ptr + first, stride_m, stride_n, i, j, M, N, TILE, TILE_K)
    _store_twice(out_ptr + matrix * M * M, out, i, j, M, TILE)
    if row_sums_ptr is not None:
        row_sums_ptr += matrix * tl.cdiv(M, TILE) * M
        offs_i, offs_j = i * TILE + tl.arange(0, TILE), j * TILE + tl.arange(0, TILE)
        tl.store(row_sums_ptr + j * M + offs_i, tl.sum(tl.abs(out), axis=1), mask=offs_i < M)
        if i != j:
            tl.store(row_sums_ptr + i * M + offs_j, tl.sum(tl.abs(out), axis=0), mask=offs_j < M)


@triton.jit
def _polynomial_kernel(
    gram_ptr,  # (n, M, M)
    p_ptr,  # (n, M, M), written
    square_ptr,  # (n,) fp32 or None: P is divided by its root, because X should have been
    a,
    b,
    c,
    M,
    TILE: tl.constexpr,
    TILE_K: tl.constexpr,
):
    """P = a I + b A + c A A of symmetric A."""
    i, j = _triangle(tl.program_id(0))
    matrix = tl.program_id(1).to(tl.int64) * M * M
    gram_ptr += matrix
    product = _tile_of_product(gram_ptr, gram_ptr, M, 1, i, j, M, M, TILE, TILE_K)
    offs_i, offs_j = i * TILE + tl.arange(0, TILE)[:, None], j * TILE + tl.arange(0, TILE)[None, :]
    mask = (offs_i < M) & (offs_j < M)
    gram = tl.load(gram_ptr + offs_i * M + offs_j, mask=mask, other=0.0).to(tl.float32)
    p = tl.where(offs_i == offs_j, a, 0.0) + b * gram + c * product
    if square_ptr is not None:
        p /= tl.sqrt(tl.load(square_ptr + tl.program_id(1)))
    _store_twice(p_ptr + matrix, p, i, j, M, TILE)


class _Iteration:
    """The launches on matrices (n, M, M) of one shape and dtype."""

    def __init__(self, x: Tensor) -> None:
        self.x, (self.n, *shape) = x, x.shape
        self.tall, self.M = shape[0] > shape[1], min(shape)
        tile = min(_TILE, block_size(self.M))
        self.tiles = triton.cdiv(self.M, tile)
        self.grid = (self.tiles * (self.tiles + 1) // 2, self.n)
        # On 10.0 8 warps spill in Triton 3.6, 3 stages in 3.8.
        warps, stages = (16, 2) if tuning.capability(x.device) >= (10, 0) else (8, 3)
        self.options = {"TILE": tile, "TILE_K": min(_TILE_K, tile), "num_warps": warps, "num_stages": stages}

    def product(self, x: Tensor, y: Tensor, row_sums: Tensor | None = None) -> Tensor:
        """X Y^T of x and y (n, M, N), where it is symmetric."""
        out = self.x.new_empty(self.n, self.M, self.M)
        _symmetric_product_kernel[self.grid](
            x, y, out, row_sums, *x.stride(), self.M, x.shape[2], **self.options
        )
        return out

    def gram(self, row_sums: Tensor | None = None) -> Tensor:
        """X X^T, or X^T X where that is smaller."""
        x = self.x.mT if self.tall else self.x
        return self.product(x, x, row_sums)

    def bounded_gram(self) -> tuple[Tensor, Tensor]:
        """(A / s, s), s (n,) fp32: no singular value of X is larger than its root."""
        row_sums = torch.empty(self.n, self.tiles, self.M, dtype=torch.float32, device=self.x.device)
        gram = self.gram(row_sums)
        square = row_sums.sum(1).amax(1).clamp_(min=SMALLEST_SQUARE)
        return gram.div_(square[:, None, None]), square

    def polynomial(self, gram: Tensor, coefficients: tuple[float, ...], square: Tensor | None) -> Tensor:
        """P (n, M, M), divided by the root of `square` (n,) if given."""
        p = torch.empty_like(gram)
        _polynomial_kernel[self.grid](gram, p, square, *coefficients, self.M, **self.options)
        return p

    def multiply(self, p: Tensor) -> None:
        """X <- P X, or X P."""
        self.x = torch.bmm(self.x, p) if self.tall else torch.bmm(p, self.x)


def orthogonalise(x: Tensor) -> Tensor:
    """x (n, R, C) with singular values near 1, bf16, fp16 or fp32; see reference.orthogonalise."""
    iteration = _Iteration(x)
    with torch.cuda.device_of(x), fp32_sums():
        gram, square = iteration.bounded_gram()
        if takes_products(iteration.M, max(x.shape[1:])):
            product = None
            for i, coefficients in enumerate(NEWTON_SCHULZ):
                p = iteration.polynomial(gram, coefficients, None)
                product = p if product is None else iteration.product(p, product)
                if i < len(NEWTON_SCHULZ) - 1:
                    gram = iteration.product(iteration.product(p, gram), p)
            assert product is not None
            iteration.multiply(product.div_(square.sqrt()[:, None, None]))
        else:
            for i, coefficients in enumerate(NEWTON_SCHULZ):
                gram = iteration.gram() if i else gram
                iteration.multiply(iteration.polynomial(gram, coefficients, None if i else square))
    return iteration.x


def hyper_row(lr: float, momentum: float, weight_decay: float) -> list[float]:
    """A parameter group's row of adamw.grad_norm's hyper, lr first."""
    return [lr, -math.inf, -math.inf, 1.0 - momentum, 0.0, 0.0, weight_decay, 0.0]


def muon(
    batch: Batch,
    shape: tuple[int, int],
    norm: Tensor,
    *,
    max_norm: float = 0.0,
    grad_scale: Tensor | None = None,
    dtype: torch.dtype = torch.bfloat16,
    orthogonalised: Callable[[Tensor], Tensor] = orthogonalise,
    scale: float | None = None,
) -> None:
    """One Muon step, after adamw.grad_norm on the same batch: its matrices all have this shape (R, C).

    The batch's exp_avgs hold the momentum, its exp_avg_sqs count for nothing. norm: fp32 scalar, that of all
    gradients, as adamw.adamw writes it: where it is not finite, all stays as it is. max_norm and grad_scale
    are adamw.adamw's; dtype: that of the iteration; orthogonalised and scale: reference.muon's.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    x = torch.empty(len(batch.table), *shape, dtype=dtype, device=norm.device)
    walk = partial(
        batch.launch,
        _muon_kernel,
        _PROGRAMS_PER_SM,
        norm_ptr=norm,
        grad_scale_ptr=torch.ones_like(norm) if grad_scale is None else grad_scale,
        max_norm=float(max_norm),
        scale=muon_scale(*shape) if scale is None else scale,
        X_DTYPE=TRITON_DTYPES[dtype],
        BLOCK=_BLOCK,
        num_warps=_BLOCK // 256,
    )
    walk(x_ptr=x, UPDATE=False, DTYPE=TRITON_DTYPES[batch.grad_dtype])
    walk(x_ptr=orthogonalised(x), UPDATE=True, DTYPE=TRITON_DTYPES[batch.param_dtype])
