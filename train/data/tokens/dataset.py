"""Token windows for training: documents joined by end-of-text, visited in a reproducible order.

The training stream is a ring. Epoch e cuts it into windows of `max_length` tokens, starting at a shift drawn
from (seed, e), and visits them in a permutation drawn from (seed, e). Every token is a target once per epoch,
window borders move from epoch to epoch, and (seed, epoch, position) alone determines the next tokens. Packed
windows end where documents end instead; a mix draws windows from several sets by weight.

Shape letters: B windows in a batch, T tokens in a window, N tokens in the training stream, R packed windows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fusedgpt.kernels.errors import InputError
from fusedgpt.train.data.tokens.shards import Part, Tokens, TokenStream
from fusedgpt.train.data.tokens.windows import (
    MIX_BLOCK,
    Ints,
    epoch_order,
    mix_order,
    mix_shares,
)

IGNORE_INDEX = -100
Batch = tuple[Tensor, Tensor]  # inputs (B, T), targets (B, T), both int64


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """A training and a validation stream of token ids, and how to cut them into windows."""

    train: Tokens  # (N,)
    val: Tokens  # (M,), empty if nothing was held out
    max_length: int
    train_documents: int
    val_documents: int
    eot_id: int | None = None  # ends a document; None: unknown, documents cannot be told apart
    document_masks: bool = False  # whether a token attends to its own document only
    borders: Ints | None = None  # (R + 1,), where packed windows begin and end; see pack_documents
    val_borders: Ints | None = None  # the same of the validation stream
    token_bytes: Tensor | None = None  # (V,) int64, the length of each token in bytes, for bits per byte

    def __str__(self) -> str:
        plural = "s" * (self.train_documents != 1)
        packed = "" if self.borders is None else f", packed into {self.windows_per_epoch:,}"
        return (
            f"{len(self.train):,} training tokens in {self.train_documents:,} document{plural}, "
            f"{len(self.val):,} validation tokens in {self.val_documents:,}, windows of {self.max_length}"
            f"{packed}"
        )

    @property
    def windows_per_epoch(self) -> int:
        """Windows per epoch of the training stream."""
        return len(self.train) // self.max_length if self.borders is None else len(self.borders) - 1

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that change with any token of either stream and with how they are cut."""
        digest = hashlib.sha256(f"{self.max_length} {self.borders is not None}".encode())
        for tokens in (self.train, self.val):
            digest.update(f" {len(tokens)} ".encode())
            if isinstance(tokens, TokenStream):
                digest.update(tokens.fingerprint.encode())
            else:
                digest.update(np.ascontiguousarray(tokens).data)
        return digest.hexdigest()[:32]

    def train_batch(self, *, seed: int, epoch: int, position: int, batch_size: int) -> Batch:
        """`batch_size` windows from `position` of an epoch on; the next epoch's follow its last."""
        return self._windows(seed, self._positions(epoch, position, batch_size))

    def count_targets(self, *, seed: int, epoch: int, position: int, batch_size: int) -> int:
        """How many targets the windows of train_batch have, without reading them."""
        return self._count_targets(seed, self._positions(epoch, position, batch_size))

    def _count_targets(self, seed: int, positions: Ints, member: int = 0) -> int:
        if self.borders is None:
            return len(positions) * self.max_length
        starts, stops = self._spans(seed, positions, member)
        return int((stops - starts).sum())

    @property
    def has_starts(self) -> bool:
        """Whether every window is max_length consecutive tokens of `train`, found by window_starts."""
        return self.borders is None

    def window_starts(self, *, seed: int, epoch: int, position: int, batch_size: int) -> Ints:
        """Where in the ring the windows of train_batch begin (B,); the inputs are the T tokens from there."""
        return self._spans(seed, self._positions(epoch, position, batch_size))[0]

    def _positions(self, epoch: int, position: int, batch_size: int) -> Ints:
        """The positions of consecutive windows, counted from the first of epoch 0."""
        return epoch * self.windows_per_epoch + np.arange(position, position + batch_size)

    def _spans(self, seed: int, positions: Ints, member: int = 0) -> tuple[Ints, Ints]:
        """The tokens [start, stop) that are each window's inputs (B,); its targets lie one further."""
        windows, shifts = np.empty_like(positions), np.empty_like(positions)
        epochs, places = np.divmod(positions, self.windows_per_epoch)
        for epoch in np.unique(epochs).tolist():
            rows = epochs == epoch
            shift, order = epoch_order(seed, epoch, self.windows_per_epoch, self.max_length, member)
            windows[rows], shifts[rows] = order(places[rows]), shift
        if self.borders is None:
            starts = shifts + windows * self.max_length
            return starts, starts + self.max_length
        return self.borders[windows] - 1, self.borders[windows + 1] - 1

    def _windows(self, seed: int, positions: Ints, member: int = 0) -> Batch:
        """Inputs and targets (B, T) of the windows at `positions`, counted from the first of epoch 0."""
        starts, stops = self._spans(seed, positions, member)
        spans = zip(starts.tolist(), stops.tolist(), strict=True)
        return self._batch(
            [_ring(self.train, start, stop + 1 - start) for start, stop in spans], self.eot_id or 0
        )

    def _batch(self, windows: list[NDArray[np.integer]], padding: int) -> Batch:
        """Inputs and targets (B, T) of windows of up to T + 1 ids."""
        inputs = np.full((len(windows), self.max_length), padding, dtype=np.int64)
        targets = np.full_like(inputs, IGNORE_INDEX)
        for row, ids in enumerate(windows):
            inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    def val_batches(self, batch_size: int) -> Iterator[Batch]:
        """The validation stream in order, every token a target once; without packing, all but the first."""
        if self.val_borders is None:
            n_targets = max(len(self.val) - 1, 0)
            borders = np.append(np.arange(0, n_targets, self.max_length), n_targets)
        else:
            borders = self.val_borders - 1
        for first in range(0, len(borders) - 1, batch_size):
            spans = pairwise(borders[first : first + batch_size + 1].tolist())
            yield self._batch(
                [_ring(self.val, start, stop + 1 - start) for start, stop in spans], self.eot_id or 0
            )

    def document_ids(self, inputs: Tensor) -> Tensor | None:
        """The model's `documents` argument for inputs (B, T): (B, T) int32, None without document masks.

        Raises ValueError if the end-of-text token is unknown.
        """
        if not self.document_masks:
            return None
        if self.eot_id is None:
            raise InputError("--document-masks needs to know which token ends a document")
        return document_ids(inputs, self.eot_id)


