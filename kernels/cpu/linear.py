"""Products without autograd, computed by oneDNN for fp32 on AMD CPUs.

torch sends fp32 matmuls on x86 to MKL. On AMD CPUs oneDNN, also part of torch, is faster, without AVX-512 all
but the gradients of weights; on Intel's MKL is (docs/experiments.md, "oneDNN for fp32 matmuls"). bf16 goes to
oneDNN anyway.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from fusedgpt.kernels import reference
from fusedgpt.kernels.cpu.process import cpu_description

HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
USES_ONEDNN = HAS_ONEDNN and "AuthenticAMD" in cpu_description()

_HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"


def takes_onednn(x: Tensor) -> bool:
    """Whether products with x go to oneDNN."""
    return x.dtype == torch.float32 and x.device.type == "cpu" and USES_ONEDNN


def _onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return y


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias; x (..., C), weight (K, C) of x's dtype, bias (K,) of any."""
    if takes_onednn(x) and x.numel() > 0:
        return _onednn_linear(x, weight, None if bias is None else bias.to(x.dtype))
    return reference.linear(x, weight, bias)


def matmul_nt(a: Tensor, b: Tensor, add_to: Tensor | None = None) -> Tensor:
    """a @ b.T for a (M, K) and b (N, K), any strides, no autograd. add_to: what it is added to, in place."""
    if takes_onednn(a):
        found = _onednn_linear(a, b)
    elif add_to is not None and add_to.dtype == a.dtype:
        return add_to.addmm_(a, b.T)
    else:
        found = a @ b.T
    return found if add_to is None else add_to.add_(found)


def matmul_tn(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b for a (N, M) and b (N, K), no autograd."""
    return _onednn_linear(a.T, b.T) if takes_onednn(a) and _HAS_AVX512 else a.T @ b


def transposed_storage(weight: Tensor) -> Tensor:
    """`weight` (K, C) stored as its transpose where `inference_linear` reads it faster so: fp32 on a CPU.

    oneDNN multiplies one row at little more than half of the memory bandwidth; embedding_bag's weighted sum
    of the rows of weight.T comes close to it. MKL, too, reads the transpose faster (docs/experiments.md).
    """
    on_x86 = weight.device.type == "cpu" and torch.backends.mkl.is_available()
    return weight.T.contiguous().T if weight.dtype == torch.float32 and on_x86 else weight


@lru_cache
def _bags(K: int, C: int, threads: int) -> tuple[int, Tensor, Tensor]:
    """A bag of columns for each thread: (number of bags, the table's rows in each, where each begins)."""
    n = next(n for n in range(threads, 0, -1) if K % n == 0)
    rows = torch.arange(n * C, dtype=torch.int32)
    return n, rows.view(C, n).T.flatten(), rows[::C].contiguous()


def inference_linear(weight: Tensor, bias: Tensor | None = None) -> Callable[[Tensor], Tensor]:
    """x (..., C) -> x weight^T + bias (..., K) without autograd, for weights that no longer change.

    A vector x (C,) times a weight (K, C) of `transposed_storage` goes through embedding_bag, prepared here so
    that a call is three or four small ops.
    """
    K, C = weight.shape
    if not takes_onednn(weight) or weight.stride() != (1, K) or C == 1:
        return lambda x: product(x, weight, bias)
    n, rows, starts = _bags(K, C, torch.get_num_threads())
    table = weight.T.view(C * n, K // n)

    def of_vector(x: Tensor) -> Tensor:
        if x.ndim > 1:
            return product(x, weight, bias)
        y = torch.embedding_bag(table, rows, starts, False, 0, False, torch.cat((x,) * n))[0].view(K)
        return y if bias is None else y.add_(bias)

    return of_vector
