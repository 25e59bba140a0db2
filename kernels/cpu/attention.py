"""Attention without Triton: the reference, and what is faster on a CPU."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from fusedgpt.kernels import reference
from fusedgpt.kernels.cpu.dropout import attention_dropout_mask
from fusedgpt.kernels.reference import on_eager_cpu

_SLOW_SDPA = 256  # tokens up to which SDPA in bf16 is slow: docs/experiments.md, "SDPA in bf16 on a CPU"


def attention(
    projections: tuple[Tensor, ...],  # q, k, v, each (B, T, H, D), or their (B, T, 3, H, D)
    *,
    dropout_p: float,
    seed: Tensor | None,
    offset: Tensor | None,
    scale: float,
    documents: Tensor | None,  # (B, T) int
) -> Tensor:
    """See ops.attention and ops.qkv_attention."""
    x, T = projections[0], projections[0].shape[1]
    slow_sdpa = x.device.type == "cpu" and x.dtype == torch.bfloat16 and T < _SLOW_SDPA
    by_weights = slow_sdpa or dropout_p > 0.0 or documents is not None
    if by_weights and len(projections) == 1 and on_eager_cpu(x):
        keep = None
        if dropout_p > 0.0:
            assert seed is not None
            assert offset is not None
            keep = attention_dropout_mask(torch.Size((x.shape[0], x.shape[3], T, T)), dropout_p, seed, offset)
        y: Tensor = _QKVAttention.apply(x, keep, dropout_p, scale, documents)
        return y
    function = reference.attention_by_weights if by_weights else reference.attention
    return function(
        *(projections if len(projections) == 3 else x.unbind(2)),
        dropout_p=dropout_p,
        seed=seed,
        offset=offset,
        scale=scale,
        documents=documents,
        mask=attention_dropout_mask,
    )


class _QKVAttention(torch.autograd.Function):
    """reference.attention_by_weights of the fused projection: one copy of it and of its gradient.

    The gradient of the scores is rounded to the inputs' dtype before q's and k's are made of it, as the
    kernel does: autograd would multiply in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        qkv: Tensor,  # (B, T, 3, H, D)
        keep: Tensor | None,  # (B, H, T, T) bool
        dropout_p: float,
        scale: float,
        documents: Tensor | None,
    ) -> Tensor:
        """(B, T, H, D) in qkv's dtype; keep: the weights that dropout keeps; documents (B, T) int."""
        heads = qkv.permute(2, 0, 3, 1, 4).contiguous()  # (3, B, H, T, D)
        q, k, v = heads
        scores = reference.at_least_fp32(q) @ reference.at_least_fp32(k).transpose(-2, -1)
        hidden = reference.hidden_scores(q.shape[2], documents, scores)
        weights = torch.softmax(torch.add(hidden, scores, alpha=scale, out=scores), dim=-1)
        factors, kept = None, weights
        if keep is not None:
            factors = reference.attention_factors(keep, dropout_p, weights)
            kept = torch.mul(weights, factors, out=scores)
        kept = kept.to(q.dtype)
        ctx.save_for_backward(heads, weights, factors, kept)
        ctx.scale = scale
        return torch.matmul(kept, v).transpose(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dqkv (B, T, 3, H, D) in qkv's dtype; dy (B, T, H, D)."""
        heads, weights, factors, kept = ctx.saved_tensors
        (q, k, v), dy = heads, dy.transpose(1, 2)
        dheads = torch.empty_like(heads)
        torch.matmul(kept.transpose(-2, -1), dy, out=dheads[2])
        dweights = (dy @ v.transpose(-2, -1)).to(weights.dtype)
        if factors is not None:
            dweights.mul_(factors)
        dscores = torch._softmax_backward_data(dweights, weights, -1, weights.dtype)
        dscores = dscores.mul_(ctx.scale).to(q.dtype)
        torch.matmul(dscores, k, out=dheads[0])
        torch.matmul(dscores.transpose(-2, -1), q, out=dheads[1])
        return dheads.permute(1, 3, 0, 2, 4), None, None, None, None


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
