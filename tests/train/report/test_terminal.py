"""Streams and the progress bar; printable and TerminalWriter are tested with the commands that use them."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from fusedgpt.train.report import terminal
from fusedgpt.train.report.terminal import progress_bar

PROGRAM = """
import os, sys
from fusedgpt.train.report.terminal import protect_streams
protect_streams()
with open(sys.argv[1], "w") as file:
    for number in range(3):
        print("out", number, flush=True)
        print("err", number, file=sys.stderr)
    print(file.fileno() > 2, repr(sys.stdin.read()), file=file)
"""


def run_program(path: Path, redirected: str = "", **streams: Any) -> subprocess.CompletedProcess[str]:
    """PROGRAM, which writes to `path` when it gets to its end."""
    command = ["bash", "-c", f'"$0" "$@" {redirected}', sys.executable, "-c", PROGRAM, str(path)]
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, **streams}
    return subprocess.run(command, text=True, **streams)


@pytest.fixture
def unread() -> Iterator[int]:
    """A pipe that nobody reads."""
    end, pipe = os.pipe()
    os.close(end)
    yield pipe
    os.close(pipe)


@pytest.mark.parametrize("closed", ["<&-", "<&- 2>&-", "<&- >&-", "<&- >&- 2>&-"])
def test_a_closed_stream_takes_what_is_written(tmp_path: Path, closed: str) -> None:
    done = run_program(tmp_path / "file", closed)
    assert done.returncode == 0
    assert (tmp_path / "file").read_text() == "True ''\n"
    assert done.stdout.count("out") == (0 if " >&-" in closed else 3)
    assert done.stderr.count("err") == (0 if "2>&-" in closed else 3)
    assert "Error" not in done.stderr


def test_a_broken_standard_error_is_given_up(tmp_path: Path, unread: int) -> None:
    for done in (
        run_program(tmp_path / "file", "2>/dev/full"),
        run_program(tmp_path / "file", stderr=unread),
    ):
        assert (done.returncode, done.stdout) == (0, "out 0\nout 1\nout 2\n")
        assert not done.stderr
        assert (tmp_path / "file").read_text() == "True ''\n"


def test_a_standard_error_that_is_full_holds_nothing_up(tmp_path: Path) -> None:
    end, pipe = os.pipe()
    os.set_blocking(pipe, False)
    with suppress(BlockingIOError):
        while os.write(pipe, bytes(4096)):
            pass
    done = run_program(tmp_path / "file", stderr=pipe)
    os.close(pipe)
    os.close(end)
    assert (done.returncode, done.stdout) == (0, "out 0\nout 1\nout 2\n")


def test_a_standard_output_that_nobody_reads_ends_the_program_well(tmp_path: Path, unread: int) -> None:
    done = run_program(tmp_path / "file", stdout=unread)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "file").read_text() == ""


@pytest.mark.parametrize(
    ("encoding", "shown"), [("latin-1", b"\xe9 ? ?"), ("cp1252", b"\xe9 ? ?"), ("utf-8", "é 料 ?".encode())]
)
def test_what_cannot_be_shown_is_replaced(encoding: str, shown: bytes) -> None:
    code = "from fusedgpt.train.report.terminal import protect_streams; protect_streams(); "
    code += r"print('\xe9 \u6599 \udcff', end='')"
    environment = {**os.environ, "PYTHONIOENCODING": encoding}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=environment)
    assert done.stdout == shown


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


def test_colours_make_no_terminal_of_a_file(
    now: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress_bar("reading") as show:
        now[0] = 20.0
        show(1, 4)
    assert capsys.readouterr().err == "reading 25%\n"


@pytest.mark.parametrize("stream", [io.StringIO, Terminal])
def test_quiet_says_nothing(now: Any, monkeypatch: pytest.MonkeyPatch, stream: Any) -> None:
    monkeypatch.setattr(sys, "stderr", stream())
    with progress_bar("reading", quiet=True) as show:
        now[0] = 100.0
        show(1, 4)
    assert sys.stderr.getvalue() == ""  # type: ignore[attr-defined]
