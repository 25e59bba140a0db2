"""The loader: every window once an epoch, in the dataset's order, cut into steps and micro-batches."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from token_data import dataset_of
from training_runs import counting

from fusedgpt.train.config import TrainConfig
from fusedgpt.train.data.tokens.dataset import Batch, TokenDataset, mix_datasets
from fusedgpt.train.loop.batches import Cursor, Loader, StepBatch
from fusedgpt.train.run.world import World

CPU = torch.device("cpu")


def steps(config: TrainConfig, n: int, cursor: Cursor | None = None) -> list[StepBatch]:
    with Loader(counting(), config, CPU, cursor or Cursor()) as loader:
        return list(itertools.islice(loader, n))


def test_steps_of_one_shape_take_every_window_once_an_epoch_in_the_datasets_order() -> None:
    """An epoch of the 84 windows ends inside a step."""
    dataset = counting()
    n = dataset.windows_per_epoch
    assert n % 8
    batches = steps(TrainConfig(batch_size=3, batch_tokens=8 * 16, seed=5), -(-2 * n // 8))
    for batch in batches:
        assert [len(x) for x, _ in batch.micro_batches] == [3, 3, 2]
        assert batch.tokens == 8 * 16
        assert batch.shares.tolist() == pytest.approx((3 / 8, 3 / 8, 2 / 8))
    seen = [torch.cat(x) for x in zip(*(pair for b in batches for pair in b.micro_batches), strict=True)]
    for epoch in (0, 1):
        whole = dataset.train_batch(seed=5, epoch=epoch, position=0, batch_size=n)
        for mine, wanted in zip(seen, whole, strict=True):
            assert torch.equal(mine[epoch * n : (epoch + 1) * n], wanted)
    assert batches[-1].following == Cursor(epoch=2, position=8 * len(batches) - 2 * n)


def test_the_cursor_leads_to_the_next_step() -> None:
    config = TrainConfig(batch_size=3, batch_tokens=8 * 16, seed=5)
    batches = steps(config, 25)
    for i in (1, 10, 11, 23):
        (resumed,) = steps(config, 1, batches[i].following)
        assert resumed.following == batches[i + 1].following
        assert torch.equal(resumed.micro_batches[0][0], batches[i + 1].micro_batches[0][0])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_share_every_step(ranks: int, packing: bool) -> None:
    """Their windows in a row are one process's, and so are cursor, tokens and the shares of 1."""
    documents = [[i % 7] * (3 + 5 * i % 11) for i in range(90)]
    packed = dataset_of(documents, eot_id=60, max_length=16, packing=packing)
    dataset = mix_datasets([packed, counting()], [0.4, 0.6]) if not packing else packed
    config = TrainConfig(batch_size=3, batch_tokens=8 * 16, seed=5)

    def drawn(rank: int, size: int) -> list[StepBatch]:
        world = World()
        world.rank, world.size = rank, size
        with Loader(dataset, config, CPU, Cursor(), world) as loader:
            return list(itertools.islice(loader, 12))

    parts = [drawn(rank, ranks) for rank in range(ranks)]
    for step, whole in enumerate(drawn(0, 1)):
        mine = [part[step] for part in parts]
        for i in (0, 1):
            windows = torch.cat([pair[i] for one in mine for pair in one.micro_batches])
            assert torch.equal(windows, torch.cat([pair[i] for pair in whole.micro_batches]))
        assert {(one.tokens, one.following) for one in mine} == {(whole.tokens, whole.following)}
        assert sum(float(one.shares.sum()) for one in mine) == pytest.approx(1.0)


def test_padding_is_not_counted() -> None:
    """Three documents of three tokens and their ends, packed one to a window of ten."""
    packed = dataset_of([[1, 2, 3]] * 3, eot_id=9, max_length=6, packing=True)
    config = TrainConfig(batch_size=2, batch_tokens=18)
    with Loader(packed, config, CPU, Cursor()) as loader:
        batch = next(loader)
    assert sum(x.numel() for x, _ in batch.micro_batches) == 18
    assert batch.tokens == 12
    assert batch.shares.tolist() == pytest.approx((8 / 12, 4 / 12))


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
        assert (copied.tokens, copied.following) == (gathered.tokens, gathered.following)
        assert torch.equal(copied.shares, gathered.shares)
        for ours, theirs in zip(copied.micro_batches, gathered.micro_batches, strict=True):
            assert torch.equal(ours[0], theirs[0])
            assert torch.equal(ours[1], theirs[1])
