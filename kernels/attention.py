"""Causal self-attention in tiles: the weights (T, T) never exist in memory.

Shape letters: B batch, T tokens, H heads, D head size (BLOCK_D: the next power of two); m queries, n keys.

Forward (FlashAttention-2's order of work): one program owns BLOCK_M queries of one head and walks over the
keys, first the tiles left of the diagonal, which need no mask, then those on it. The row maximum m, the row
sum l and the output stay in fp32; scale * log2(e) is applied after the dot product, and the output is divided
by l once, at the end. The backward needs lse = m + log2(l), one fp32 per row, in log2 units: the weights are
exp2(s - lse).

Backward, with dO given, keep the dropout mask / (1 - p) and s the scaled scores:
    delta = rowsum(dO * O)     P = exp2(s - lse)      dP = keep * (dO V^T)     dS = P * (dP - delta)
    dV = (keep * P)^T dO       dK = scale * dS^T Q    dQ = scale * dS K
One kernel owns a tile of keys and sums dK and dV over the queries below it, another owns a tile of queries
and sums dQ: 7 matrix products where atomics would need 5, but the same bits every time.

tl.static_range unrolls the loop over tiles into two: full tiles, which need no mask, and those on the
diagonal. With documents every tile takes the mask.

Sources: Dao 2023, "FlashAttention-2" (arXiv 2307.08691); Milakov and Gimelshein 2018 for the running softmax.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fusedgpt.kernels import tuning
from fusedgpt.kernels.common import LOG2_E, LOWEST, block_size
from fusedgpt.kernels.dropout import dropout_arguments, philox_lanes
from fusedgpt.kernels.tuning import Tile

_DELTA = Tile(BLOCK_M=16, BLOCK_N=64, num_warps=4, num_stages=1)  # limited by memory bandwidth


@triton.jit
def _program_tile(H, T, BLOCK: tl.constexpr, REVERSED: tl.constexpr):
    """(b, h, index of the head in (B, H), first row) of this program's tile of BLOCK rows.

    REVERSED: the last rows of a head first, where they have the most keys.
    """
    n_tiles = tl.cdiv(T, BLOCK)
    bh, tile = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    if REVERSED:
        tile = n_tiles - 1 - tile
    return bh // H, bh % H, bh, tile * BLOCK


@triton.jit
def _tile_ptrs(x_ptr, strides, b, h, start, T, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to rows start .. of one head and which of them exist: (BLOCK, BLOCK_D) each."""
    offs_t, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    x_ptr += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2]
    x_ptr += tl.cast(start, tl.int64) * strides[1]
    mask = (offs_t < T - start)[:, None]
    if D != BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    return x_ptr + offs_t[:, None] * strides[1] + offs_d[None, :] * strides[3], mask


