"""What a person sees of a run."""

from __future__ import annotations

import fcntl
import io
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest

from fusedgpt.train.report import progress as monitor_module
from fusedgpt.train.report.progress import Monitor, StepMetrics, clock, progress_line

SHOWN = StepMetrics(
    seconds=323,
    step=156,
    smoothed_loss=3.45214,
    learning_rate=2.96e-4,
    steps_per_second=0.483,
    tokens_per_second=1234.4,
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def row(step: int, *, loss: float = 1.0, skipped: bool = False) -> StepMetrics:
    """A step of 256 tokens and two seconds."""
    return StepMetrics(
        step=step,
        loss=loss,
        grad_norm=1.0,
        learning_rate=3e-4,
        skipped=skipped,
        tokens=256 * step,
        seconds=2.0 * step,
        smoothed_loss=loss,
        steps_per_second=0.5,
        tokens_per_second=128.0,
    )


def run(monitor: Monitor, losses: list[float], **begin: Any) -> None:
    monitor.begin(**{"steps": len(losses), "steps_per_epoch": 1000, **begin})
    for i, loss in enumerate(losses):
        monitor.update(row(i + 1, loss=loss))
    monitor.close()


def test_progress_line_is_as_designed() -> None:
    assert progress_line(SHOWN, 200) == (
        "[00:05:23] [###############.....] 156/200 steps | Loss: 3.4521 | ETA: 00:01:31"
        " | lr 3.0e-04 | 1,234 tok/s"
    )
    assert progress_line(replace(SHOWN, mfu=0.4123), 200).endswith(" | 1,234 tok/s | MFU 41.2%")


def test_a_run_beyond_its_steps_has_a_full_bar() -> None:
    assert "] [####################] 156/4 steps | Loss: 3.4521 | ETA: 00:00:00" in progress_line(SHOWN, 4)


def test_progress_line_before_anything_is_known() -> None:
    assert progress_line(StepMetrics(), 200) == (
        "[00:00:00] [....................] 0/200 steps | Loss: - | ETA: --:--:--"
    )


@pytest.mark.parametrize(
    ("width", "line"),
    [
        (
            95,
            "[00:05:23] [#######...] 156/200 steps | Loss: 3.4521 | ETA: 00:01:31 | 1,234 tok/s | MFU 41.2%",
        ),
        (92, "[00:05:23] [#######...] 156/200 steps | Loss: 3.4521 | ETA: 00:01:31 | 1,234 tok/s"),
        (80, "[00:05:23] [#######...] 156/200 steps | Loss: 3.4521 | ETA: 00:01:31"),
        (60, "[00:05:23] 156/200 steps | Loss: 3.4521 | ETA: 00:01:31"),
        (50, "[00:05:23] 156/200 steps | Loss: 3.4521"),
        (30, "156/200 steps | Loss: 3.4521"),
        (9, "156/200 s"),
    ],
)
def test_progress_line_is_shortened_to_the_width(width: int, line: str) -> None:
    assert progress_line(replace(SHOWN, mfu=0.4123), 200, width) == line


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "00:00:00"), (59.6, "00:01:00"), (3661, "01:01:01"), (4e5, "111:06:40")]
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_averages_come_every_five_epochs() -> None:
    out = io.StringIO()
    run(Monitor(stream=out), [9.0] * 8 + [1.0, 3.0] + [9.0] * 10, steps_per_epoch=2)
    assert [line for line in out.getvalue().splitlines() if "epoch" in line] == [
        "epoch 5: average loss 2.0000",
        "epoch 10: average loss 9.0000",
    ]


def test_an_epoch_may_end_inside_a_step() -> None:
    """After 17, 34, ... windows, by twos: epoch 5 is steps 35 to 43, epoch 10 steps 77 to 85."""
    out = io.StringIO()
    losses = [1.0 if 35 <= step <= 43 else 9.0 for step in range(1, 86)]
    run(Monitor(stream=out), losses, steps_per_epoch=Fraction(17, 2))
    assert [line for line in out.getvalue().splitlines() if "epoch" in line] == [
        "epoch 5: average loss 1.0000",
        "epoch 10: average loss 9.0000",
    ]


def test_a_resumed_run_goes_on_at_its_step() -> None:
    out = io.StringIO()
    monitor = Monitor(stream=out)
    monitor.begin(steps=60, steps_per_epoch=5, step=22)
    for step in range(23, 61):
        monitor.update(row(step))
    lines = out.getvalue().splitlines()
    assert "] 23/60 steps" in lines[0]
    assert [line for line in lines if "epoch" in line] == [
        "epoch 5: average loss 1.0000 (from step 23)",
        "epoch 10: average loss 1.0000",
    ]


