"""The plain-PyTorch twin of every fused op: the truth in tests, the baseline in benchmarks, the path of CPUs.

Shape letters: B batch, T tokens, H heads, D head size, C channels, V vocabulary, N rows.
Of bf16 and fp16 inputs, what decides on precision (softmax, statistics, loss) is computed in fp32 and
rounded once at the end; fp32 and fp64 inputs are computed as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

_LOW_MASK = 0xFFFFFFFF
_PHILOX_ROUNDS = 7  # the fewest that pass BigCrush (Random123, section 5.2)
MakeMask = Callable[[torch.Size, float, Tensor, Tensor], Tensor]  # (shape, p, seed, offset) -> what is kept


def on_eager_cpu(x: Tensor) -> bool:
    """Whether x is on a CPU with nothing tracing: a scalar is read for nothing then."""
    return type(x) is Tensor and x.device.type == "cpu" and not torch.compiler.is_compiling()


def at_least_fp32(x: Tensor) -> Tensor:
    """x in fp32 if it is bf16 or fp16, else unchanged."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def philox4x32(n: int, seed: Tensor, offset: Tensor) -> Tensor:
    """n Philox-4x32 blocks at counters offset .. offset + n - 1 under the key `seed`.

    Counter-based: block i is a pure function of (seed, offset + i), on every device and in every kernel.
    seed, offset: int64 scalars. Returns (n, 4) int32, each entry 32 random bits.
    Source: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3".
    """
    counter = torch.arange(n, dtype=torch.int64, device=offset.device) + offset
    c0, c1 = counter & _LOW_MASK, counter >> 32  # bits of c1 and c3 above the low 32 do not count
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & _LOW_MASK, (seed >> 32) & _LOW_MASK
    for _ in range(_PHILOX_ROUNDS):
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap mod 2^64, as they should
        c0, c1 = _high_word(right, c1, k0), right
        c2, c3 = _high_word(left, c3, k1), left
        k0, k1 = (k0 + 0x9E3779B9) & _LOW_MASK, (k1 + 0xBB67AE85) & _LOW_MASK
    return torch.stack([c.to(torch.int32) for c in (c0, c1, c2, c3)], dim=-1)


def _high_word(product: Tensor, word: Tensor, key: Tensor) -> Tensor:
    """The product's high 32 bits, xor word and key; in place of what it makes, which is twice as fast."""
    return (product >> 32).bitwise_xor_(word).bitwise_xor_(key).bitwise_and_(_LOW_MASK)


def dropout_blocks(C: int) -> int:
    """Philox blocks that dropout_mask takes for a row of C."""
    return (C + 7) // 8


def dropout_mask(shape: torch.Size, p: float, seed: Tensor, offset: Tensor) -> Tensor:
    """The elements that dropout with probability p, in steps of 1/65536, keeps (bool, `shape`).

    Each row (last dimension, C) starts a new Philox block: element (row, col) takes 16-bit lane col % 8 of
    block offset + row * ceil(C / 8) + col // 8. The same mask for the same (seed, offset), forward, backward
    and recomputed. seed, offset: int64 scalars.
    """
    C = shape[-1] if shape else 1
    blocks_per_row = dropout_blocks(C)
    rows = shape.numel() // max(C, 1)
    blocks = philox4x32(rows * blocks_per_row, seed, offset)
    lanes = (blocks ^ -(2**31)).view(torch.int16)  # uniform in [-32768, 32767]
    return (lanes >= round(p * 65536) - 32768).view(rows, blocks_per_row * 8)[:, :C].reshape(shape)


def dropout_threshold(p: float) -> int:
    """The smallest 8-bit lane that attention keeps: p in steps of 1/256, below 1."""
    return min(round(p * 256), 255)


