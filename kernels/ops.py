"""The seam: every op the model calls, and the one place that decides between Triton and the reference.

Shape letters: B batch, T tokens, H heads, D head size, C channels, V vocabulary, P padded vocabulary, N rows.

FUSEDGPT_KERNELS=auto (default) takes a Triton kernel where the device has one, `triton` insists on it,
`reference` never does. With TRITON_INTERPRET=1 as well, `triton` runs the kernels on CPU tensors. Where no
kernel is taken, kernels/cpu/ has the faster form of some references.

Dropout is counter-based: the same (seed, offset), int64 scalar tensors, give the same mask; a new mask needs
another offset, at least numel / 8 further on.
"""

from __future__ import annotations

import math
import os
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fusedgpt.kernels import linear as linear_
from fusedgpt.kernels import linear_cross_entropy as linear_cross_entropy_
from fusedgpt.kernels import reference
from fusedgpt.kernels.arguments import (
    check_dropout,
    check_floating,
    check_integers,
    check_like,
    check_shape,
    check_size,
    unexpected,
)
from fusedgpt.kernels.cpu import attention as attention_cpu
from fusedgpt.kernels.cpu import dropout as dropout_cpu
from fusedgpt.kernels.cpu import layer_norm as layer_norm_cpu
from fusedgpt.kernels.cpu.embedding import tied_embedding
from fusedgpt.kernels.reference import attention_dropout_blocks as attention_dropout_blocks
from fusedgpt.kernels.reference import dropout_blocks as dropout_blocks

HAS_TRITON = find_spec("triton") is not None  # no wheel of it for macOS or Windows
if HAS_TRITON:
    from fusedgpt.kernels import activation as activation_
    from fusedgpt.kernels import attention as attention_
    from fusedgpt.kernels import decode_attention as decode_attention_
    from fusedgpt.kernels import documents as documents_
    from fusedgpt.kernels import dropout as dropout_
    from fusedgpt.kernels import layer_norm as layer_norm_
    from fusedgpt.kernels.common import TRITON_DTYPES

OPS = (
    "dropout",
    "attention",
    "decode_attention",
    "layer_norm",
    "dropout_add_layer_norm",
    "bias_gelu",
    "linear_cross_entropy",
    "adamw",
    "muon",
)
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # read where the kernels are decorated: at import
_LARGEST_HEAD = 128


