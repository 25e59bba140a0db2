"""Where the windows of an epoch begin and end, and in which order they come: pure functions of a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from fusedgpt.kernels.errors import InputError

Ints = NDArray[np.int64]

MIX_BLOCK = 1000  # windows in which a mix has its shares exactly
_LARGEST_TABLE = 2**20  # the order of more windows is computed, not kept as a table


@lru_cache(maxsize=8)  # one order per epoch and set of a mix
def epoch_order(
    seed: int, epoch: int, n_windows: int, max_length: int, member: int = 0
) -> tuple[int, Callable[[Ints], Ints]]:
    """(the token at which the first window begins, the function from positions of an epoch to windows).

    member: which set of a mix, counted from 1; 0 for a dataset of its own.
    """
    rng = _rng(seed, epoch, member)  # trailing zeros do not change the generator
    shift = int(rng.integers(max_length))
    if n_windows <= _LARGEST_TABLE:
        return shift, rng.permutation(n_windows).__getitem__
    keys = tuple(rng.integers(2**63, size=4).tolist())
    return shift, partial(permute, n=n_windows, keys=keys)


def permute(x: Ints, n: int, keys: Sequence[int]) -> Ints:
    """Where the pseudo-random permutation of 0 .. n - 1 given by `keys` takes each of x.

    A Feistel network over the next power of four, repeated until the result is below n (cycle walking, Black
    and Rogaway 2002).
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    y = x.astype(np.uint64)
    outside = np.ones(len(y), dtype=bool)
    while outside.any():
        left, right = y[outside] >> half, y[outside] & mask
        for key in keys:
            left, right = right, left ^ (_hash(right + np.uint64(key)) & mask)
        y[outside] = left << half | right
        outside = y >= n
    return y.astype(np.int64)


def _hash(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def pack_documents(ends: NDArray[np.integer], max_length: int) -> Ints:
    """Borders (R + 1,) of windows of at most `max_length` targets that end where documents end.

    ends: where each document ends in the stream, ascending; the last is the length of the stream. A window
    takes whole documents while they fit. A longer document is split over several windows, and the next one
    begins in its last. A window's inputs begin with the end-of-text before its first document, so that every
    token is a target once.
    """
    borders = [0]
    total = int(ends[-1]) if len(ends) else 0
    while borders[-1] < total:
        limit = borders[-1] + max_length
        fitting = int(np.searchsorted(ends, limit, side="right"))  # documents that end by then
        last_end = int(ends[fitting - 1]) if fitting else 0
        borders.append(last_end if last_end > borders[-1] else limit)
    return np.asarray(borders, dtype=np.int64)


def mix_shares(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of MIX_BLOCK windows each weight gets, by the largest-remainder method.

    Raises ValueError for a weight that is not positive or gets none.
    """
    wanted = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        raise InputError(f"weights must be positive numbers, got {', '.join(f'{w:g}' for w in weights)}")
    wanted *= MIX_BLOCK / wanted.sum()
    shares = np.floor(wanted).astype(np.int64)
    largest_remainders = np.argsort(shares - wanted, kind="stable")[: MIX_BLOCK - int(shares.sum())]
    shares[largest_remainders] += 1
    if not shares.all():
        raise InputError(f"a weight is below 1/{MIX_BLOCK} of their sum: leave that set out")
    return tuple(shares.tolist())


def mix_order(seed: int, positions: Ints, shares: tuple[int, ...]) -> tuple[Ints, Ints]:
    """(which set each window of a run is drawn from, how many windows of that set come before it).

    positions: windows counted from the run's first.
    """
    sets, ranks = np.empty_like(positions), np.empty_like(positions)
    blocks, places = np.divmod(positions, MIX_BLOCK)
    for block in np.unique(blocks).tolist():
        block_sets, block_ranks = _mix_block(seed, block, shares)
        rows = blocks == block
        sets[rows], ranks[rows] = block_sets[places[rows]], block_ranks[places[rows]]
    return sets, ranks


@lru_cache(maxsize=4)
def _mix_block(seed: int, block: int, shares: tuple[int, ...]) -> tuple[Ints, Ints]:
    """`mix_order` of all windows of a block."""
    rng = _rng(seed, block, len(shares), MIX_BLOCK)
    sets = rng.permutation(np.repeat(np.arange(len(shares)), shares))
    ranks = np.empty_like(sets)
    for i, share in enumerate(shares):
        ranks[sets == i] = block * share + np.arange(share)
    return sets, ranks


def _rng(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))
