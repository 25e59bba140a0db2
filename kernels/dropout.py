"""Dropout: the Philox mask that every kernel draws, and the elementwise op.

Shape letters: N rows, C channels.

The mask is `reference.dropout_mask`, bit by bit: element (row, col) is kept where the 16-bit lane col % 8 of
Philox block offset + row * ceil(C / 8) + col // 8 is at least the threshold. One block serves the eight
neighbours that a thread loads with one 16-byte instruction; the backward draws the same mask again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgpt.kernels.common import contiguous_like
from fusedgpt.kernels.library import register_op

_BLOCK_C = 1024


def dropout_arguments(p: float, seed: Tensor | None, offset: Tensor | None) -> dict[str, Any]:
    """The arguments of a kernel that has dropout inside; pointers are None for p = 0.

    threshold: the smallest signed 16-bit lane that is kept; p in steps of 1/65536, as in
    reference.dropout_mask.
    """
    return {
        "seed_ptr": seed if p > 0.0 else None,
        "offset_ptr": offset if p > 0.0 else None,
        "threshold": round(p * 65536) - 32768,
        "keep_scale": 1.0 / (1.0 - p),
    }


@triton.jit
def philox_lanes(seed, block):
    """The eight signed 16-bit lanes of each Philox-4x32-7 block: int64 (...) -> int16 (..., 2, 2, 2)."""
    r0, r1, r2, r3 = tl.randint4x(seed, block, n_rounds=7)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))  # (..., 2, 2), in order
    words = words.to(tl.uint32, bitcast=True) ^ 0x80000000
    return tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))


@triton.jit(do_not_specialize=["threshold"])
def _dropout_kernel(
    x_ptr,  # (N, C) contiguous
    out_ptr,  # (N, C) contiguous
    seed_ptr,  # int64 scalar
    offset_ptr,  # int64 scalar
    C,
    threshold,
    keep_scale,  # 1 / (1 - p)
    BLOCK_C: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offs_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask_c = offs_c < C
    blocks = tl.load(offset_ptr) + row * tl.cdiv(C, 8) + tl.program_id(1) * (BLOCK_C // 8)
    lanes = philox_lanes(tl.load(seed_ptr), blocks + tl.arange(0, BLOCK_C // 8))
    keep = tl.reshape(lanes, (BLOCK_C,)) >= threshold
    x = tl.load(x_ptr + row * C + offs_c, mask=mask_c).to(tl.float32)
    tl.store(out_ptr + row * C + offs_c, tl.where(keep, x * keep_scale, 0.0), mask=mask_c)


def dropout_fwd(x: Tensor, p: float, seed: Tensor, offset: Tensor) -> Tensor:
    """Launch; see ops.dropout. x of any shape is read as rows of its last dimension."""
    x = x.contiguous()
    out = torch.empty_like(x)
    if x.numel() == 0:
        return out
    C = x.shape[-1] if x.ndim else 1
    grid = (x.numel() // C, triton.cdiv(C, _BLOCK_C))
    with torch.cuda.device_of(x):
        _dropout_kernel[grid](
            x, out, C=C, **dropout_arguments(p, seed, offset), BLOCK_C=_BLOCK_C, num_warps=4
        )
    return out


def _fake(x: Tensor, p: float, seed: Tensor, offset: Tensor) -> Tensor:
    return contiguous_like(x)


_dropout_op = register_op("dropout", dropout_fwd, _fake)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, p: float, seed: Tensor, offset: Tensor) -> Tensor:
        ctx.p = p
        ctx.save_for_backward(seed, offset)
        out: Tensor = _dropout_op(x, p, seed, offset)
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:  # the same op on the gradient
        return _dropout_op(dout, ctx.p, *ctx.saved_tensors), None, None, None


dropout: Callable[..., Tensor] = _Dropout.apply