def philox2x32(n: int, seed: Tensor, offset: Tensor) -> Tensor:
    """n Philox-2x32 blocks, otherwise as philox4x32; returns (n, 2). Both halves of the seed make the key."""
    counter = torch.arange(n, dtype=torch.int64, device=offset.device) + offset
    c0, c1, key = counter & _LOW_MASK, counter >> 32, (seed ^ (seed >> 32)) & _LOW_MASK
    for _ in range(_PHILOX_ROUNDS):
        product = c0 * 0xD256D193
        c0, c1 = _high_word(product, c1, key), product
        key = (key + 0x9E3779B9) & _LOW_MASK
    return torch.stack((c0.to(torch.int32), c1.to(torch.int32)), dim=-1)


def attention_dropout_blocks(T: int) -> int:
    """Philox blocks that attention_dropout_mask takes for a head."""
    return ((T + 15) // 16) * 8 * ((T + 31) // 32) * 8


def attention_dropout_mask(shape: torch.Size, p: float, seed: Tensor, offset: Tensor) -> Tensor:
    """The attention weights that dropout keeps (bool, `shape` = (B, H, T, T)), p in steps of 1/256.

    Every 16 queries by 32 keys take 64 Philox blocks of eight 8-bit lanes: query 8 i + a and key 8 j + b take
    lane 4 i + j of block 8 a + b, which suits the registers of tensor cores (attention.py).
    """
    T = shape[-1]
    M, N = (T + 15) // 16, (T + 31) // 32
    blocks = philox2x32(shape[:-2].numel() * M * 8 * N * 8, seed, offset)
    lanes = blocks.view(torch.uint8).view(*shape[:-2], M, 8, N, 8, 2, 4)
    lanes = lanes.permute(0, 1, 2, 6, 3, 4, 7, 5).reshape(*shape[:-2], M * 16, N * 32)
    return lanes[..., :T, :T] >= dropout_threshold(p)


def dropout(x: Tensor, p: float, seed: Tensor, offset: Tensor, mask: MakeMask = dropout_mask) -> Tensor:
    """x with elements dropped with probability p and the rest scaled by 1 / (1 - p). Any shape and dtype."""
    wide = at_least_fp32(x)
    return (wide * _factors(mask(x.shape, p, seed, offset), 1.0 / (1.0 - p), wide.dtype)).to(x.dtype)


def _factors(keep: Tensor, scale: float, dtype: torch.dtype) -> Tensor:
    """`scale` where `keep`, else 0."""
    if not torch.compiler.is_compiling():  # torch 2.11 could not compile the view
        keep = keep.view(torch.uint8)  # which a CPU converts several times as fast
    return keep.to(dtype).mul_(scale)


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
    mask: MakeMask = attention_dropout_mask,
) -> Tensor:
    """Causal self-attention; see ops.attention. Returns (B, T, H, D)."""
    if dropout_p == 0.0 and documents is None:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale).transpose(1, 2)
    return attention_by_weights(
        q, k, v, dropout_p=dropout_p, seed=seed, offset=offset, scale=scale, documents=documents, mask=mask
    )


def attention_by_weights(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, H, D)
    v: Tensor,  # (B, T, H, D)
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    scale: float | None = None,
    documents: Tensor | None = None,  # (B, T) int
    mask: MakeMask = attention_dropout_mask,
) -> Tensor:
    """The same with all weights (B, H, T, T) in memory."""
    scale = 1.0 / math.sqrt(q.shape[3]) if scale is None else scale
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D)
    wide, keys = at_least_fp32(q), at_least_fp32(k).transpose(-2, -1)  # bf16 scores would cost precision
    hidden = hidden_scores(q.shape[2], documents, wide)
    weights = torch.softmax(torch.add(hidden, wide @ keys, alpha=scale), dim=-1)  # (B, H, T, T)
    if dropout_p > 0.0:
        assert seed is not None
        assert offset is not None
        weights = weights * attention_factors(mask(weights.shape, dropout_p, seed, offset), dropout_p, wide)
    return (weights.to(q.dtype) @ v).transpose(1, 2)


