"""Windows: every token once an epoch, an order that is a pure function, a split by document."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgpt.train.data.dataset import IGNORE_INDEX, TokenDataset, build_dataset

EOT = 9999


def documents(n: int, length: int) -> list[list[int]]:
    """n documents of distinct tokens."""
    return [list(range(i * length, (i + 1) * length)) for i in range(n)]


def whole_epoch(dataset: TokenDataset, *, seed: int, epoch: int, batch_size: int) -> list[torch.Tensor]:
    return [
        torch.cat((inputs, targets[:, -1:]), dim=1)
        for position in range(0, dataset.windows_per_epoch, batch_size)
        for inputs, targets in [
            dataset.train_batch(seed=seed, epoch=epoch, position=position, batch_size=batch_size)
        ]
    ]


@given(st.integers(10, 300), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_token_as_a_target_once(n: int, T: int, batch_size: int, epoch: int) -> None:
    dataset = build_dataset([list(range(n))], eot_id=n, max_length=T, val_fraction=0.0, seed=0)
    windows = torch.cat(whole_epoch(dataset, seed=3, epoch=epoch, batch_size=batch_size))
    assert torch.equal((windows[:, :-1] + 1) % (n + 1), windows[:, 1:])  # the stream, as a ring
    targets = windows[:, 1:].flatten().tolist()
    assert len(set(targets)) == len(targets)
    assert n + 1 - len(targets) < T  # at most a part of a window is left out, another one each epoch


def test_order_depends_on_seed_epoch_and_position_alone() -> None:
    dataset = build_dataset([list(range(400))], eot_id=EOT, max_length=8, val_fraction=0.0, seed=0)

    def batch(seed: int, epoch: int, position: int) -> torch.Tensor:
        return dataset.train_batch(seed=seed, epoch=epoch, position=position, batch_size=4)[0]

    reference = batch(1, 2, 12)
    batch(5, 7, 0)  # another order in between
    assert torch.equal(batch(1, 2, 12), reference)
    ones = [dataset.train_batch(seed=1, epoch=2, position=p, batch_size=1)[0] for p in range(12, 16)]
    assert torch.equal(torch.cat(ones), reference)  # whatever the batch size
    for other in (batch(2, 2, 12), batch(1, 3, 12), batch(1, 2, 16)):
        assert not torch.equal(other, reference)


def test_window_borders_move_from_epoch_to_epoch() -> None:
    dataset = build_dataset([list(range(400))], eot_id=EOT, max_length=8, val_fraction=0.0, seed=0)
    first_tokens = {
        epoch: int(whole_epoch(dataset, seed=0, epoch=epoch, batch_size=99)[0].min(dim=1).values[0]) % 8
        for epoch in range(12)
    }
    assert len(set(first_tokens.values())) > 4


def test_documents_are_joined_by_end_of_text() -> None:
    dataset = build_dataset([[1, 2], [3], [], [4, 5, 6]], eot_id=EOT, max_length=4, val_fraction=0.0, seed=0)
    assert dataset.train.tolist() == [1, 2, EOT, 3, EOT, 4, 5, 6, EOT]
    assert (dataset.train_documents, dataset.val_documents) == (3, 0)


def test_split_holds_out_whole_documents() -> None:
    texts = documents(50, 20)
    dataset = build_dataset(texts, eot_id=EOT, max_length=8, val_fraction=0.1, seed=0)
    assert (dataset.train_documents, dataset.val_documents) == (45, 5)
    assert str(dataset) == ("945 training tokens in 45 documents, 105 validation tokens in 5, windows of 8")
    for stream in (dataset.train, dataset.val):
        pieces = np.split(stream, np.flatnonzero(stream == EOT) + 1)[:-1]
        assert all(piece[:-1].tolist() in texts for piece in pieces)
    assert set(dataset.train) & set(dataset.val) == {EOT}
    other = build_dataset(texts, eot_id=EOT, max_length=8, val_fraction=0.1, seed=1)
    assert other.val.tolist() != dataset.val.tolist()


@pytest.mark.parametrize("texts", [[list(range(1000))], [[1, 2, 3], list(range(1000))]])
def test_a_single_book_gives_up_its_end(texts: list[list[int]]) -> None:
    dataset = build_dataset(texts, eot_id=EOT, max_length=8, val_fraction=0.1, seed=0)
    assert dataset.val.tolist() == [*range(1001 - len(dataset.val), 1000), EOT]
    assert len(dataset.val) == round(0.1 * sum(len(t) + 1 for t in texts))


@given(st.integers(2, 100), st.integers(1, 9), st.integers(1, 5))
@settings(max_examples=60, deadline=None)
def test_validation_counts_every_target_once(n: int, T: int, batch_size: int) -> None:
    dataset = TokenDataset(
        train=np.arange(20, dtype=np.int32),
        val=np.arange(n, dtype=np.int32),
        max_length=T,
        train_documents=1,
        val_documents=1,
    )
    inputs, targets = (torch.cat(x) for x in zip(*dataset.val_batches(batch_size), strict=True))
    counted = targets != IGNORE_INDEX
    assert targets[counted].tolist() == list(range(1, n))
    assert torch.equal(inputs[counted] + 1, targets[counted])


def test_too_little_text_is_refused_with_the_remedy() -> None:
    with pytest.raises(ValueError, match=r"5 training tokens.*window of 8.*--block-size smaller"):
        build_dataset([[1, 2, 3, 4]], eot_id=EOT, max_length=8, val_fraction=0.0, seed=0)
    with pytest.raises(ValueError, match="0 training tokens"):
        build_dataset([], eot_id=EOT, max_length=8, val_fraction=0.1, seed=0)


def test_positions_outside_the_epoch_are_refused() -> None:
    dataset = build_dataset([list(range(100))], eot_id=EOT, max_length=8, val_fraction=0.0, seed=0)
    with pytest.raises(ValueError, match="position 12 is not in an epoch of 12 windows"):
        dataset.train_batch(seed=0, epoch=0, position=12, batch_size=1)
