"""Tensors by address: what AdamW and Muon step in one launch, however many tensors there are.

Shape letters: n tensors, K chunks.

A table holds the addresses, so parameters, gradients and state stay where they are: gradients that autograd
allocates anew every step, FSDP shards and loaded checkpoints all fit.

Every access of a full block is 16 bytes per thread, without gaps in a warp: 8 neighbours of a 16-bit tensor,
4 of an fp32 one. So a warp takes rows of 256 elements, in fp32 as two halves of 128, one after the other in
its registers; between the two layouts elements change threads, but never warps, which needs no shared memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fusedgpt.kernels import tuning

GRAD_COLUMN = 1  # of Batch.table
CHUNK_SIZE = 4096  # elements one program takes at a time: of 124M, the last round is 99% full

# The columns of a table's row, and of a row of scalars.
PARAM, GRAD, EXP_AVG, EXP_AVG_SQ = (tl.constexpr(i) for i in (0, GRAD_COLUMN, 2, 3))
MASTER, STEP, SIZE, GROUP = (tl.constexpr(i) for i in range(4, 8))
STEP_SIZE, DECAY, INV_SQRT_CORRECTION2, EPS = (tl.constexpr(i) for i in range(4))
WEIGHT1, WEIGHT2, NEW_STEP = (tl.constexpr(i) for i in range(4, 7))
COLUMNS = tl.constexpr(8)  # of both, and of hyper
ROW = tl.constexpr(256)  # elements of a 16-bit tensor that a warp accesses at once


@triton.jit
def typed(address, dtype: tl.constexpr, ALIGNED: tl.constexpr):
    """The address as a pointer; without the hint its elements would be accessed one by one."""
    base = address.to(tl.pointer_type(dtype))
    if ALIGNED:
        base = tl.multiple_of(base, 16)
    return base


@triton.jit
def _to_halves(x, BLOCK: tl.constexpr):
    """The BLOCK elements of x in order -> (2, BLOCK / 256, 128): all first halves of rows, all second."""
    return tl.permute(tl.reshape(x, (BLOCK // ROW, 2, ROW // 2)), (1, 0, 2))


@triton.jit
def offsets(BITS: tl.constexpr, BLOCK: tl.constexpr):
    """Of a block's elements: rows (BLOCK / 256, 256) in 16 bits, else halves (2, BLOCK / 256, 128)."""
    rows = ROW * tl.arange(0, BLOCK // ROW)[:, None]
    if BITS == 16:
        offs = rows + tl.arange(0, ROW)
    else:
        offs = ROW // 2 * tl.arange(0, 2)[:, None, None] + rows + tl.arange(0, ROW // 2)
    return offs


@triton.jit
def load(address_ptr, first, offs, mask, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """fp32 (2, BLOCK / 256, 128) from element `first` on; without a mask the tensor is 16-byte aligned.

    address_ptr: in a table; loaded here and in `store`, because registers are scarcer than cache bandwidth.
    """
    return load_from(typed(tl.load(address_ptr), dtype, mask is None) + first, offs, mask, dtype, BLOCK)


@triton.jit
def load_from(first_ptr, offs, mask, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """As `load`, from first_ptr on."""
    x = tl.load(first_ptr + offs, mask=mask)
    if dtype.primitive_bitwidth == 16:
        x = _to_halves(x, BLOCK)
    return x.to(tl.float32)


@triton.jit
def store(address_ptr, first, offs, mask, x, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Stores x as `load` returns it."""
    store_to(typed(tl.load(address_ptr), dtype, mask is None) + first, offs, mask, x, dtype, BLOCK)


@triton.jit
def store_to(first_ptr, offs, mask, x, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """As `store`, to first_ptr and on."""
    x = x.to(dtype)
    if dtype.primitive_bitwidth == 16:
        x = tl.reshape(tl.permute(x, (1, 0, 2)), (BLOCK // ROW, ROW))
    tl.store(first_ptr + offs, x, mask=mask)


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The tensors one launch steps: n of one parameter and one gradient dtype; see make_batch."""

    table: Tensor  # (n, 8) int64, as the kernels document it
    chunks: Tensor  # (K, 2) int32
    chunk_size: int  # elements
    scalars: Tensor  # (n, 8) fp32, from the first launch to the second
    param_dtype: torch.dtype
    grad_dtype: torch.dtype

    def launch(
        self, kernel: Any, per_multiprocessor: int, *, most: int | None = None, **arguments: Any
    ) -> None:
        """Launch `kernel`: so many programs on each multiprocessor, `most` in all, walk over the chunks."""
        n_chunks = len(self.chunks)
        programs = tuning.multiprocessor_count(self.table.device) * per_multiprocessor
        with torch.cuda.device_of(self.table):
            kernel[(max(1, min(n_chunks, programs, most or programs)),)](
                table_ptr=self.table,
                chunks_ptr=self.chunks,
                scalars_ptr=self.scalars,
                n_chunks=n_chunks,
                CHUNK=self.chunk_size,
                **arguments,
            )


def make_batch(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    groups: Sequence[int],
) -> Batch:
    """A batch of n >= 1 tensors on one device, each list of n; contiguous tensors of the same n shapes.

    params: fp32, fp16 or bf16, all of one dtype, as are grads; masters: fp32, for fp32 params these
    themselves; exp_avgs, exp_avg_sqs: fp32; steps: fp32 scalars; groups: rows of hyper.
    The batch does not keep the tensors alive.
    """
    device = params[0].device
    columns = [[x.data_ptr() for x in xs] for xs in (params, grads, exp_avgs, exp_avg_sqs, masters, steps)]
    columns += [[p.numel() for p in params], list(groups)]
    chunks = [(i, c) for i, p in enumerate(params) for c in range(triton.cdiv(p.numel(), CHUNK_SIZE))]
    return Batch(
        table=torch.tensor(columns, dtype=torch.int64).T.contiguous().to(device),
        chunks=torch.tensor(chunks, dtype=torch.int32, device=device).view(-1, 2),
        chunk_size=CHUNK_SIZE,
        scalars=torch.zeros(len(params), 8, dtype=torch.float32, device=device),
        param_dtype=params[0].dtype,
        grad_dtype=grads[0].dtype,
    )
