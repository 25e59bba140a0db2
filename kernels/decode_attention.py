"""Attention of one new token against a key-value cache, split over the sequence.

Shape letters: B batch, T rows the cache can hold, H heads, D head size (BLOCK_D: the next power of two),
S splits of R rows.

Cache layout: keys and values (B, T, H, D) each, row t holding token t; a new token appends one contiguous row
of H * D numbers. Row t of sequence b is used if t < lengths[b]; the rows beyond are never read.

A query is only a few kilobytes of work: few sequences and heads would leave most of the GPU idle. So the rows
of one head are split among S programs, each with its own softmax, and a second, tiny kernel combines them:
out = sum_s w_s out_s / sum_s w_s with w_s = exp2(lse_s - max lse). R depends on the cache's capacity alone.
Not on lengths: the host never waits for the device, and a CUDA graph stays valid as the cache fills. Not on
the batch either: a sequence gives the same bits in any batch. One sequence of GPT-2 (12 heads, 1,024 rows)
is 96 programs, 32 are 3,072.

Sources: Dao et al. 2023, "Flash-Decoding for long-context inference"; He et al. 2025, "Defeating
nondeterminism in LLM inference", for fixed sizes of splits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgpt.kernels.common import LOG2_E, LOWEST, block_size

_BLOCK_N, _BLOCK = 64, 4096  # cache rows that a program reads at once, at most, and elements
_ROWS, _MAX_SPLITS = 128, 64  # rows of a split, until a cache has too many splits for one program to combine


@triton.jit
def _decode_attention_kernel(
    q_ptr,  # (B, H, D)
    k_ptr,  # (B, T, H, D)
    v_ptr,  # (B, T, H, D)
    lengths_ptr,  # (B,) int
    q_strides,
    k_strides,
    v_strides,
    out_ptr,  # (S, B, H, D)
    lse_ptr,  # (S, B, H) fp32, log2 units
    H,
    T,
    R,
    qk_scale,  # scale * log2(e)
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    bh, split = tl.program_id(0), tl.program_id(1)
    b, h = (bh // H).to(tl.int64), bh % H
    length = tl.minimum(tl.load(lengths_ptr + b).to(tl.int32), T)
    begin = split * R
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    q = tl.load(q_ptr + b * q_strides[0] + h * q_strides[1] + offs_d * q_strides[2], mask=mask_d, other=0.0)
    q = q.to(tl.float32) * qk_scale
    k_ptr += b * k_strides[0] + h * k_strides[2] + offs_d[None, :] * k_strides[3]
    v_ptr += b * v_strides[0] + h * v_strides[2] + offs_d[None, :] * v_strides[3]
    acc = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_N,), LOWEST, tl.float32)  # each of the BLOCK_N lanes has its own softmax
    row_sum = tl.zeros((BLOCK_N,), tl.float32)
    for start in range(begin, tl.minimum(begin + R, length), BLOCK_N):
        offs_n = start + tl.arange(0, BLOCK_N)
        mask_n = offs_n < length
        mask = mask_n[:, None] & mask_d[None, :]
        offs_row = offs_n.to(tl.int64)[:, None]
        k = tl.load(k_ptr + offs_row * k_strides[1], mask=mask, other=0.0).to(tl.float32)
        v = tl.load(v_ptr + offs_row * v_strides[1], mask=mask, other=0.0).to(tl.float32)
        s = tl.where(mask_n, tl.sum(k * q[None, :], 1), float("-inf"))
        new_max = tl.maximum(row_max, s)
        alpha, p = tl.exp2(row_max - new_max), tl.exp2(s - new_max)
        acc = acc * alpha[:, None] + p[:, None] * v
        row_sum = row_sum * alpha + p
        row_max = new_max
    top = tl.max(row_max, 0)
    weight = tl.exp2(row_max - top)
    total = tl.sum(row_sum * weight, 0)
    out = tl.sum(acc * weight[:, None], 0) / total  # NaN where the split has no rows,
    lse = top + tl.log2(total)  # and -inf
    out_row = split.to(tl.int64) * tl.num_programs(0) + bh
    tl.store(out_ptr + out_row * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=mask_d)
    tl.store(lse_ptr + out_row, lse)


@triton.jit
def _decode_combine_kernel(
    parts_ptr,  # (S, B, H, D) fp32
    lse_ptr,  # (S, B, H) fp32
    out_ptr,  # (B, H, D)
    S,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    bh, BH = tl.program_id(0), tl.num_programs(0)
    offs_s, offs_d = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    lse = tl.load(lse_ptr + offs_s * BH + bh, mask=offs_s < S, other=float("-inf"))
    weight = tl.exp2(lse - tl.max(lse, 0))
    offs_row = (offs_s * BH + bh).to(tl.int64)[:, None]
    mask = (offs_s < S)[:, None] & (offs_d < D)[None, :]
    parts = tl.load(parts_ptr + offs_row * D + offs_d[None, :], mask=mask, other=0.0)
    parts = tl.where(weight[:, None] > 0.0, parts, 0.0)
    out = tl.sum(parts * weight[:, None], 0) / tl.sum(weight, 0)
    tl.store(out_ptr + bh.to(tl.int64) * D + offs_d, out.to(out_ptr.dtype.element_ty), mask=offs_d < D)


def rows_per_split(capacity: int) -> int:
    """How many of a cache's `capacity` rows one program reads: a multiple of those it reads at once."""
    blocks_each = triton.cdiv(triton.cdiv(capacity, _BLOCK_N), _MAX_SPLITS)
    return max(_ROWS, int(blocks_each) * _BLOCK_N)


def decode_attention_fwd(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, lengths: Tensor, scale: float, rows: int | None = None
) -> Tensor:
    """Launch; see ops.decode_attention. rows: of a split, by `rows_per_split` if None."""
    B, H, D = q.shape
    T = k_cache.shape[1]
    out = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    if out.numel() == 0:
        return out
    R = rows or rows_per_split(T)
    S = max(1, triton.cdiv(T, R))
    parts = out if S == 1 else torch.empty(S, B, H, D, dtype=torch.float32, device=q.device)
    lse = torch.empty(S, B, H, dtype=torch.float32, device=q.device)
    BLOCK_D = block_size(D)
    with torch.cuda.device_of(q):
        _decode_attention_kernel[(B * H, S)](
            q,
            k_cache,
            v_cache,
            lengths,
            q.stride(),
            k_cache.stride(),
            v_cache.stride(),
            parts,
            lse,
            H,
            T,
            R,
            scale * LOG2_E.value,
            D=D,
            BLOCK_D=BLOCK_D,
            BLOCK_N=min(_BLOCK_N, _BLOCK // BLOCK_D),
            num_warps=4,
        )
        if S > 1:
            BLOCK_S = triton.next_power_of_2(S)
            _decode_combine_kernel[(B * H,)](parts, lse, out, S, D=D, BLOCK_D=BLOCK_D, BLOCK_S=BLOCK_S)
    return out


_NAME = "fusedgpt::decode_attention"
decode_attention = torch.library.custom_op(_NAME, decode_attention_fwd, mutates_args=())  # without a gradient


@decode_attention.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)
