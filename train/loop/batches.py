"""Batches for the training loop: made ahead on a thread, copied to the device once.

Which windows a step takes is a pure function of (seed, epoch, position): the cursor of a run.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from fusedgpt.train.config import TrainConfig, windows_per_step
from fusedgpt.train.data.tokens.dataset import IGNORE_INDEX, Batch, TokenDataset
from fusedgpt.train.run.world import ALONE, World

_PREFETCHED = 2  # steps made ahead
_MAX_RESIDENT_TOKENS = 1 << 26  # 256 MB on the GPU


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where in the training stream a step begins: `position` windows into `epoch`."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What this rank trains on in one optimizer step, in micro-batches that fit the device."""

    micro_batches: tuple[Batch, ...]  # inputs and targets, (B, T) int64 each
    shares: Tensor  # of the step's targets that each micro-batch has: fp32, on its device; 1 over all ranks
    tokens: int  # targets of the step, over all ranks, that count: not padding
    following: Cursor  # where the next step begins

    @classmethod
    def collect(cls, micro_batches: Sequence[Batch], following: Cursor) -> Self:
        """The step on `micro_batches`, each weighing by the targets it has that are not ignored."""
        counts = [int((targets != IGNORE_INDEX).sum()) for _, targets in micro_batches]
        shares = _shares(counts, sum(counts)).to(micro_batches[0][0].device)
        return cls(micro_batches=tuple(micro_batches), shares=shares, tokens=sum(counts), following=following)


def _shares(counts: Sequence[int], total: int) -> Tensor:
    return torch.tensor([count / max(1, total) for count in counts])


@dataclass(frozen=True, kw_only=True)
class _Drawn:
    """A step as the thread makes it: batches on the host, or where windows start in tokens on the GPU."""

    pieces: list[Batch | Tensor]
    shares: Tensor
    tokens: int
    following: Cursor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x on `device`, which copies it while the CPU goes on."""
    return (x.pin_memory() if device.type == "cuda" else x).to(device, non_blocking=True)


class Loader:
    """Iterates over the steps of a run from `cursor` on, without end; use it as a context manager.

    Steps cross the ends of epochs, so all are equal in shape. What goes wrong in the thread is raised by
    next(). A small set lives on the GPU (`resident`, by default where it fits well), and a step copies only
    where it looks there. Of several ranks each takes an equal, consecutive part of every step.
    """

    def __init__(
        self,
        dataset: TokenDataset,
        config: TrainConfig,
        device: torch.device,
        cursor: Cursor,
        world: World = ALONE,
        *,
        resident: bool | None = None,
    ) -> None:
        self.dataset, self.config, self.device, self.world = dataset, config, device, world
        self.windows = windows_per_step(config, dataset.max_length)
        small = device.type == "cuda" and len(dataset.train) <= _MAX_RESIDENT_TOKENS
        self._resident: Tensor | None = None
        if dataset.has_starts and (small if resident is None else resident):
            tokens = np.asarray(dataset.train[:], dtype=np.int32)
            self._resident = torch.from_numpy(tokens).to(device)
        self._queue: queue.Queue[_Drawn | BaseException] = queue.Queue(maxsize=_PREFETCHED)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(cursor,), name="loader", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def __iter__(self) -> Iterator[StepBatch]:
        return self

    def __next__(self) -> StepBatch:
        drawn = self._queue.get()
        if isinstance(drawn, BaseException):
            raise drawn
        return StepBatch(
            micro_batches=tuple(self._on_device(piece) for piece in drawn.pieces),
            shares=drawn.shares.to(self.device, non_blocking=True),
            tokens=drawn.tokens,
            following=drawn.following,
        )

    def _on_device(self, piece: Batch | Tensor) -> Batch:
        if not isinstance(piece, Tensor):
            inputs, targets = (x.to(self.device, non_blocking=True) for x in piece)
            return inputs, targets
        assert self._resident is not None
        starts = piece.to(self.device, non_blocking=True)
        offsets = torch.arange(self.dataset.max_length + 1, device=self.device)
        ids = self._resident[(starts[:, None] + offsets) % len(self._resident)].long()  # (B, T + 1)
        return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()

    def _work(self, cursor: Cursor) -> None:
        try:
            while not self._closed.is_set():
                drawn = self._draw(cursor)
                cursor = drawn.following
                self._put(drawn)
        except BaseException as error:
            self._put(error)

    def _put(self, item: _Drawn | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None

    def _draw(self, cursor: Cursor) -> _Drawn:
        """This rank's part of the step that begins at `cursor`."""
        pieces: list[Batch | Tensor] = []
        counts: list[int] = []
        mine = self.windows // self.world.size
        begin = self.world.rank * mine
        at: dict[str, Any] = {"seed": self.config.seed, "epoch": cursor.epoch}
        for first in range(begin, begin + mine, self.config.batch_size):
            size = min(self.config.batch_size, begin + mine - first)
            where = {**at, "position": cursor.position + first, "batch_size": size}
            if self._resident is not None:
                starts = torch.from_numpy(self.dataset.window_starts(**where))
                pieces.append(self._pinned(starts))
                counts.append(len(starts) * self.dataset.max_length)
            else:
                inputs, targets = self.dataset.train_batch(**where)
                pieces.append((self._pinned(inputs), self._pinned(targets)))
                counts.append(int((targets != IGNORE_INDEX).sum()))
        ended, position = divmod(cursor.position + self.windows, self.dataset.windows_per_epoch)
        following = Cursor(epoch=cursor.epoch + ended, position=position)
        tokens = sum(counts)
        if self.world.size > 1:
            tokens = self.dataset.count_targets(**at, position=cursor.position, batch_size=self.windows)
        shares = self._pinned(_shares(counts, tokens))
        return _Drawn(pieces=pieces, shares=shares, tokens=tokens, following=following)

    def _pinned(self, x: Tensor) -> Tensor:
        return x.pin_memory() if self.device.type == "cuda" else x
