"""How cuBLAS adds up: what the ops that call it, and a trainer, set for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import _C


@contextmanager
def fp32_sums() -> Iterator[None]:
    """Within the block, cuBLAS adds the parts of a bf16 or fp16 matmul that it splits along K in fp32.

    By default torch lets it round each part to the output's dtype first. The setting is read as a matmul is
    launched, or captured, and is the whole process's: other threads see it too.
    """
    # What torch.backends.cuda.matmul does, in a tenth of its time: (reduced precision, split along K).
    bf16 = _C._get_cublas_allow_bf16_reduced_precision_reduction()
    fp16 = _C._get_cublas_allow_fp16_reduced_precision_reduction()
    try:
        _C._set_cublas_allow_bf16_reduced_precision_reduction(False, bf16[1])
        _C._set_cublas_allow_fp16_reduced_precision_reduction(False, fp16[1])
        yield
    finally:
        _C._set_cublas_allow_bf16_reduced_precision_reduction(*bf16)
        _C._set_cublas_allow_fp16_reduced_precision_reduction(*fp16)
