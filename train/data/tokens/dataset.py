"""Token windows for training: documents joined by end-of-text, in an order that is a pure function.

The stream is a ring. Epoch e cuts it into windows of `max_length` tokens, starting at a shift drawn from
(seed, e), and visits them in a permutation drawn from (seed, e): a token is a target once an epoch, window
borders move from epoch to epoch, and (seed, epoch, position) alone says which tokens come next. Packed
windows end where documents end instead; a mix draws windows of several sets by their weights.

Shape letters: B windows of a batch, T tokens of a window, N tokens of the training stream, R packed windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.data.tokens.shards import TokenStream

IGNORE_INDEX = -100
Tokens = NDArray[np.int32] | TokenStream  # in memory, or mapped from shards
Batch = tuple[Tensor, Tensor]  # inputs (B, T), targets (B, T), both int64
Ints = NDArray[np.int64]

_LARGEST_TABLE = 2**20  # windows whose order is kept as a table; that of more is computed, in no memory
_MIX_BLOCK = 1000  # windows in which a mix has its shares exactly


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """A training and a validation stream of token ids, and how to cut them."""

    train: Tokens  # (N,)
    val: Tokens  # (M,), empty if nothing was held out
    max_length: int
    train_documents: int
    val_documents: int
    eot_id: int | None = None  # what ends a document; None: unknown, documents cannot be told apart
    document_masks: bool = False  # whether a token is to attend to its own document only
    borders: Ints | None = None  # (R + 1,), where packed windows begin and end; see pack_documents
    token_bytes: Tensor | None = None  # (V,) int64, the length of each token in bytes, for bits per byte

    def __str__(self) -> str:
        packed = "" if self.borders is None else f", packed into {self.windows_per_epoch:,}"
        return (
            f"{len(self.train):,} training tokens in {self.train_documents:,} documents, "
            f"{len(self.val):,} validation tokens in {self.val_documents:,}, windows of {self.max_length}"
            f"{packed}"
        )

    @property
    def windows_per_epoch(self) -> int:
        """Windows an epoch of the training stream has."""
        return len(self.train) // self.max_length if self.borders is None else len(self.borders) - 1

    @cached_property
    def fingerprint(self) -> str:
        """Changes with any token of either stream, and with the way they are cut; 32 hexadecimal digits."""
        digest = hashlib.sha256(f"{self.max_length} {self.borders is not None}".encode())
        for tokens in (self.train, self.val):
            digest.update(f" {len(tokens)} ".encode())
            if isinstance(tokens, TokenStream):
                digest.update(tokens.fingerprint.encode())
            else:
                digest.update(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
        return digest.hexdigest()[:32]

    def train_batch(self, *, seed: int, epoch: int, position: int, batch_size: int) -> Batch:
        """Windows position .. position + batch_size - 1 of an epoch, fewer at its end.

        Raises ValueError for a position outside the epoch.
        """
        if not 0 <= position < self.windows_per_epoch:
            raise ValueError(f"position {position} is not in an epoch of {self.windows_per_epoch} windows")
        positions = np.arange(position, min(position + batch_size, self.windows_per_epoch))
        windows = self._windows(seed, epoch, positions)
        return torch.from_numpy(windows[0]), torch.from_numpy(windows[1])

    @property
    def has_starts(self) -> bool:
        """Whether all windows are max_length long and lie in `train`: window_starts says where."""
        return self.borders is None

    def window_starts(self, *, seed: int, epoch: int, position: int, batch_size: int) -> Ints:
        """Where in the ring the windows of train_batch begin (B,); its inputs are the T tokens from there."""
        positions = np.arange(position, min(position + batch_size, self.windows_per_epoch))
        order = _epoch_order(seed, epoch, self.windows_per_epoch, self.max_length, 0)
        return order.shift + order.at(positions) * self.max_length

    def _windows(self, seed: int, epoch: int, positions: Ints, member: int = 0) -> tuple[Ints, Ints]:
        """Inputs and targets (B, T) of the windows at `positions` of an epoch."""
        T = self.max_length
        order = _epoch_order(seed, epoch, self.windows_per_epoch, T, member)
        drawn = order.at(positions)
        inputs = np.full((len(drawn), T), self.eot_id or 0, dtype=np.int64)
        targets = np.full((len(drawn), T), IGNORE_INDEX, dtype=np.int64)
        for row, window in enumerate(drawn.tolist()):
            start, stop = self._span(order.shift, window)
            ids = _ring(self.train, start, stop - start + 1)
            inputs[row, : stop - start], targets[row, : stop - start] = ids[:-1], ids[1:]
        return inputs, targets

    def _span(self, shift: int, window: int) -> tuple[int, int]:
        """The tokens [start, stop) that are a window's inputs; its targets lie one further."""
        if self.borders is None:
            start = shift + window * self.max_length
            return start, start + self.max_length
        return int(self.borders[window]) - 1, int(self.borders[window + 1]) - 1

    def val_batches(self, batch_size: int) -> Iterator[Batch]:
        """The validation stream in order, every token but the first a target once."""
        T = self.max_length
        n_targets = len(self.val) - 1
        for first in range(0, n_targets, batch_size * T):
            ids = self.val[first : first + batch_size * T + 1].astype(np.int64)
            rows = -(-(len(ids) - 1) // T)
            inputs = np.zeros(rows * T, dtype=np.int64)
            targets = np.full(rows * T, IGNORE_INDEX, dtype=np.int64)
            inputs[: len(ids) - 1], targets[: len(ids) - 1] = ids[:-1], ids[1:]
            yield torch.from_numpy(inputs).view(rows, T), torch.from_numpy(targets).view(rows, T)

    def document_ids(self, inputs: Tensor) -> Tensor | None:
        """What the model takes as `documents` for a batch's inputs (B, T): (B, T) int32, None without masks.

        Raises ValueError where documents are to be told apart and no end-of-text is known.
        """
        if not self.document_masks:
            return None
        if self.eot_id is None:
            raise ValueError("--document-masks needs to know which token ends a document")
        return document_ids(inputs, self.eot_id)


@dataclass(frozen=True, kw_only=True)
class MixedDataset(TokenDataset):
    """Several sets as one: windows are drawn from each by its weight, none twice before all of it was seen.

    Blocks of 1,000 windows have each set's share exactly. An epoch has as many windows as all sets together;
    a set with more weight than tokens is seen more often in it. `train` and `val` are all sets' one after
    another. Use mix_datasets.
    """

    sets: tuple[TokenDataset, ...]
    shares: tuple[int, ...]  # windows of each set in a block

    @property
    def has_starts(self) -> bool:
        return False

    @property
    def windows_per_epoch(self) -> int:
        return sum(one.windows_per_epoch for one in self.sets)

    def __str__(self) -> str:
        shares = ", ".join(f"{share / _MIX_BLOCK:.1%}" for share in self.shares)
        return f"{super().__str__()}, mixed {shares}"

    @cached_property
    def fingerprint(self) -> str:
        parts = [f"{one.fingerprint} {share}" for one, share in zip(self.sets, self.shares, strict=True)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]

    def _windows(self, seed: int, epoch: int, positions: Ints, member: int = 0) -> tuple[Ints, Ints]:
        inputs = np.empty((len(positions), self.max_length), dtype=np.int64)
        targets = np.empty_like(inputs)
        which, turns = self._draw(seed, epoch * self.windows_per_epoch + positions)
        for i in np.unique(which).tolist():
            epochs, places = np.divmod(turns, self.sets[i].windows_per_epoch)
            for own_epoch in np.unique(epochs[which == i]).tolist():
                rows = (which == i) & (epochs == own_epoch)
                inputs[rows], targets[rows] = self.sets[i]._windows(seed, own_epoch, places[rows], i + 1)
        return inputs, targets

    def _draw(self, seed: int, positions: Ints) -> tuple[Ints, Ints]:
        """The set of each window, counted from the run's first, and how many of that set come before."""
        which, turns = np.empty_like(positions), np.empty_like(positions)
        blocks, places = np.divmod(positions, _MIX_BLOCK)
        for block in np.unique(blocks).tolist():
            drawn, ranks = _mix_block(seed, block, self.shares)
            rows = blocks == block
            which[rows] = drawn[places[rows]]
            turns[rows] = block * np.asarray(self.shares)[which[rows]] + ranks[places[rows]]
        return which, turns


def document_ids(inputs: Tensor, eot_id: int) -> Tensor:
    """Which document of its window each of the inputs (B, T) belongs to: (B, T) int32, on their device.

    For model(inputs, targets, documents=...), where a token then sees only its own document. End-of-text
    belongs to the document that it precedes, as in sampling, which starts from it.
    """
    return (inputs == eot_id).cumsum(dim=1, dtype=torch.int32)


def mix_datasets(sets: Sequence[TokenDataset], weights: Sequence[float]) -> TokenDataset:
    """`sets` as one, drawn from in proportion to `weights`; one set is itself.

    Raises ValueError for a weight that is not positive or below a thousandth of all, or sets that do not cut
    their streams alike.
    """
    if len(sets) == 1:
        return sets[0]
    if len({(one.max_length, one.eot_id, one.borders is None) for one in sets}) > 1:
        raise ValueError("sets that are mixed must have the same tokenizer and windows")
    return MixedDataset(
        train=TokenStream.join([_as_stream(one.train) for one in sets]),
        val=TokenStream.join([_as_stream(one.val) for one in sets]),
        max_length=sets[0].max_length,
        train_documents=sum(one.train_documents for one in sets),
        val_documents=sum(one.val_documents for one in sets),
        eot_id=sets[0].eot_id,
        document_masks=sets[0].document_masks,
        borders=sets[0].borders,  # for what asks whether windows are packed; each set has its own
        token_bytes=sets[0].token_bytes,
        sets=tuple(sets),
        shares=_shares(weights),
    )


def _as_stream(tokens: Tokens) -> TokenStream:
    return tokens if isinstance(tokens, TokenStream) else TokenStream([tokens])


def _shares(weights: Sequence[float]) -> tuple[int, ...]:
    """How many of 1,000 windows each weight is: rounded down, what is left to the largest remainders."""
    wanted = np.asarray(weights, dtype=np.float64)
    if not (np.isfinite(wanted).all() and (wanted > 0).all()):
        raise ValueError(f"weights must be positive numbers, got {', '.join(f'{w:g}' for w in weights)}")
    wanted *= _MIX_BLOCK / wanted.sum()
    shares = np.floor(wanted).astype(np.int64)
    largest_remainders = np.argsort(shares - wanted, kind="stable")[: _MIX_BLOCK - int(shares.sum())]
    shares[largest_remainders] += 1
    if not shares.all():
        raise ValueError(f"a weight is below 1/{_MIX_BLOCK} of their sum: leave that set out")
    return tuple(shares.tolist())


@lru_cache(maxsize=4)
def _mix_block(seed: int, block: int, shares: tuple[int, ...]) -> tuple[Ints, Ints]:
    """For each window of a block of a mix: its set, and how many of that set come before it in the block."""
    drawn = _rng(seed, block, len(shares), _MIX_BLOCK).permutation(np.repeat(np.arange(len(shares)), shares))
    ranks = np.empty_like(drawn)
    for i, share in enumerate(shares):
        ranks[drawn == i] = np.arange(share)
    return drawn, ranks


@dataclass(frozen=True)
class _Order:
    """The shift of an epoch's first window, and the order of its windows."""

    shift: int
    table: Ints | None
    n_windows: int
    keys: tuple[int, ...]

    def at(self, positions: Ints) -> Ints:
        """The windows at `positions` of the epoch."""
        if self.table is not None:
            return self.table[positions]
        return permuted(positions, self.n_windows, self.keys)


@lru_cache(maxsize=8)  # an order serves a whole epoch; a mix has one for each of its sets
def _epoch_order(seed: int, epoch: int, n_windows: int, max_length: int, member: int) -> _Order:
    rng = _rng(seed, epoch, member)  # a last 0 changes nothing
    shift = int(rng.integers(max_length))
    if n_windows <= _LARGEST_TABLE:
        return _Order(shift, rng.permutation(n_windows), n_windows, ())
    return _Order(shift, None, n_windows, tuple(rng.integers(2**63, size=4).tolist()))


def _rng(*entropy: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


def permuted(x: Ints, n: int, keys: Sequence[int]) -> Ints:
    """Where a pseudo-random permutation of 0 .. n - 1 takes each of x; the same keys, the same permutation.

    A Feistel network over the next power of four, walked until it lands below n (Black and Rogaway 2002).
    """
    half = np.uint64(((n - 1).bit_length() + 1) // 2)
    mask = (np.uint64(1) << half) - np.uint64(1)
    y = x.astype(np.uint64)
    outside = np.ones(len(y), dtype=bool)
    while outside.any():
        left, right = y[outside] >> half, y[outside] & mask
        for key in keys:
            left, right = right, left ^ (_mixed(right + np.uint64(key)) & mask)
        y[outside] = left << half | right
        outside = y >= n
    return y.astype(np.int64)


def _mixed(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _ring(tokens: Tokens, start: int, length: int) -> NDArray[np.integer]:
    """`length` ids from `start` on, the first following the last."""
    start %= len(tokens)
    ids = tokens[start : start + length]
    while len(ids) < length:
        ids = np.concatenate((ids, tokens[: length - len(ids)]))
    return ids


def pack_documents(ends: NDArray[np.integer], max_length: int) -> Ints:
    """Borders (R + 1,) of windows of at most `max_length` targets that end where documents end.

    ends: where each document ends in the stream, ascending, the last the length of the stream. Documents
    follow each other in a window while they fit; one that is longer than a window is cut, and the next
    begins in its last. A window's inputs begin with the end-of-text before its first document: every token
    is a target once.
    """
    borders = [0]
    total = int(ends[-1]) if len(ends) else 0
    while borders[-1] < total:
        limit = borders[-1] + max_length
        fitting = int(np.searchsorted(ends, limit, side="right"))  # documents that end by then
        last_end = int(ends[fitting - 1]) if fitting else 0
        borders.append(last_end if last_end > borders[-1] else limit)
    return np.asarray(borders, dtype=np.int64)


def build_dataset(
    documents: Sequence[Sequence[int]],
    *,
    eot_id: int,
    max_length: int,
    val_fraction: float,
    seed: int,
    packing: bool = False,
) -> TokenDataset:
    """Join tokenised documents, each followed by eot_id, into a training and a validation stream.

    Whole documents are held out, drawn by seed, up to val_fraction of the tokens; where they do not come to
    half of that (a single book), the end of the last document is held out instead. packing: windows end where
    documents do. Raises ValueError where the training stream is no longer than one window of max_length.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction: expected 0 <= fraction < 1, got {val_fraction}")
    ended = [np.append(document, eot_id).astype(np.int32) for document in documents if len(document)]
    total = sum(map(len, ended))
    budget = round(total * val_fraction)
    held_out = _choose_validation([len(d) for d in ended], budget, seed)
    train = [d for i, d in enumerate(ended) if i not in held_out]
    val = [d for i, d in enumerate(ended) if i in held_out]
    if train and not val and 0 < budget < len(train[-1]):
        train[-1], tail = train[-1][:-budget], train[-1][-budget:]
        val = [tail]
    check_length(sum(map(len, train)), max_length)
    return TokenDataset(
        train=np.concatenate(train),
        val=np.concatenate(val) if val else np.empty(0, dtype=np.int32),
        max_length=max_length,
        train_documents=len(train),
        val_documents=len(val),
        eot_id=eot_id,
        borders=pack_documents(np.cumsum([len(d) for d in train]), max_length) if packing else None,
    )


def token_bytes(tokenizer: Tokenizer) -> Tensor | None:
    """TokenDataset.token_bytes of a tokenizer; None where it cannot tell."""
    lengths = tokenizer.token_bytes()
    return None if lengths is None else torch.tensor(lengths, dtype=torch.int64)


def check_length(n_train: int, max_length: int) -> None:
    """Raise ValueError where `n_train` tokens are too few for one window."""
    if n_train <= max_length:
        raise ValueError(
            f"the text gives {n_train} training tokens, too few for one window of {max_length}: "
            f"add text, or make --max-length or --block-size smaller"
        )


def _choose_validation(lengths: list[int], budget: int, seed: int) -> set[int]:
    """Indices of documents, drawn by seed, that fit the token budget together; none if under half of it."""
    rng = np.random.Generator(np.random.Philox(seed))
    chosen: set[int] = set()
    left = budget
    for i in rng.permutation(len(lengths)):
        if lengths[i] <= left:
            chosen.add(int(i))
            left -= lengths[i]
    return chosen if left <= budget / 2 else set()
