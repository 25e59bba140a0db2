"""Signals that stop a run: it saves and ends between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Self, TypeVar

from fusedgpt.kernels.errors import UserError

T = TypeVar("T")

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)


class Stopped(UserError):
    """A signal ended the run, which is saved."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal_number


class _StopNow(BaseException):
    """Raised by the handler inside unless_stopped; no `except Exception` of a library swallows it."""


class StopSignals:
    """A context that records SIGINT, SIGTERM, SIGUSR1 and SIGHUP; a second SIGINT raises KeyboardInterrupt.

    SIGHUP stays ignored where it was, under nohup. Only the main thread can handle signals: in others it
    records nothing.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._at_once = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            heeded = [n for n in _SIGNALS if n != signal.SIGHUP or signal.getsignal(n) != signal.SIG_IGN]
            self._previous = {number: signal.signal(number, self._note) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        if self._at_once:
            raise _StopNow

    def requested(self) -> bool:
        """Whether a signal arrived."""
        return self.received is not None

    def unless_stopped(self, work: Callable[[], T]) -> T | None:
        """work(), which a signal ends at once with None: for what takes minutes and has nothing to save."""
        self._at_once = True
        try:
            return None if self.requested() else work()
        except _StopNow:
            return None
        finally:
            self._at_once = False
