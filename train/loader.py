"""Batches for the training loop: made ahead on a thread, copied to the device once.

Which windows a step takes is a pure function of (seed, epoch, position): the cursor of a run.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import torch
from torch import Tensor

from fusedgpt.train.config import TrainConfig, windows_per_step
from fusedgpt.train.data.dataset import IGNORE_INDEX, Batch, TokenDataset

_PREFETCHED = 2  # steps made ahead


@dataclass(frozen=True, kw_only=True)
class Cursor:
    """Where in the training stream a step begins: `position` windows into `epoch`."""

    epoch: int = 0
    position: int = 0


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """What one optimizer step trains on, in micro-batches that fit the device."""

    micro_batches: tuple[Batch, ...]  # inputs and targets, (B, T) int64 each
    shares: tuple[float, ...]  # of the step's targets that each micro-batch has; they add up to 1
    tokens: int
    following: Cursor  # where the next step begins

    @classmethod
    def collect(cls, micro_batches: Sequence[Batch], following: Cursor) -> Self:
        """The step on `micro_batches`, each weighing by the targets it has that are not ignored."""
        counts = [int((targets != IGNORE_INDEX).sum()) for _, targets in micro_batches]
        return cls(
            micro_batches=tuple(micro_batches),
            shares=tuple(count / max(1, sum(counts)) for count in counts),
            tokens=sum(inputs.numel() for inputs, _ in micro_batches),
            following=following,
        )

    @property
    def shapes(self) -> tuple[torch.Size, ...]:
        """Of the micro-batches."""
        return tuple(inputs.shape for inputs, _ in self.micro_batches)


class Loader:
    """Iterates over the steps of a run from `cursor` on, without end; use it as a context manager.

    The last step of an epoch may be smaller. What goes wrong in the thread is raised by next().
    """

    def __init__(
        self, dataset: TokenDataset, config: TrainConfig, device: torch.device, cursor: Cursor
    ) -> None:
        self.dataset, self.config, self.device = dataset, config, device
        self.windows = windows_per_step(config, dataset.max_length)
        self._queue: queue.Queue[StepBatch | BaseException] = queue.Queue(maxsize=_PREFETCHED)
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
        batch = self._queue.get()
        if isinstance(batch, BaseException):
            raise batch
        moved = tuple((self._moved(x), self._moved(y)) for x, y in batch.micro_batches)
        return replace(batch, micro_batches=moved)

    def _moved(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)

    def _work(self, cursor: Cursor) -> None:
        try:
            while not self._closed.is_set():
                batch = self.make(cursor)
                cursor = batch.following
                self._put(batch)
        except BaseException as error:
            self._put(error)

    def _put(self, item: StepBatch | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue
        return None

    def make(self, cursor: Cursor) -> StepBatch:
        """The step that begins at `cursor`, on the host (pinned where it goes to a GPU)."""
        left = self.dataset.windows_per_epoch - cursor.position
        micro_batches: list[Batch] = []
        for first in range(0, min(self.windows, left), self.config.batch_size):
            size = min(self.config.batch_size, self.windows - first)
            where: dict[str, Any] = {"seed": self.config.seed, "epoch": cursor.epoch, "batch_size": size}
            batch = self.dataset.train_batch(position=cursor.position + first, **where)
            if self.device.type == "cuda":
                batch = batch[0].pin_memory(), batch[1].pin_memory()
            micro_batches.append(batch)
        end = left <= self.windows
        following = Cursor(epoch=cursor.epoch + end, position=0 if end else cursor.position + self.windows)
        return StepBatch.collect(micro_batches, following)