def test_skipped_steps_are_shown_at_once_and_counted() -> None:
    out = io.StringIO()
    monitor = Monitor(stream=out)
    monitor.begin(steps=20, steps_per_epoch=20)
    for step in range(1, 13):
        monitor.update(row(step, loss=math.nan if step == 3 else 1.0, skipped=step in (3, 7, 12)))
    assert out.getvalue().splitlines()[1:] == [
        f"step {step}: loss or gradient not finite, update skipped ({count} so far)"
        for count, step in enumerate((3, 7, 12), start=1)
    ]


def test_validations_are_said_with_what_is_known() -> None:
    out = io.StringIO()
    monitor = Monitor(stream=out)
    monitor.evaluation(step=200, loss=3.21, bits_per_byte=1.23456, improved=True)
    monitor.evaluation(step=400, loss=3.31, bits_per_byte=None, improved=False)
    assert out.getvalue().splitlines() == [
        "step 200: validation loss 3.2100, 1.2346 bits per byte, best so far",
        "step 400: validation loss 3.3100",
    ]


def test_samples_are_blocks_above_the_bar(terminal: Terminal) -> None:
    monitor = Monitor(stream=terminal)
    monitor.begin(steps=9, steps_per_epoch=9)
    written: list[str] = []
    write = terminal.write
    terminal.write = lambda text: written.append(text) or write(text)  # type: ignore[method-assign]
    monitor.samples(5, {"The": "The cat\nsat\x1b[31m.\n", "": "[bold]"})
    monitor.close()
    lines = visible("".join(written))
    start = lines.index("--- step 5: sample for 'The'")
    assert lines[start : start + 4] == ["--- step 5: sample for 'The'", "The cat", "sat.", "---"]
    assert "[bold]" in lines
    assert sum("The cat" in text for text in written) == 1  # no other thread's text comes in between


def test_a_file_gets_first_and_last_line_only_when_quick() -> None:
    out = io.StringIO()
    run(Monitor(stream=out), [1.0] * 50)
    lines = out.getvalue().splitlines()
    assert [line.split("] ")[2].split(" steps")[0] for line in lines] == ["1/50", "50/50"]
    assert "128 tok/s" in lines[-1]
    assert "\r" not in out.getvalue()
    assert "\x1b" not in out.getvalue()


def test_the_last_step_is_shown_before_what_follows_it() -> None:
    out = io.StringIO()
    monitor = Monitor(stream=out)
    monitor.begin(steps=2, steps_per_epoch=2)
    monitor.update(row(1))
    monitor.update(row(2))
    monitor.evaluation(step=2, loss=1.0, bits_per_byte=None, improved=False)
    monitor.close()
    assert [line[-20:] for line in out.getvalue().splitlines()[1:]] == [
        " lr 3.0e-04 | 128 tok/s"[-20:],
        "validation loss 1.0000"[-20:],
    ]


def test_a_file_gets_a_line_every_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(monitor_module.time, "monotonic", lambda: now[0])
    out = io.StringIO()
    monitor = Monitor(stream=out)
    monitor.begin(steps=50, steps_per_epoch=50)
    for step in range(1, 26):
        monitor.update(row(step))
        now[0] += 2.0
    assert re.findall(r"(\d+)/50", out.getvalue()) == ["1", "6", "11", "16", "21"]
    monitor.close()  # an interrupted run says how far it came
    assert re.findall(r"(\d+)/50", out.getvalue())[-1] == "25"


def test_quiet_says_nothing() -> None:
    out = Terminal()
    monitor = Monitor(quiet=True, stream=out)
    run(monitor, [1.0] * 5, steps_per_epoch=1)
    monitor.note("note")
    assert out.getvalue() == ""


def test_notes_cannot_drive_the_terminal() -> None:
    out = io.StringIO()
    Monitor(stream=out).note("a\x1b[31mb\x07c\rd\u202e\n\té")
    assert out.getvalue() == "abcd\n\té\n"


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm")
    return Terminal()


def visible(out: str) -> list[str]:
    """What was drawn, without escape sequences, one redraw or note each."""
    return [line for line in re.split(r"[\r\n]", re.sub(r"\x1b\[\??[0-9;]*[A-Za-z]", "", out)) if line]


