"""The learning rate's course."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest

from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.schedule import decay_steps, learning_rate, warmup_steps

SCHEDULES = ("constant", "linear", "cosine", "wsd", "inverse_sqrt")


def rates(total_steps: int, **options: Any) -> list[float]:
    config = TrainConfig(learning_rate=1.0, **options)
    return [learning_rate(step, total_steps, config) for step in range(total_steps)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    course = rates(111, schedule=schedule, min_learning_rate=0.2, warmup=10)
    assert course[:10] == pytest.approx([(i + 1) / 11 for i in range(10)])
    assert course[10] == 1.0
    assert all(a >= b for a, b in itertools.pairwise(course[10:]))


@pytest.mark.parametrize(
    ("schedule", "halfway", "last"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.6, 0.2),
        ("cosine", 0.6, 0.2),
        ("wsd", 1.0, 0.2),
        ("inverse_sqrt", math.sqrt(11 / 61), math.sqrt(11 / 111)),
    ],
)
def test_after_warmup(schedule: str, halfway: float, last: float) -> None:
    course = rates(111, schedule=schedule, min_learning_rate=0.2, warmup=10)
    assert (course[60], course[110]) == pytest.approx((halfway, last))


def test_linear_and_cosine_part_between_the_halves() -> None:
    linear, cosine = (rates(101, schedule=s, min_learning_rate=0.0, warmup=0) for s in ("linear", "cosine"))
    assert (linear[25], cosine[25]) == pytest.approx((0.75, 0.5 + math.sqrt(0.5) / 2))


@pytest.mark.parametrize("decay", [4, 0.4])
def test_wsd_is_flat_until_its_last_steps_and_falls_linearly_in_them(decay: float) -> None:
    course = rates(10, schedule="wsd", min_learning_rate=0.2, warmup=2, decay=decay)
    assert course == pytest.approx([1 / 3, 2 / 3, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_wsd_without_decay_never_falls() -> None:
    assert rates(10, schedule="wsd", warmup=0, decay=0) == [1.0] * 10


def test_inverse_sqrt_stops_at_its_floor() -> None:
    course = rates(1000, schedule="inverse_sqrt", min_learning_rate=0.2, warmup=3)
    assert course[15] == pytest.approx(0.5)  # four times as many steps as warm-up took
    assert course[200] == course[999] == 0.2


def test_inverse_sqrt_and_the_plateau_do_not_depend_on_the_length_of_the_run() -> None:
    for schedule in ("inverse_sqrt", "wsd"):
        short, long = (rates(n, schedule=schedule, warmup=10, decay=50) for n in (200, 2000))
        assert short[:150] == long[:150]


def test_floor_defaults_to_a_tenth() -> None:
    for schedule in ("linear", "cosine", "wsd"):
        assert rates(100, schedule=schedule, warmup=0)[99] == pytest.approx(0.1)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_past_the_last_step_the_rate_stays(schedule: str) -> None:
    config = TrainConfig(schedule=schedule)
    assert 0 < learning_rate(150, 100, config) <= learning_rate(99, 100, config)


@pytest.mark.parametrize(("length", "steps"), [(0, 0), (0.05, 50), (0.999, 999), (1, 1), (300, 300)])
def test_phases_are_a_share_below_one_and_a_count_from_one(length: float, steps: int) -> None:
    assert warmup_steps(1000, TrainConfig(warmup=length)) == steps
    assert decay_steps(1000, TrainConfig(warmup=0, decay=length)) == steps


@pytest.mark.parametrize(("warmup", "decay"), [(0.5, 0.5), (8, 8), (20, 5)])
def test_decay_has_the_room_that_warmup_leaves(warmup: float, decay: float) -> None:
    """13 steps: halves round to 6 each and counts may be longer than a run measured in epochs."""
    config = TrainConfig(schedule="wsd", warmup=warmup, decay=decay)
    assert decay_steps(13, config) == {0.5: 6, 8: 5, 20: 0}[warmup]
    assert all(0 < learning_rate(step, 13, config) <= 3e-4 for step in range(13))


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 0.5, 1, 5])
def test_a_run_of_one_step_has_a_rate(schedule: str, warmup: float) -> None:
    assert 0 < learning_rate(0, 1, TrainConfig(schedule=schedule, warmup=warmup)) <= 3e-4