@triton.jit
def _load_tile(x, strides, b, h, start, T, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start .. of one head of x (B, T, H, D): (BLOCK, BLOCK_D), zeros beyond T and D.

    x: a pointer with its strides, or a descriptor with strides None.
    """
    if strides is None:
        tile = x.load([b, h, start, 0]).reshape(BLOCK, BLOCK_D)
    else:
        ptrs, mask = _tile_ptrs(x, strides, b, h, start, T, D, BLOCK, BLOCK_D)
        tile = tl.load(ptrs, mask=mask, other=0.0)
    return tile


@triton.jit
def _store_tile(
    x_ptr, strides, b, h, start, tile, T, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    ptrs, mask = _tile_ptrs(x_ptr, strides, b, h, start, T, D, BLOCK, BLOCK_D)
    tl.store(ptrs, tile.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _keep_tile(
    seed, offset, threshold, bh, start_m, start_n, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """The dropout mask (BLOCK_M, BLOCK_N) of one tile of weights: reference.attention_dropout_mask.

    A Philox block serves keys 8 apart: those are what one thread holds of a tensor-core accumulator, so that
    the mask can be made in the registers where it is used.
    """
    rows = tl.cast(bh, tl.int64) * T + start_m + tl.arange(0, BLOCK_M)
    row_blocks = offset + rows * (tl.cdiv(T, 64) * 8)
    if BLOCK_N % 64 == 0:
        blocks = row_blocks[:, None] + start_n // 8 + tl.arange(0, BLOCK_N // 8)[None, :]
        lanes = tl.reshape(philox_lanes(seed, blocks), (BLOCK_M, BLOCK_N // 64, 8, 8)).permute(0, 1, 3, 2)
        lanes = tl.reshape(lanes, (BLOCK_M, BLOCK_N))
    else:  # the small tiles of fp32: the block of each key is drawn separately
        offs_n = (start_n + tl.arange(0, BLOCK_N))[None, :]
        r0, r1, r2, r3 = tl.randint4x(seed, row_blocks[:, None] + offs_n // 64 * 8 + offs_n % 8, n_rounds=7)
        lane = offs_n // 8 % 8
        word = tl.where(lane < 4, tl.where(lane < 2, r0, r1), tl.where(lane < 6, r2, r3))
        word = word.to(tl.uint32, bitcast=True) ^ 0x80000000
        lanes = (word >> (lane % 2 * 16).to(tl.uint32)).to(tl.int16)
    return lanes >= threshold


@triton.jit  # noqa: RET503  # Triton 3.6 does not compile a `return None`
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
def _overlap(
    ranges_ptr,  # (B, ceil(T / 64), 2) smallest and largest id
    ids,
    b,
    T,
):
    """The first and last token of all 64-token blocks whose range of ids meets that of `ids`."""
    n_blocks = tl.cdiv(T, 64)
    low, high = tl.min(ids, 0), tl.max(ids, 0)
    first, last = n_blocks, 0
    for start in range(0, n_blocks, 128):
        offs = start + tl.arange(0, 128)
        mask = offs < n_blocks
        lo = tl.load(ranges_ptr + 2 * (b * n_blocks + offs), mask=mask)
        hi = tl.load(ranges_ptr + 2 * (b * n_blocks + offs) + 1, mask=mask)
        meets = mask & (lo <= high) & (hi >= low)
        first = tl.minimum(first, tl.min(tl.where(meets, offs, n_blocks), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, offs, 0), 0))
    return first * 64, last * 64 + 63


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
    qk_scale = scale * LOG2_E
    b, h, bh, start_m = _program_tile(H, T, BLOCK_M, REVERSED=True)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = _load_tile(q, q_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
    ids_m = _load_ids(ids_ptr, b, offs_m, T)
    if seed_ptr is not None:
        seed, offset = tl.load(seed_ptr), tl.load(offset_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)  # in log2 units
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    diagonal = start_m // BLOCK_N * BLOCK_N
    if ids_ptr is not None:
        first, _ = _overlap(ranges_ptr, ids_m, b, T)
        diagonal = first // BLOCK_N * BLOCK_N
    for MASK in tl.static_range(0 if ids_ptr is None else 1, 2):
        begin = diagonal if MASK else 0
        end = tl.minimum(start_m + BLOCK_M, T) if MASK else diagonal
        for start_n in range(begin, end, BLOCK_N):
            k_tile = _load_tile(k, k_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
            if MASK:
                offs_n = start_n + tl.arange(0, BLOCK_N)
                visible = _visible(offs_m, offs_n, ids_m, _load_ids(ids_ptr, b, offs_n, T))
                s = tl.where(visible, s * qk_scale, LOWEST)
                new_max = tl.maximum(row_max, tl.max(s, 1))
                p = tl.exp2(s - new_max[:, None])
            else:  # scale and subtract in one instruction
                new_max = tl.maximum(row_max, tl.max(s, 1) * qk_scale)
                p = tl.exp2(s * qk_scale - new_max[:, None])
            alpha = tl.exp2(row_max - new_max)  # 0 at the first visible key: what masked keys summed up goes
            row_sum = row_sum * alpha + tl.sum(p, 1)
            if seed_ptr is not None:
                keep = _keep_tile(seed, offset, threshold, bh, start_m, start_n, T, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, 0.0)  # keep_scale is applied once, at the end
            v_tile = _load_tile(v, v_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
            row_max = new_max
    out = acc / row_sum[:, None]
    if seed_ptr is not None:
        out = out * keep_scale
    _store_tile(out_ptr, out_strides, b, h, start_m, out, T, D, BLOCK_M, BLOCK_D)
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
    b, h, bh, start_m = _program_tile(H, T, BLOCK_M, REVERSED=False)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    out = _load_tile(out_ptr, out_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D).to(tl.float32)
    dout = _load_tile(dout_ptr, dout_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D).to(tl.float32)
    tl.store(delta_ptr + tl.cast(bh, tl.int64) * T + offs_m, tl.sum(out * dout, 1), mask=offs_m < T)


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
    qk_scale = scale * LOG2_E
    b, h, bh, start_n = _program_tile(H, T, BLOCK_N, REVERSED=False)  # the keys with the most queries first
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k_tile = _load_tile(k, k_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
    v_tile = _load_tile(v, v_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
    ids_n = _load_ids(ids_ptr, b, offs_n, T)
    if seed_ptr is not None:
        seed, offset = tl.load(seed_ptr), tl.load(offset_ptr)
    lse_ptr += tl.cast(bh, tl.int64) * T
    delta_ptr += tl.cast(bh, tl.int64) * T
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    if ids_ptr is None:
        below = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, T)  # the diagonal
    else:
        _, last = _overlap(ranges_ptr, ids_n, b, T)
        below = tl.minimum(last + 1, T)
    for FULL in tl.static_range(2 if ids_ptr is None else 1):
        begin = below if FULL else start_n // BLOCK_M * BLOCK_M
        end = T if FULL else below
        for start_m in range(begin, end, BLOCK_M):  # tiles are (BLOCK_N, BLOCK_M)
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q_tile = _load_tile(q, q_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
            lse = tl.load(lse_ptr + offs_m, mask=offs_m < T, other=float("inf"))  # rows beyond T weigh 0
            p = tl.exp2(tl.dot(k_tile, q_tile.T, input_precision="ieee") * qk_scale - lse[None, :])
            if not FULL:
                ids_m = _load_ids(ids_ptr, b, offs_m, T)
                p = tl.where(tl.trans(_visible(offs_m, offs_n, ids_m, ids_n)), p, 0.0)
            dout_tile = _load_tile(dout, dout_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
            kept = p
            if seed_ptr is not None:
                keep = _keep_tile(seed, offset, threshold, bh, start_m, start_n, T, BLOCK_M, BLOCK_N)
                keep = tl.trans(keep)
                kept = tl.where(keep, p, 0.0)
            dv = tl.dot(kept.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
            dp = tl.dot(v_tile, dout_tile.T, input_precision="ieee")
            if seed_ptr is not None:
                dp = tl.where(keep, dp * keep_scale, 0.0)
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < T, other=0.0)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    if seed_ptr is not None:
        dv = dv * keep_scale
    _store_tile(dk_ptr, dk_strides, b, h, start_n, dk * scale, T, D, BLOCK_N, BLOCK_D)
    _store_tile(dv_ptr, dv_strides, b, h, start_n, dv, T, D, BLOCK_N, BLOCK_D)


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
    qk_scale = scale * LOG2_E
    b, h, bh, start_m = _program_tile(H, T, BLOCK_M, REVERSED=True)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = _load_tile(q, q_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
    dout_tile = _load_tile(dout, dout_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
    ids_m = _load_ids(ids_ptr, b, offs_m, T)
    offs_row = tl.cast(bh, tl.int64) * T + offs_m
    lse = tl.load(lse_ptr + offs_row, mask=offs_m < T, other=float("inf"))
    delta = tl.load(delta_ptr + offs_row, mask=offs_m < T, other=0.0)
    if seed_ptr is not None:
        seed, offset = tl.load(seed_ptr), tl.load(offset_ptr)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    diagonal = start_m // BLOCK_N * BLOCK_N
    if ids_ptr is not None:
        first, _ = _overlap(ranges_ptr, ids_m, b, T)
        diagonal = first // BLOCK_N * BLOCK_N
    for MASK in tl.static_range(0 if ids_ptr is None else 1, 2):
        begin = diagonal if MASK else 0
        end = tl.minimum(start_m + BLOCK_M, T) if MASK else diagonal
        for start_n in range(begin, end, BLOCK_N):
            k_tile = _load_tile(k, k_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
            p = tl.exp2(tl.dot(q_tile, k_tile.T, input_precision="ieee") * qk_scale - lse[:, None])
            if MASK:
                offs_n = start_n + tl.arange(0, BLOCK_N)
                visible = _visible(offs_m, offs_n, ids_m, _load_ids(ids_ptr, b, offs_n, T))
                p = tl.where(visible, p, 0.0)
            v_tile = _load_tile(v, v_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
            dp = tl.dot(dout_tile, v_tile.T, input_precision="ieee")
            if seed_ptr is not None:
                keep = _keep_tile(seed, offset, threshold, bh, start_m, start_n, T, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp * keep_scale, 0.0)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    _store_tile(dq_ptr, dq_strides, b, h, start_m, dq * scale, T, D, BLOCK_M, BLOCK_D)


def _feature(dropout_p: float, documents: Tensor | None) -> str:
    """What decides on the block sizes."""
    return "dropout" if dropout_p > 0.0 else "plain" if documents is None else "documents"


def _document_arguments(documents: Tensor | None) -> dict[str, Tensor | None]:
    if documents is None:
        return {"ids_ptr": None, "ranges_ptr": None}
    return {"ids_ptr": documents.contiguous(), "ranges_ptr": document_ranges(documents)}


def document_ranges(documents: Tensor) -> Tensor:
    """(B, ceil(T / 64), 2): the smallest and the largest id of every 64 tokens."""
    T = documents.shape[1]
    positions = torch.arange((T + 63) // 64 * 64, device=documents.device).clamp(max=T - 1)
    return torch.stack(documents[:, positions].view(len(documents), -1, 64).aminmax(dim=2), dim=-1)


def _pointers(**tensors: Tensor) -> dict[str, Any]:
    """The kernel arguments NAME_ptr and NAME_strides."""
    strides = {f"{name}_strides": x.stride() for name, x in tensors.items()}
    return {f"{name}_ptr": x for name, x in tensors.items()} | strides


def _sources(tile: Tile, **tensors: tuple[Tensor, int]) -> dict[str, Any]:
    """The kernel arguments NAME and NAME_strides for each (tensor, rows of its tiles)."""
    arguments: dict[str, Any] = {}
    for name, (x, rows) in tensors.items():
        if tile.descriptors:
            x = x.transpose(1, 2)  # (B, H, T, D): only then do tiles stay in shared memory as operands
            block = [1, 1, rows, block_size(x.shape[3])]
            arguments |= {name: TensorDescriptor(x, x.shape, x.stride(), block), f"{name}_strides": None}
        else:
            arguments |= {name: x, f"{name}_strides": x.stride()}
    return arguments


def _describable(*tensors: Tensor) -> bool:
    """Whether the tensor memory accelerator can address them all: 16-byte steps, contiguous along D."""

    def fits(x: Tensor) -> bool:
        steps = all(stride > 0 and stride * x.element_size() % 16 == 0 for stride in x.stride()[:3])
        return steps and x.stride(3) == 1 and x.data_ptr() % 16 == 0

    return all(fits(x) for x in tensors)


def _launch(kernel: Any, tile: Tile, rows_per_program: int, x: Tensor, **arguments: Any) -> None:
    """One program for each tile of rows of each head of x (B, T, H, D)."""
    B, T, H, D = x.shape
    constants = {"D": D, "BLOCK_D": block_size(D), "num_warps": tile.num_warps, "num_stages": tile.num_stages}
    with torch.cuda.device_of(x):
        kernel[(triton.cdiv(T, rows_per_program) * B * H,)](**arguments, H=H, T=T, **constants)


def attention_fwd(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, H, D)
    v: Tensor,  # (B, T, H, D)
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # int64 scalar
    offset: Tensor | None = None,  # int64 scalar
    documents: Tensor | None = None,  # (B, T) int
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D), lse (B, H, T) in log2 units) of q, k, v with any strides."""
    B, T, H, D = q.shape
    out = torch.empty(B, T, H, D, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, H, T, dtype=torch.float32, device=q.device)
    if out.numel():
        feature = _feature(dropout_p, documents)
        tile = tuning.attention("fwd", q, feature=feature, describable=_describable(q, k, v))
        M, N = tile.BLOCK_M, tile.BLOCK_N
        _launch(
            _attention_fwd_kernel,
            tile,
            M,
            q,
            **_sources(tile, q=(q, M), k=(k, N), v=(v, N)),
            **_pointers(out=out),
            lse_ptr=lse,
            **_document_arguments(documents),
            **dropout_arguments(dropout_p, seed, offset),
            scale=scale,
            BLOCK_M=M,
            BLOCK_N=N,
        )
    return out, lse


def attention_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    documents: Tensor | None = None,
) -> Tensor:
    """dq, dk, dv as one tensor (B, T, 3, H, D): the gradient of a fused qkv projection."""
    B, T, H, D = q.shape
    dqkv = torch.empty(B, T, 3, H, D, dtype=q.dtype, device=q.device)
    if dqkv.numel() == 0:
        return dqkv
    dq, dk, dv = dqkv.unbind(2)
    delta = torch.empty_like(lse)
    M = _DELTA.BLOCK_M
    pointers = _pointers(out=out, dout=dout)
    _launch(_attention_delta_kernel, _DELTA, M, q, **pointers, delta_ptr=delta, BLOCK_M=M)
    feature, describable = _feature(dropout_p, documents), _describable(q, k, v, dout)
    arguments = _document_arguments(documents) | dropout_arguments(dropout_p, seed, offset)
    for name, kernel, gradients in (
        ("dkdv", _attention_dkdv_kernel, _pointers(dk=dk, dv=dv)),
        ("dq", _attention_dq_kernel, _pointers(dq=dq)),
    ):
        tile = tuning.attention(name, q, feature=feature, describable=describable)
        M, N = tile.BLOCK_M, tile.BLOCK_N
        _launch(
            kernel,
            tile,
            N if name == "dkdv" else M,
            q,
            **_sources(tile, q=(q, M), k=(k, N), v=(v, N), dout=(dout, M)),
            lse_ptr=lse,
            delta_ptr=delta,
            **gradients,
            **arguments,
            scale=scale,
            BLOCK_M=M,
            BLOCK_N=N,
        )
    return dqkv


