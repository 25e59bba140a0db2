"""Causal self-attention in tiles: the weights (T, T) never exist in memory.

Shape letters: B batch, T tokens, H heads, D head size (BLOCK_D: the next power of two); m rows are queries,
n columns are keys.

Forward (FlashAttention-2's order of work): one program owns BLOCK_M queries of one head and walks the keys,
first the tiles left of the diagonal, which need no mask, then those on it. Row maximum m, sum l and the
output stay in fp32; scale * log2(e) is applied after the dot product, and one division ends it all. What is
kept for the backward is lse = m + log2(l), one fp32 a row, in log2 units: the weights are exp2(s - lse).

Backward, with dO given, keep the dropout mask / (1 - p) and s the scaled scores:
    delta = rowsum(dO * O)     P = exp2(s - lse)      dP = keep * (dO V^T)     dS = P * (dP - delta)
    dV = (keep * P)^T dO       dK = scale * dS^T Q    dQ = scale * dS K
One kernel owns a tile of keys and sums dK, dV over the queries below it, another owns a tile of queries and
sums dQ: 7 matrix products where atomics would need 5, but the same bits every time.

Sources: Dao 2023, "FlashAttention-2" (arXiv 2307.08691); Milakov and Gimelshein 2018 for the running softmax.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedgpt.kernels import tuning
from fusedgpt.kernels.dropout import keep_threshold, philox_lanes
from fusedgpt.kernels.tuning import Tile

_DELTA = Tile(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1)  # bytes decide there
_LOG2_E = tl.constexpr(math.log2(math.e))
_MASKED = tl.constexpr(-1.0e30)  # finite: what a row sums up before its first visible key is then scaled to 0


@triton.jit
def _tile_ptrs(x_ptr, strides, at, T, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers (BLOCK, BLOCK_D) to rows start .. of one head, at = (b, start, h), and which of them exist."""
    b, start, h = at
    offs_t, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    x_ptr += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2]
    x_ptr += tl.cast(start, tl.int64) * strides[1]
    mask = (offs_t < T - start)[:, None]
    if D != BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    return x_ptr + offs_t[:, None] * strides[1] + offs_d[None, :] * strides[3], mask


