"""Linear + cross-entropy in chunks of rows: all logits never exist at once.

For the logits z = h W^T of a row, lse = log sum exp z, label smoothing s and z-loss c,

    loss = lse - (1 - s) z[target] - s mean(z) + c lse^2
    dz   = (1 + 2 c lse) softmax(z) - (1 - s) onehot(target) - s / V,   dh = dz W,   dW = sum of dz^T h.

The forward pass has all that the gradients need: a row kernel (cross_entropy.py) overwrites a chunk's
logits with d-logits, and these give dh and their part of dW before the next chunk. The backward pass only
scales both by the upstream gradient. cpu/linear_cross_entropy.py is the forward pass without Triton.

Shape letters: N rows, n rows of a chunk, C channels, V vocabulary, P padded vocabulary (rows of the weight).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedgpt.kernels.cpu import linear_cross_entropy as plain
from fusedgpt.kernels.library import register_op
from fusedgpt.kernels.numerics import fp32_sums
from fusedgpt.kernels.reference import on_eager_cpu

_LOGITS_BYTES = 1 << 30  # of a GPU's buffer at most: 8192 rows of 50304 in bf16
_ALIGNMENT = 128  # the buffer's row stride is a multiple of this, so that every row is read 16 bytes per load


class LossOptions(NamedTuple):
    """What turns a row of logits into its loss."""

    vocab_size: int  # V: columns from here on are padding
    ignore_index: int
    label_smoothing: float
    z_loss: float


def rows_per_chunk(P: int, dtype: torch.dtype) -> int:
    """The largest power of two of rows whose logits fit a GPU's buffer."""
    fitting = _LOGITS_BYTES // (_row_stride(P) * dtype.itemsize)
    return 1 << max(fitting.bit_length() - 1, 0)


