"""The progress bar; printable and TerminalWriter are tested with the commands that use them."""

from __future__ import annotations

import io
import sys
from typing import Any

import pytest

from fusedgpt.train.report import terminal
from fusedgpt.train.report.terminal import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Any:
    moment = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: moment[0])
    return moment


def test_a_file_gets_a_line_every_ten_seconds(now: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("reading") as show:
        for done in range(25):
            now[0] = float(done)
            show(done, 24, "writing" if done > 15 else "reading")
        now[0] = 40.0
        show(30, 0)
    assert capsys.readouterr().err.splitlines() == ["reading 42%", "writing 83%", "reading"]


def test_a_terminal_gets_a_bar_that_goes_away(now: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("reading") as show:
        show(1, 4)
        show(2, 4)  # too soon
        now[0] = 1.0
        show(3, 4, "grading")
    shown = sys.stderr.getvalue()  # type: ignore[attr-defined]
    assert "25%" in shown
    assert "50%" not in shown
    assert "grading" in shown
    assert "75%" in shown
    assert shown.endswith("\x1b[2K")


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_says_nothing(now: Any, monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    with progress_bar("reading", quiet=True) as show:
        now[0] = 100.0
        show(1, 4)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
