"""x W^T + b, with fp32 on a CPU computed by oneDNN.

torch sends fp32 matmuls on x86 to MKL. On an AMD CPU with AVX-512 oneDNN, which torch carries too, is twice
as fast (docs/experiments.md, "oneDNN for fp32 matmuls"). bf16 goes to oneDNN anyway. torch.compile sees the
plain op and chooses by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fusedgpt.kernels import reference

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(  # type: ignore[no-untyped-call]
    torch.ops.mkldnn, "_linear_pointwise"
)


_CHUNKS = 4
_Table = tuple[Tensor, Tensor, Tensor]  # (chunks * C, K / chunks), its rows' numbers, each chunk's first
_row_tables: dict[int, _Table] = {}  # by the weight's address


def matmul_nt(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T for a (M, K) and b (N, K), any strides, no autograd."""
    if a.dtype == torch.float32 and a.device.type == "cpu" and HAS_ONEDNN:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")
        return product
    return a @ b.T


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


@contextmanager
def row_tables(weights: Iterable[Tensor]) -> Iterator[None]:
    """Within, one row times one of `weights`, fp32 (K, C) on a CPU, reads a transposed copy of it.

    oneDNN multiplies one row at little more than half of the memory's bandwidth; embedding_bag's weighted
    sum of the rows of weight.T comes close to it (docs/experiments.md). The copies take as much memory as the
    weights; what is written into a weight meanwhile is not seen.
    """
    mine = {}
    for weight in weights:
        K, C = weight.shape
        usable = weight.dtype == torch.float32 and weight.device.type == "cpu" and HAS_ONEDNN
        if usable and K % _CHUNKS == 0:  # several bags, so that all threads have one
            chunks = weight.detach().view(_CHUNKS, K // _CHUNKS, C).transpose(1, 2)
            every = torch.arange(_CHUNKS * C, dtype=torch.int32)
            table = chunks.reshape(_CHUNKS * C, K // _CHUNKS)
            mine[weight.data_ptr()] = (table, every, every[::C].contiguous())
    _row_tables.update(mine)
    try:
        yield
    finally:
        for address in mine:
            _row_tables.pop(address, None)


def _one_row(x: Tensor, table: _Table, K: int, bias: Tensor | None) -> Tensor:
    C = x.shape[-1]
    y = torch.embedding_bag(*table, False, 0, False, x.reshape(C).repeat(_CHUNKS))[0].view(-1)[:K]
    return (y if bias is None else y + bias).view(*x.shape[:-1], K)


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _forward(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dy = dys[0].flatten(0, -2)  # (N, K)
        dx = matmul_nt(dy, weight.T).view(x.shape)
        dweight = matmul_nt(dy.T, x.flatten(0, -2).T)
        dbias = dy.sum(0) if ctx.needs_input_grad[2] else None
        return dx, dweight, dbias


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., C), weight (K, C), bias (K,), one dtype -> (..., K); see ops.linear."""
    plain = x.dtype != torch.float32 or x.device.type != "cpu" or torch.compiler.is_compiling()
    if plain or not HAS_ONEDNN or x.numel() == 0:
        return reference.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        table = _row_tables.get(weight.data_ptr()) if x.numel() == x.shape[-1] else None
        return _forward(x, weight, bias) if table is None else _one_row(x, table, len(weight), bias)
    y: Tensor = _OneDNNLinear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return y
