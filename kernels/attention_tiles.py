"""What the attention kernels share: tiles of heads, which of them to visit, masks and dropout.

Shape letters: B batch, T tokens, H heads, D head size (BLOCK_D: the next power of two).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def program_tile(B, H, T, heads, BLOCK: tl.constexpr, REVERSED: tl.constexpr):
    """(b, h, index of the head in (B, H), first row) of this program's tile of BLOCK rows.

    Groups of `heads` heads go one after the other, and within a group one tile of every head before the next
    tile of any. REVERSED: the last rows of a head first, where they have the most keys.
    """
    n_tiles = tl.cdiv(T, BLOCK)
    first_head = tl.program_id(0) // (heads * n_tiles) * heads
    heads = tl.minimum(heads, B * H - first_head)
    i = tl.program_id(0) - first_head * n_tiles
    bh, tile = first_head + i % heads, i // heads
    if REVERSED:
        tile = n_tiles - 1 - tile
    return bh // H, bh % H, bh, tile * BLOCK


@triton.jit
def _tile_ptrs(x_ptr, strides, b, h, start, T, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Pointers to rows start .. of one head and which of them exist: (BLOCK, BLOCK_D) each."""
    offs_t, offs_d = tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    x_ptr += tl.cast(b, tl.int64) * strides[0] + tl.cast(h, tl.int64) * strides[2]
    x_ptr += tl.cast(start, tl.int64) * strides[1]
    mask = (offs_t < T - start)[:, None]
    if D != BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    return x_ptr + offs_t[:, None] * strides[1] + offs_d[None, :] * strides[3], mask


@triton.jit
def load_tile(x, strides, b, h, start, T, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows start .. of one head of x (B, T, H, D): (BLOCK, BLOCK_D), zeros beyond T and D.

    x: a pointer with its strides, or a descriptor with strides None.
    """
    if strides is None:
        tile = x.load([b, h, start, 0]).reshape(BLOCK, BLOCK_D)
    else:
        ptrs, mask = _tile_ptrs(x, strides, b, h, start, T, D, BLOCK, BLOCK_D)
        tile = tl.load(ptrs, mask=mask, other=0.0)
    return tile


@triton.jit
def store_tile(
    x_ptr, strides, b, h, start, tile, T, D: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr
):
    ptrs, mask = _tile_ptrs(x_ptr, strides, b, h, start, T, D, BLOCK, BLOCK_D)
    tl.store(ptrs, tile.to(x_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _philox2x32(seed, counter):
    """The two words of each Philox-2x32-7 block: reference.philox2x32."""
    key = (seed ^ (seed >> 32)).to(tl.uint32)
    c0, c1 = counter.to(tl.uint32), (counter >> 32).to(tl.uint32)
    for _ in tl.static_range(7):
        product = c0.to(tl.uint64) * 0xD256D193
        c0, c1 = (product >> 32).to(tl.uint32) ^ c1 ^ key, product.to(tl.uint32)
        key += 0x9E3779B9
    return c0, c1


@triton.jit
def keep_tile(seed, offset, threshold, bh, start_m, start_n, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The dropout mask (BLOCK_M, BLOCK_N) of one tile of weights: reference.attention_dropout_mask.

    A Philox block serves two queries and four keys that are 8 apart. One thread holds them of a tensor-core
    accumulator, and half of them of its transpose: the mask is made in the registers where it is used.
    """
    rows = tl.cast(bh, tl.int64) * (tl.cdiv(T, 16) * 8) + start_m // 2 + tl.arange(0, BLOCK_M // 2)
    row_blocks = offset + rows * (tl.cdiv(T, 32) * 8)
    blocks = row_blocks[:, None] + (start_n // 4 + tl.arange(0, BLOCK_N // 4))[None, :]
    w0, w1 = _philox2x32(seed, blocks)
    words = tl.join(w0, w1)
    lanes = tl.join(tl.join(words << 24, words << 8), tl.join(words << 16, words))  # the byte on top
    lanes = tl.reshape(lanes, (BLOCK_M // 16, 8, BLOCK_N // 32, 8, 2, 4))
    lanes = tl.reshape(lanes.permute(0, 4, 1, 2, 5, 3), (BLOCK_M, BLOCK_N))
    return lanes >= threshold.to(tl.uint32) << 24


@triton.jit  # noqa: RET503  # Triton 3.6 does not compile a `return None`
def load_ids(ids_ptr, b, offs, T):
    """The document ids of tokens `offs`; None without documents."""
    if ids_ptr is not None:
        return tl.load(ids_ptr + tl.cast(b, tl.int64) * T + tl.minimum(offs, T - 1))


@triton.jit
def visible_keys(offs_m, offs_n, ids_m, ids_n):
    """Which keys the queries may see: (BLOCK_M, BLOCK_N)."""
    visible = offs_m[:, None] >= offs_n[None, :]
    if ids_m is not None:
        visible = visible & (ids_m[:, None] == ids_n[None, :])
    return visible


@triton.jit
def key_ranges(spans_ptr, b, start_m, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(begin, full, diagonal): keys from `begin` on are visited; `full` .. `diagonal` need no mask."""
    begin, full, diagonal = 0, 0, start_m // BLOCK_N * BLOCK_N
    if spans_ptr is not None:
        spans_ptr += 4 * b * tl.cdiv(T, 64)
        block, last_block = start_m // 64, tl.minimum(start_m + BLOCK_M - 1, T - 1) // 64
        first = tl.load(spans_ptr + 4 * block)
        for other in range(block + 1, last_block + 1):
            first = tl.minimum(first, tl.load(spans_ptr + 4 * other))
        same = tl.load(spans_ptr + 4 * last_block + 1)
        begin = first * 64 // BLOCK_N * BLOCK_N
        full = tl.cdiv(same * 64, BLOCK_N) * BLOCK_N
        full = tl.where(same <= block, tl.minimum(full, diagonal), diagonal)
    return begin, full, diagonal


@triton.jit
def query_ranges(spans_ptr, b, start_n, T, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """(below, full_end, end): queries up to `end` are visited; `below` .. `full_end` need no mask."""
    below = tl.minimum(tl.cdiv(start_n + BLOCK_N, BLOCK_M) * BLOCK_M, T)  # the diagonal
    full_end, end = T, T
    if spans_ptr is not None:
        spans_ptr += 4 * b * tl.cdiv(T, 64)
        block, last_block = start_n // 64, tl.minimum(start_n + BLOCK_N - 1, T - 1) // 64
        last = tl.load(spans_ptr + 4 * last_block + 3)
        for other in range(block, last_block):
            last = tl.maximum(last, tl.load(spans_ptr + 4 * other + 3))
        same_end = (tl.load(spans_ptr + 4 * block + 2) + 1) * 64
        end = tl.minimum((last + 1) * 64, T)
        full_end = tl.where(same_end < T, same_end // BLOCK_M * BLOCK_M, T)
        full_end = tl.where(same_end > last_block * 64, tl.maximum(full_end, below), below)
    return below, full_end, end