def hidden_scores(T: int, documents: Tensor | None, like: Tensor) -> Tensor:
    """What masks scores when added: 0 for keys that a query sees, else -inf; (T, T) or (B, 1, T, T)."""
    visible = torch.ones(T, T, dtype=torch.bool, device=like.device).tril()
    if documents is not None:
        visible = visible & (documents[:, None, :, None] == documents[:, None, None, :])
    return torch.zeros(visible.shape, dtype=like.dtype, device=like.device).masked_fill_(~visible, -math.inf)


def attention_factors(keep: Tensor, dropout_p: float, like: Tensor) -> Tensor:
    """What attention weights are multiplied by: 0 where dropped, else 1 / (1 - p), p in steps of 1/256."""
    return _factors(keep, 256 / (256 - dropout_threshold(dropout_p)), like.dtype)


def decode_attention(
    q: Tensor,  # (B, H, D)
    k_cache: Tensor,  # (B, T, H, D)
    v_cache: Tensor,  # (B, T, H, D)
    lengths: Tensor,  # (B,) int, how many cache rows are valid
    *,
    scale: float | None = None,
) -> Tensor:
    """One query token against a key-value cache; see ops.decode_attention. Returns (B, H, D)."""
    valid = torch.arange(k_cache.shape[1], device=q.device) < lengths[:, None]  # (B, T)
    return F.scaled_dot_product_attention(
        q[:, :, None],
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        attn_mask=valid[:, None, None],
        scale=scale,
    )[:, :, 0]


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """LayerNorm over the last dimension with fp32 statistics; see ops.layer_norm."""
    wide = at_least_fp32(x)
    return F.layer_norm(wide, x.shape[-1:], weight.to(wide.dtype), bias.to(wide.dtype), eps).to(x.dtype)


def dropout_add_layer_norm(
    x: Tensor,  # (..., C)
    residual: Tensor,  # (..., C)
    weight: Tensor,  # (C,)
    bias: Tensor,  # (C,)
    eps: float = 1e-5,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    x_bias: Tensor | None = None,  # (C,)
    mask: MakeMask = dropout_mask,
) -> tuple[Tensor, Tensor]:
    """layer_norm(z) and z = residual + dropout(x + x_bias); see ops.dropout_add_layer_norm."""
    wide = at_least_fp32(x)
    if x_bias is not None:
        wide = wide + x_bias.to(wide.dtype)
    if dropout_p > 0.0:
        assert seed is not None
        assert offset is not None
        wide = dropout(wide, dropout_p, seed, offset, mask)
    residual = (wide + residual).to(residual.dtype)
    return layer_norm(residual, weight, bias, eps), residual