def _row_stride(P: int) -> int:
    return (P + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT


def extra_bytes(
    N: int, C: int, P: int, dtype: torch.dtype, weight_dtype: torch.dtype, rows: int | None = None
) -> int:
    """Peak memory on a GPU of a forward and backward beyond their inputs, gradients included.

    dtype: hidden's. rows: per chunk. Not counted: a dozen bytes per row of masks, cuBLAS's workspace.
    """
    rows = min(N, rows or rows_per_chunk(P, dtype))
    dhidden, dweight = N * C * dtype.itemsize, P * C * 4
    buffer = rows * _row_stride(P) * dtype.itemsize
    cast_weight = P * C * dtype.itemsize if weight_dtype != dtype else 0
    forward = buffer + cast_weight + dhidden + dweight + N * 4  # losses
    backward = 2 * dhidden + dweight + P * C * weight_dtype.itemsize
    return max(forward, backward)


@fp32_sums()  # dhidden's have V terms, dweight's a chunk's rows
def linear_cross_entropy_fwd(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    row_scale: Tensor | None,  # (N,) fp32, or None for the losses alone
    options: LossOptions,
    rows: int | None = None,  # per chunk; chosen by the vocabulary if None
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,) and, given row_scale, the gradients of sum(row_scale * losses).

    Returns (losses, dhidden (N, C) in hidden's dtype, dweight (P, C)); losses and dweight in fp32, in fp64
    for fp64. Without row_scale the gradients are empty. Matrix products run in hidden's dtype.
    """
    from fusedgpt.kernels.cross_entropy import cross_entropy

    N, C, P = *hidden.shape, len(weight)
    weight, rows = weight.to(hidden.dtype), min(N, rows or rows_per_chunk(P, hidden.dtype))
    buffer = hidden.new_empty(rows, _row_stride(P))
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(N, dtype=wide)
    dhidden = hidden.new_empty((N, C) if row_scale is not None else 0)
    dweight: Tensor | None = None
    for start in range(0, N, max(rows, 1)):
        chunk = slice(start, min(start + rows, N))
        x, scale = hidden[chunk], None if row_scale is None else row_scale[chunk]
        logits = torch.mm(x, weight.T, out=buffer[: len(x), :P])
        cross_entropy(logits, targets[chunk], scale, losses[chunk], options)
        if scale is not None:
            torch.mm(logits, weight, out=dhidden[chunk])
            dweight = _add_weight_gradient(dweight, logits, x)
    if dweight is None:
        dweight = hidden.new_zeros((P, C) if row_scale is not None else 0, dtype=wide)
    return losses, dhidden, dweight


def _add_weight_gradient(dweight: Tensor | None, dlogits: Tensor, hidden: Tensor) -> Tensor:
    """dweight (P, C), None before the first chunk, + dlogits^T (P, n) hidden (n, C), in at least fp32."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if hidden.device.type == "cpu":  # in the interpreter
        found = dlogits.T @ hidden
        return found.to(wide) if dweight is None else dweight.add_(found)
    # cuBLAS adds in its epilogue: a chunk reads and writes dweight once, the minimum.
    beta = 0.0 if dweight is None else 1.0
    if dweight is None:
        dweight = hidden.new_empty(dlogits.shape[1], hidden.shape[1], dtype=wide)
    return torch.addmm(dweight, dlogits.T, hidden, beta=beta, out_dtype=wide, out=dweight)


def check_targets(targets: Tensor, options: LossOptions) -> None:
    """Raises ValueError for a target out of range; on a GPU a device-side assert, so that nothing waits."""
    valid = (targets == options.ignore_index) | ((targets >= 0) & (targets < options.vocab_size))
    expected = f"expected 0 to {options.vocab_size - 1} or ignore_index {options.ignore_index}"
    if targets.device.type != "cpu":
        torch._assert_async(valid.all(), f"targets: {expected}")
    elif not valid.all():
        raise ValueError(f"targets holds {int(targets[~valid][0])}, {expected}")


def _loss_and_gradients(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    row_scale: Tensor | None,  # (N,)
    backend: str,
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum(row_scale * losses), its dhidden, its dweight); without row_scale (losses (N,), empty, empty)."""
    options = LossOptions(vocab_size, ignore_index, label_smoothing, z_loss)
    if backend != "triton" or targets.device.type == "cpu":  # on a GPU the Triton kernel asserts
        check_targets(targets, options)
    row_scale = None if row_scale is None else row_scale.contiguous()
    forward = linear_cross_entropy_fwd if backend == "triton" else plain.linear_cross_entropy_fwd
    losses, dhidden, dweight = forward(hidden, weight, targets.contiguous(), row_scale, options)
    return losses if row_scale is None else losses @ row_scale, dhidden, dweight


def _fake(
    hidden: Tensor, weight: Tensor, _: Tensor, row_scale: Tensor | None, *__: object
) -> tuple[Tensor, Tensor, Tensor]:
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if row_scale is None:
        return hidden.new_empty(len(hidden), dtype=wide), hidden.new_empty(0), hidden.new_empty(0, dtype=wide)
    loss = hidden.new_empty((), dtype=wide)
    return loss, hidden.new_empty(hidden.shape), hidden.new_empty(weight.shape, dtype=wide)


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """x * scale (a scalar) in at least fp32, rounded once to dtype."""
    # As a scalar, scale would be rounded to x's dtype first.
    return torch.mul(x, scale.view(1), out=torch.empty_like(x, dtype=dtype))


def _scaled_fake(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(x, dtype=dtype)


_op = register_op("linear_cross_entropy", _loss_and_gradients, _fake)
_scaled_op = register_op("linear_cross_entropy_scaled", _scaled, _scaled_fake)


class _LinearCrossEntropy(torch.autograd.Function):
    """The loss of _loss_and_gradients, whose gradients are made along with it.

    Without row_scale the losses; the backward pass then makes the logits a second time. So it does on a CPU
    in a second backward pass: the first gives the gradients away, for others to add to them in place.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, row_scale: Tensor | None, *options: Any
    ) -> Tensor:
        """The loss (), or without row_scale the losses (N,); arguments as of _loss_and_gradients."""
        loss: Tensor
        loss, *gradients = _op(hidden, weight, targets, row_scale, *options)
        ctx.options, ctx.weight_dtype, ctx.gradients = options, weight.dtype, None
        gives = options[0] == "reference" and on_eager_cpu(hidden)
        ctx.keeps_gradients = row_scale is not None and not gives
        if ctx.keeps_gradients:
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(hidden, weight, targets, row_scale)
            ctx.gradients = None if row_scale is None else gradients
        return loss

    @staticmethod
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        """dhidden (N, C), dweight (P, C) in their inputs' dtypes; dloss () or, without row_scale, (N,)."""
        none = [None] * (2 + len(ctx.options))
        if ctx.keeps_gradients:
            dhidden, dweight = ctx.saved_tensors
        elif ctx.gradients:
            (dhidden, dweight), ctx.gradients = ctx.gradients, None
        else:
            *inputs, row_scale = ctx.saved_tensors
            _, dhidden, dweight = _op(*inputs, dloss if row_scale is None else row_scale, *ctx.options)
        nothing_to_scale = dloss.ndim == 1 or (not ctx.keeps_gradients and _is_one(dloss))
        if nothing_to_scale:  # as by loss.backward() itself
            return dhidden, dweight.to(ctx.weight_dtype), *none
        # Out of place: after retain_graph=True another backward needs both as they are.
        return (
            _scaled_op(dhidden, dloss, dhidden.dtype),
            _scaled_op(dweight, dloss, ctx.weight_dtype),
            *none,
        )


_loss: Callable[..., Tensor] = _LinearCrossEntropy.apply


def _is_one(x: Tensor) -> bool:
    """Whether x is 1, where that can be seen for nothing."""
    return on_eager_cpu(x) and x.item() == 1.0


def linear_cross_entropy(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    options: LossOptions,
    *,
    reduction: str,
    backend: str,
) -> Tensor:
    """ops.linear_cross_entropy, its forward pass by `backend`, "triton" or "reference"."""
    row_scale = (targets != options.ignore_index).to(torch.promote_types(hidden.dtype, torch.float32))
    divisor: Tensor | None = None
    if reduction == "mean":
        divisor = row_scale.sum().clamp(min=1)
        if hidden.dtype != torch.float16:  # fp16 divides last: its d-logits / count would be denormal
            row_scale, divisor = row_scale / divisor, None
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    in_op = row_scale if needs_grad and reduction != "none" else None
    loss = _loss(hidden, weight, targets, in_op, backend, *options)
    if in_op is None and reduction != "none":
        loss = loss @ row_scale
    return loss if divisor is None else loss / divisor
