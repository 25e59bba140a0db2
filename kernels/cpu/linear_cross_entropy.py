"""The plain-PyTorch path of linear + cross-entropy: chunks of rows, d-logits written over the logits.

For logits z = h W^T, lse = log sum exp z and loss = lse - z[target], the gradient of a row is
softmax(z) - onehot(target): the forward already has all it needs, so each chunk makes its logits, its losses
and, when gradients are wanted, its d-logits dz, dh = dz W and dW += dz^T h before the next chunk takes the
buffer over.

Label smoothing s and z-loss c change a row to

    loss = lse - (1 - s) z[target] - s mean(z) + c lse^2
    dz   = (1 + 2 c lse) softmax(z) - (1 - s) onehot(target) - s / V

Shape letters: N rows, C channels, V vocabulary, P padded vocabulary (rows of the weight).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedgpt.kernels.cpu.linear import matmul_nt
from fusedgpt.kernels.reference import at_least_fp32

_ROWS_PER_MATMUL = 512  # measured: docs/experiments.md, "Chunked linear + cross-entropy"
_SOFTMAX_LOGITS = 1 << 19  # so many at a time, 2 MiB in fp32, stay in a core's cache


@dataclass(frozen=True, kw_only=True)
class LossOptions:
    """What turns a row of logits into its loss."""

    vocab_size: int  # V: columns from here on are padding
    ignore_index: int
    label_smoothing: float
    z_loss: float


def _row_losses(logits: Tensor, targets: Tensor, counted: Tensor, o: LossOptions) -> tuple[Tensor, Tensor]:
    """(loss, lse) of a few rows; `logits` (n, V) fp32 is overwritten with softmax(logits)."""
    target_logit = logits.gather(1, targets[:, None])[:, 0]
    mean_logit = logits.mean(dim=1) if o.label_smoothing else 0.0
    peak = logits.amax(dim=1)
    total = logits.sub_(peak[:, None]).exp_().sum(dim=1)
    logits.div_(total[:, None])
    lse = peak + total.log()
    loss = (
        lse - (1 - o.label_smoothing) * target_logit - o.label_smoothing * mean_logit + o.z_loss * lse * lse
    )
    return torch.where(counted, loss, 0.0), lse


def _to_dlogits(probs: Tensor, lse: Tensor, targets: Tensor, row_scale: Tensor, o: LossOptions) -> Tensor:
    """softmax (n, V) turned in place into d loss / d logits, each row times its row_scale."""
    probs.mul_(((1 + 2 * o.z_loss * lse) * row_scale)[:, None])
    if o.label_smoothing:
        probs.sub_((o.label_smoothing / o.vocab_size * row_scale)[:, None])
    probs.scatter_add_(1, targets[:, None], ((o.label_smoothing - 1) * row_scale)[:, None])
    return probs


def _softmax_chunk(
    logits: Tensor,  # (n, P) in the compute dtype, overwritten with d-logits if row_scale is given
    targets: Tensor,  # (n,)
    row_scale: Tensor | None,  # (n,) d total / d loss of each row
    loss: Tensor,  # (n,) fp32, written
    o: LossOptions,
) -> None:
    """Losses and d-logits of one chunk, a few rows at a time so that the fp32 copy stays in cache."""
    counted = targets != o.ignore_index
    safe_targets = torch.where(counted, targets, 0)
    if row_scale is not None:
        row_scale = torch.where(counted, row_scale, 0.0)
    step = max(1, _SOFTMAX_LOGITS // o.vocab_size)
    for i in range(0, len(logits), step):
        rows = slice(i, i + step)
        wide = logits[rows, : o.vocab_size].to(loss.dtype)  # of fp32 logits a view, so written in place
        loss[rows], lse = _row_losses(wide, safe_targets[rows], counted[rows], o)
        if row_scale is not None:
            dlogits = _to_dlogits(wide, lse, safe_targets[rows], row_scale[rows], o)
            if dlogits.dtype != logits.dtype:
                logits[rows, : o.vocab_size] = dlogits
    logits[:, o.vocab_size :] = 0.0


def linear_cross_entropy_fwd(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    row_scale: Tensor | None,  # (N,) fp32, or None for the losses alone
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses (N,) in fp32 and, given row_scale, the gradients of sum(row_scale * losses).

    Returns (losses, dhidden (N, C) like hidden, dweight (P, C) like weight); without row_scale the gradients
    are empty. Matrix products run in hidden's dtype, everything else in fp32 (fp64 for fp64 inputs); dweight
    is summed over chunks in fp32.
    """
    N, compute_weight = len(hidden), weight.to(hidden.dtype)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    losses = hidden.new_empty(N, dtype=wide)
    dhidden = torch.empty_like(hidden) if row_scale is not None else hidden.new_empty(0)
    dweight = weight.new_empty(0)
    for i in range(0, N, _ROWS_PER_MATMUL):
        rows = slice(i, min(i + _ROWS_PER_MATMUL, N))
        logits = matmul_nt(hidden[rows], compute_weight)
        scale = None if row_scale is None else row_scale[rows]
        _softmax_chunk(logits, targets[rows], scale, losses[rows], options)
        if scale is not None:
            dhidden[rows] = matmul_nt(logits, compute_weight.T)
            part = matmul_nt(logits.T, hidden[rows].T)
            dweight = part.to(wide) if i == 0 else dweight.add_(part)
        del logits  # before the next chunk's are made
    if row_scale is not None:
        dweight = dweight.to(weight.dtype) if N else torch.zeros_like(weight)
    return losses, dhidden, dweight


