"""Documents in a sequence: what attention's kernels read of them, made once per step for all layers.

Shape letters: B batch, T tokens; blocks are of 64 tokens.

Tokens see each other only if their ids are equal. Of every block the kernels know which blocks to visit at
all, and which of these need no mask, because they and the block hold one and the same id:

    first .. last                 the blocks whose range of ids meets that of the block
    same_first .. same_last       the blocks around it that hold only its id; empty if it has several itself
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgpt.kernels.library import register_op

BLOCK = tl.constexpr(64)
_CHUNK = tl.constexpr(16)  # blocks compared at a time


@triton.jit
def _documents_kernel(
    ids_ptr,  # (B, T) contiguous, any integers
    ids32_ptr,  # (B, T) int32
    spans_ptr,  # (B, ceil(T / 64), 4) int32: first, same_first, same_last, last
    T,
):
    n_blocks = tl.cdiv(T, BLOCK)
    b, block = tl.program_id(0) // n_blocks, tl.program_id(0) % n_blocks
    row = tl.cast(b, tl.int64) * T
    offs_t = block * BLOCK + tl.arange(0, BLOCK)
    ids = tl.load(ids_ptr + row + tl.minimum(offs_t, T - 1)).to(tl.int32)
    tl.store(ids32_ptr + row + offs_t, ids, mask=offs_t < T)
    low, high = tl.min(ids, 0), tl.max(ids, 0)
    first, last = block, block
    left, right = tl.full((), -1, tl.int32), n_blocks  # the nearest blocks that do not hold only its id
    for start in range(0, n_blocks, _CHUNK):
        others = start + tl.arange(0, _CHUNK)
        tokens = tl.minimum(others[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :], T - 1)
        other_ids = tl.load(ids_ptr + row + tokens).to(tl.int32)
        lows, highs = tl.min(other_ids, 1), tl.max(other_ids, 1)
        exists = others < n_blocks
        meets = exists & (lows <= high) & (highs >= low)
        first = tl.minimum(first, tl.min(tl.where(meets, others, n_blocks), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, others, 0), 0))
        differs = exists & ((lows != high) | (highs != low))
        left = tl.maximum(left, tl.max(tl.where(differs & (others <= block), others, -1), 0))
        right = tl.minimum(right, tl.min(tl.where(differs & (others >= block), others, n_blocks), 0))
    spans_ptr += 4 * tl.program_id(0)
    tl.store(spans_ptr, first)
    tl.store(spans_ptr + 1, left + 1)
    tl.store(spans_ptr + 2, right - 1)
    tl.store(spans_ptr + 3, last)


def documents(ids: Tensor) -> tuple[Tensor, Tensor]:
    """(ids as int32 (B, T), spans (B, ceil(T / 64), 4) int32) of document ids (B, T)."""
    ids32, spans = _outputs(ids)
    if ids.numel():
        with torch.cuda.device_of(ids):
            _documents_kernel[(spans.shape[0] * spans.shape[1],)](
                ids.contiguous(), ids32, spans, T=ids.shape[1], num_warps=4
            )
    return ids32, spans


def _outputs(ids: Tensor) -> tuple[Tensor, Tensor]:
    B, T = ids.shape
    return ids.new_empty(B, T, dtype=torch.int32), ids.new_empty(B, (T + 63) // 64, 4, dtype=torch.int32)


prepare_documents = register_op("prepare_documents", documents, _outputs)
