"""The ops of a decoding step in fp32 on a CPU: those of ops.py without its checks and casts.

A token costs a small model a few milliseconds, most of them for reading the weights. That empties the caches
of all else, so the checks of every op would cost another fifth.

Shape letters: B batch, T rows of a cache, H heads, D head size, C channels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """x (..., C) normalised; see ops.layer_norm."""
    return torch.layer_norm(x, weight.shape, weight, bias, eps)


def dropout_add_layer_norm(
    x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """(layer_norm(residual + x), residual + x); no dropout. x (..., C) is overwritten with the sum."""
    residual = x.add_(residual)
    return torch.layer_norm(residual, weight.shape, weight, bias, eps), residual


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias); x (..., C) is overwritten."""
    return F.gelu(x.add_(bias), approximate="tanh")


def decode_attention(q: Tensor, k_cache: Tensor, v_cache: Tensor, length: int) -> Tensor:
    """q (B, H, D) against the first `length` rows of the caches (B, T, H, D); see ops.decode_attention."""
    k = k_cache.narrow(1, 0, length).transpose(1, 2)
    v = v_cache.narrow(1, 0, length).transpose(1, 2)
    return F.scaled_dot_product_attention(q.unsqueeze(2), k, v).squeeze(2)
