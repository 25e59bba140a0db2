"""Linear + cross-entropy in chunks of rows: losses and d-logits from one kernel, in place over the logits.

For logits z = h W^T of a row, lse = log sum exp z, label smoothing s and z-loss c,

    loss = lse - (1 - s) z[target] - s mean(z) + c lse^2
    dz   = (1 + 2 c lse) softmax(z) - (1 - s) onehot(target) - s / V,   dh = dz W,   dW = sum of dz^T h.

Gradients are made along with the loss, before the next chunk takes the buffer over. So the upstream gradient
and the mean's division are not known to them yet: both are applied in the backward, in fp32, by the pass
that rounds dW to the weight's dtype anyway. That also keeps d-logits clear of fp16's underflow.
linear_cross_entropy_torch.py is the same without Triton.

Shape letters: N rows, n rows of a chunk, C channels, V vocabulary, P padded vocabulary (rows of the weight),
S logits from row to row in the buffer.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgpt.kernels.cpu.linear_cross_entropy import LossOptions, check_targets

_LOGITS_BYTES = 1 << 29  # of the buffer at most: 4096 rows of 50304 in bf16
_ALIGNMENT = 128  # logits from row to row are a multiple of this, so that every row is read 16 bytes a load
_BLOCK_V = (256, 8192)  # least and most columns at once, 8 a thread: 1 to 32 warps
_SCALE_BLOCK = 4096
_LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-1e38)  # below any logit; -inf would give inf - inf


@triton.jit
def _columns(start, BLOCK_V: tl.constexpr):
    """Column numbers (BLOCK_V // 8, 8) from `start` on: a group of 8 is one thread's 16 bytes of bf16."""
    return start + tl.arange(0, BLOCK_V // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]


@triton.jit
def _exp(x):
    return tl.exp2(x * _LOG2_E)  # tl.exp would spend two more instructions on denormal results


@triton.jit
def _add_exponentials(z, peak, total):
    """Each group's (max z, sum of exp(z - max z)) so far, with its next 8 logits."""
    higher = tl.maximum(peak, tl.max(z, axis=1))
    return higher, total * _exp(peak - higher) + tl.sum(_exp(z - higher[:, None]), axis=1)


@triton.jit
def _row_statistics(row_ptr, S, V, BLOCK_V: tl.constexpr, HAS_SMOOTHING: tl.constexpr):
    """(max z, sum of exp(z - max z), sum of z) of one row's V logits.

    Groups of 8 columns keep statistics of their own until the end: no warp waits for another in the loop.
    """
    peak = tl.full((BLOCK_V // 8,), _LOWEST, tl.float32)
    total = tl.zeros((BLOCK_V // 8,), tl.float32)
    z_sum = tl.zeros((BLOCK_V // 8,), tl.float32)
    full = V // BLOCK_V * BLOCK_V  # so far no masks are needed: they would double the instructions
    for start in range(0, full, BLOCK_V):
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
    return row_peak, tl.sum(total * _exp(peak - row_peak), axis=0), tl.sum(z_sum, axis=0)


@triton.jit
def _dlogits(z, offs_v, target, peak, factor, hot, smooth, HAS_SMOOTHING: tl.constexpr):
    """The gradient of a block of logits: factor * exp(z - peak) - smooth, and - hot at the target."""
    dz = _exp(z - peak) * factor
    if HAS_SMOOTHING:
        dz -= smooth
    return tl.where(offs_v == target, dz - hot, dz)


# debug=True keeps the assert in the kernel, where it costs no register and no launch of its own.
@triton.jit(do_not_specialize=["ignore_index"], debug=True)
def _linear_cross_entropy_kernel(
    logits_ptr,  # (n, S), of a row V are logits; with HAS_GRADIENT overwritten with d-logits, 0 beyond V
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
            for start in range(0, full, BLOCK_V):  # just read, so most of it comes from the L2 cache
                offs_v = _columns(start, BLOCK_V)
                z = tl.load(row_ptr + offs_v).to(tl.float32)
                dz = _dlogits(z, offs_v, target_column, peak, factor, hot, smooth, HAS_SMOOTHING)
                tl.store(row_ptr + offs_v, dz)
            for start in range(full, S, BLOCK_V):
                offs_v = _columns(start, BLOCK_V)
                z = tl.load(row_ptr + offs_v, mask=offs_v < S, other=0.0).to(tl.float32)
                dz = _dlogits(z, offs_v, target_column, peak, factor, hot, smooth, HAS_SMOOTHING)
                tl.store(row_ptr + offs_v, tl.where(offs_v < V, dz, 0.0), mask=offs_v < S)


@triton.jit
def _scale_kernel(
    x_ptr,  # n elements
    scale_ptr,  # fp32 scalar
    out_ptr,  # n elements
    n,
    BLOCK: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < n - start
    x = tl.load(x_ptr + start + offs, mask=mask).to(tl.float32)
    tl.store(out_ptr + start + offs, x * tl.load(scale_ptr), mask=mask)


def rows_per_chunk(P: int, dtype: torch.dtype) -> int:
    """The largest power of two of rows whose logits fit the buffer."""
    fitting = _LOGITS_BYTES // (_row_stride(P) * dtype.itemsize)
    return 1 << max(fitting.bit_length() - 1, 0)


def _row_stride(P: int) -> int:
    return (P + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def extra_bytes(
    N: int, C: int, P: int, dtype: torch.dtype, weight_dtype: torch.dtype, rows: int | None = None
) -> int:
    """Memory that a forward and backward take beyond their inputs, at the worst moment, gradients included.

    dtype: hidden's. rows: of a chunk. Not counted: a dozen bytes a row of ops.linear_cross_entropy, cuBLAS.
    """
    rows = min(N, rows or rows_per_chunk(P, dtype))
    dhidden, dweight = N * C * dtype.itemsize, P * C * 4
    buffer = rows * _row_stride(P) * dtype.itemsize
    cast_weight = P * C * dtype.itemsize if weight_dtype != dtype else 0
    forward = buffer + cast_weight + dhidden + dweight + N * 4  # losses
    backward = 2 * dhidden + dweight + P * C * weight_dtype.itemsize
    return max(forward, backward)


def linear_cross_entropy_fwd(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    row_scale: Tensor | None,  # (N,) fp32, or None for the losses alone
    options: LossOptions,
    rows: int | None = None,  # of a chunk; by rows_per_chunk if None
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch: losses (N,) in fp32 and, given row_scale, the gradients of sum(row_scale * losses).

    Returns (losses, dhidden (N, C) in hidden's dtype, dweight (P, C) in fp32); without row_scale the
    gradients are empty. Targets are checked on a GPU only, by a device-side assert.
    """
    N, C, P = *hidden.shape, len(weight)
    rows = min(N, rows or rows_per_chunk(P, hidden.dtype))
    compute_weight = weight.to(hidden.dtype)
    buffer = hidden.new_empty(rows, _row_stride(P))
    losses = hidden.new_empty(N, dtype=torch.float32)
    dhidden = hidden.new_empty((N, C) if row_scale is not None else 0)
    dweight = hidden.new_empty((P, C) if row_scale is not None else 0, dtype=torch.float32)
    for start in range(0, N, max(rows, 1)):
        chunk = slice(start, min(start + rows, N))
        x, logits = hidden[chunk], buffer[: chunk.stop - start, :P]
        torch.mm(x, compute_weight.T, out=logits)
        scale = None if row_scale is None else row_scale[chunk]
        _softmax(logits, targets[chunk], scale, losses[chunk], options)
        if row_scale is not None:
            torch.mm(logits, compute_weight, out=dhidden[chunk])
            _accumulate(dweight, logits, x, first=start == 0)
    return losses, dhidden, dweight if N else dweight.zero_()


def _softmax(
    logits: Tensor,  # (n, P) of a buffer (n, S), overwritten with d-logits if row_scale is given
    targets: Tensor,  # (n,)
    row_scale: Tensor | None,  # (n,) fp32
    losses: Tensor,  # (n,) fp32, written
    o: LossOptions,
) -> None:
    """Launch the kernel on one chunk, one program a row.

    With 1024 threads a row, a multiprocessor works on 2 rows: the 264 rows of 100 KB that an H100 has in
    flight stay in its L2 cache between the two passes. 2048 threads have 32 registers each; the kernel fits.
    """
    S = logits.stride(0)
    BLOCK_V = min(max(triton.next_power_of_2(S), _BLOCK_V[0]), _BLOCK_V[1])
    with torch.cuda.device_of(logits):
        _linear_cross_entropy_kernel[(len(logits),)](
            logits,
            targets,
            row_scale,
            losses,
            S,
            o.vocab_size,
            o.ignore_index,
            o.label_smoothing,
            o.z_loss,
            BLOCK_V=BLOCK_V,
            HAS_GRADIENT=row_scale is not None,
            HAS_SMOOTHING=o.label_smoothing > 0.0,
            num_warps=BLOCK_V // 256,
            maxnreg=32 if logits.element_size() == 2 else None,
            sanitize_overflow=False,  # of debug=True only the assert is wanted
        )


def _accumulate(dweight: Tensor, dlogits: Tensor, hidden: Tensor, *, first: bool) -> None:
    """dweight (P, C) in fp32 = (0 if first, else dweight) + dlogits^T hidden, never rounded in between."""
    beta = 0.0 if first else 1.0
    if dweight.device.type == "cuda":
        # cuBLAS adds in its epilogue: a chunk reads and writes dweight once, the least there is.
        torch.addmm(dweight, dlogits.T, hidden, beta=beta, out_dtype=torch.float32, out=dweight)
    else:  # out_dtype is for CUDA only
        dweight.addmm_(dlogits.T.float(), hidden.float(), beta=beta)


def linear_cross_entropy_bwd(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Launch: x * scale (fp32 scalar) in fp32, rounded once to dtype. x: contiguous."""
    out = torch.empty_like(x, dtype=dtype)
    if x.numel():
        with torch.cuda.device_of(x):
            grid = (triton.cdiv(x.numel(), _SCALE_BLOCK),)
            _scale_kernel[grid](x, scale, out, x.numel(), BLOCK=_SCALE_BLOCK, num_warps=8)
    return out


@torch.library.custom_op("fusedgpt::linear_cross_entropy_rows", mutates_args=())
def linear_cross_entropy_rows(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The loss of every row (N,); its backward makes the logits a second time."""
    options = _options(targets, vocab_size, ignore_index, label_smoothing, z_loss)
    return linear_cross_entropy_fwd(hidden, weight, targets.contiguous(), None, options)[0]


@torch.library.custom_op("fusedgpt::linear_cross_entropy_sum", mutates_args=())
def linear_cross_entropy_sum(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    row_scale: Tensor,  # (N,) fp32
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum(row_scale * losses), its dhidden, its dweight in fp32): gradients are made along with the loss."""
    options = _options(targets, vocab_size, ignore_index, label_smoothing, z_loss)
    losses, dhidden, dweight = linear_cross_entropy_fwd(
        hidden, weight, targets.contiguous(), row_scale.contiguous(), options
    )
    return (losses * row_scale).sum(), dhidden, dweight


@torch.library.custom_op("fusedgpt::linear_cross_entropy_scaled", mutates_args=())
def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return linear_cross_entropy_bwd(x, scale, dtype)


def _options(
    targets: Tensor, vocab_size: int, ignore_index: int, label_smoothing: float, z_loss: float
) -> LossOptions:
    options = LossOptions(
        vocab_size=vocab_size, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
    )
    if targets.device.type == "cpu":  # on a GPU the kernel asserts
        check_targets(targets, options)
    return options


@linear_cross_entropy_rows.register_fake
def _(hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(len(hidden), dtype=torch.float32)


@linear_cross_entropy_sum.register_fake
def _(hidden: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, ...]:
    return (
        hidden.new_empty((), dtype=torch.float32),
        hidden.new_empty(hidden.shape),
        weight.new_empty(weight.shape, dtype=torch.float32),
    )


@_scaled.register_fake
def _(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _rows_bwd(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, targets = ctx.saved_tensors
    _, dhidden, dweight = linear_cross_entropy_sum(hidden, weight, targets, dlosses, *ctx.options)
    return dhidden, dweight.to(weight.dtype), None, None, None, None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])
    ctx.weight_dtype = inputs[1].dtype


def _sum_bwd(ctx: Any, dtotal: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    # Out of place: after retain_graph=True another backward needs both as they are.
    dhidden = _scaled(dhidden, dtotal, dhidden.dtype)
    return dhidden, _scaled(dweight, dtotal, ctx.weight_dtype), *[None] * 6


linear_cross_entropy_rows.register_autograd(_rows_bwd, setup_context=_save_rows)
linear_cross_entropy_sum.register_autograd(_sum_bwd, setup_context=_save_sum)


def linear_cross_entropy(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    *,
    vocab_size: int,
    ignore_index: int,
    reduction: str,
    label_smoothing: float,
    z_loss: float,
) -> Tensor:
    """The Triton path of ops.linear_cross_entropy."""
    options = (vocab_size, ignore_index, label_smoothing, z_loss)
    if reduction == "none":
        losses: Tensor = linear_cross_entropy_rows(hidden, weight, targets, *options)
        return losses
    counted = (targets != ignore_index).float()
    total: Tensor
    if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
        total, _, _ = linear_cross_entropy_sum(hidden, weight, targets, counted, *options)
    else:
        total = linear_cross_entropy_rows(hidden, weight, targets, *options).sum()
    return total / counted.sum().clamp(min=1.0) if reduction == "mean" else total
