"""Softmax cross-entropy of rows of logits in plain PyTorch: losses, then d-logits in place of the logits.

The formulas are in linear_cross_entropy.py.
Shape letters: n rows of a chunk, V vocabulary, P padded vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fusedgpt.kernels.linear_cross_entropy import LossOptions

_SOFTMAX_LOGITS = 1 << 19  # at a time: 2 MiB in fp32, which stay in a core's cache


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


def cross_entropy(
    logits: Tensor,  # (n, P), overwritten with d-logits if row_scale is given
    targets: Tensor,  # (n,)
    row_scale: Tensor | None,  # (n,) fp32
    losses: Tensor,  # (n,) fp32, written
    options: LossOptions,
) -> None:
    """The row kernel: losses and d-logits, a few rows at a time so that their fp32 copy stays in cache."""
    V, counted = options.vocab_size, targets != options.ignore_index
    safe_targets = torch.where(counted, targets, 0)
    if row_scale is not None:
        row_scale = torch.where(counted, row_scale, 0.0)
    step = max(1, _SOFTMAX_LOGITS // V)
    for i in range(0, len(logits), step):
        rows = slice(i, i + step)
        wide = logits[rows, :V].to(losses.dtype)  # of fp32 logits a view, so written in place
        losses[rows], lse = _row_losses(wide, safe_targets[rows], counted[rows], options)
        if row_scale is not None:
            dlogits = _to_dlogits(wide, lse, safe_targets[rows], row_scale[rows], options)
            if dlogits.dtype != logits.dtype:
                logits[rows, :V] = dlogits
    logits[:, V:] = 0.0
