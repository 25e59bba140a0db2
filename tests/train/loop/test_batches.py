"""The loader: every window once an epoch, in the dataset's order, cut into steps and micro-batches."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from training_runs import counting

from fusedgpt.train.config import TrainConfig
from fusedgpt.train.data.tokens.dataset import Batch, TokenDataset
from fusedgpt.train.loop.batches import Cursor, Loader, StepBatch

CPU = torch.device("cpu")


def steps(config: TrainConfig, n: int, cursor: Cursor | None = None) -> list[StepBatch]:
    with Loader(counting(), config, CPU, cursor or Cursor()) as loader:
        return list(itertools.islice(loader, n))


def test_an_epoch_is_every_window_once_in_the_datasets_order() -> None:
    dataset = counting()
    config = TrainConfig(batch_size=3, batch_tokens=8 * 16, seed=5)
    per_epoch = -(-dataset.windows_per_epoch // 8)
    batches = steps(config, 2 * per_epoch)
    for epoch in (0, 1):
        inputs, targets = dataset.train_batch(seed=5, epoch=epoch, position=0, batch_size=10**6)
        mine = batches[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert torch.equal(torch.cat([x for b in mine for x, _ in b.micro_batches]), inputs)
        assert torch.equal(torch.cat([y for b in mine for _, y in b.micro_batches]), targets)
    assert [len(x) for x, _ in batches[0].micro_batches] == [3, 3, 2]
    assert batches[0].tokens == 8 * 16
    assert batches[0].shares == pytest.approx((3 / 8, 3 / 8, 2 / 8))


def test_the_cursor_leads_to_the_next_step() -> None:
    config = TrainConfig(batch_size=3, batch_tokens=8 * 16, seed=5)
    batches = steps(config, 25)
    for i in (1, 10, 11, 23):
        (resumed,) = steps(config, 1, batches[i].following)
        assert resumed.following == batches[i + 1].following
        assert torch.equal(resumed.micro_batches[0][0], batches[i + 1].micro_batches[0][0])


def test_what_goes_wrong_in_the_thread_is_raised() -> None:
    class Broken(TokenDataset):
        def train_batch(self, *, seed: int, epoch: int, position: int, batch_size: int) -> Batch:
            raise OSError("the disk is gone")

    broken = Broken(**vars(counting()))
    with (
        Loader(broken, TrainConfig(), CPU, Cursor()) as loader,
        pytest.raises(OSError, match="the disk is gone"),
    ):
        next(loader)


def test_leaving_ends_the_thread_at_once() -> None:
    with Loader(counting(), TrainConfig(), CPU, Cursor()) as loader:
        next(loader)
    assert not any(thread.name == "loader" for thread in threading.enumerate())


def test_a_set_on_the_device_gives_the_same_batches(device: torch.device) -> None:
    """Gathered there from where its windows start, also over the end of the ring."""
    config = TrainConfig(batch_size=3, batch_tokens=8 * 16, seed=5)
    taken = []
    for resident in (False, True):
        with Loader(counting(), config, device, Cursor(), resident=resident) as loader:
            taken.append(list(itertools.islice(loader, 25)))
    for copied, gathered in zip(*taken, strict=True):
        assert (copied.shares, copied.tokens, copied.following) == (
            gathered.shares, gathered.tokens, gathered.following
        )  # fmt: skip
        for ours, theirs in zip(copied.micro_batches, gathered.micro_batches, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
