"""What a person sees of a run: the progress line, the smoothed loss, the notes between."""

from __future__ import annotations

import math
import sys
import time
from collections import deque
from typing import TextIO

_BAR_WIDTH = 20
_SMOOTHED_STEPS = 10
_EPOCHS_BETWEEN_AVERAGES = 5
_SECONDS_BETWEEN_REDRAWS = 0.1  # on a terminal
_SECONDS_BETWEEN_LINES = 10.0  # elsewhere


def clock(seconds: float) -> str:
    """HH:MM:SS; hours beyond 99 keep counting."""
    whole = max(0, round(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def progress_line(*, seconds: float, step: int, steps: int, loss: float, tokens_per_second: float) -> str:
    """E.g. `[00:05:23] [####......] 156/200 steps | Loss: 3.4521 | ETA: 00:02:15 | 1,234 tok/s`."""
    filled = _BAR_WIDTH * step // steps
    bar = "#" * filled + "." * (_BAR_WIDTH - filled)
    eta = clock(seconds / step * (steps - step)) if step else "--:--:--"
    return (
        f"[{clock(seconds)}] [{bar}] {step}/{steps} steps | Loss: {loss:.4f} | ETA: {eta} "
        f"| {tokens_per_second:,.0f} tok/s"
    )


class Monitor:
    """Draws progress on `stream` (standard error by default).

    One moving line on a terminal, else a line every ten seconds; `quiet` draws nothing.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.quiet = quiet
        self._terminal = self.stream.isatty()
        self._line_open = False
        self._last_drawn = -math.inf
        self.begin(steps=1, steps_per_epoch=1)

    def begin(self, *, steps: int, steps_per_epoch: int) -> None:
        """Start a run of `steps`."""
        self.steps, self.steps_per_epoch = steps, steps_per_epoch
        self._step = 0
        self._recent: deque[float] = deque(maxlen=_SMOOTHED_STEPS)
        self._epoch_losses: list[float] = []

    @property
    def smoothed_loss(self) -> float:
        """Mean of the last 10 losses, NaN before the first."""
        return sum(self._recent) / len(self._recent) if self._recent else math.nan

    def update(self, loss: float, *, tokens: int, seconds: float) -> None:
        """Take in one step's loss; `tokens` seen and `seconds` spent since the beginning."""
        self._step += 1
        self._recent.append(loss)
        self._epoch_losses.append(loss)
        now = time.monotonic()
        interval = _SECONDS_BETWEEN_REDRAWS if self._terminal else _SECONDS_BETWEEN_LINES
        if now - self._last_drawn >= interval or self._step == self.steps:
            self._last_drawn = now
            self._draw(seconds, tokens / seconds)
        if self._step % self.steps_per_epoch == 0:
            self._end_epoch(self._step // self.steps_per_epoch)

    def _draw(self, seconds: float, tokens_per_second: float) -> None:
        line = progress_line(
            seconds=seconds,
            step=self._step,
            steps=self.steps,
            loss=self.smoothed_loss,
            tokens_per_second=tokens_per_second,
        )
        if self._terminal:
            self._write(f"\r\x1b[2K{line}")
            self._line_open = True
        else:
            self._write(line + "\n")

    def _end_epoch(self, epoch: int) -> None:
        if epoch % _EPOCHS_BETWEEN_AVERAGES == 0:
            self.note(f"epoch {epoch}: average loss {sum(self._epoch_losses) / len(self._epoch_losses):.4f}")
        self._epoch_losses.clear()

    def note(self, text: str) -> None:
        """A line of its own; the progress line goes on below it."""
        self.close()
        self._write(text + "\n")

    def close(self) -> None:
        """End the moving line, so that what follows starts on a new one."""
        if self._line_open:
            self._write("\n")
            self._line_open = False

    def _write(self, text: str) -> None:
        if not self.quiet:
            self.stream.write(text)
            self.stream.flush()