@dataclass(frozen=True, kw_only=True)
class MixedDataset(TokenDataset):
    """Several datasets as one, each sampled by its weight without replacement; see mix_datasets.

    Blocks of 1,000 windows have each set's share exactly. An epoch has as many windows as all sets together,
    so a set with more weight than tokens is seen several times in it. `train` and `val` are the sets' streams
    one after another.
    """

    sets: tuple[TokenDataset, ...]
    shares: tuple[int, ...]  # windows of each set per block

    @property
    def has_starts(self) -> bool:
        return False

    @property
    def windows_per_epoch(self) -> int:
        return sum(one.windows_per_epoch for one in self.sets)

    def __str__(self) -> str:
        shares = ", ".join(f"{share / MIX_BLOCK:.1%}" for share in self.shares)
        return f"{super().__str__()}, mixed {shares}"

    @cached_property
    def fingerprint(self) -> str:
        parts = [f"{one.fingerprint} {share}" for one, share in zip(self.sets, self.shares, strict=True)]
        return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:32]

    def _windows(self, seed: int, positions: Ints, member: int = 0) -> Batch:
        inputs = torch.empty(len(positions), self.max_length, dtype=torch.int64)
        targets = torch.empty_like(inputs)
        sets, ranks = mix_order(seed, positions, self.shares)
        for i in np.unique(sets).tolist():
            rows = np.flatnonzero(sets == i)
            inputs[rows], targets[rows] = self.sets[i]._windows(seed, ranks[rows], i + 1)
        return inputs, targets

    def _count_targets(self, seed: int, positions: Ints, member: int = 0) -> int:
        sets, ranks = mix_order(seed, positions, self.shares)
        members = np.unique(sets).tolist()
        return sum(self.sets[i]._count_targets(seed, ranks[sets == i], i + 1) for i in members)


def document_ids(inputs: Tensor, eot_id: int) -> Tensor:
    """The document of its window that each of the inputs (B, T) belongs to: (B, T) int32, on their device.

    For model(inputs, targets, documents=...), where a token then attends only to its own document.
    End-of-text belongs to the document after it, as in sampling, which starts from it.
    """
    return (inputs == eot_id).cumsum(dim=1, dtype=torch.int32)


def mix_datasets(sets: Sequence[TokenDataset], weights: Sequence[float]) -> TokenDataset:
    """`sets` as one dataset, sampled in proportion to `weights`; a single set is returned as it is.

    Raises ValueError for a weight that is not positive or below a thousandth of their sum, or sets that
    differ in tokenizer, window length or packing.
    """
    shares = mix_shares(weights)
    if len(sets) == 1:
        return sets[0]
    if len({(one.max_length, one.eot_id, one.borders is None) for one in sets}) > 1:
        raise InputError("sets that are mixed must have the same tokenizer and windows")
    return MixedDataset(
        train=TokenStream.join([_as_stream(one.train) for one in sets]),
        val=TokenStream.join([_as_stream(one.val) for one in sets]),
        max_length=sets[0].max_length,
        train_documents=sum(one.train_documents for one in sets),
        val_documents=sum(one.val_documents for one in sets),
        eot_id=sets[0].eot_id,
        document_masks=sets[0].document_masks,
        borders=sets[0].borders,  # only says that windows are packed; each set has its own
        val_borders=_joined([(one.val_borders, len(one.val)) for one in sets]),
        token_bytes=sets[0].token_bytes,
        sets=tuple(sets),
        shares=shares,
    )


def _joined(parts: Sequence[tuple[Ints | None, int]]) -> Ints | None:
    """The borders in streams of the given lengths as borders in all of them together."""
    found, start = [np.zeros(1, dtype=np.int64)], 0
    for borders, length in parts:
        if borders is None:
            return None
        found.append(borders[1:] + start)
        start += length
    return np.concatenate(found)


def _as_stream(tokens: Tokens) -> TokenStream:
    return tokens if isinstance(tokens, TokenStream) else TokenStream([Part(tokens)])


def _ring(tokens: Tokens, start: int, length: int) -> NDArray[np.integer]:
    """`length` ids from `start` on; the first token follows the last."""
    start %= len(tokens)
    ids = tokens[start : start + length]
    while len(ids) < length:
        ids = np.concatenate((ids, tokens[: length - len(ids)]))
    return ids


def check_length(n_train: int, max_length: int) -> None:
    """Raise ValueError if `n_train` tokens are too few for one window."""
    if n_train <= max_length:
        raise InputError(
            f"the text gives {n_train} training tokens, too few for one window of {max_length}: "
            f"add text, or make --max-length or --block-size smaller"
        )
