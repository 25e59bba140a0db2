"""What a person sees on a terminal: text without escape sequences, a progress bar, a line typed in."""

from __future__ import annotations

import io
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Protocol, TextIO

_SECONDS_BETWEEN_REDRAWS = 0.1  # on a terminal
_SECONDS_BETWEEN_LINES = 10.0  # elsewhere

# ECMA-48: control sequences, control strings (titles, links), and two-character sequences
_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|[ -/]*[0-~])?")
_OPEN_ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|[\]PX^_][^\x07\x1b]*\x1b?|[ -/]*)?\Z")  # may go on
_MAX_HELD = 64


def protect_streams() -> None:
    """Let no stream end the process that is closed, whose reader is gone or that cannot show a character.

    What standard error cannot take is lost. Standard output without a reader ends the process, exit code 0.
    """
    while (unused := os.open(os.devnull, os.O_RDWR)) <= 2:  # or a file of ours would be standard error
        os.set_inheritable(unused, True)
    os.close(unused)
    sys.stdin = sys.stdin or io.TextIOWrapper(io.BytesIO())
    if sys.stdout is sys.__stdout__:  # neither is a test's
        sys.stdout = _protected(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _protected(sys.stderr, 2)


class _Output(io.FileIO):
    """Standard output or error; from its first fault on, what is written goes nowhere."""

    def write(self, data: Any) -> int:
        try:
            written = super().write(data)
            full = written is None and self.fileno() == 2  # a pipe that must not block
            return len(data) if full else written
        except OSError as error:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            if self.fileno() == 1 and isinstance(error, BrokenPipeError):
                sys.exit(0)  # the reader has what it wanted
            if self.fileno() == 1:
                raise OSError(f"cannot write to standard output: {error.strerror}") from None
            return len(data)


def _protected(stream: TextIO | None, descriptor: int) -> TextIO:
    encoding, errors = (stream.encoding, stream.errors) if stream else ("utf-8", "strict")
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        encoding=encoding,
        errors="replace" if errors == "strict" else errors,
        line_buffering=descriptor == 2 or os.isatty(descriptor),
    )


def moves(stream: TextIO) -> bool:
    """Whether `stream` is a terminal on which a line can be redrawn; FORCE_COLOR does not make it one."""
    return stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")


def strip_escapes(text: str) -> str:
    """`text` without terminal escape sequences."""
    return _ESCAPE.sub("", text)


def printable(text: str) -> str:
    """`text` without control characters and escape sequences."""
    return "".join(c for c in strip_escapes(text) if c in "\n\t" or c.isprintable())


class TerminalWriter:
    """Writes a text to `stream` piece by piece, as `printable` makes it of the whole.

    An escape sequence of over 64 characters that is cut between two pieces is written as text.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._held = stream, ""

    def write(self, text: str) -> None:
        """Write `text` except an escape sequence at its end that may go on."""
        text = self._held + text
        found = _OPEN_ESCAPE.search(text)
        cut = found.start() if found and len(text) - found.start() <= _MAX_HELD else len(text)
        self._held = text[cut:]
        self._stream.write(printable(text[:cut]))
        self._stream.flush()

    def end(self) -> None:
        """End the line."""
        self._stream.write(printable(self._held) + "\n")
        self._stream.flush()
        self._held = ""


class ShowProgress(Protocol):
    """What `progress_bar` yields; total: 0 where it is not known, title: replaces the first one."""

    def __call__(self, done: int, total: int, title: str = ...) -> None: ...


@contextmanager
def progress_bar(title: str, *, quiet: bool = False) -> Iterator[ShowProgress]:
    """A bar on standard error; where that is no terminal, a line every ten seconds."""
    from rich.console import Console  # 60 ms, which `fusedgpt --help` saves
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    on_terminal = moves(sys.stderr)
    console = Console(stderr=True, force_terminal=on_terminal)
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    # auto_refresh would draw in a thread: processes forked meanwhile inherit its locks, perhaps held
    off = quiet or not on_terminal
    with Progress(*columns, console=console, transient=True, auto_refresh=False, disable=off) as bar:
        task = bar.add_task(title)
        interval = _SECONDS_BETWEEN_REDRAWS if on_terminal else _SECONDS_BETWEEN_LINES
        shown = -math.inf if on_terminal else time.monotonic()

        def show(done: int, total: int, title: str = title) -> None:
            nonlocal shown
            if quiet or time.monotonic() - shown < interval:
                return
            shown = time.monotonic()
            bar.update(task, description=title, completed=done, total=total or None, refresh=True)
            if not on_terminal:
                share = f" {min(done / total, 1):.0%}" if total else ""
                sys.stderr.write(f"{title}{share}\n")

        yield show


def typed_lines(prompt: str) -> Iterator[str]:
    """Lines from the keyboard until Ctrl-D or Ctrl-C."""
    with suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input(prompt)
