"""Dropout for a CPU, its masks by NumPy's Philox: compiled code, where the kernels' takes 70 ops of torch.

As there, a mask is a pure function of (seed, offset), drawn again where activations are recomputed, in blocks
as long as the kernels'. Its bits are Philox-4x64-10's; FUSEDGPT_KERNELS=reference asks for the kernels' bits
(docs/experiments.md, "NumPy's Philox").
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedgpt.kernels import reference
from fusedgpt.kernels.library import register_op
from fusedgpt.kernels.reference import on_eager_cpu


def _takes_numpy(offset: Tensor) -> bool:
    return offset.device.type == "cpu" and os.environ.get("FUSEDGPT_KERNELS", "auto") != "reference"


def _random_words(n: int, seed: int, start: int) -> NDArray[np.uint64]:
    """Words start .. start + n - 1 of the stream of `seed` (n,).

    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"; numpy.random.Philox.
    """
    block, skipped = divmod(start % (1 << 64), 4)
    words: NDArray[np.uint64] = np.random.Philox(key=seed % (1 << 64), counter=block).random_raw(skipped + n)
    return words[skipped:]


def _dropout_mask(shape: Sequence[int], p: float, seed: Tensor, offset: Tensor) -> Tensor:
    """reference.dropout_mask: each row (last dimension, C) starts a new block of eight 16-bit lanes."""
    *batch, C = shape or [1]
    blocks_per_row = reference.dropout_blocks(C)
    rows = math.prod(batch)
    words = _random_words(2 * rows * blocks_per_row, int(seed), 2 * int(offset))
    lanes = words.view(np.int16).reshape(rows, blocks_per_row * 8)[:, :C]  # uniform in [-32768, 32767]
    return torch.from_numpy(lanes >= round(p * 65536) - 32768).view(list(shape))


def _attention_dropout_mask(shape: Sequence[int], p: float, seed: Tensor, offset: Tensor) -> Tensor:
    """reference.attention_dropout_mask: each head starts a new block, a query takes a row of 8-bit lanes."""
    *heads, T, _ = shape
    words = _random_words(math.prod(heads) * reference.attention_dropout_blocks(T), int(seed), int(offset))
    lanes = words.view(np.uint8).reshape(*heads, -1, (T + 31) // 32 * 32)[..., :T, :T]
    return torch.from_numpy(lanes >= reference.dropout_threshold(p))


def _fake(shape: Sequence[int], p: float, seed: Tensor, offset: Tensor) -> Tensor:
    return offset.new_empty(shape, dtype=torch.bool)


_dropout_mask_op = register_op("cpu_dropout_mask", _dropout_mask, _fake)
_attention_dropout_mask_op = register_op("cpu_attention_dropout_mask", _attention_dropout_mask, _fake)


def dropout_mask(shape: torch.Size, p: float, seed: Tensor, offset: Tensor) -> Tensor:
    """What dropout keeps (bool, `shape`), p in steps of 1/65536; see reference.dropout_mask."""
    draw = _dropout_mask_op if _takes_numpy(offset) else reference.dropout_mask
    mask: Tensor = draw(shape, p, seed, offset)
    return mask


def attention_dropout_mask(shape: torch.Size, p: float, seed: Tensor, offset: Tensor) -> Tensor:
    """The attention weights (B, H, T, T) that dropout keeps; see reference.attention_dropout_mask."""
    draw = _attention_dropout_mask_op if _takes_numpy(offset) else reference.attention_dropout_mask
    mask: Tensor = draw(shape, p, seed, offset)
    return mask


def dropout(x: Tensor, p: float, seed: Tensor, offset: Tensor) -> Tensor:
    """See ops.dropout; p > 0."""
    if not on_eager_cpu(x):
        return reference.dropout(x, p, seed, offset, dropout_mask)
    y: Tensor = _Dropout.apply(x, _kept(x, p, seed, offset), 1.0 / (1.0 - p))
    return y


def add_dropout(residual: Tensor, x: Tensor, p: float, seed: Tensor, offset: Tensor) -> Tensor:
    """residual + dropout(x), both of one shape and dtype, in one pass, rounded once; p > 0."""
    z: Tensor = _AddDropout.apply(residual, x, _kept(x, p, seed, offset), 1.0 / (1.0 - p))
    return z


def _kept(x: Tensor, p: float, seed: Tensor, offset: Tensor) -> Tensor:
    """1 where dropout keeps x, else 0, in its dtype. A CPU converts bytes several times as fast as bools."""
    return dropout_mask(x.shape, p, seed, offset).view(torch.uint8).to(x.dtype)


def _scaled(x: Tensor, kept: Tensor, scale: float) -> Tensor:
    """x * kept * scale, rounded once."""
    return (x * kept).mul_(scale)


class _Dropout(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return _scaled(x, kept, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return _scaled(dy, kept, ctx.scale), None, None


class _AddDropout(torch.autograd.Function):
    """torch's own gradient of addcmul would round the scale to x's dtype."""

    @staticmethod
    def forward(ctx: Any, residual: Tensor, x: Tensor, kept: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.scale = scale
        return torch.addcmul(residual, x, kept, value=scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (kept,) = ctx.saved_tensors
        return dz, _scaled(dz, kept, ctx.scale), None, None
