"""AdamW over all tensors of a model: one launch for the gradient norm, one for the update.

Shape letters: n tensors, K chunks, G parameter groups.

The update is made on fp32 masters; bf16 and fp16 parameters are rounded copies, fp32 ones their own masters.

Both kernels walk a table of addresses (tensor_table.py). A fixed number of programs share the chunks; every
program of the second launch adds the first one's partial sums in the same order, so all agree on norm, clip
coefficient and finiteness without atomics, a third launch or the host.

Bytes per bf16 parameter: the gradient is read twice (2 + 2), master, exp_avg and exp_avg_sq are read and
written (3 x 8), the parameter is written (2): 30.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgpt.kernels.common import TRITON_DTYPES
from fusedgpt.kernels.tensor_table import (
    COLUMNS,
    DECAY,
    EPS,
    EXP_AVG,
    EXP_AVG_SQ,
    GRAD,
    GROUP,
    INV_SQRT_CORRECTION2,
    MASTER,
    NEW_STEP,
    PARAM,
    ROW,
    SIZE,
    STEP,
    STEP_SIZE,
    WEIGHT1,
    WEIGHT2,
    Batch,
    load,
    offsets,
    store,
    typed,
)

PARTIALS = 1024  # programs per launch at most; ranks that add up their partial sums need the same number
_NORM_BLOCK, _BLOCK = 4096, 1024
_NORM_PROGRAMS_PER_SM, _PROGRAMS_PER_SM = 6, 7  # as many as fit by their registers
_REGISTERS = 72  # per thread of the update: 7 programs of 128 threads have 65,536


@triton.jit
def _prepare(table_ptr, hyper_ptr, scalars_ptr, n_tensors, BLOCK: tl.constexpr):
    """Each tensor's scalars of this step; 1 - beta^t in fp64: fp32 would lose its digits at small t."""
    for first in tl.range(0, n_tensors, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < n_tensors
        table = table_ptr + offs * COLUMNS
        step_ptr = tl.load(table + STEP, mask=mask, other=0).to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=mask, other=0.0) + 1.0
        hyper = hyper_ptr + tl.load(table + GROUP, mask=mask, other=0) * COLUMNS
        lr = tl.load(hyper, mask=mask, other=0.0)
        correction1 = 1.0 - tl.exp2(step.to(tl.float64) * tl.load(hyper + 1, mask=mask, other=-1.0))
        correction2 = 1.0 - tl.exp2(step.to(tl.float64) * tl.load(hyper + 2, mask=mask, other=-1.0))
        row = scalars_ptr + offs * COLUMNS
        tl.store(row + STEP_SIZE, lr / correction1, mask=mask)
        tl.store(row + DECAY, lr * tl.load(hyper + 6, mask=mask), mask=mask)
        tl.store(row + INV_SQRT_CORRECTION2, 1.0 / tl.sqrt(correction2), mask=mask)
        tl.store(row + EPS, tl.load(hyper + 5, mask=mask), mask=mask)
        tl.store(row + WEIGHT1, tl.load(hyper + 3, mask=mask), mask=mask)
        tl.store(row + WEIGHT2, tl.load(hyper + 4, mask=mask), mask=mask)
        tl.store(row + NEW_STEP, step, mask=mask)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks"])