@triton.jit
def _load_tile(
    x,  # (B, T, H, D), a pointer with strides, or a descriptor with strides None
    strides,
    at,
    T,
    D: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """(BLOCK, BLOCK_D), zeros beyond T and D."""
    if strides is None:
        tile = x.load([at[0], at[2], at[1], 0]).reshape(BLOCK, BLOCK_D)
    else:
        ptrs, mask = _tile_ptrs(x, strides, at, T, D, BLOCK, BLOCK_D)
        tile = tl.load(ptrs, mask=mask, other=0.0)
    return tile


@triton.jit
def _store_tile(x_ptr, strides, at, tile, T, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    ptrs, mask = _tile_ptrs(x_ptr, strides, at, T, D, BLOCK, BLOCK_D)
    tl.store(ptrs, tile.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keep_tile(dropout, bh, start_m, start_n, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The dropout mask (BLOCK_M, BLOCK_N) of one tile of weights: reference.attention_dropout_mask.

    A Philox block serves keys 8 apart: those are what one thread holds of a tensor-core accumulator, so that
    the mask can be made in the registers where it is used.
    """
    seed, offset, threshold, _ = dropout
    rows = tl.cast(bh, tl.int64) * T + start_m + tl.arange(0, BLOCK_M)
    row_blocks = offset + rows * (tl.cdiv(T, 64) * 8)
    if BLOCK_N % 64 == 0:
        blocks = row_blocks[:, None] + start_n // 8 + tl.arange(0, BLOCK_N // 8)[None, :]
        lanes = tl.reshape(philox_lanes(seed, blocks), (BLOCK_M, BLOCK_N // 64, 8, 8)).permute(0, 1, 3, 2)
        lanes = tl.reshape(lanes, (BLOCK_M, BLOCK_N))
    else:  # the small tiles of fp32: each key draws its block for itself
        offs_n = (start_n + tl.arange(0, BLOCK_N))[None, :]
        r0, r1, r2, r3 = tl.randint4x(seed, row_blocks[:, None] + offs_n // 64 * 8 + offs_n % 8, n_rounds=7)
        lane = offs_n // 8 % 8
        word = tl.where(lane < 4, tl.where(lane < 2, r0, r1), tl.where(lane < 6, r2, r3))
        word = word.to(tl.uint32, bitcast=True) ^ 0x80000000
        lanes = (word >> (lane % 2 * 16).to(tl.uint32)).to(tl.int16)
    return lanes >= threshold


@triton.jit  # noqa: RET503  # Triton 3.6 does not compile a `return None`
def _load_dropout(seed_ptr, offset_ptr, threshold, keep_scale):
    """(seed, offset, threshold, 1 / (1 - p)), or None where there is no dropout."""
    if seed_ptr is not None:
        return tl.load(seed_ptr), tl.load(offset_ptr), threshold, keep_scale


@triton.jit  # noqa: RET503
def _load_ids(ids_ptr, b, offs, T):
    """The document ids of tokens `offs`; None without documents."""
    if ids_ptr is not None:
        return tl.load(ids_ptr + tl.cast(b, tl.int64) * T + tl.minimum(offs, T - 1))


@triton.jit
def _visible(offs_m, offs_n, ids_m, ids_n):
    """Which keys the queries may see: (BLOCK_M, BLOCK_N)."""
    visible = offs_m[:, None] >= offs_n[None, :]
    if ids_m is not None:
        visible = visible & (ids_m[:, None] == ids_n[None, :])
    return visible


@triton.jit
def _overlap(ranges_ptr, ids, b, T, LAST: tl.constexpr):
    """The first (or last) token of all 64-token blocks whose range of ids meets that of `ids`.

    ranges_ptr: (2, B, ceil(T / 64)), smallest and largest id; B is the grid's.
    """
    n_blocks = tl.cdiv(T, 64)
    low, high = tl.min(ids, 0), tl.max(ids, 0)
    found = 0 if LAST else n_blocks
    for start in range(0, n_blocks, 128):
        offs = start + tl.arange(0, 128)
        exists = offs < n_blocks
        lo = tl.load(ranges_ptr + 2 * (b * n_blocks + offs), mask=exists)
        hi = tl.load(ranges_ptr + 2 * (b * n_blocks + offs) + 1, mask=exists)
        meets = exists & (lo <= high) & (hi >= low)
        if LAST:
            found = tl.maximum(found, tl.max(tl.where(meets, offs, 0), 0))
        else:
            found = tl.minimum(found, tl.min(tl.where(meets, offs, n_blocks), 0))
    return found * 64 + 63 if LAST else found * 64


@triton.jit
def _attend(
    state,  # acc (BLOCK_M, BLOCK_D), row maximum (BLOCK_M,) in log2 units, row sum (BLOCK_M,), all fp32
    begin,
    end,
    q_tile,  # (BLOCK_M, BLOCK_D)
    kv,  # k, k_strides, v, v_strides
    at,  # b, h, start_m, index of the head in (B, H)
    T,
    qk_scale,
    ids_ptr,
    dropout,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
):
    """The keys begin .. end added to the running softmax of one tile of queries."""
    BLOCK_M: tl.constexpr = q_tile.shape[0]
    BLOCK_D: tl.constexpr = q_tile.shape[1]
    k, k_strides, v, v_strides = kv
    b, h, start_m, bh = at
    acc, row_max, row_sum = state
    offs_m = start_m + tl.arange(0, BLOCK_M)
    ids_m = _load_ids(ids_ptr, b, offs_m, T)
    for start_n in range(begin, end, BLOCK_N):
        k_tile = _load_tile(k, k_strides, (b, start_n, h), T, D, BLOCK_N, BLOCK_D)
        s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        if MASK:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            visible = _visible(offs_m, offs_n, ids_m, _load_ids(ids_ptr, b, offs_n, T))
            s = tl.where(visible, s * qk_scale, _MASKED)
            new_max = tl.maximum(row_max, tl.max(s, 1))
            p = tl.exp2(s - new_max[:, None])
        else:  # scale and subtract in one instruction
            new_max = tl.maximum(row_max, tl.max(s, 1) * qk_scale)
            p = tl.exp2(s * qk_scale - new_max[:, None])
        alpha = tl.exp2(row_max - new_max)
        row_sum = row_sum * alpha + tl.sum(p, 1)
        if dropout is not None:
            keep = _keep_tile(dropout, bh, start_m, start_n, T, BLOCK_M, BLOCK_N)
            p = tl.where(keep, p, 0.0)  # the scale waits for the end
        v_tile = _load_tile(v, v_strides, (b, start_n, h), T, D, BLOCK_N, BLOCK_D)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
        row_max = new_max
    return acc, row_max, row_sum


@triton.jit
def _attention_fwd_kernel(
    q,  # (B, T, H, D), a pointer with strides, or a descriptor with strides None; the same for k and v
    k,
    v,
    q_strides,
    k_strides,
    v_strides,
    out_ptr,  # (B, T, H, D)
    out_strides,
    lse_ptr,  # (B, H, T) fp32
    ids_ptr,  # (B, T) document ids, or None
    ranges_ptr,  # (B, ceil(T / 64), 2) smallest and largest id, or None
    seed_ptr,  # int64 scalar, or None: no dropout
    offset_ptr,  # int64 scalar, or None
    threshold,
    keep_scale,  # 1 / (1 - p)
    H,
    T,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    qk_scale = scale * _LOG2_E
    n_tiles = tl.cdiv(T, BLOCK_M)
    bh = tl.program_id(0) // n_tiles
    b, h = bh // H, bh % H
    start_m = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M  # the longest rows first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    end = tl.minimum(start_m + BLOCK_M, T)
    dropout = _load_dropout(seed_ptr, offset_ptr, threshold, keep_scale)
    q_tile = _load_tile(q, q_strides, (b, start_m, h), T, D, BLOCK_M, BLOCK_D)
    kv, at = (k, k_strides, v, v_strides), (b, h, start_m, bh)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    state = (acc, tl.full((BLOCK_M,), _MASKED, tl.float32), tl.zeros((BLOCK_M,), tl.float32))
    if ids_ptr is None:
        diagonal = start_m // BLOCK_N * BLOCK_N
        state = _attend(state, 0, diagonal, q_tile, kv, at, T, qk_scale, None, dropout, D, BLOCK_N, False)
        state = _attend(state, diagonal, end, q_tile, kv, at, T, qk_scale, None, dropout, D, BLOCK_N, True)
    else:
        begin = _overlap(ranges_ptr, _load_ids(ids_ptr, b, offs_m, T), b, T, False) // BLOCK_N * BLOCK_N
        state = _attend(state, begin, end, q_tile, kv, at, T, qk_scale, ids_ptr, dropout, D, BLOCK_N, True)
    acc, row_max, row_sum = state
    out = acc / row_sum[:, None]
    if dropout is not None:
        out = out * keep_scale
    _store_tile(out_ptr, out_strides, (b, start_m, h), out, T, D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + tl.cast(bh, tl.int64) * T + offs_m, row_max + tl.log2(row_sum), mask=offs_m < T)


@triton.jit
def _attention_delta_kernel(
    out_ptr,  # (B, T, H, D)
    dout_ptr,  # (B, T, H, D)
    out_strides,
    dout_strides,
    delta_ptr,  # (B, H, T) fp32
    H,
    T,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    n_tiles = tl.cdiv(T, BLOCK_M)
    bh = tl.program_id(0) // n_tiles
    at = (bh // H, tl.program_id(0) % n_tiles * BLOCK_M, bh % H)
    offs_m = at[1] + tl.arange(0, BLOCK_M)
    out = _load_tile(out_ptr, out_strides, at, T, D, BLOCK_M, BLOCK_D).to(tl.float32)
    dout = _load_tile(dout_ptr, dout_strides, at, T, D, BLOCK_M, BLOCK_D).to(tl.float32)
    tl.store(delta_ptr + tl.cast(bh, tl.int64) * T + offs_m, tl.sum(out * dout, 1), mask=offs_m < T)


@triton.jit
def _sum_dkdv(
    sums,  # dk, dv (BLOCK_N, BLOCK_D) fp32
    begin,
    end,
    k_tile,  # (BLOCK_N, BLOCK_D)
    v_tile,  # (BLOCK_N, BLOCK_D)
    rows,  # q, q_strides, dout, dout_strides, lse_ptr, delta_ptr, the last two of this head
    at,  # b, h, start_n, index of the head in (B, H)
    T,
    qk_scale,
    ids_ptr,
    dropout,
    D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    MASK: tl.constexpr,
):
    """The queries begin .. end added to dK and dV of one tile of keys; tiles are (BLOCK_N, BLOCK_M)."""
    BLOCK_N: tl.constexpr = k_tile.shape[0]
    BLOCK_D: tl.constexpr = k_tile.shape[1]
    q, q_strides, dout, dout_strides, lse_ptr, delta_ptr = rows
    b, h, start_n, bh = at
    dk, dv = sums
    offs_n = start_n + tl.arange(0, BLOCK_N)
    ids_n = _load_ids(ids_ptr, b, offs_n, T)
    for start_m in range(begin, end, BLOCK_M):
        offs_m = start_m + tl.arange(0, BLOCK_M)
        q_tile = _load_tile(q, q_strides, (b, start_m, h), T, D, BLOCK_M, BLOCK_D)
        lse = tl.load(lse_ptr + offs_m, mask=offs_m < T, other=float("inf"))  # rows beyond T weigh 0
        p = tl.exp2(tl.dot(k_tile, q_tile.T, input_precision="ieee") * qk_scale - lse[None, :])
        if MASK:
            ids_m = _load_ids(ids_ptr, b, offs_m, T)
            p = tl.where(tl.trans(_visible(offs_m, offs_n, ids_m, ids_n)), p, 0.0)
        dout_tile = _load_tile(dout, dout_strides, (b, start_m, h), T, D, BLOCK_M, BLOCK_D)
        kept = p
        if dropout is not None:
            keep = tl.trans(_keep_tile(dropout, bh, start_m, start_n, T, BLOCK_M, BLOCK_N))
            kept = tl.where(keep, p, 0.0)
        dv = tl.dot(kept.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
        dp = tl.dot(v_tile, dout_tile.T, input_precision="ieee")
        if dropout is not None:
            dp = tl.where(keep, dp * dropout[3], 0.0)
        delta = tl.load(delta_ptr + offs_m, mask=offs_m < T, other=0.0)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    return dk, dv


@triton.jit
def _attention_dkdv_kernel(
    q,  # as in the forward
    k,
    v,
    q_strides,
    k_strides,
    v_strides,
    dout,  # as q
    dout_strides,
    lse_ptr,  # (B, H, T) fp32
    delta_ptr,  # (B, H, T) fp32
    dk_ptr,  # (B, T, H, D)
    dv_ptr,  # (B, T, H, D)
    dk_strides,
    dv_strides,
    ids_ptr,
    ranges_ptr,
    seed_ptr,
    offset_ptr,
    threshold,
    keep_scale,
    H,
    T,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    qk_scale = scale * _LOG2_E
    n_tiles = tl.cdiv(T, BLOCK_N)
    bh = tl.program_id(0) // n_tiles
    b, h = bh // H, bh % H
    start_n = tl.program_id(0) % n_tiles * BLOCK_N  # the most queries first
    dropout = _load_dropout(seed_ptr, offset_ptr, threshold, keep_scale)
    k_tile = _load_tile(k, k_strides, (b, start_n, h), T, D, BLOCK_N, BLOCK_D)
    v_tile = _load_tile(v, v_strides, (b, start_n, h), T, D, BLOCK_N, BLOCK_D)
    row = tl.cast(bh, tl.int64) * T
    rows, at = (q, q_strides, dout, dout_strides, lse_ptr + row, delta_ptr + row), (b, h, start_n, bh)
    sums = (tl.zeros((BLOCK_N, BLOCK_D), tl.float32), tl.zeros((BLOCK_N, BLOCK_D), tl.float32))
    begin = start_n // BLOCK_M * BLOCK_M
    if ids_ptr is None:
        below = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, T)
        sums = _sum_dkdv(
            sums, begin, below, k_tile, v_tile, rows, at, T, qk_scale, None, dropout, D, BLOCK_M, True
        )
        sums = _sum_dkdv(
            sums, below, T, k_tile, v_tile, rows, at, T, qk_scale, None, dropout, D, BLOCK_M, False
        )
    else:
        ids_n = _load_ids(ids_ptr, b, start_n + tl.arange(0, BLOCK_N), T)
        end = tl.minimum(_overlap(ranges_ptr, ids_n, b, T, True) + 1, T)
        sums = _sum_dkdv(
            sums, begin, end, k_tile, v_tile, rows, at, T, qk_scale, ids_ptr, dropout, D, BLOCK_M, True
        )
    dk, dv = sums
    if dropout is not None:
        dv = dv * keep_scale
    _store_tile(dk_ptr, dk_strides, (b, start_n, h), dk * scale, T, D, BLOCK_N, BLOCK_D)
    _store_tile(dv_ptr, dv_strides, (b, start_n, h), dv, T, D, BLOCK_N, BLOCK_D)


@triton.jit
def _sum_dq(
    dq,  # (BLOCK_M, BLOCK_D) fp32
    begin,
    end,
    q_tile,  # (BLOCK_M, BLOCK_D)
    dout_tile,  # (BLOCK_M, BLOCK_D)
    rows,  # lse, delta (BLOCK_M,)
    kv,  # k, k_strides, v, v_strides
    at,  # b, h, start_m, index of the head in (B, H)
    T,
    qk_scale,
    ids_ptr,
    dropout,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASK: tl.constexpr,
):
    """The keys begin .. end added to dQ of one tile of queries; tiles are (BLOCK_M, BLOCK_N)."""
    BLOCK_M: tl.constexpr = q_tile.shape[0]
    BLOCK_D: tl.constexpr = q_tile.shape[1]
    lse, delta = rows
    k, k_strides, v, v_strides = kv
    b, h, start_m, bh = at
    offs_m = start_m + tl.arange(0, BLOCK_M)
    ids_m = _load_ids(ids_ptr, b, offs_m, T)
    for start_n in range(begin, end, BLOCK_N):
        k_tile = _load_tile(k, k_strides, (b, start_n, h), T, D, BLOCK_N, BLOCK_D)
        p = tl.exp2(tl.dot(q_tile, k_tile.T, input_precision="ieee") * qk_scale - lse[:, None])
        if MASK:
            offs_n = start_n + tl.arange(0, BLOCK_N)
            visible = _visible(offs_m, offs_n, ids_m, _load_ids(ids_ptr, b, offs_n, T))
            p = tl.where(visible, p, 0.0)
        v_tile = _load_tile(v, v_strides, (b, start_n, h), T, D, BLOCK_N, BLOCK_D)
        dp = tl.dot(dout_tile, v_tile.T, input_precision="ieee")
        if dropout is not None:
            keep = _keep_tile(dropout, bh, start_m, start_n, T, BLOCK_M, BLOCK_N)
            dp = tl.where(keep, dp * dropout[3], 0.0)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    return dq


@triton.jit
def _attention_dq_kernel(
    q,  # as in the forward
    k,
    v,
    q_strides,
    k_strides,
    v_strides,
    dout,  # as q
    dout_strides,
    lse_ptr,  # (B, H, T) fp32
    delta_ptr,  # (B, H, T) fp32
    dq_ptr,  # (B, T, H, D)
    dq_strides,
    ids_ptr,
    ranges_ptr,
    seed_ptr,
    offset_ptr,
    threshold,
    keep_scale,
    H,
    T,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    qk_scale = scale * _LOG2_E
    n_tiles = tl.cdiv(T, BLOCK_M)
    bh = tl.program_id(0) // n_tiles
    b, h = bh // H, bh % H
    start_m = (n_tiles - 1 - tl.program_id(0) % n_tiles) * BLOCK_M  # the longest rows first
    offs_m = start_m + tl.arange(0, BLOCK_M)
    end = tl.minimum(start_m + BLOCK_M, T)
    dropout = _load_dropout(seed_ptr, offset_ptr, threshold, keep_scale)
    q_tile = _load_tile(q, q_strides, (b, start_m, h), T, D, BLOCK_M, BLOCK_D)
    dout_tile = _load_tile(dout, dout_strides, (b, start_m, h), T, D, BLOCK_M, BLOCK_D)
    row_ptrs = tl.cast(bh, tl.int64) * T + offs_m
    lse = tl.load(lse_ptr + row_ptrs, mask=offs_m < T, other=float("inf"))
    rows = (lse, tl.load(delta_ptr + row_ptrs, mask=offs_m < T, other=0.0))
    kv, at = (k, k_strides, v, v_strides), (b, h, start_m, bh)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    if ids_ptr is None:
        diagonal = start_m // BLOCK_N * BLOCK_N
        dq = _sum_dq(
            dq, 0, diagonal, q_tile, dout_tile, rows, kv, at, T, qk_scale, None, dropout, D, BLOCK_N, False
        )
        dq = _sum_dq(
            dq, diagonal, end, q_tile, dout_tile, rows, kv, at, T, qk_scale, None, dropout, D, BLOCK_N, True
        )
    else:
        begin = _overlap(ranges_ptr, _load_ids(ids_ptr, b, offs_m, T), b, T, False) // BLOCK_N * BLOCK_N
        dq = _sum_dq(
            dq, begin, end, q_tile, dout_tile, rows, kv, at, T, qk_scale, ids_ptr, dropout, D, BLOCK_N, True
        )
    _store_tile(dq_ptr, dq_strides, (b, start_m, h), dq * scale, T, D, BLOCK_M, BLOCK_D)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What an attention is asked for besides its tensors."""

    scale: float
    dropout_p: float = 0.0
    seed: Tensor | None = None  # int64 scalar
    offset: Tensor | None = None  # int64 scalar
    documents: Tensor | None = None  # (B, T) int

    @property
    def feature(self) -> str:
        """What decides on the block sizes."""
        return "dropout" if self.dropout_p > 0.0 else "plain" if self.documents is None else "documents"

    def arguments(self) -> dict[str, Any]:
        """The kernels' arguments for documents and dropout."""
        dropping = self.dropout_p > 0.0
        return {
            "ids_ptr": None if self.documents is None else self.documents.contiguous(),
            "ranges_ptr": None if self.documents is None else document_ranges(self.documents),
            "seed_ptr": self.seed if dropping else None,
            "offset_ptr": self.offset if dropping else None,
            "threshold": keep_threshold(self.dropout_p),
            "keep_scale": 1.0 / (1.0 - self.dropout_p),
            "scale": self.scale,
        }


def document_ranges(documents: Tensor) -> Tensor:
    """(B, ceil(T / 64), 2): the smallest and the largest id of every 64 tokens."""
    T = documents.shape[1]
    at = torch.arange((T + 63) // 64 * 64, device=documents.device).clamp(max=T - 1)
    return torch.stack(documents[:, at].view(len(documents), -1, 64).aminmax(dim=2), dim=-1)


def _sources(tile: Tile, *tensors: tuple[Tensor, int]) -> tuple[list[Any], list[Any]]:
    """(what to read from, strides) for each (tensor, rows of its tiles)."""
    if not tile.descriptors:
        return [x for x, _ in tensors], [x.stride() for x, _ in tensors]
    BLOCK_D = _padded(tensors[0][0].shape[3])
    described = []
    for x, rows in tensors:
        x = x.transpose(1, 2)  # (B, H, T, D): only then do tiles stay in shared memory as operands
        described.append(TensorDescriptor(x, x.shape, x.stride(), [1, 1, rows, BLOCK_D]))
    return described, [None] * len(tensors)


def _describable(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can address them all: 16-byte steps, contiguous along D."""

    def fits(x: Tensor) -> bool:
        steps = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        return steps and x.stride(3) == 1 and x.data_ptr() % 16 == 0

    return all(fits(x) for x in tensors)


def _padded(D: int) -> int:
    return max(16, int(triton.next_power_of_2(D)))  # 16: the least a tensor core takes


def _launch(kernel: Any, tile: Tile, rows_per_program: int, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """One program for each tile of rows of each head of x (B, T, H, D)."""
    B, T, H, D = x.shape
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(T, rows_per_program) * B * H,)](
            *args,
            **kwargs,
            H=H,
            T=T,
            D=D,
            BLOCK_D=_padded(D),
            num_warps=tile.num_warps,
            num_stages=tile.num_stages,
        )


def attention_fwd(q: Tensor, k: Tensor, v: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D), lse (B, H, T) in log2 units) of q, k, v (B, T, H, D) with any strides."""
    B, T, H, D = q.shape
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if out.numel():
        tile = tuning.attention("fwd", q, feature=options.feature, describable=_describable(q, k, v))
        sources, strides = _sources(tile, (q, tile.BLOCK_M), (k, tile.BLOCK_N), (v, tile.BLOCK_N))
        _launch(
            _attention_fwd_kernel,
            tile,
            tile.BLOCK_M,
            q,
            *sources,
            *strides,
            out,
            out.stride(),
            lse,
            **options.arguments(),
            BLOCK_M=tile.BLOCK_M,
            BLOCK_N=tile.BLOCK_N,
        )
    return out, lse


def attention_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, options: Options
) -> Tensor:
    """dq, dk, dv as one tensor (B, T, 3, H, D): the gradient of a fused qkv projection as it stands."""
    B, T, H, D = q.shape
    dqkv = torch.empty(B, T, 3, H, D, dtype=q.dtype, device=q.device)
    if dqkv.numel() == 0:
        return dqkv
    dq, dk, dv = dqkv.unbind(2)
    delta = torch.empty_like(lse)
    BLOCK_M = _DELTA.BLOCK_M
    _launch(
        _attention_delta_kernel,
        _DELTA,
        BLOCK_M,
        q,
        out,
        dout,
        out.stride(),
        dout.stride(),
        delta,
        BLOCK_M=BLOCK_M,
    )
    describable = _describable(q, k, v, dout)
    arguments = options.arguments()
    for name, kernel, outputs in (
        ("dkdv", _attention_dkdv_kernel, (dk, dv)),
        ("dq", _attention_dq_kernel, (dq,)),
    ):
        tile = tuning.attention(name, q, feature=options.feature, describable=describable)
        M, N = tile.BLOCK_M, tile.BLOCK_N
        sources, strides = _sources(tile, (q, M), (k, N), (v, N), (dout, M))
        _launch(
            kernel,
            tile,
            N if name == "dkdv" else M,
            q,
            *sources[:3],
            *strides[:3],
            sources[3],
            strides[3],
            lse,
            delta,
            *outputs,
            *(x.stride() for x in outputs),
            **arguments,
            BLOCK_M=M,
            BLOCK_N=N,
        )
    return dqkv


@torch.library.custom_op("fusedgpt::attention", mutates_args=())
def attention(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, H, D)
    v: Tensor,  # (B, T, H, D)
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    offset: Tensor | None,
    documents: Tensor | None,  # (B, T) int
) -> tuple[Tensor, Tensor]:
    """The Triton path of ops.attention: (out (B, T, H, D), lse (B, H, T))."""
    return attention_fwd(q, k, v, _options(scale, dropout_p, seed, offset, documents))


@torch.library.custom_op("fusedgpt::qkv_attention", mutates_args=())
def qkv_attention(
    qkv: Tensor,  # (B, T, 3, H, D)
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    offset: Tensor | None,
    documents: Tensor | None,  # (B, T) int
) -> tuple[Tensor, Tensor]:
    """The same on the fused projection, whose gradient is then one tensor."""
    q, k, v = qkv.unbind(2)
    return attention_fwd(q, k, v, _options(scale, dropout_p, seed, offset, documents))


@torch.library.custom_op("fusedgpt::attention_bwd", mutates_args=())
def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    offset: Tensor | None,
    documents: Tensor | None,
) -> Tensor:
    """The gradients of q, k, v side by side: (B, T, 3, H, D)."""
    return attention_bwd(dout, q, k, v, out, lse, _options(scale, dropout_p, seed, offset, documents))


def _options(
    scale: float, dropout_p: float, seed: Tensor | None, offset: Tensor | None, documents: Tensor | None
) -> Options:
    return Options(scale=scale, dropout_p=dropout_p, seed=seed, offset=offset, documents=documents)


@attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)


@qkv_attention.register_fake
def _(qkv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, T, _three, H, D = qkv.shape
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=torch.float32)


@attention_backward.register_fake
def _(dout: Tensor, q: Tensor, *_: object) -> Tensor:
    B, T, H, D = q.shape
    return q.new_empty(B, T, 3, H, D)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *projections, ctx.scale, ctx.dropout_p, seed, offset, documents = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(seed, offset, documents, *output, *projections)


def _gradient(ctx: Any, dout: Tensor, fused: bool) -> Tensor:
    seed, offset, documents, out, lse, *projections = ctx.saved_tensors  # once: a checkpoint allows no more
    q, k, v = projections[0].unbind(2) if fused else projections
    dqkv: Tensor = attention_backward(
        dout, q, k, v, out, lse, ctx.scale, ctx.dropout_p, seed, offset, documents
    )
    return dqkv


def _bwd(ctx: Any, dout: Tensor, dlse: None) -> tuple[Tensor | None, ...]:
    return *_gradient(ctx, dout, fused=False).unbind(2), *[None] * 5


def _qkv_bwd(ctx: Any, dout: Tensor, dlse: None) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, dout, fused=True), *[None] * 5


attention.register_autograd(_bwd, setup_context=_save)
qkv_attention.register_autograd(_qkv_bwd, setup_context=_save)
