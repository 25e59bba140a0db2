"""What several kernels share: constants, dtypes, block sizes, and tiles of rows.

Shape letters: N rows, C channels.
"""

from __future__ import annotations

import math
import os
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}  # that the kernels take
TRITON_DTYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}

if hasattr(triton.knobs.language, "fp_fusion_enabled"):  # Triton 3.9, which warns unless this is set
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # fused multiply-adds, which 3.10 turns off

LOG2_E = tl.constexpr(math.log2(math.e))
LOWEST = tl.constexpr(-1e38)  # below any logit, and finite: -inf would give inf - inf

_TILE = 2048  # elements of a tile of rows: narrow rows share one
_PER_WARP = 512  # elements: 16 per thread, two 16-byte loads of bf16


@triton.jit
def exp(x):
    """e^x of fp32 x; tl.exp would spend two more instructions on denormal results."""
    return tl.exp2(x * LOG2_E)


@triton.jit
def row_tile(first_row, first_col, N, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """A tile of a contiguous (N, C) tensor: its rows (ROWS,) int64, and (ROWS, BLOCK_C) offsets and mask."""
    rows = first_row + tl.arange(0, ROWS).to(tl.int64)
    offs_c = first_col + tl.arange(0, BLOCK_C)[None, :]
    return rows, (rows * C)[:, None] + offs_c, (rows < N)[:, None] & (offs_c < C)


@triton.jit
def load_columns(x_ptr, first_col, C: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    """Columns of a vector (C,) in fp32, repeated to (ROWS, BLOCK_C) so that they get a row tile's layout."""
    offs_c = tl.broadcast_to(first_col + tl.arange(0, BLOCK_C)[None, :], (ROWS, BLOCK_C))
    return tl.load(x_ptr + offs_c, mask=offs_c < C, other=0.0).to(tl.float32)


@cache  # asked at every launch
def block_size(n: int) -> int:
    """The smallest power of two that holds n, at least 16: what a tensor core takes."""
    return max(16, int(triton.next_power_of_2(n)))


def row_blocks(C: int, max_block_c: int) -> dict[str, int]:
    """The constants of a launch over rows of C: chosen by the width alone, whatever the number of rows."""
    BLOCK_C = min(block_size(C), max_block_c)
    ROWS = max(1, _TILE // BLOCK_C)
    return {"C": C, "ROWS": ROWS, "BLOCK_C": BLOCK_C, "num_warps": ROWS * BLOCK_C // _PER_WARP}


def contiguous_like(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """An empty contiguous tensor of x's shape, and dtype if None: what fake kernels return."""
    return torch.empty_like(x, dtype=dtype, memory_format=torch.contiguous_format)