def embedding(idx: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """See ops.embedding."""
    return F.embedding(idx, weight), weight


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's dtype; x (..., C), weight (K, C), bias (K,)."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """GELU in its tanh form of x + bias; x (..., C), bias (C,)."""
    return F.gelu(x + bias.to(x.dtype), approximate="tanh")


def linear_cross_entropy(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (V, C), rows from vocab_size on are padding
    targets: Tensor,  # (N,) int64
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of hidden @ weight.T with all logits in memory; see ops.linear_cross_entropy."""
    logits = at_least_fp32(hidden @ weight[:vocab_size].to(hidden.dtype).T)  # (N, V)
    loss = F.cross_entropy(
        logits, targets, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing
    )
    counted = targets != ignore_index
    loss = loss + z_loss * torch.where(counted, logits.logsumexp(-1) ** 2, 0.0)
    if reduction == "none":
        return loss
    return loss.sum() / counted.sum().clamp(min=1) if reduction == "mean" else loss.sum()


def grad_norm(grads: list[Tensor]) -> Tensor:
    """The norm of all gradients together, a scalar in fp32 (fp64 for fp64 gradients); see adamw.grad_norm."""
    squares = [at_least_fp32(grad).square().sum() for grad in grads]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros(())


def adamw(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,  # from 1
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """(param, exp_avg, exp_avg_sq) after one AdamW step; all of one shape, the moments fp32 or fp64.

    Source: Loshchilov and Hutter 2019, algorithm 2, with PyTorch's lr * weight_decay.
    """
    wide, grad = param.to(exp_avg.dtype), grad.to(exp_avg.dtype)
    exp_avg = betas[0] * exp_avg + (1.0 - betas[0]) * grad
    exp_avg_sq = betas[1] * exp_avg_sq + (1.0 - betas[1]) * grad.square()
    mean, mean_sq = exp_avg / (1.0 - betas[0] ** step), exp_avg_sq / (1.0 - betas[1] ** step)
    wide = wide - lr * (mean / (mean_sq.sqrt() + eps) + weight_decay * wide)
    return wide.to(param.dtype), exp_avg, exp_avg_sq


# (a, b, c) of p(s) = a s + b s^3 + c s^5, step by step: composed they come nearest to 1 on [0.01, 1].
NEWTON_SCHULZ = (
    (8.0934, -23.6204, 17.4462),
    (3.6366, -2.7219, 0.5365),
    (2.6613, -1.9772, 0.4526),
)
SMALLEST_SQUARE = 1e-30  # of a singular value that is still scaled up


def orthogonalise(x: Tensor) -> Tensor:
    """x (..., R, C) with singular values near 1, about U V^T where x is U S V^T; computed in x's dtype.

    A bound of the largest singular value, the root of the largest row sum of |x x^T|, brings all below 1.
    Those above 0.01 of it end within 0.73 and 1.27; smaller ones grow about 80-fold. Zero stays zero.
    Source: Newton-Schulz iteration of Muon (Jordan et al. 2024) with the minimax polynomials of Polar Express
    (Amsel et al. 2025, arXiv:2505.16932, theorem 3.1).
    """
    M, N = x.shape[-2:]
    if M > N:
        return orthogonalise(x.mT).mT
    gram = x @ x.mT
    square = gram.abs().sum(-1).amax(-1).clamp(min=SMALLEST_SQUARE)[..., None, None]
    x, gram = x / square.sqrt(), gram / square
    product = gram  # of all p so far, from the first on
    for i, (a, b, c) in enumerate(NEWTON_SCHULZ):
        p = (gram @ gram).mul_(c).add_(gram, alpha=b)
        p.diagonal(dim1=-2, dim2=-1).add_(a)
        last = i == len(NEWTON_SCHULZ) - 1
        if takes_products(M, N):
            product = p @ product if i else p
            gram = gram if last else p @ gram @ p
        else:
            x = p @ x
            gram = gram if last else x @ x.mT
    return product @ x if takes_products(M, N) else x


def takes_products(M: int, N: int) -> bool:
    """Whether it is cheaper to multiply the polynomials, which commute, and x (M, N) only once."""
    return N >= 2 * M


def muon_scale(R: int, C: int) -> float:
    """The largest factor by which a step of an (R, C) matrix stretches anything, per learning rate."""
    return math.sqrt(max(1.0, R / C))


def muon(
    param: Tensor,  # (..., R, C)
    grad: Tensor,
    momentum: Tensor,  # fp32 or fp64
    *,
    lr: float | Tensor,
    beta: float,
    weight_decay: float,
    orthogonalised: Callable[[Tensor], Tensor] = orthogonalise,
) -> tuple[Tensor, Tensor]:
    """(param, momentum) after one Muon step with Nesterov momentum; all of one shape.

    The step's root mean square is lr / sqrt(C), whatever the gradient's.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon.
    """
    wide, grad = param.to(momentum.dtype), grad.to(momentum.dtype)
    momentum = beta * momentum + (1.0 - beta) * grad
    step = orthogonalised(beta * momentum + (1.0 - beta) * grad)
    wide = wide - lr * (muon_scale(*param.shape[-2:]) * step + weight_decay * wide)
    return wide.to(param.dtype), momentum
