"""Attention without Triton: the reference, and what is faster on a CPU."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt.kernels import reference
from fusedgpt.kernels.cpu.dropout import attention_dropout_mask

_SLOW_SDPA = 256  # tokens up to which SDPA in bf16 is slow: docs/experiments.md, "SDPA in bf16 on a CPU"


def attention(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, H, D)
    v: Tensor,  # (B, T, H, D)
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    scale: float | None = None,
    documents: Tensor | None = None,  # (B, T) int
) -> Tensor:
    """See ops.attention."""
    slow_sdpa = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.shape[1] < _SLOW_SDPA
    function = reference.attention_by_weights if slow_sdpa else reference.attention
    return function(
        q,
        k,
        v,
        dropout_p=dropout_p,
        seed=seed,
        offset=offset,
        scale=scale,
        documents=documents,
        mask=attention_dropout_mask,
    )


def decode_attention(
    q: Tensor,  # (B, H, D)
    k_cache: Tensor,  # (B, T, H, D)
    v_cache: Tensor,  # (B, T, H, D)
    lengths: Tensor,  # (B,) int
    *,
    scale: float | None = None,
) -> Tensor:
    """See ops.decode_attention. On a CPU the rows beyond the longest sequence are not read."""
    if lengths.device.type != "cpu" or torch.compiler.is_compiling():  # no waiting for a GPU
        return reference.decode_attention(q, k_cache, v_cache, lengths, scale=scale)
    shortest, longest = (int(length) for length in lengths.aminmax())
    k_cache, v_cache = k_cache[:, :longest], v_cache[:, :longest]
    T = k_cache.shape[1]
    valid = None
    if shortest < T:
        valid = (torch.arange(T) < lengths[:, None])[:, None, None]  # (B, 1, 1, T)
    return F.scaled_dot_product_attention(
        q[:, :, None], k_cache.transpose(1, 2), v_cache.transpose(1, 2), attn_mask=valid, scale=scale
    )[:, :, 0]