def check_targets(targets: Tensor, options: LossOptions) -> None:
    """Raises ValueError for a target out of range; on a GPU it is a device-side assert: nothing waits."""
    valid = (targets == options.ignore_index) | ((targets >= 0) & (targets < options.vocab_size))
    expected = f"expected 0 to {options.vocab_size - 1} or ignore_index {options.ignore_index}"
    if targets.device.type != "cpu":
        torch._assert_async(valid.all(), f"targets: {expected}")
    elif not valid.all():
        raise ValueError(f"targets holds {int(targets[~valid][0])}, {expected}")


@torch.library.custom_op("fusedgpt::linear_cross_entropy_torch_rows", mutates_args=())
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
    options = LossOptions(
        vocab_size=vocab_size, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
    )
    check_targets(targets, options)
    return linear_cross_entropy_fwd(hidden, weight, targets, None, options)[0]


@torch.library.custom_op("fusedgpt::linear_cross_entropy_torch_sum", mutates_args=())
def linear_cross_entropy_sum(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    row_scale: Tensor,  # (N,)
    vocab_size: int,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(sum(row_scale * losses), its dhidden, its dweight): the gradients are made along with the loss."""
    options = LossOptions(
        vocab_size=vocab_size, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss
    )
    check_targets(targets, options)
    losses, dhidden, dweight = linear_cross_entropy_fwd(hidden, weight, targets, row_scale, options)
    return losses @ row_scale, dhidden, dweight


@linear_cross_entropy_rows.register_fake
def _(hidden: Tensor, *_: object) -> Tensor:
    return hidden.new_empty(len(hidden), dtype=torch.promote_types(hidden.dtype, torch.float32))


@linear_cross_entropy_sum.register_fake
def _(hidden: Tensor, weight: Tensor, targets: Tensor, row_scale: Tensor, *_: object) -> tuple[Tensor, ...]:
    return row_scale.new_empty(()), torch.empty_like(hidden), torch.empty_like(weight)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])
    ctx.options = inputs[3:]


def _rows_bwd(ctx: Any, dlosses: Tensor) -> tuple[Tensor | None, ...]:
    hidden, weight, targets = ctx.saved_tensors
    _, dhidden, dweight = linear_cross_entropy_sum(hidden, weight, targets, dlosses, *ctx.options)
    return dhidden, dweight, None, None, None, None, None


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*output[1:])


def _sum_bwd(ctx: Any, dtotal: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    if type(dtotal) is Tensor and dtotal.device.type == "cpu" and dtotal.item() == 1.0:
        return dhidden, dweight, *[None] * 6  # loss.backward() itself: spare a pass over dweight
    return _scaled(dhidden, dtotal), _scaled(dweight, dtotal), *[None] * 6


def _scaled(x: Tensor, scale: Tensor) -> Tensor:
    if x.device.type == "cpu":
        return x * scale
    return (at_least_fp32(x) * scale).to(x.dtype)  # a GPU would round the fp32 scalar to x's dtype first


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
    """The plain-PyTorch path of ops.linear_cross_entropy."""
    options = (vocab_size, ignore_index, label_smoothing, z_loss)
    counted = (targets != ignore_index).to(torch.promote_types(hidden.dtype, torch.float32))
    row_scale = counted / counted.sum().clamp(min=1) if reduction == "mean" else counted
    needs_grad = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    if reduction == "none" or not needs_grad:
        losses: Tensor = linear_cross_entropy_rows(hidden, weight, targets, *options)
        return losses if reduction == "none" else losses @ row_scale
    total: Tensor
    total, _, _ = linear_cross_entropy_sum(hidden, weight, targets, row_scale, *options)
    return total
