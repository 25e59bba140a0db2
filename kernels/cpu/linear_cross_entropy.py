"""Linear + cross-entropy in plain PyTorch, made for CPUs; the formulas are in ../linear_cross_entropy.py.

A chunk's logits are made transposed, (P, n): two of the three matrix products are faster so in bf16
(docs/experiments.md, "Transposed logits").

Shape letters: N rows, n rows of a chunk, C channels, V vocabulary, P padded vocabulary (rows of the weight).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fusedgpt.kernels.cpu.linear import matmul_nt, matmul_tn
from fusedgpt.kernels.numerics import fp32_sums

if TYPE_CHECKING:
    from fusedgpt.kernels.linear_cross_entropy import LossOptions

ROWS = 1024  # per chunk; docs/experiments.md, "Chunked linear + cross-entropy"
_SOFTMAX_LOGITS = 1 << 19  # at a time: 2 MiB in fp32, which stay in a core's cache
_LARGEST_UNIT = 1e25  # of exponentials above the target's logit: of a loss of 57


@fp32_sums()
def linear_cross_entropy_fwd(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    row_scale: Tensor | None,  # (N,) fp32, or None for the losses alone
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """See ../linear_cross_entropy.py."""
    N, C, P = *hidden.shape, len(weight)
    wide = torch.promote_types(hidden.dtype, torch.float32)
    weight, has_gradient = weight.to(hidden.dtype), row_scale is not None
    losses = hidden.new_empty(N, dtype=wide)
    dhidden = hidden.new_empty((N, C) if has_gradient else 0)
    dweight: Tensor | None = None
    for start in range(0, N, ROWS):
        chunk = slice(start, start + ROWS)
        x, scale = hidden[chunk], None if row_scale is None else row_scale[chunk]
        logits, losses[chunk], unit = _chunk(weight, x, targets[chunk], options, has_gradient=has_gradient)
        if scale is not None:
            scale = (torch.where(targets[chunk] == options.ignore_index, 0.0, scale) / unit)[:, None]
            dhidden[chunk] = matmul_tn(logits, weight) * scale
            dweight = matmul_nt(logits, (x * scale).to(x.dtype).T, add_to=dweight).to(wide)
        del logits  # before the next chunk's are made
    if dweight is None:
        dweight = hidden.new_zeros((P, C) if has_gradient else 0, dtype=wide)
    return losses, dhidden, dweight


def _chunk(
    weight: Tensor, x: Tensor, targets: Tensor, o: LossOptions, *, has_gradient: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(logits (P, n) or unit * d loss / d logits, losses (n,), units (n,)); see _losses."""
    narrow, waits = x.dtype == torch.float16, x.device.type != "cpu"
    if not (narrow or waits):
        logits = matmul_nt(weight, x)
        losses, unit = _losses(logits, targets, o, "target", has_gradient=has_gradient)
        if (unit < _LARGEST_UNIT).all():
            return logits, losses, unit
        del logits
    logits = matmul_nt(weight, x)
    return logits, *_losses(logits, targets, o, "largest", has_gradient=has_gradient)


def _losses(
    logits: Tensor, targets: Tensor, o: LossOptions, origin: str, *, has_gradient: bool
) -> tuple[Tensor, Tensor]:
    """(losses (n,), units (n,)); logits (P, n) become unit * d loss / d logits if that is asked for.

    A column's unit is its sum of exponentials: the division is left for n rows of C channels. fp16 is too
    narrow for that, so its unit is 1. Exponentials are taken of what a logit has above its column's `origin`:
    the "target"'s logit, which takes no pass over all to find, or the "largest", which never overflows.
    """
    counted = targets != o.ignore_index
    logits[o.vocab_size :] = 0.0
    logits = logits[: o.vocab_size]
    target = torch.where(counted, targets, 0), torch.arange(len(targets), device=targets.device)
    at_target = logits[target].to(torch.promote_types(logits.dtype, torch.float32))
    peak = at_target if origin == "target" else logits.amax(0).to(at_target.dtype)
    total, mean = torch.zeros_like(peak), torch.zeros_like(peak)
    blocks = logits.split(max(1, _SOFTMAX_LOGITS // len(peak)))
    for block in blocks:
        exps = block.to(peak.dtype)  # fp32 blocks themselves, so written in place
        if o.label_smoothing:
            mean += exps.sum(0) / o.vocab_size
        total += exps.sub_(peak).exp_().sum(0)
        if has_gradient:
            block.copy_(exps)
    lse, narrow = peak + total.log(), logits.dtype == torch.float16
    unit = torch.ones_like(total) if narrow else total
    if has_gradient:
        factor, shift = (1 + 2 * o.z_loss * lse) * unit / total, o.label_smoothing / o.vocab_size * unit
        if narrow or o.z_loss or o.label_smoothing:
            for block in blocks:
                block.copy_(block.to(peak.dtype).mul_(factor).sub_(shift))
        d_target = (at_target - peak).exp() * factor - shift - (1 - o.label_smoothing) * unit
        logits[target] = d_target.to(logits.dtype)  # scatter_ would copy all logits, twice
    loss = lse - (1 - o.label_smoothing) * at_target - o.label_smoothing * mean + o.z_loss * lse * lse
    return torch.where(counted, loss, 0.0), unit
