"""Token windows for training: documents joined by end-of-text, in an order that is a pure function.

The stream is a ring. Epoch e cuts it into windows of `max_length` tokens, starting at a shift drawn from
(seed, e), and visits them in a permutation drawn from (seed, e): every token is a target once an epoch, window
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

    Whole documents are held out, drawn by seed, up to val_fraction of the tokens; where no document is small
    enough for that (a single book), the end of the last one is. Raises ValueError where the training stream is
    shorter than one window of max_length.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"val_fraction: expected 0 <= fraction < 1, got {val_fraction}")
    kept = [np.asarray([*document, eot_id], dtype=np.int32) for document in documents if len(document)]
    total = sum(map(len, kept))
    held_out = _choose_validation([len(d) for d in kept], round(total * val_fraction), seed)
    train = [d for i, d in enumerate(kept) if i not in held_out]
    val = [d for i, d in enumerate(kept) if i in held_out]
    if kept and not val and val_fraction > 0.0:
        cut = len(train[-1]) - round(total * val_fraction)
        if cut > 0:
            train[-1], tail = train[-1][:cut], train[-1][cut:]
            val = [tail]
    n_train = sum(map(len, train))
    if n_train <= max_length:
        raise ValueError(
            f"the text has {n_train} training tokens, fewer than one window of {max_length} + 1: "
            f"add text or use a smaller block size"
        )
    return TokenDataset(
        train=np.concatenate(train),
        val=np.concatenate(val) if val else np.empty(0, dtype=np.int32),
        max_length=max_length,
        train_documents=len(train),
        val_documents=len(val),
    )


def _choose_validation(lengths: list[int], budget: int, seed: int) -> set[int]:
    """Indices of documents, in an order drawn by seed, that fit the budget of tokens together."""
    rng = np.random.Generator(np.random.Philox(seed))
    chosen: set[int] = set()
    for i in rng.permutation(len(lengths)):
        if lengths[i] <= budget:
            chosen.add(int(i))
            budget -= lengths[i]
    return chosen
