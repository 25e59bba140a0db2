"""What a person sees of a run."""

from __future__ import annotations

import io

import pytest

from fusedgpt.train.monitor import Monitor, clock, progress_line


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(monitor: Monitor, losses: list[float], steps_per_epoch: int = 1000) -> None:
    monitor.begin(steps=len(losses), steps_per_epoch=steps_per_epoch)
    for i, loss in enumerate(losses):
        monitor.update(loss, tokens=256 * (i + 1), seconds=2.0 * (i + 1))
    monitor.close()


def test_progress_line_is_as_designed() -> None:
    line = progress_line(seconds=323, step=156, steps=200, loss=3.45214, tokens_per_second=1234.4)
    assert line == (
        "[00:05:23] [###############.....] 156/200 steps | Loss: 3.4521 | ETA: 00:01:31 | 1,234 tok/s"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00:00"), (59.6, "00:01:00"), (3661, "01:01:01"), (4e5, "111:06:40")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_loss_is_smoothed_over_ten_steps() -> None:
    monitor = Monitor(quiet=True)
    run(monitor, [100.0, *map(float, range(10))])
    assert monitor.smoothed_loss == 4.5


def test_averages_come_every_five_epochs() -> None:
    out = io.StringIO()
    run(Monitor(stream=out), [9.0] * 8 + [1.0, 3.0] + [9.0] * 10, steps_per_epoch=2)
    assert [line for line in out.getvalue().splitlines() if "epoch" in line] == [
        "epoch 5: average loss 2.0000",
        "epoch 10: average loss 9.0000",
    ]


def test_a_file_gets_first_and_last_line_only_when_quick() -> None:
    out = io.StringIO()
    run(Monitor(stream=out), [1.0] * 50)
    lines = out.getvalue().splitlines()
    assert [line.split("] ")[2].split(" steps")[0] for line in lines] == ["1/50", "50/50"]
    assert "128 tok/s" in lines[-1]
    assert "\r" not in out.getvalue()


def test_a_terminal_gets_one_moving_line_and_notes_above_it() -> None:
    out = Terminal()
    monitor = Monitor(stream=out)
    monitor.begin(steps=9, steps_per_epoch=9)
    monitor.update(1.0, tokens=1, seconds=1.0)
    monitor.note("note")
    assert out.getvalue().startswith("\r\x1b[2K[00:00:01]")
    assert out.getvalue().endswith("tok/s\nnote\n")


def test_quiet_says_nothing() -> None:
    out = io.StringIO()
    run(Monitor(quiet=True, stream=out), [1.0] * 5, steps_per_epoch=1)
    assert out.getvalue() == ""