def _grad_norm_kernel(
    table_ptr,  # (n, 8) int64: addresses of param, grad, exp_avg, exp_avg_sq, master, step; then size, group
    chunks_ptr,  # (K, 2) int32: tensor, number of the chunk within it
    hyper_ptr,  # (G, 8) fp64, see hyper_row
    scalars_ptr,  # (n, 8) fp32, written: for _adamw_kernel
    partials_ptr,  # (PARTIALS,) fp32, written: sums of squares, one per program
    n_tensors,
    n_chunks,
    GRAD_DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    pid = tl.program_id(0)
    if pid == 0:
        _prepare(table_ptr, hyper_ptr, scalars_ptr, n_tensors, 128)
    WIDE: tl.constexpr = 128 // GRAD_DTYPE.primitive_bitwidth  # elements in 16 bytes, summed by one thread
    PART: tl.constexpr = BLOCK // WIDE
    total = tl.zeros((PART,), tl.float32)
    for chunk in tl.range(pid, n_chunks, tl.num_programs(0)):
        row_ptr = table_ptr + tl.load(chunks_ptr + 2 * chunk) * COLUMNS
        start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
        address, size = tl.load(row_ptr + GRAD), tl.load(row_ptr + SIZE)
        aligned = address % 16 == 0
        for first in tl.range(start, tl.minimum(start + CHUNK, size), BLOCK):
            if aligned & (first + BLOCK <= size):
                grad_ptrs = typed(address, GRAD_DTYPE, True) + first + tl.arange(0, BLOCK)
                grad = tl.load(grad_ptrs).to(tl.float32)
                total += tl.sum(tl.reshape(grad * grad, (PART, WIDE)), axis=1)
            else:
                for part in tl.range(first, tl.minimum(first + BLOCK, size), PART):
                    mask = tl.arange(0, PART) < size - part
                    grad_ptrs = typed(address, GRAD_DTYPE, False) + part + tl.arange(0, PART)
                    grad = tl.load(grad_ptrs, mask=mask, other=0.0).to(tl.float32)
                    total += grad * grad
    tl.store(partials_ptr + pid, tl.sum(total))
    if pid == 0:
        offs = tl.arange(0, PARTIALS)
        tl.store(partials_ptr + offs, 0.0, mask=offs >= tl.num_programs(0))


@triton.jit
def _lerp(a, b, weight):
    """a + weight * (b - a), exact at both ends."""
    near_a = weight < 0.5
    return tl.where(near_a, a, b) + tl.where(near_a, weight, weight - 1.0) * (b - a)


@triton.jit
def _update(
    row_ptr,  # (8,) int64: a row of the table
    scalars_ptr,  # (8,) fp32
    clip,
    first,
    size,
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    FULL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One block's step. The master is rounded once: decay and update are added, then subtracted from it."""
    offs = offsets(32, BLOCK)
    offs_param, offs_grad = offs, offs
    if PARAM_DTYPE.primitive_bitwidth == 16:
        offs_param = offsets(16, BLOCK)
    if GRAD_DTYPE.primitive_bitwidth == 16:
        offs_grad = offsets(16, BLOCK)
    mask = None if FULL else offs < size - first
    mask_param = None if FULL else offs_param < size - first
    mask_grad = None if FULL else offs_grad < size - first
    grad = load(row_ptr + GRAD, first, offs_grad, mask_grad, GRAD_DTYPE, BLOCK) * clip
    master = load(row_ptr + MASTER, first, offs, mask, tl.float32, BLOCK)
    exp_avg = load(row_ptr + EXP_AVG, first, offs, mask, tl.float32, BLOCK)
    exp_avg_sq = load(row_ptr + EXP_AVG_SQ, first, offs, mask, tl.float32, BLOCK)
    exp_avg = _lerp(exp_avg, grad, tl.load(scalars_ptr + WEIGHT1))
    exp_avg_sq = _lerp(exp_avg_sq, grad * grad, tl.load(scalars_ptr + WEIGHT2))
    denominator = tl.sqrt(exp_avg_sq) * tl.load(scalars_ptr + INV_SQRT_CORRECTION2)
    update = exp_avg / (denominator + tl.load(scalars_ptr + EPS)) * tl.load(scalars_ptr + STEP_SIZE)
    master -= master * tl.load(scalars_ptr + DECAY) + update
    store(row_ptr + EXP_AVG, first, offs, mask, exp_avg, tl.float32, BLOCK)
    store(row_ptr + EXP_AVG_SQ, first, offs, mask, exp_avg_sq, tl.float32, BLOCK)
    store(row_ptr + MASTER, first, offs, mask, master, tl.float32, BLOCK)
    if PARAM_DTYPE.primitive_bitwidth == 16:
        store(row_ptr + PARAM, first, offs_param, mask_param, master, PARAM_DTYPE, BLOCK)


@triton.jit
def _advance_steps(table_ptr, scalars_ptr, n_tensors, BLOCK: tl.constexpr):
    for first in tl.range(0, n_tensors, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < n_tensors
        step_ptr = tl.load(table_ptr + offs * COLUMNS + STEP, mask=mask, other=0)
        step = tl.load(scalars_ptr + offs * COLUMNS + NEW_STEP, mask=mask)
        tl.store(step_ptr.to(tl.pointer_type(tl.float32)), step, mask=mask)


@triton.jit(do_not_specialize=["n_tensors", "n_chunks", "n_partials", "report"])
def _adamw_kernel(
    table_ptr,  # (n, 8) int64, as in _grad_norm_kernel
    chunks_ptr,  # (K, 2) int32
    scalars_ptr,  # (n, 8) fp32
    partials_ptr,  # (n_partials,) fp32
    norm_ptr,  # fp32 scalar, written
    skipped_ptr,  # fp32 scalar, written: 1 if the norm is not finite
    skipped_steps_ptr,  # int64 scalar, incremented by skipped
    grad_scale_ptr,  # fp32 scalar, factor by which the gradients are too large
    n_tensors,
    n_chunks,
    n_partials,
    max_norm,
    report,  # 1 in the one launch of a step that writes the three above
    PARAM_DTYPE: tl.constexpr,
    GRAD_DTYPE: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
    PARTIALS: tl.constexpr,
):
    pid = tl.program_id(0)
    squares = tl.zeros((PARTIALS,), tl.float64)
    for segment in tl.range(0, n_partials, PARTIALS):
        squares += tl.load(partials_ptr + segment + tl.arange(0, PARTIALS))
    grad_scale = tl.load(grad_scale_ptr)
    norm = tl.sqrt(tl.sum(squares).to(tl.float32)) / grad_scale
    finite = norm < float("inf")  # false for NaN
    clip = tl.where((max_norm > 0.0) & (norm > max_norm), max_norm / norm, 1.0) / grad_scale
    if (pid == 0) & (report != 0):
        tl.store(norm_ptr, norm)
        tl.store(skipped_ptr, tl.where(finite, 0.0, 1.0))
        tl.store(skipped_steps_ptr, tl.load(skipped_steps_ptr) + tl.where(finite, 0, 1))
    if (pid == 0) & finite:
        _advance_steps(table_ptr, scalars_ptr, n_tensors, 128)
    for done in tl.range(pid, tl.where(finite, n_chunks, 0), tl.num_programs(0)):
        chunk = n_chunks - 1 - done  # the gradients that were read last are still in the L2 cache
        tensor = tl.load(chunks_ptr + 2 * chunk)
        row_ptr, tensor_scalars_ptr = table_ptr + tensor * COLUMNS, scalars_ptr + tensor * COLUMNS
        start = tl.load(chunks_ptr + 2 * chunk + 1).to(tl.int64) * CHUNK
        size = tl.load(row_ptr + SIZE)
        addresses = tl.load(row_ptr + PARAM) | tl.load(row_ptr + GRAD) | tl.load(row_ptr + MASTER)
        addresses |= tl.load(row_ptr + EXP_AVG) | tl.load(row_ptr + EXP_AVG_SQ)
        aligned = addresses % 16 == 0
        for first in tl.range(start, tl.minimum(start + CHUNK, size), BLOCK):
            if aligned & (first + BLOCK <= size):
                _update(
                    row_ptr, tensor_scalars_ptr, clip, first, size,
                    PARAM_DTYPE, GRAD_DTYPE, True, BLOCK,
                )  # fmt: skip
            else:
                for part in tl.range(first, tl.minimum(first + BLOCK, size), ROW):
                    _update(
                        row_ptr, tensor_scalars_ptr, clip, part, size,
                        PARAM_DTYPE, GRAD_DTYPE, False, ROW,
                    )  # fmt: skip


def hyper_row(lr: float, betas: tuple[float, float], eps: float, weight_decay: float) -> list[float]:
    """A parameter group's row of hyper (G, 8) fp64: what the kernels read, lr first."""
    logs = [math.log2(beta) if beta > 0.0 else -math.inf for beta in betas]
    return [lr, *logs, 1.0 - betas[0], 1.0 - betas[1], eps, weight_decay, 0.0]


def grad_norm(batch: Batch, hyper: Tensor, partials: Tensor) -> None:
    """Launch: partials (PARTIALS,) fp32 whose sum is the squared norm of the gradients, and adamw's scalars.

    hyper: (G, 8) fp64, see hyper_row. The same bits every time.
    """
    batch.launch(
        _grad_norm_kernel,
        _NORM_PROGRAMS_PER_SM,
        most=PARTIALS,
        hyper_ptr=hyper,
        partials_ptr=partials,
        n_tensors=len(batch.table),
        GRAD_DTYPE=TRITON_DTYPES[batch.grad_dtype],
        BLOCK=_NORM_BLOCK,
        PARTIALS=PARTIALS,
        num_warps=8,
    )


def adamw(
    batch: Batch,
    partials: Tensor,
    norm: Tensor,
    skipped: Tensor,
    skipped_steps: Tensor,
    *,
    max_norm: float = 0.0,
    grad_scale: Tensor | None = None,
    report: bool = True,
) -> None:
    """Launch, after grad_norm: one AdamW step with the gradient scaled to a norm of at most max_norm > 0.

    partials: those of all batches of the step, a multiple of PARTIALS; where one is not finite, batches stay
    as they are.
    grad_scale: fp32 scalar by which the gradients are too large (loss scaling), None for 1.
    Written if `report`: norm (fp32 scalar, before clipping), skipped (fp32 scalar, 1 or 0), which is added to
    skipped_steps (int64 scalar). Source: Loshchilov and Hutter 2019, algorithm 2.
    """
    batch.launch(
        _adamw_kernel,
        _PROGRAMS_PER_SM,
        partials_ptr=partials,
        norm_ptr=norm,
        skipped_ptr=skipped,
        skipped_steps_ptr=skipped_steps,
        grad_scale_ptr=torch.ones_like(norm) if grad_scale is None else grad_scale,
        n_tensors=len(batch.table),
        n_partials=partials.numel(),
        max_norm=float(max_norm),
        report=int(report),
        PARAM_DTYPE=TRITON_DTYPES[batch.param_dtype],
        GRAD_DTYPE=TRITON_DTYPES[batch.grad_dtype],
        BLOCK=_BLOCK,
        PARTIALS=PARTIALS,
        num_warps=_BLOCK // 256,  # a row each
        maxnreg=_REGISTERS,
    )
