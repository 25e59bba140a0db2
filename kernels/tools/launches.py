"""The launches of every kernel file: what `fusedgpt kernels report` compiles.

Each list is a generator named after its file. It yields a label and a call of a launcher on meta tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

Launch = tuple[str, Callable[[], object]]  # a label, and a call of a launcher


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _counters() -> dict[str, Tensor]:
    return {name: _meta(dtype=torch.int64) for name in ("seed", "offset")}


# Imported inside the functions: a file that fails to import hides no other.


def _activation(dtype: torch.dtype, full: bool) -> Iterator[Launch]:
    from fusedgpt.kernels import activation

    for C in (65, 1536, 3072, 6400, 16384) if full else (3072, 6400):
        (x, dout), bias = (_meta(8192, C, dtype=dtype) for _ in range(2)), _meta(C)
        yield f"C {C}", partial(activation.bias_gelu_fwd, x, bias)
        yield f"C {C}", partial(activation.bias_gelu_bwd, dout, x, bias)


def _documents(dtype: torch.dtype, full: bool) -> Iterator[Launch]:
    from fusedgpt.kernels import documents

    for T in (1024, 1000) if full else (1024,):
        ids = _meta(8, T, dtype=torch.int32)
        yield f"T {T}, int32", partial(documents.documents, ids)
        yield f"T {T}, int64", partial(documents.documents, ids.long())


def _dropout(dtype: torch.dtype, full: bool) -> Iterator[Launch]:
    from fusedgpt.kernels import dropout

    for C in (768, 65) if full else (768,):
        x = _meta(64, C, dtype=dtype)
        yield f"C {C}", partial(dropout.dropout_fwd, x, 0.1, **_counters())


def _layer_norm(dtype: torch.dtype, full: bool) -> Iterator[Launch]:
    from fusedgpt.kernels import layer_norm

    for C in (65, 384, 768, 1024, 1280, 1600, 4096) if full else (768, 1600):
        x, r, dy = (_meta(8192, C, dtype=dtype) for _ in range(3))  # three: a prediction counts their bytes
        weight, rows = _meta(C), _meta(8192)
        saved, norm = (x, weight, rows, rows, weight.dtype, dtype), (weight, weight, 1e-5)
        for label, x_bias, residual, p in (
            ("", None, None, 0.0),
            (", residual", None, r, 0.0),
            (", residual, dropout", None, r, 0.1),
            (", bias, residual", weight, r, 0.0),
            (", bias, residual, dropout", weight, r, 0.1),
        ):
            dropout: dict[str, Any] = {"p": p, **_counters()}
            bias_dtype = None if x_bias is None else x_bias.dtype
            forward = partial(layer_norm.layer_norm_fwd, x, x_bias, residual, *norm, **dropout)
            backward = partial(layer_norm.layer_norm_bwd, dy, residual, *saved, bias_dtype, **dropout)
            yield f"C {C}{label}", forward
            yield f"C {C}{label}", backward


def _attention(dtype: torch.dtype, full: bool) -> Iterator[Launch]:
    from fusedgpt.kernels import attention

    for D in (16, 32, 36, 40, 64, 80, 96, 128) if full else (64, 128):  # 36: beyond descriptors
        q, k, v = _meta(8, 1024, 3, 12, D, dtype=dtype).unbind(2)
        out, lse = _meta(8, 1024, 12, D, dtype=dtype), _meta(8, 12, 1024)
        int32 = {"dtype": torch.int32}
        documents = {"ids": _meta(8, 1024, **int32), "spans": _meta(8, 16, 4, **int32)}
        dropout = {"dropout_p": 0.1, **_counters()}
        features: dict[str, dict[str, Any]] = {
            "": {},
            ", documents": documents,
            ", dropout": dropout,
            ", documents, dropout": documents | dropout,
        }
        if dtype == torch.float32 and not full:  # slow to compile, and seldom run on a GPU
            del features[", documents"], features[", dropout"]
        for label, feature in features.items():
            yield f"D {D}{label}", partial(attention.attention_fwd, q, k, v, 0.125, **feature)
            yield f"D {D}{label}", partial(attention.attention_bwd, out, q, k, v, out, lse, 0.125, **feature)


def _decode_attention(dtype: torch.dtype, full: bool) -> Iterator[Launch]:
    from fusedgpt.kernels import decode_attention

    for D in (16, 40, 64, 80, 96, 128) if full else (64, 128):
        cache, lengths = _meta(8, 1024, 2, 12, D, dtype=dtype), _meta(8, dtype=torch.int32)
        k, v = cache.unbind(2)
        for rows in (1024, 128):
            forward = partial(decode_attention.decode_attention_fwd, k[:, 0], k, v, lengths, 0.125, rows)
            yield f"D {D}, {1024 // rows} splits", forward


def _cross_entropy(dtype: torch.dtype, full: bool) -> Iterator[Launch]:
    from fusedgpt.kernels.cross_entropy import cross_entropy
    from fusedgpt.kernels.linear_cross_entropy import LossOptions

    for V, P in ((50257, 50304), (65, 128), (256, 256)) if full else ((50257, 50304),):
        logits, targets, row = _meta(1024, P, dtype=dtype), _meta(1024, dtype=torch.int64), _meta(1024)
        for smoothing in (0.0, 0.1):
            options = LossOptions(V, ignore_index=-100, label_smoothing=smoothing, z_loss=0.0)
            for name, row_scale in (("losses", None), ("gradients", row)):
                label = f"V {V}, {name}" + (", smoothing" if smoothing else "")
                yield label, partial(cross_entropy, logits, targets, row_scale, row, options)


def _adamw(dtype: torch.dtype, full: bool) -> Iterator[Launch]:
    from fusedgpt.kernels import adamw, tensor_table

    state = ([_meta(768, 768)], [_meta(768, 768)], [_meta()], [0])  # exp_avgs, exp_avg_sqs, steps, groups
    scalars = (_meta(), _meta(), _meta(dtype=torch.int64))
    param, wide = [_meta(768, 768, dtype=dtype)], [_meta(768, 768)]
    for grad in (param, wide) if full and dtype != torch.float32 else (param,):
        batch, hyper = tensor_table.make_batch(param, grad, wide, *state), _meta(1, 8, dtype=torch.float64)
        partials, label = _meta(adamw.PARTIALS), f"{grad[0].dtype} gradient".replace("torch.", "")
        yield label, partial(adamw.grad_norm, batch, hyper, partials)
        yield label, partial(adamw.adamw, batch, partials, *scalars, max_norm=1.0)


def _muon(dtype: torch.dtype, full: bool) -> Iterator[Launch]:
    from fusedgpt.kernels import muon, tensor_table

    shapes = (432, 64, 768), (12, 768, 768), (12, 3072, 768), (12, 768, 3072), (3, 65, 24)
    for n, R, C in shapes[: 5 if full else 2]:
        (param, grad), wide = _meta(2, n, R, C, dtype=dtype), _meta(n, R, C).unbind()
        norm = _meta()
        tensors = (list(param), list(grad), wide, wide, wide, [norm] * n)
        batch = tensor_table.make_batch(*tensors, [0] * n)
        yield f"{n} of ({R}, {C})", partial(muon.muon, batch, (R, C), norm)


_FILES = (
    _activation,
    _adamw,
    _attention,
    _cross_entropy,
    _decode_attention,
    _documents,
    _dropout,
    _layer_norm,
    _muon,
)
LAUNCHES = {launches.__name__.removeprefix("_"): launches for launches in _FILES}
