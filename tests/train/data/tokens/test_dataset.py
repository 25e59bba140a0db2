"""Windows: every token once an epoch, an order that is a pure function of seed, epoch and position."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from token_data import dataset_of

from fusedgpt.train.data.tokens.dataset import IGNORE_INDEX, TokenDataset, mix_datasets
from fusedgpt.train.data.tokens.windows import epoch_order, permute

EOT = 9999


def documents(n: int, length: int) -> list[list[int]]:
    """n documents of distinct tokens."""
    return [list(range(i * length, (i + 1) * length)) for i in range(n)]


def whole_epoch(dataset: TokenDataset, *, seed: int, epoch: int, batch_size: int) -> list[torch.Tensor]:
    return [
        torch.cat((inputs, targets[:, -1:]), dim=1)
        for position in range(0, dataset.windows_per_epoch, batch_size)
        for size in [min(batch_size, dataset.windows_per_epoch - position)]
        for inputs, targets in [
            dataset.train_batch(seed=seed, epoch=epoch, position=position, batch_size=size)
        ]
    ]


@given(st.integers(10, 300), st.integers(1, 9), st.integers(1, 5), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_an_epoch_has_every_token_as_a_target_once(n: int, T: int, batch_size: int, epoch: int) -> None:
    dataset = dataset_of([list(range(n))], eot_id=n, max_length=T)
    windows = torch.cat(whole_epoch(dataset, seed=3, epoch=epoch, batch_size=batch_size))
    assert torch.equal((windows[:, :-1] + 1) % (n + 1), windows[:, 1:])  # the stream, as a ring
    targets = windows[:, 1:].flatten().tolist()
    assert len(set(targets)) == len(targets)
    assert n + 1 - len(targets) < T  # at most a part of a window is left out, another one each epoch


def test_order_depends_on_seed_epoch_and_position_alone() -> None:
    dataset = dataset_of([list(range(400))], eot_id=EOT, max_length=8)

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
    dataset = dataset_of([list(range(400))], eot_id=EOT, max_length=8)
    first_tokens = {
        epoch: int(whole_epoch(dataset, seed=0, epoch=epoch, batch_size=99)[0].min(dim=1).values[0]) % 8
        for epoch in range(12)
    }
    assert len(set(first_tokens.values())) > 4


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


@pytest.mark.parametrize("packing", [False, True])
def test_a_batch_goes_on_into_the_next_epoch(packing: bool) -> None:
    one = dataset_of(documents(20, 5), eot_id=EOT, max_length=8, packing=packing)
    for data in (one, mix_datasets([one, one], [1, 3])):
        n = data.windows_per_epoch
        across = data.train_batch(seed=4, epoch=1, position=n - 3, batch_size=n + 5)
        pieces = [(1, n - 3, 3), (2, 0, n), (3, 0, 2)]
        apart = [data.train_batch(seed=4, epoch=e, position=p, batch_size=b) for e, p, b in pieces]
        for x, ys in zip(across, zip(*apart, strict=True), strict=True):
            assert torch.equal(x, torch.cat(ys))


# Order, for any number of windows


@given(st.integers(1, 500), st.lists(st.integers(0, 2**63 - 1), min_size=4, max_size=4))
@settings(max_examples=100, deadline=None)
def test_a_computed_order_is_a_permutation(n: int, keys: list[int]) -> None:
    assert sorted(permute(np.arange(n), n, keys).tolist()) == list(range(n))


def test_a_computed_order_looks_random() -> None:
    n = 10**12 + 7
    x = np.arange(n - 20_000, n)
    y = permute(x, n, (1, 2, 3, 4))
    assert len(np.unique(y)) == len(x)
    assert 0 <= y.min() < y.max() < n
    counts = np.histogram(y, bins=10, range=(0, n))[0]
    assert 1700 < counts.min() < counts.max() < 2300
    assert abs(np.corrcoef(x, y)[0, 1]) < 0.05
    other = permute(x, n, (1, 2, 3, 5))
    assert (other != y).mean() > 0.99


def test_a_large_epoch_needs_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    data = dataset_of([list(range(400))], eot_id=400, max_length=8)
    epoch_order.cache_clear()
    monkeypatch.setattr("fusedgpt.train.data.tokens.windows._LARGEST_TABLE", 10)
    windows = torch.cat(whole_epoch(data, seed=3, epoch=1, batch_size=7))
    epoch_order.cache_clear()
    assert windows.shape == (50, 9)
    assert len(set(windows[:, 1:].flatten().tolist())) == 400


def test_the_order_of_old_runs_stays() -> None:
    """A change here would make every run that is resumed see other text than it would have."""
    data = dataset_of([list(range(99))], eot_id=99, max_length=10)
    inputs, _ = data.train_batch(seed=5, epoch=2, position=3, batch_size=4)
    assert inputs[:, 0].tolist() == [88, 78, 28, 98]


# Documents


def test_documents_are_told_apart_in_a_window() -> None:
    data = dataset_of([[1, 2], [3], [4, 5, 6]], eot_id=9, max_length=4)
    inputs = torch.tensor([[1, 2, 9, 3], [9, 9, 4, 5]])
    assert data.document_ids(inputs) is None
    ids = replace(data, document_masks=True).document_ids(inputs)
    assert ids is not None
    assert (ids.tolist(), ids.dtype) == ([[0, 0, 1, 1], [1, 2, 2, 2]], torch.int32)
    unknown = TokenDataset(
        train=np.arange(9, dtype=np.int32), val=np.arange(0), max_length=4, train_documents=1, val_documents=0
    )
    with pytest.raises(ValueError, match="which token ends a document"):
        replace(unknown, document_masks=True).document_ids(inputs)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=20), st.integers(1, 8), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_packed_windows_have_every_token_as_a_target_once(
    lengths: list[int], T: int, batch_size: int
) -> None:
    texts = [[100 * i + j for j in range(n)] for i, n in enumerate(lengths)]
    total = sum(n + 1 for n in lengths)
    if total <= T:
        return
    data = dataset_of(texts, eot_id=EOT, max_length=T, packing=True)
    assert data.borders is not None
    ends = np.cumsum([n + 1 for n in lengths]).tolist()
    seen: list[int] = []
    for position in range(0, data.windows_per_epoch, batch_size):
        size = min(batch_size, data.windows_per_epoch - position)
        inputs, targets = data.train_batch(seed=1, epoch=0, position=position, batch_size=size)
        for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
            n = sum(t != IGNORE_INDEX for t in y)
            assert y[n:] == [IGNORE_INDEX] * (T - n)
            assert x[n:] == [EOT] * (T - n)
            assert x[1:n] == y[: n - 1]
            seen += y[:n]
    assert sorted(seen) == sorted(data.train.tolist())
    for a, b in zip(data.borders[:-1].tolist(), data.borders[1:].tolist(), strict=True):
        fitting = [end for end in ends if a < end <= a + T]
        assert b == (max(fitting) if fitting else a + T)


def test_a_packed_window_begins_with_end_of_text() -> None:
    data = dataset_of([[1, 2], [3, 4], [5]], eot_id=9, max_length=4, packing=True)
    assert data.borders is not None
    assert data.borders.tolist() == [0, 3, 6, 8]
    assert ", packed into 3" in str(data)
    batch = data.train_batch(seed=0, epoch=0, position=0, batch_size=3)
    rows = sorted(zip(batch[0].tolist(), batch[1].tolist(), strict=True))
    assert rows[0] == ([9, 1, 2, 9], [1, 2, 9, IGNORE_INDEX])
    assert rows[1] == ([9, 3, 4, 9], [3, 4, 9, IGNORE_INDEX])
    assert rows[2] == ([9, 5, 9, 9], [5, 9, IGNORE_INDEX, IGNORE_INDEX])


# Mixes


def stream(first: int, n: int, T: int = 4) -> TokenDataset:
    return dataset_of([list(range(first, first + n))], eot_id=EOT, max_length=T, val_fraction=0.1)


def firsts(mix: TokenDataset, *, seed: int = 0, epochs: int = 1, batch_size: int = 7) -> list[int]:
    return [
        int(token)
        for epoch in range(epochs)
        for window in whole_epoch(mix, seed=seed, epoch=epoch, batch_size=batch_size)
        for token in window[:, 1]
    ]


def test_a_mix_has_its_shares_exactly() -> None:
    mix = mix_datasets([stream(0, 8000), stream(10_000, 8000)], [0.7, 0.3])
    drawn = np.array(firsts(mix)[:3000]) >= 9000
    assert [int(block.sum()) for block in drawn.reshape(3, 1000)] == [300, 300, 300]
    assert 20 < drawn[:100].sum() < 40  # and they are mixed well
    assert "mixed 70.0%, 30.0%" in str(mix)


def test_no_window_comes_twice_before_all_came() -> None:
    small, large = stream(0, 400), stream(1000, 4000)
    drawn = firsts(mix_datasets([small, large], [1, 3]), epochs=2)
    for one, seen in ((small, [t for t in drawn if t < 900]), (large, [t for t in drawn if t > 900])):
        n = one.windows_per_epoch
        assert len(seen) > n  # also from one epoch of the mix to the next
        for start in range(0, len(seen), n):
            assert len(set(seen[start : start + n])) == len(seen[start : start + n])
        assert set(seen[:n]) != set(seen[n : 2 * n])  # another shift


@given(st.integers(0, 2000), st.integers(1, 40))
@settings(max_examples=40, deadline=None)
def test_a_mix_is_a_function_of_seed_epoch_and_position(position: int, batch_size: int) -> None:
    mix = mix_datasets([stream(0, 8000), stream(10_000, 900)], [1, 1])
    position %= mix.windows_per_epoch
    a = mix.train_batch(seed=1, epoch=3, position=position, batch_size=batch_size)
    ones = [
        mix.train_batch(seed=1, epoch=3, position=p, batch_size=1)
        for p in range(position, position + batch_size)
    ]
    assert torch.equal(a[0], torch.cat([x for x, _ in ones]))
    assert torch.equal(a[1], torch.cat([y for _, y in ones]))
    assert not torch.equal(
        a[0], mix.train_batch(seed=2, epoch=3, position=position, batch_size=batch_size)[0]
    )


def test_a_mix_validates_on_all_of_its_sets() -> None:
    one, two = stream(0, 100), stream(1000, 200)
    mix = mix_datasets([one, two], [1, 1])
    targets = torch.cat([y.flatten() for _, y in mix.val_batches(3)])
    assert targets[targets != IGNORE_INDEX].tolist() == [*one.val.tolist(), *two.val.tolist()][1:]
    assert len(mix.train) == len(one.train) + len(two.train)
    assert mix_datasets([one], [5.0]) is one


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ([1.0, 0.0], "must be positive"),
        ([1.0, float("nan")], "must be positive"),
        ([1.0, 1e-6], "below 1/1000"),
    ],
)
def test_weights_that_mean_nothing_are_refused(weights: list[float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mix_datasets([stream(0, 100), stream(1000, 100)], weights)
    with pytest.raises(ValueError, match="same tokenizer and windows"):
        mix_datasets([stream(0, 100), stream(0, 100, T=5)], [1, 1])


def test_a_fingerprint_changes_with_any_token_and_the_windows() -> None:
    def of(**change: Any) -> str:
        parts: dict[str, Any] = {"train": np.arange(50, dtype=np.int32), "val": np.arange(9, dtype=np.int32)}
        parts |= {"max_length": 4, "train_documents": 1, "val_documents": 1}
        return TokenDataset(**(parts | change)).fingerprint

    other = np.arange(50, dtype=np.int32)
    other[40] = 7
    changes: list[dict[str, Any]] = [
        {},
        {"train": other},
        {"max_length": 5},
        {"val": np.arange(8, dtype=np.int32)},
    ]
    changes += [{"borders": np.array([0, 50])}]
    assert of() == of()
    assert len({of(**change) for change in changes}) == 5
    mixes = [mix_datasets([stream(0, 100), stream(0, 100)], w).fingerprint for w in ([1, 1], [1, 2])]
    assert mixes[0] != mixes[1]