def backend(op: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
    """ "triton" or "reference": the path `op` takes for tensors of `dtype` on `device`.

    Raises ValueError for an unknown FUSEDGPT_KERNELS, or where it says `triton` and that cannot be.
    """
    choice = os.environ.get("FUSEDGPT_KERNELS", "auto")
    if choice not in ("auto", "triton", "reference"):
        raise ValueError(f"FUSEDGPT_KERNELS is {choice!r}, expected auto, triton or reference")
    if choice == "reference" or (choice == "auto" and device.type != "cuda"):  # the interpreter on request
        return "reference"
    obstacle = _obstacle(op, device, dtype)
    if choice == "triton" and obstacle:
        raise ValueError(f"FUSEDGPT_KERNELS=triton, but {op} {obstacle}")
    return "reference" if obstacle else "triton"


def fallback(device: torch.device, dtype: torch.dtype) -> str:
    """Why ops on this GPU take the reference although nobody asked for it; empty if they do not."""
    if device.type != "cuda" or os.environ.get("FUSEDGPT_KERNELS", "auto") != "auto":
        return ""
    return next((f"{op} {why}" for op in OPS if (why := _obstacle(op, device, dtype))), "")


def _obstacle(op: str, device: torch.device, dtype: torch.dtype) -> str:
    """Why `op` cannot take its Triton kernel here; empty if it can."""
    if not HAS_TRITON:
        return "needs the package triton"
    if dtype not in TRITON_DTYPES:
        return f"has no Triton kernel for {dtype}"
    if device.type == "cuda":
        old = torch.cuda.get_device_capability(device) < (8, 0)
        return "needs a GPU of compute capability 8.0 or newer" if old else ""
    if device.type == "cpu" and _INTERPRETED:
        return "in bf16 is miscomputed by Triton's interpreter, use fp32" if dtype == torch.bfloat16 else ""
    return f"has no Triton kernel for {device.type} tensors (TRITON_INTERPRET=1 interprets it on a CPU)"


def _takes_triton(op: str, *tensors: Tensor) -> bool:
    """Whether `op` takes its kernel for these tensors of one device; each dtype must allow it."""
    device = tensors[0].device
    return all(backend(op, device, dtype) == "triton" for dtype in {x.dtype for x in tensors})


def dropout(x: Tensor, p: float, seed: Tensor | None = None, offset: Tensor | None = None) -> Tensor:
    """x with elements dropped with probability p and the others scaled by 1 / (1 - p).

    x: any shape, floating point. seed, offset: int64 scalars, needed when p > 0. Raises ValueError.
    """
    check_floating(x=x)
    check_dropout(x, p, seed, offset)
    if p == 0.0:
        return x
    assert seed is not None
    assert offset is not None
    if _takes_triton("dropout", x):
        return dropout_.dropout(x, p, seed, offset)
    return dropout_cpu.dropout(x, p, seed, offset)


class Documents(NamedTuple):
    """The documents of a batch, ready for attention in every layer: see prepare_documents."""

    ids: Tensor  # (B, T) int
    spans: Tensor | None = None  # (B, ceil(T / 64), 4) int32 where the kernel runs: see kernels/documents.py


def prepare_documents(ids: Tensor) -> Documents:
    """What attention needs of document ids (B, T), integers within 32 bits: once per step, in one launch.

    A token sees only tokens of its own id. Raises ValueError.
    """
    if ids.ndim != 2:
        raise unexpected("documents", "(B, T)", ids.shape)
    check_integers("documents", ids, ids.shape, ids.device)
    if backend("attention", ids.device) == "triton":
        return Documents(*documents_.prepare_documents(ids))
    return Documents(ids)


def attention(
    q: Tensor,  # (B, T, H, D)
    k: Tensor,  # (B, T, H, D)
    v: Tensor,  # (B, T, H, D)
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    scale: float | None = None,
    documents: Tensor | Documents | None = None,  # (B, T)
) -> Tensor:
    """Causal self-attention: softmax(scale * q k^T, causal) v, with dropout on the weights.

    q, k, v: (B, T, H, D), any strides, one floating dtype; D up to 128 on a GPU. scale: > 0, 1 / sqrt(D) if
    None. dropout_p: in steps of 1/256; what is kept is scaled by 1 / the exact keep rate. documents: int ids;
    a token sees only tokens of its own id, and the kernel skips the blocks of keys before the first and after
    the last with a matching id. Several layers share them by prepare_documents. Returns (B, T, H, D) in q's
    dtype; softmax in fp32. Raises ValueError naming the argument. Source: Vaswani et al. 2017, equation 1.
    """
    check_floating(q=q, k=k, v=v)
    if q.ndim != 4:
        raise unexpected("q", "(B, T, H, D)", q.shape)
    check_like("k", k, "q", q)
    check_like("v", v, "q", q)
    check_dropout(q, dropout_p, seed, offset)
    return _attention("q", (q, k, v), dropout_p, seed, offset, scale, documents)


def qkv_attention(
    qkv: Tensor,  # (B, T, 3, H, D)
    *,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
    offset: Tensor | None = None,
    scale: float | None = None,
    documents: Tensor | Documents | None = None,  # (B, T)
) -> Tensor:
    """`attention` on the fused projection, whose gradient is written as one tensor: nothing is copied.

    qkv: (B, T, 3, H, D), any strides; q, k, v are its three slices. Everything else as in `attention`.
    """
    check_floating(qkv=qkv)
    if qkv.ndim != 5 or qkv.shape[2] != 3:
        raise unexpected("qkv", "(B, T, 3, H, D)", qkv.shape)
    check_dropout(qkv, dropout_p, seed, offset)
    return _attention("qkv", (qkv,), dropout_p, seed, offset, scale, documents)


def _attention(
    name: str,
    projections: tuple[Tensor, ...],  # q, k, v or qkv
    dropout_p: float,
    seed: Tensor | None,
    offset: Tensor | None,
    scale: float | None,
    documents: Tensor | Documents | None,
) -> Tensor:
    """Both forms of attention, after what only one of them checks; `name` is the first projection's."""
    x = projections[0]
    D = x.shape[-1]
    if D == 0:
        raise unexpected(name, "a head size D above 0", x.shape)
    ids = documents.ids if isinstance(documents, Documents) else documents
    if ids is not None:
        check_integers("documents", ids, x.shape[:2], x.device)
    options: dict[str, Any] = {"dropout_p": dropout_p, "seed": seed, "offset": offset}
    options["scale"] = _checked_scale(scale, D)
    if not _takes_triton("attention", x):
        return attention_cpu.attention(projections, **options, documents=ids)
    check_size(name, "a head size D", D, _LARGEST_HEAD)
    if isinstance(documents, Tensor):
        documents = prepare_documents(documents)
    ids, spans = (None, None) if documents is None else documents
    return attention_.attention(*projections, **options, ids=ids, spans=spans)


def _checked_scale(scale: float | None, D: int) -> float:
    scale = 1.0 / math.sqrt(D) if scale is None else scale
    if not 0.0 < scale < math.inf:
        raise unexpected("scale", "a positive number", scale)
    return scale


def decode_attention(
    q: Tensor,  # (B, H, D)
    k_cache: Tensor,  # (B, T, H, D)
    v_cache: Tensor,  # (B, T, H, D)
    lengths: Tensor,  # (B,) int
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention of one query token per sequence over the first lengths[b] >= 1 rows of its cache.

    Row t of a cache (B, T, H, D) belongs to token t; lengths beyond T count as T, a length of 0 gives NaN.
    scale: > 0, 1 / sqrt(D) if None. Returns (B, H, D) in q's dtype. Raises ValueError naming the argument.
    """
    check_floating(q=q, k_cache=k_cache, v_cache=v_cache)
    if q.ndim != 3:
        raise unexpected("q", "(B, H, D)", q.shape)
    B, H, D = q.shape
    if k_cache.ndim != 4 or (k_cache.shape[0], *k_cache.shape[2:]) != (B, H, D):
        raise unexpected("k_cache", f"({B}, T, {H}, {D})", k_cache.shape)
    if k_cache.dtype != q.dtype:
        raise unexpected("k_cache", f"the dtype of q, {q.dtype}", k_cache.dtype)
    check_like("v_cache", v_cache, "k_cache", k_cache)
    check_integers("lengths", lengths, q.shape[:1], q.device)
    scale = _checked_scale(scale, D)
    if _takes_triton("decode_attention", q):
        check_size("q", "a head size D", D, _LARGEST_HEAD)
        y: Tensor = decode_attention_.decode_attention(q, k_cache, v_cache, lengths, scale)
        return y
    return attention_cpu.decode_attention(q, k_cache, v_cache, lengths, scale=scale)


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> None:
    if x.ndim == 0 or x.shape[-1] == 0:
        raise unexpected("x", "(..., C) with C > 0", x.shape)
    check_shape("weight", weight, x.shape[-1:])
    check_shape("bias", bias, x.shape[-1:])
    if not eps > 0.0:
        raise unexpected("eps", "a positive number", eps)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5) -> Tensor:
    """(x - mean) / sqrt(var + eps) * weight + bias over the last dimension, statistics in fp32.

    x: (..., C); weight, bias: (C,), any floating dtype. Returns x's shape and dtype. Raises ValueError.
    Source: Ba et al. 2016.
    """
    check_floating(x=x, weight=weight, bias=bias)
    _check_norm(x, weight, bias, eps)
    if _takes_triton("layer_norm", x, weight, bias):
        check_size("x", "rows", x.shape[-1], layer_norm_.MAX_C)
        return layer_norm_.layer_norm(x, None, None, weight, bias, eps, 0.0, None, None)[0]
    return reference.layer_norm(x, weight, bias, eps)


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
) -> tuple[Tensor, Tensor]:
    """(y, new_residual) with new_residual = residual + dropout(x + x_bias) and y = layer_norm(new_residual).

    The sum is made in fp32 and rounded once to residual's dtype, which is also y's. Raises ValueError.
    """
    check_floating(x=x, weight=weight, bias=bias, residual=residual)
    _check_norm(x, weight, bias, eps)
    check_like("residual", residual, "x", x, dtype=False)
    check_dropout(x, dropout_p, seed, offset)
    if x_bias is not None:
        check_floating(x=x, x_bias=x_bias)
        check_shape("x_bias", x_bias, x.shape[-1:])
    vectors = (weight, bias) if x_bias is None else (weight, bias, x_bias)
    if _takes_triton("dropout_add_layer_norm", x, residual, *vectors):
        check_size("x", "rows", x.shape[-1], layer_norm_.MAX_C)
        return layer_norm_.layer_norm(x, x_bias, residual, weight, bias, eps, dropout_p, seed, offset)
    return layer_norm_cpu.dropout_add_layer_norm(
        x, residual, weight, bias, eps, dropout_p, seed, offset, x_bias
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.T + bias in x's dtype: (..., C) -> (..., K).

    weight: (K, C); bias: (K,) or None; both of any floating dtype, cast to x's. Raises ValueError.
    """
    check_floating(x=x, weight=weight)
    if weight.ndim != 2 or weight.shape[1] != x.shape[-1]:
        raise unexpected("weight", f"(K, {x.shape[-1]})", weight.shape)
    if bias is not None:
        check_floating(x=x, bias=bias)
        check_shape("bias", bias, weight.shape[:1])
    return linear_.linear(x, weight.to(x.dtype), bias)


def norm_adds_bias(x: Tensor) -> bool:
    """Whether a linear layer before dropout_add_layer_norm leaves its bias to it, as x_bias.

    The kernel adds it, and sums its gradient, on the way; for the reference that would be another pass.
    """
    return backend("dropout_add_layer_norm", x.device, x.dtype) == "triton"


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """gelu(x + bias) by the tanh form, in x's dtype; x (..., C), bias (C,) of any floating dtype.

    Raises ValueError. Source: Hendrycks and Gimpel 2016.
    """
    check_floating(x=x, bias=bias)
    if x.ndim == 0:
        raise unexpected("x", "(..., C)", x.shape)
    check_shape("bias", bias, x.shape[-1:])
    if _takes_triton("bias_gelu", x, bias):
        return activation_.bias_gelu(x, bias)
    return reference.bias_gelu(x, bias)


def embedding(idx: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """(the rows weight[idx] (..., C), the weight for a head tied to them).

    idx: (...) int64; weight: (P, C), floating point. The head uses the second tensor in place of weight: on
    a CPU the backward pass adds the rows' gradients to that of it, in place. Raises ValueError.
    """
    check_floating(weight=weight)
    if weight.ndim != 2:
        raise unexpected("weight", "(P, C)", weight.shape)
    check_integers("idx", idx, idx.shape, weight.device)
    if idx.device.type == "cpu" and not torch.compiler.is_compiling():
        return tied_embedding(idx, weight)
    return reference.embedding(idx, weight)


def linear_cross_entropy(
    hidden: Tensor,  # (N, C)
    weight: Tensor,  # (P, C)
    targets: Tensor,  # (N,) int64
    *,
    vocab_size: int | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Cross-entropy of the logits hidden @ weight.T, which never exist all at once.

    hidden: (N, C) in the compute dtype; weight: (P, C), any floating dtype, of which rows from vocab_size on
    are padding; targets: (N,) int64, 0 .. vocab_size - 1, or ignore_index for rows to leave out.
    reduction: "mean" over the counted rows (0 if there are none), "sum" or "none" (N,). z_loss adds
    z_loss * logsumexp(logits)^2 per row. Returns fp32 (fp64 for fp64 hidden). Raises ValueError.
    """
    check_floating(hidden=hidden, weight=weight)
    if hidden.ndim != 2:
        raise unexpected("hidden", "(N, C)", hidden.shape)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise unexpected("weight", f"(P, {hidden.shape[1]})", weight.shape)
    check_integers("targets", targets, hidden.shape[:1], hidden.device)
    if targets.dtype != torch.int64:
        raise unexpected("targets", "int64", targets.dtype)
    if reduction not in ("mean", "sum", "none"):
        raise unexpected("reduction", "mean, sum or none", reduction)
    if not 0.0 <= label_smoothing < 1.0:
        raise unexpected("label_smoothing", "0 <= label_smoothing < 1", label_smoothing)
    if not 0.0 <= z_loss < math.inf:
        raise unexpected("z_loss", "a number >= 0", z_loss)
    vocab_size = len(weight) if vocab_size is None else vocab_size
    if not 0 < vocab_size <= len(weight):
        raise unexpected("vocab_size", f"1 to {len(weight)}", vocab_size)
    options = linear_cross_entropy_.LossOptions(vocab_size, ignore_index, label_smoothing, z_loss)
    path = backend("linear_cross_entropy", hidden.device, hidden.dtype)
    function = linear_cross_entropy_.linear_cross_entropy
    return function(hidden, weight, targets, options, reduction=reduction, backend=path)
