"""Steps and tokens per second over the last half minute."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from fusedgpt.train.report.speed import Speed


def speeds(seconds: Sequence[float], *, steps: int = 10**6) -> list[float]:
    """Tokens per second after each step of 256 tokens, for the times at which the steps were done."""
    speed = Speed(0, 0)
    rates = [speed.add(x, i, 256 * i, last=i == steps) for i, x in enumerate(seconds, 1)]
    assert all(math.isnan(t) or s == t / 256 for s, t in rates)
    return [tokens for _, tokens in rates]


def test_speed_is_that_of_the_last_half_minute() -> None:
    slow_then_fast = [10.0 * i for i in range(1, 21)] + [200.0 + 2.0 * i for i in range(1, 41)]
    assert speeds(slow_then_fast)[15] == 25.6
    assert speeds(slow_then_fast)[-1] == 128.0


def test_speed_leaves_out_the_first_reading_which_compiles() -> None:
    known = speeds([60.0, 62.0, 64.0, 66.0])
    assert math.isnan(known[0])
    assert known[1] == pytest.approx(256 / 60)  # there is no other yet
    assert known[3] == 128.0


def test_speed_of_steps_longer_than_the_window() -> None:
    assert speeds([100.0 * i for i in range(1, 9)])[2:] == [2.56] * 6


def test_speed_of_a_burst_is_not_that_of_its_first_row() -> None:
    """Rows that are read together have one time: ten steps in 20 seconds, each burst."""
    known = speeds([20.0 * (1 + i // 10) for i in range(60)])
    assert all(math.isnan(speed) for speed in known[:10])
    assert known[10:] == [128.0] * 50


def test_speed_of_steps_faster_than_the_clock_is_read() -> None:
    speed = Speed(0, 0)
    for step in range(1, 40_001):
        _, tokens_per_second = speed.add(0.001 * step, step, 256 * step)
    assert tokens_per_second == pytest.approx(256_000)
    assert len(speed._points) < 110  # what it remembers does not grow with the number of steps


def test_speed_of_a_short_run_is_known_at_its_end() -> None:
    assert speeds([0.01, 0.02], steps=2)[-1] == pytest.approx(25_600)


def test_a_resumed_run_does_not_count_the_steps_before() -> None:
    speed = Speed(22, 22 * 256)
    rates = [speed.add(2.0 * (step - 22), step, 256 * step) for step in range(23, 61)]
    assert set(rates[1:]) == {(0.5, 128.0)}
