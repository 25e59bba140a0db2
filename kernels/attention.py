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
One kernel owns a tile of queries, makes their delta and sums dQ; a second owns a tile of keys and sums dK and
dV over the queries below it: 7 matrix products where atomics would need 5, but the same bits every time.

tl.static_range unrolls the loop over tiles into two: full tiles, which need no mask, and those on the
diagonal or at a border between documents.

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
from fusedgpt.kernels.attention_tiles import (
    keep_tile,
    key_ranges,
    load_ids,
    load_tile,
    program_tile,
    query_ranges,
    store_tile,
    visible_keys,
)
from fusedgpt.kernels.common import LOG2_E, LOWEST, block_size
from fusedgpt.kernels.library import register_op
from fusedgpt.kernels.reference import dropout_threshold
from fusedgpt.kernels.tuning import Tile

_GROUP_BYTES = 2**24  # K and V of the heads that run side by side, so that they stay in L2


@triton.jit(do_not_specialize=["B", "heads", "threshold"])
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
    ids_ptr,  # (B, T) int32 document ids, or None
    spans_ptr,  # (B, ceil(T / 64), 4) int32, see documents.py, or None
    seed_ptr,  # int64 scalar, or None: no dropout
    offset_ptr,  # int64 scalar, or None
    threshold,  # the smallest 8-bit lane that is kept
    keep_scale,  # 1 / the share of weights that are kept
    zero,  # 0.0; where the compiler knows, it selects after rounding, half a register at a time
    B,
    H,
    T,
    heads,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,  # start the next full tile's product before this one's softmax
):
    qk_scale = scale * LOG2_E
    b, h, bh, start_m = program_tile(B, H, T, heads, BLOCK_M, REVERSED=True)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q, q_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
    ids_m = load_ids(ids_ptr, b, offs_m, T)
    if seed_ptr is not None:
        seed, offset = tl.load(seed_ptr), tl.load(offset_ptr)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    row_max = tl.full((BLOCK_M,), LOWEST, tl.float32)  # in log2 units
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    first, full, diagonal = key_ranges(spans_ptr, b, start_m, T, BLOCK_M, BLOCK_N)
    for MASK in tl.static_range(2):
        begin = first if MASK else full
        end = tl.minimum(start_m + BLOCK_M, T) - (diagonal - full) if MASK else diagonal
        if AHEAD and not MASK:
            k_tile = load_tile(k, k_strides, b, h, begin, T, D, BLOCK_N, BLOCK_D)
            next_s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
        for start_n in range(begin, end, BLOCK_N):
            if MASK:
                start_n += tl.where(start_n >= full, diagonal - full, 0)
            load_n = start_n + BLOCK_N if AHEAD and not MASK else start_n
            k_tile = load_tile(k, k_strides, b, h, load_n, T, D, BLOCK_N, BLOCK_D)
            s = tl.dot(q_tile, k_tile.T, input_precision="ieee")
            if AHEAD and not MASK:
                s, next_s = next_s, s
            if MASK:
                offs_n = start_n + tl.arange(0, BLOCK_N)
                visible = visible_keys(offs_m, offs_n, ids_m, load_ids(ids_ptr, b, offs_n, T))
                s = tl.where(visible, s * qk_scale, LOWEST)
                new_max = tl.maximum(row_max, tl.max(s, 1))
                p = tl.exp2(s - new_max[:, None])
            else:  # scale and subtract in one instruction
                new_max = tl.maximum(row_max, tl.max(s, 1) * qk_scale)
                p = tl.exp2(s * qk_scale - new_max[:, None])
            alpha = tl.exp2(row_max - new_max)  # 0 at the first visible key: what masked keys summed up goes
            row_sum = row_sum * alpha + tl.sum(p, 1)
            if seed_ptr is not None:
                keep = keep_tile(seed, offset, threshold, bh, start_m, start_n, T, BLOCK_M, BLOCK_N)
                p = tl.where(keep, p, zero)  # keep_scale is applied once, at the end
            v_tile = load_tile(v, v_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc * alpha[:, None], input_precision="ieee")
            row_max = new_max
    out = acc / row_sum[:, None]
    if seed_ptr is not None:
        out = out * keep_scale
    store_tile(out_ptr, out_strides, b, h, start_m, out, T, D, BLOCK_M, BLOCK_D)
    tl.store(lse_ptr + tl.cast(bh, tl.int64) * T + offs_m, row_max + tl.log2(row_sum), mask=offs_m < T)