@torch.library.custom_op("fusedgpt::qkv_attention", mutates_args=())
def qkv_attention(
    qkv: Tensor,  # (B, T, 3, H, D)
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    offset: Tensor | None,
    documents: Tensor | None,  # (B, T) int
) -> tuple[Tensor, Tensor]:
    """`attention_fwd` on the fused projection, whose gradient is then one tensor."""
    q, k, v = qkv.unbind(2)
    return attention_fwd(q, k, v, scale, dropout_p, seed, offset, documents)


attention = torch.library.custom_op("fusedgpt::attention", attention_fwd, mutates_args=())
_backward_op = torch.library.custom_op("fusedgpt::attention_bwd", attention_bwd, mutates_args=())


@attention.register_fake
def _(q: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)


@qkv_attention.register_fake
def _(qkv: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    B, T, _three, H, D = qkv.shape
    return qkv.new_empty(B, T, H, D), qkv.new_empty(B, H, T, dtype=torch.float32)


@_backward_op.register_fake
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
    dqkv: Tensor = _backward_op(dout, q, k, v, out, lse, ctx.scale, ctx.dropout_p, seed, offset, documents)
    return dqkv


def _bwd(ctx: Any, dout: Tensor, dlse: None) -> tuple[Tensor | None, ...]:
    return *_gradient(ctx, dout, fused=False).unbind(2), *[None] * 5


def _qkv_bwd(ctx: Any, dout: Tensor, dlse: None) -> tuple[Tensor | None, ...]:
    return _gradient(ctx, dout, fused=True), *[None] * 5


attention.register_autograd(_bwd, setup_context=_save)
qkv_attention.register_autograd(_qkv_bwd, setup_context=_save)
