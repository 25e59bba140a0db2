"""The learning rate's course."""

from __future__ import annotations

import itertools

import pytest

from fusedgpt.train.config import TrainConfig
from fusedgpt.train.schedule import learning_rate, warmup_steps


def test_cosine_rises_then_falls_to_its_floor() -> None:
    config = TrainConfig(learning_rate=1.0, min_learning_rate=0.2, warmup=10)
    rates = [learning_rate(step, 111, config) for step in range(111)]
    assert rates[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert rates[10] == 1.0
    assert rates[60] == pytest.approx(0.6)  # halfway down
    assert rates[110] == pytest.approx(0.2)
    assert all(a >= b for a, b in itertools.pairwise(rates[10:]))


def test_floor_defaults_to_a_tenth() -> None:
    config = TrainConfig(learning_rate=1.0, warmup=0)
    assert learning_rate(99, 100, config) == pytest.approx(0.1)


def test_constant_stays_at_its_peak() -> None:
    config = TrainConfig(learning_rate=0.5, schedule="constant", warmup=0.1)
    assert [learning_rate(step, 100, config) for step in (10, 50, 99)] == [0.5, 0.5, 0.5]
    assert learning_rate(0, 100, config) < 0.1


@pytest.mark.parametrize(("warmup", "steps"), [(0, 0), (0.05, 50), (0.999, 999), (1, 1), (300, 300)])
def test_warmup_is_a_share_below_one_and_a_count_from_one(warmup: float, steps: int) -> None:
    assert warmup_steps(1000, TrainConfig(warmup=warmup)) == steps


@pytest.mark.parametrize("warmup", [0, 0.5, 1, 5])
def test_a_run_of_one_step_has_a_rate(warmup: float) -> None:
    assert 0 < learning_rate(0, 1, TrainConfig(warmup=warmup)) <= 3e-4