@triton.jit(do_not_specialize=["B", "heads", "threshold"])
def _attention_dq_kernel(
    q,  # as in the forward
    k,
    v,
    q_strides,
    k_strides,
    v_strides,
    dout,  # as q
    dout_strides,
    out_ptr,  # (B, T, H, D)
    out_strides,
    lse_ptr,  # (B, H, T) fp32
    delta_ptr,  # (B, H, T) fp32, is written
    dq_ptr,  # (B, T, H, D)
    dq_strides,
    ids_ptr,
    spans_ptr,
    seed_ptr,
    offset_ptr,
    threshold,
    keep_scale,
    zero,
    B,
    H,
    T,
    heads,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    qk_scale = scale * LOG2_E
    b, h, bh, start_m = program_tile(B, H, T, heads, BLOCK_M, REVERSED=True)
    offs_m = start_m + tl.arange(0, BLOCK_M)
    q_tile = load_tile(q, q_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
    dout_tile = load_tile(dout, dout_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
    out_tile = load_tile(out_ptr, out_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
    delta = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if seed_ptr is not None:  # keep_scale is taken out of dS and applied once, at the end
        delta = delta / keep_scale
    offs_row = tl.cast(bh, tl.int64) * T + offs_m
    tl.store(delta_ptr + offs_row, delta, mask=offs_m < T)
    lse = tl.load(lse_ptr + offs_row, mask=offs_m < T, other=float("inf"))
    ids_m = load_ids(ids_ptr, b, offs_m, T)
    if seed_ptr is not None:
        seed, offset = tl.load(seed_ptr), tl.load(offset_ptr)
    dq = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    first, full, diagonal = key_ranges(spans_ptr, b, start_m, T, BLOCK_M, BLOCK_N)
    for MASK in tl.static_range(2):
        begin = first if MASK else full
        end = tl.minimum(start_m + BLOCK_M, T) - (diagonal - full) if MASK else diagonal
        for start_n in range(begin, end, BLOCK_N):
            if MASK:
                start_n += tl.where(start_n >= full, diagonal - full, 0)
            k_tile = load_tile(k, k_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
            p = tl.exp2(tl.dot(q_tile, k_tile.T, input_precision="ieee") * qk_scale - lse[:, None])
            if MASK:
                offs_n = start_n + tl.arange(0, BLOCK_N)
                visible = visible_keys(offs_m, offs_n, ids_m, load_ids(ids_ptr, b, offs_n, T))
                p = tl.where(visible, p, 0.0)
            v_tile = load_tile(v, v_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
            dp = tl.dot(dout_tile, v_tile.T, input_precision="ieee")
            if seed_ptr is not None:
                keep = keep_tile(seed, offset, threshold, bh, start_m, start_n, T, BLOCK_M, BLOCK_N)
                dp = tl.where(keep, dp, 0.0)
            ds = p * (dp - delta[:, None])
            dq = tl.dot(ds.to(k_tile.dtype), k_tile, dq, input_precision="ieee")
    if seed_ptr is not None:
        scale *= keep_scale
    store_tile(dq_ptr, dq_strides, b, h, start_m, dq * scale, T, D, BLOCK_M, BLOCK_D)


@triton.jit(do_not_specialize=["B", "heads", "threshold"])
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
    spans_ptr,
    seed_ptr,
    offset_ptr,
    threshold,
    keep_scale,
    zero,
    B,
    H,
    T,
    heads,
    scale,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    qk_scale = scale * LOG2_E
    b, h, bh, start_n = program_tile(B, H, T, heads, BLOCK_N, REVERSED=False)  # the first have most queries
    offs_n = start_n + tl.arange(0, BLOCK_N)
    k_tile = load_tile(k, k_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
    v_tile = load_tile(v, v_strides, b, h, start_n, T, D, BLOCK_N, BLOCK_D)
    ids_n = load_ids(ids_ptr, b, offs_n, T)
    if seed_ptr is not None:
        seed, offset = tl.load(seed_ptr), tl.load(offset_ptr)
    lse_ptr += tl.cast(bh, tl.int64) * T
    delta_ptr += tl.cast(bh, tl.int64) * T
    dk = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_D), tl.float32)
    below, full_end, last = query_ranges(spans_ptr, b, start_n, T, BLOCK_M, BLOCK_N)
    for FULL in tl.static_range(2):
        begin = below if FULL else start_n // BLOCK_M * BLOCK_M
        end = full_end if FULL else last - (full_end - below)
        for start_m in range(begin, end, BLOCK_M):  # tiles are (BLOCK_N, BLOCK_M)
            if not FULL:
                start_m += tl.where(start_m >= below, full_end - below, 0)
            offs_m = start_m + tl.arange(0, BLOCK_M)
            q_tile = load_tile(q, q_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
            lse = tl.load(lse_ptr + offs_m, mask=offs_m < T, other=float("inf"))  # rows beyond T weigh 0
            p = tl.exp2(tl.dot(k_tile, q_tile.T, input_precision="ieee") * qk_scale - lse[None, :])
            if not FULL:
                ids_m = load_ids(ids_ptr, b, offs_m, T)
                p = tl.where(tl.trans(visible_keys(offs_m, offs_n, ids_m, ids_n)), p, 0.0)
            dout_tile = load_tile(dout, dout_strides, b, h, start_m, T, D, BLOCK_M, BLOCK_D)
            kept = p
            if seed_ptr is not None:
                keep = keep_tile(seed, offset, threshold, bh, start_m, start_n, T, BLOCK_M, BLOCK_N)
                keep = tl.trans(keep)
                kept = tl.where(keep, p, zero)
            dv = tl.dot(kept.to(dout_tile.dtype), dout_tile, dv, input_precision="ieee")
            dp = tl.dot(v_tile, dout_tile.T, input_precision="ieee")
            if seed_ptr is not None:
                dp = tl.where(keep, dp, 0.0)
            delta = tl.load(delta_ptr + offs_m, mask=offs_m < T, other=0.0)
            ds = p * (dp - delta[None, :])
            dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision="ieee")
    if seed_ptr is not None:
        dv = dv * keep_scale
        scale *= keep_scale
    store_tile(dk_ptr, dk_strides, b, h, start_n, dk * scale, T, D, BLOCK_N, BLOCK_D)
    store_tile(dv_ptr, dv_strides, b, h, start_n, dv, T, D, BLOCK_N, BLOCK_D)


def _feature(dropout_p: float, ids: Tensor | None) -> str:
    """What decides on the block sizes."""
    return "dropout" if dropout_p > 0.0 else "plain" if ids is None else "documents"


def _dropout_arguments(p: float, seed: Tensor | None, offset: Tensor | None) -> dict[str, Any]:
    """Of a kernel: pointers are None for p = 0; p in steps of 1/256, as in attention_dropout_mask."""
    threshold = dropout_threshold(p)
    return {
        "seed_ptr": seed if p > 0.0 else None,
        "offset_ptr": offset if p > 0.0 else None,
        "threshold": threshold,
        "keep_scale": 256 / (256 - threshold),
        "zero": 0.0,
    }


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


def _cdiv(a: int, b: int) -> int:  # triton.cdiv takes microseconds
    return -(-a // b)


def _launch(kernel: Any, tile: Tile, rows_per_program: int, x: Tensor, **arguments: Any) -> None:
    """One program for each tile of rows of each head of x (B, T, H, D)."""
    B, T, H, D = x.shape
    groups = _cdiv(2 * x.numel() * x.element_size(), _GROUP_BYTES)
    constants = {"D": D, "BLOCK_D": block_size(D), "BLOCK_M": tile.BLOCK_M, "BLOCK_N": tile.BLOCK_N}
    with torch.cuda.device_of(x):
        kernel[(_cdiv(T, rows_per_program) * B * H,)](
            **arguments,
            B=B,
            H=H,
            T=T,
            heads=_cdiv(B * H, groups),
            **constants,
            num_warps=tile.num_warps,
            maxnreg=tile.maxnreg,
            num_stages=tile.num_stages,
        )


def attention_fwd(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, H, D)
    v: Tensor,  # (B, T, H, D)
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,  # int64 scalar
    offset: Tensor | None = None,  # int64 scalar
    ids: Tensor | None = None,  # (B, T) int32, and
    spans: Tensor | None = None,  # (B, ceil(T / 64), 4) int32, of prepare_documents
) -> tuple[Tensor, Tensor]:
    """(out (B, T, H, D), lse (B, H, T) in log2 units) of q, k, v with any strides."""
    out, lse = _outputs(q)
    if out.numel():
        tile = tuning.attention("fwd", q, feature=_feature(dropout_p, ids), describable=_describable(q, k, v))
        _launch(
            _attention_fwd_kernel,
            tile,
            tile.BLOCK_M,
            q,
            **_sources(tile, q=(q, tile.BLOCK_M), k=(k, tile.BLOCK_N), v=(v, tile.BLOCK_N)),
            **_pointers(out=out),
            lse_ptr=lse,
            ids_ptr=ids,
            spans_ptr=spans,
            **_dropout_arguments(dropout_p, seed, offset),
            scale=scale,
            AHEAD=tile.ahead,
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
    ids: Tensor | None = None,
    spans: Tensor | None = None,
) -> Tensor:
    """dq, dk, dv as one tensor (B, T, 3, H, D): the gradient of a fused qkv projection."""
    dqkv = _gradients(q)
    if dqkv.numel() == 0:
        return dqkv
    dq, dk, dv = dqkv.unbind(2)
    feature, describable = _feature(dropout_p, ids), _describable(q, k, v, dout)
    arguments: dict[str, Any] = {
        "lse_ptr": lse,
        "delta_ptr": torch.empty_like(lse),  # from the first kernel to the second
        "ids_ptr": ids,
        "spans_ptr": spans,
        **_dropout_arguments(dropout_p, seed, offset),
        "scale": scale,
    }
    for name, kernel, own in (
        ("dq", _attention_dq_kernel, _pointers(out=out, dq=dq)),
        ("dkdv", _attention_dkdv_kernel, _pointers(dk=dk, dv=dv)),
    ):
        tile = tuning.attention(name, q, feature=feature, describable=describable)
        M, N = tile.BLOCK_M, tile.BLOCK_N
        sources = _sources(tile, q=(q, M), k=(k, N), v=(v, N), dout=(dout, M))
        _launch(kernel, tile, M if name == "dq" else N, q, **sources, **own, **arguments)
    return dqkv


def _outputs(q: Tensor) -> tuple[Tensor, Tensor]:
    B, T, H, D = q.shape
    return q.new_empty(B, T, H, D), q.new_empty(B, H, T, dtype=torch.float32)


def _gradients(q: Tensor) -> Tensor:
    B, T, H, D = q.shape
    return q.new_empty(B, T, 3, H, D)


_fwd_op = register_op("attention", attention_fwd, lambda q, *_: _outputs(q))
_bwd_op = register_op("attention_bwd", attention_bwd, lambda dout, q, *_: _gradients(q))


class _Attention(torch.autograd.Function):
    """Of q, k, v, or of the fused projection (B, T, 3, H, D), whose gradient is then one tensor."""

    @staticmethod
    def forward(ctx: Any, scale: float, dropout_p: float, *tensors: Any) -> Any:
        """tensors: seed, offset, ids, spans, each perhaps None, and the projections."""
        state, projections = tensors[:4], tensors[4:]
        q, k, v = projections if len(projections) == 3 else projections[0].unbind(2)
        out, lse = _fwd_op(q, k, v, scale, dropout_p, *state)
        ctx.scale, ctx.dropout_p = scale, dropout_p
        ctx.save_for_backward(out, lse, *tensors)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> Any:
        out, lse, *tensors = ctx.saved_tensors  # once: a checkpoint allows no more
        state, projections = tensors[:4], tensors[4:]
        fused = len(projections) == 1
        q, k, v = projections[0].unbind(2) if fused else projections
        dqkv = _bwd_op(dout, q, k, v, out, lse, ctx.scale, ctx.dropout_p, *state)
        return *[None] * 6, *((dqkv,) if fused else dqkv.unbind(2))


def attention(
    *projections: Tensor,  # q, k, v (B, T, H, D) each, or qkv (B, T, 3, H, D)
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
    offset: Tensor | None,
    ids: Tensor | None,  # (B, T) int32
    spans: Tensor | None,  # (B, ceil(T / 64), 4) int32
) -> Tensor:
    """`attention_fwd` with a gradient. The fused projection's is one tensor, written without a copy."""
    out: Tensor = _Attention.apply(scale, dropout_p, seed, offset, ids, spans, *projections)
    return out
