"""Text from a model on a terminal, as it comes, without what could drive the terminal."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TextIO

from fusedgpt.train.cli.common import printable

_OPEN_ESCAPE = re.compile(r"\x1b(\[[0-?]*[ -/]*)?\Z")  # a sequence that may go on in the next piece
_MAX_HELD = 64


class TerminalWriter:
    """Writes pieces of a text to `stream` at once; control characters and escape sequences are left out.

    The text is what `printable` makes of the whole, but for escape sequences of over 64 characters.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream, self._held = stream, ""

    def write(self, text: str) -> None:
        """Write `text` but for an escape sequence at its end that may go on."""
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


def read_line(prompt: str) -> str | None:
    """A line that a person types; None at its end (Ctrl-D) and for Ctrl-C."""
    try:
        return input(prompt)
    except (EOFError, KeyboardInterrupt):
        return None


def read_lines_from(stream: TextIO) -> Callable[[str], str | None]:
    """`read_line` for a pipe: nobody sees the prompt."""
    return lambda _: line.rstrip("\n") if (line := stream.readline()) else None
