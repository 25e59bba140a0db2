"""Softmax cross-entropy of rows of logits in Triton: losses and d-logits from one kernel, in place.

The formulas are in linear_cross_entropy.py.
Shape letters: n rows of a chunk, V vocabulary, P padded vocabulary, S row stride of the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgpt.kernels.common import LOWEST, exp
from fusedgpt.kernels.linear_cross_entropy import LossOptions

_FEWEST_COLUMNS, _MOST_BYTES = 256, 1 << 14  # per iteration, 8 columns a thread; 32 KiB of fp32 spill


@triton.jit
def _columns(start, BLOCK_V: tl.constexpr):
    """Column numbers (BLOCK_V // 8, 8) from `start` on: a group of 8 is one thread's 16 bytes of bf16."""
    return start + tl.arange(0, BLOCK_V // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _add_exponentials(z, peak, total):
    """Each group's (max z, sum of exp(z - max z)) so far, with its next 8 logits."""
    higher = tl.maximum(peak, tl.max(z, axis=1))
    return higher, total * exp(peak - higher) + tl.sum(exp(z - higher[:, None]), axis=1)


@triton.jit
def _row_statistics(row_ptr, S, V, BLOCK_V: tl.constexpr, HAS_SMOOTHING: tl.constexpr):
    """(max z, sum of exp(z - max z), sum of z) of one row's V logits.

    Groups of 8 columns keep statistics of their own until the end: no warp waits for another in the loop.
    """
    peak = tl.full((BLOCK_V // 8,), LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V // 8,), tl.float32)
    z_sum = tl.zeros((BLOCK_V // 8,), tl.float32)
    full = V // BLOCK_V * BLOCK_V  # so far no masks are needed: they would double the instructions
    UNROLL: tl.constexpr = 32 // row_ptr.dtype.element_ty.primitive_bitwidth  # 32 bytes of loads per thread
    for start in tl.range(0, full, BLOCK_V, loop_unroll_factor=UNROLL):
        z = tl.load(row_ptr + _columns(start, BLOCK_V)).to(tl.float32)
        peak, total = _add_exponentials(z, peak, total)
        if HAS_SMOOTHING:
            z_sum += tl.sum(z, axis=1)
    for start in range(full, V, BLOCK_V):
        offs_v = _columns(start, BLOCK_V)
        z = tl.load(row_ptr + offs_v, mask=offs_v < S, other=0.0).to(tl.float32)  # < V would load singly
        peak, total = _add_exponentials(tl.where(offs_v < V, z, float("-inf")), peak, total)
        if HAS_SMOOTHING:
            z_sum += tl.sum(tl.where(offs_v < V, z, 0.0), axis=1)
    row_peak = tl.max(peak, axis=0)
    return row_peak, tl.sum(total * exp(peak - row_peak), axis=0), tl.sum(z_sum, axis=0)


@triton.jit
def _dlogits(z, offs_v, target, peak, factor, hot, smooth, HAS_SMOOTHING: tl.constexpr):
    """The gradient of a block of logits: factor * exp(z - peak) - smooth, and - hot at the target."""
    dz = exp(z - peak) * factor
    if HAS_SMOOTHING:
        dz -= smooth
    return tl.where(offs_v == target, dz - hot, dz)


# debug=True keeps the assert in the kernel, where it costs no register and no launch of its own.
@triton.jit(do_not_specialize=["ignore_index"], debug=True)
def _cross_entropy_kernel(
    logits_ptr,  # (n, S), the first V of a row; with HAS_GRADIENT overwritten with d-logits, 0 beyond V
    targets_ptr,  # (n,) int64
    row_scale_ptr,  # (n,) fp32 d total / d loss of each row, None without HAS_GRADIENT
    losses_ptr,  # (n,) fp32
    S,
    V,
    ignore_index,
    label_smoothing,
    z_loss,
    BLOCK_V: tl.constexpr,
    HAS_GRADIENT: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * S
    target = tl.load(targets_ptr + row)
    if target == ignore_index:
        tl.store(losses_ptr + row, 0.0)
        if HAS_GRADIENT:
            zeros = tl.zeros((BLOCK_V // 8, 8), logits_ptr.dtype.element_ty)
            for start in range(0, S, BLOCK_V):
                offs_v = _columns(start, BLOCK_V)
                tl.store(row_ptr + offs_v, zeros, mask=offs_v < S)
    else:
        tl.device_assert((target >= 0) & (target < V), "targets: expected 0 to V-1 or ignore_index")
        target_logit = tl.load(row_ptr + target).to(tl.float32)
        peak, total, z_sum = _row_statistics(row_ptr, S, V, BLOCK_V, HAS_SMOOTHING)
        log_total = tl.log(total)
        lse = peak + log_total
        wanted = target_logit
        if HAS_SMOOTHING:
            wanted += label_smoothing * (z_sum / V - target_logit)
        # Not lse - wanted: with a large peak lse has lost the digits of a small loss.
        tl.store(losses_ptr + row, log_total + (peak - wanted) + z_loss * lse * lse)
        if HAS_GRADIENT:
            row_scale = tl.load(row_scale_ptr + row)
            factor = (1.0 + 2.0 * z_loss * lse) * row_scale / total
            hot = (1.0 - label_smoothing) * row_scale
            smooth = label_smoothing * row_scale / V
            target_column = target.to(tl.int32)  # as the columns are
            full = V // BLOCK_V * BLOCK_V
            for start in range(full, S, BLOCK_V):
                offs_v = _columns(start, BLOCK_V)
                z = tl.load(row_ptr + offs_v, mask=offs_v < S, other=0.0).to(tl.float32)
                dz = _dlogits(z, offs_v, target_column, peak, factor, hot, smooth, HAS_SMOOTHING)
                tl.store(row_ptr + offs_v, tl.where(offs_v < V, dz, 0.0), mask=offs_v < S)
            for done in range(0, full, BLOCK_V):  # backwards: what was read last is still in a cache
                offs_v = _columns(full - BLOCK_V - done, BLOCK_V)
                z = tl.load(row_ptr + offs_v).to(tl.float32)
                dz = _dlogits(z, offs_v, target_column, peak, factor, hot, smooth, HAS_SMOOTHING)
                tl.store(row_ptr + offs_v, dz)


def cross_entropy(
    logits: Tensor,  # (n, P) of a buffer (n, S), overwritten with d-logits if row_scale is given
    targets: Tensor,  # (n,) int64
    row_scale: Tensor | None,  # (n,) fp32
    losses: Tensor,  # (n,) fp32, written
    options: LossOptions,
) -> None:
    """The row kernel: launches one program per row. On a GPU a target out of range is a device-side assert.

    With 1024 threads per row, a multiprocessor works on 2 rows, of 100 KB each, which its L1 or the L2 cache
    keeps between the two passes. 2048 threads have 32 registers each; the kernel fits.
    """
    S = logits.stride(0)
    most_columns = _MOST_BYTES // logits.element_size()
    BLOCK_V = min(max(triton.next_power_of_2(S), _FEWEST_COLUMNS), most_columns)
    with torch.cuda.device_of(logits):
        _cross_entropy_kernel[(len(logits),)](
            logits,
            targets,
            row_scale,
            losses,
            S,
            *options,
            BLOCK_V=BLOCK_V,
            HAS_GRADIENT=row_scale is not None,
            HAS_SMOOTHING=options.label_smoothing > 0.0,
            num_warps=BLOCK_V // 256,
            maxnreg=32 if logits.element_size() == 2 else None,
            sanitize_overflow=False,  # debug=True is meant for the assert alone
        )