def test_a_terminal_gets_one_moving_line_and_notes_above_it(terminal: Terminal) -> None:
    monitor = Monitor(stream=terminal)
    monitor.note("before")
    assert terminal.getvalue() == "before\n"
    monitor.begin(steps=9, steps_per_epoch=9)
    monitor.update(row(1))
    monitor.note("[bold]" + "long " * 30 + ":smile:")
    monitor.update(row(2))
    monitor.close()
    lines = visible(terminal.getvalue())
    assert lines[-1] == "[00:00:04] 2/9 steps | Loss: 1.0000 | ETA: 00:00:14"
    assert "[bold]" + "long " * 30 + ":smile:" in lines  # no markup, and wrapped by the terminal only
    assert terminal.getvalue().removesuffix("\x1b[?25h").endswith("\n")
    assert terminal.getvalue().count("\n") == 3  # two notes, and the line's end


def test_a_burst_leaves_the_line_at_its_last_step(terminal: Terminal) -> None:
    monitor = Monitor(stream=terminal)
    monitor.begin(steps=100, steps_per_epoch=100)
    for step in range(1, 11):
        monitor.update(row(step))
    deadline = time.monotonic() + 5
    while " 10/100 steps" not in terminal.getvalue() and time.monotonic() < deadline:
        time.sleep(0.02)
    shown = visible(terminal.getvalue())[-1]
    monitor.close()
    assert " 10/100 steps" in shown


def test_a_terminal_shows_where_a_resumed_run_stands_and_keeps_its_cursor(terminal: Terminal) -> None:
    monitor = Monitor(stream=terminal)
    monitor.begin(steps=60, steps_per_epoch=5, step=22)
    deadline = time.monotonic() + 5
    while "steps" not in terminal.getvalue() and time.monotonic() < deadline:
        time.sleep(0.02)
    seen = terminal.getvalue()
    monitor.close()
    assert " 22/60 steps" in visible(seen)[0]
    assert seen.rfind("\x1b[?25h") > seen.rfind("\x1b[?25l")  # even a kill leaves a cursor


def test_a_dumb_terminal_gets_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "dumb")
    run(Monitor(stream=terminal), [1.0] * 5)
    assert "\x1b" not in terminal.getvalue()
    assert re.findall(r"(\d)/5 steps", terminal.getvalue()) == ["1", "5"]


def test_steps_cost_little_and_redraws_are_few(terminal: Terminal) -> None:
    """2 us a step measured, 50 allowed; five redraws of 0.2 ms a second, ten allowed."""
    monitor = Monitor(stream=terminal)
    rows = [row(step) for step in range(1, 20_001)]
    monitor.begin(steps=len(rows) + 1, steps_per_epoch=10**9)
    start = time.perf_counter()
    for metrics in rows:
        monitor.update(metrics)
    assert (time.perf_counter() - start) / len(rows) < 50e-6
    time.sleep(0.5)
    drawn = terminal.getvalue().count("20000/20001 steps")
    monitor.close()
    seconds = time.perf_counter() - start
    assert 1 <= drawn <= 10 * seconds


PROGRAM = """
import sys, time
from fusedgpt.train.report.progress import Monitor, StepMetrics
monitor = Monitor()
monitor.begin(steps=3, steps_per_epoch=3)
for step in (1, 2):
    monitor.update(StepMetrics(step=step, loss=1.0, grad_norm=1.0, learning_rate=1e-4, skipped=False,
                               tokens=256 * step, seconds=2.0 * step))
    time.sleep(0.5)
print("a warning", file=sys.stderr)
print("a result")
raise RuntimeError("a fault")
"""


def test_a_run_that_fails_leaves_the_terminal_whole() -> None:
    """In a real terminal of 40 columns; nobody calls close(), and stdout is a file."""
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 40, 0, 0))
    environment = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "LINES", "NO_COLOR")}
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        stderr=slave,
        stdin=slave,
        text=True,
        env={**environment, "TERM": "xterm"},
    )
    os.close(slave)
    seen = b""
    try:
        while data := os.read(master, 65536):
            seen += data
    except OSError:  # the terminal's other end is closed
        pass
    result, _ = process.communicate(timeout=30)
    os.close(master)
    assert process.returncode == 1
    assert result == "a result\n"
    lines = visible(seen.decode())
    bars = [line for line in lines if "/3 steps" in line]
    assert bars
    assert max(map(len, bars)) < 40
    assert "a warning" in lines
    assert "RuntimeError: a fault" in lines
    assert seen.rfind(b"\x1b[?25h") > seen.rfind(b"\x1b[?25l")  # the cursor is there again
