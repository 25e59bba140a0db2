"""Token windows for training: documents joined by end-of-text, in an order that is a pure function.

The stream is a ring. Epoch e cuts it into windows of `max_length` tokens, starting at a shift drawn from
(seed, e), and visits them in a permutation drawn from (seed, e): a token is a target once an epoch, window
borders move from epoch to epoch, and (seed, epoch, position) alone says which tokens come next.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

IGNORE_INDEX = -100
Tokens = NDArray[np.int32]
Batch = tuple[Tensor, Tensor]  # inputs (B, T), targets (B, T), both int64


@dataclass(frozen=True, kw_only=True)
class TokenDataset:
    """A training and a validation stream of token ids, and how to cut them."""

    train: Tokens  # (N,)
    val: Tokens  # (M,), empty if nothing was held out
    max_length: int
    train_documents: int
    val_documents: int

    def __str__(self) -> str:
        return (
            f"{len(self.train):,} training tokens in {self.train_documents:,} documents, "
            f"{len(self.val):,} validation tokens in {self.val_documents:,}, windows of {self.max_length}"
        )

    @property
    def windows_per_epoch(self) -> int:
        """Windows an epoch of the training stream has."""
        return len(self.train) // self.max_length

    def train_batch(self, *, seed: int, epoch: int, position: int, batch_size: int) -> Batch:
        """Windows position .. position + batch_size - 1 of an epoch, fewer at its end.

        Raises ValueError for a position outside the epoch.
        """
        if not 0 <= position < self.windows_per_epoch:
            raise ValueError(f"position {position} is not in an epoch of {self.windows_per_epoch} windows")
        shift, order = _epoch_order(seed, epoch, len(self.train), self.max_length)
        starts = shift + order[position : position + batch_size, None] * self.max_length
        windows = self.train[(starts + np.arange(self.max_length + 1)) % len(self.train)]
        ids = torch.from_numpy(windows.astype(np.int64))
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def val_batches(self, batch_size: int) -> Iterator[Batch]:
        """The validation stream in order, every token but the first a target once."""
        T = self.max_length
        targets = self.val[1:].astype(np.int64)
        rows = -(-len(targets) // T)
        x = np.zeros(rows * T, dtype=np.int64)
        y = np.full(rows * T, IGNORE_INDEX, dtype=np.int64)
        x[: len(targets)], y[: len(targets)] = self.val[:-1], targets
        inputs, wanted = torch.from_numpy(x).view(rows, T), torch.from_numpy(y).view(rows, T)
        for i in range(0, rows, batch_size):
            yield inputs[i : i + batch_size], wanted[i : i + batch_size]


_last_order: dict[tuple[int, int, int, int], tuple[int, NDArray[np.int64]]] = {}


def _epoch_order(seed: int, epoch: int, n_tokens: int, max_length: int) -> tuple[int, NDArray[np.int64]]:
    """(shift of the first window, order of the windows); the last answer is kept, it serves a whole epoch."""
    key = (seed, epoch, n_tokens, max_length)
    if key not in _last_order:
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence((seed, epoch))))
        _last_order.clear()
        _last_order[key] = int(rng.integers(max_length)), rng.permutation(n_tokens // max_length)
    return _last_order[key]


def build_dataset(
    documents: Sequence[Sequence[int]], *, eot_id: int, max_length: int, val_fraction: float, seed: int
) -> TokenDataset:
    """Join tokenised documents, each followed by eot_id, into a training and a validation stream.

    Whole documents are held out, drawn by seed, up to val_fraction of the tokens; where they do not come to
    half of that (a single book), the end of the last document is held out instead. Raises ValueError where
    the training stream is no longer than one window of max_length.
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
    n_train = sum(map(len, train))
    if n_train <= max_length:
        raise ValueError(
            f"the text gives {n_train} training tokens, too few for one window of {max_length}: "
            f"add text, or make --max-length or --block-size smaller"
        )
    return TokenDataset(
        train=np.concatenate(train),
        val=np.concatenate(val) if val else np.empty(0, dtype=np.int32),
        max_length=max_length,
        train_documents=len(train),
        val_documents=len(val),
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
