"""What a person sees of a run: the progress line and the notes above it."""

from __future__ import annotations

import atexit
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from fusedgpt.train.report.terminal import printable

if TYPE_CHECKING:  # rich takes 60 ms to import, and `fusedgpt --help` draws no bar
    from rich.progress import Progress

_EPOCHS_BETWEEN_AVERAGES = 5
_REDRAWS_PER_SECOND = 5  # on a terminal; each costs a few hundred microseconds
_SECONDS_BETWEEN_LINES = 10.0  # elsewhere


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step and how the run stands after it; NaN where a figure is not known."""

    step: int = 0  # steps done
    loss: float = math.nan  # nats per token
    smoothed_loss: float = math.nan  # mean of the last 10 finite losses
    grad_norm: float = math.nan  # before clipping
    learning_rate: float = math.nan
    skipped: bool = False  # loss or gradient was not finite, so nothing was updated
    tokens: int = 0  # seen since the run began, resumes included
    seconds: float = 0.0  # of training since this process began, validation and saving not counted
    steps_per_second: float = math.nan
    tokens_per_second: float = math.nan
    mfu: float = math.nan  # model FLOP/s utilisation as a fraction, 0.4 for 40%


def clock(seconds: float) -> str:
    """HH:MM:SS; hours beyond 99 keep counting."""
    whole = max(0, round(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def progress_line(m: StepMetrics, steps: int, width: int | None = None) -> str:
    """E.g. `[00:05:23] [#######...] 156/200 steps | Loss: 3.4521 | ETA: 00:01:31 | lr 2.9e-04 | 1,234 tok/s`.

    At most `width` characters: first the bar gets shorter, then figures go, at last the bar.
    """
    eta = (steps - m.step) / m.steps_per_second if m.steps_per_second else math.nan
    loss = "-" if math.isnan(m.smoothed_loss) else f"{m.smoothed_loss:.4f}"
    head = f"[{clock(m.seconds)}]"
    count = f"{m.step}/{steps} steps | Loss: {loss}"
    rest = f" | ETA: {'--:--:--' if math.isnan(eta) else clock(eta)}"
    rate = "" if math.isnan(m.learning_rate) else f" | lr {m.learning_rate:.1e}"
    speed = "" if math.isnan(m.tokens_per_second) else f" | {m.tokens_per_second:,.0f} tok/s"
    mfu = "" if math.isnan(m.mfu) else f" | MFU {m.mfu:.1%}"
    long, short = (f"{head} [{'#' * (n * m.step // steps):.<{n}}] {count}{rest}" for n in (20, 10))
    ends = (rate + speed + mfu, speed + mfu, speed, "")
    tries = (
        long + ends[0],
        *(short + end for end in ends),
        f"{head} {count}{rest}",
        f"{head} {count}",
        count,
    )
    return next((line for line in tries if width is None or len(line) <= width), count[:width])


class _EpochAverage:
    """The mean loss of the current epoch."""

    def __init__(self, step: int) -> None:
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._from, self._sum, self._count = step, 0.0, 0

    def add(self, loss: float) -> None:
        """Add a step; losses that are not finite are left out."""
        if math.isfinite(loss):
            self._sum += loss
            self._count += 1

    def end(self, step: int, steps_per_epoch: int) -> str:
        """The mean after the epoch's last step, and where a resumed epoch began; starts the next."""
        part = "" if step - self._from >= steps_per_epoch else f" (from step {self._from + 1})"
        mean = self._sum / self._count if self._count else math.nan
        self._restart(step)
        return f"average loss {mean:.4f}{part}"


class _Bar:
    """One moving line on a terminal, redrawn by a thread of rich."""

    def __init__(self, stream: TextIO, line: Callable[[int | None], str]) -> None:
        from rich.console import Console
        from rich.progress import Progress, ProgressColumn, Task
        from rich.text import Text

        class Line(ProgressColumn):
            def render(self, task: Task) -> Text:
                # one column stays free: a full line wraps on some terminals
                return Text(line(console.width - 1), no_wrap=True, overflow="crop")

        console = Console(file=stream, force_terminal=True)
        self._progress: Progress = Progress(
            Line(),
            console=console,
            refresh_per_second=_REDRAWS_PER_SECOND,
            redirect_stdout=False,  # stdout holds the results, and may be a file
            redirect_stderr=stream is sys.stderr,  # so that a warning comes out above the bar
        )
        self._progress.add_task("")
        self._progress.start()
        console.show_cursor(True)  # rich hides it, and a killed run could not bring it back
        atexit.register(self.close)  # a thread that draws must not outlive the interpreter's state

    def update(self, *, last: bool) -> None:
        """Nothing to do: the thread asks for the line itself."""

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
        atexit.unregister(self.close)


class _Lines:
    """For a file: a line for the first step, every ten seconds, and for the last step."""

    def __init__(self, stream: TextIO, line: Callable[[int | None], str]) -> None:
        self._stream, self._line = stream, line
        self._next = -math.inf
        self._written = line(None)  # without a step there is nothing to write

    def update(self, *, last: bool) -> None:
        now = time.monotonic()
        if last or now >= self._next:
            self._next = now + _SECONDS_BETWEEN_LINES
            self._write()

    def note(self, text: str) -> None:
        self._stream.write(f"{text}\n")
        self._stream.flush()

    def close(self) -> None:
        self._write()

    def _write(self) -> None:
        line = self._line(None)
        if line != self._written:
            self._written = line
            self.note(line)


class Monitor:
    """Draws a run's progress on `stream`, by default standard error.

    One moving line on a terminal, else a line every ten seconds; `quiet` draws nothing.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._view: _Bar | _Lines | None = None

    def begin(self, *, steps: int, steps_per_epoch: int, step: int = 0) -> None:
        """Start to draw a run of `steps`, which has done `step` of them."""
        self.close()
        self._steps, self._steps_per_epoch = steps, steps_per_epoch
        self._epoch = _EpochAverage(step)
        self._skipped = 0
        self._last = StepMetrics(step=step)
        if not self._quiet:
            moving = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
            self._view = (_Bar if moving else _Lines)(self._stream, self._line)

    def update(self, metrics: StepMetrics) -> None:
        """Show a step. Steps may come in bursts, after which the line shows the last of them."""
        self._epoch.add(metrics.loss)
        self._last = metrics
        if self._view:
            self._view.update(last=metrics.step == self._steps)
        if metrics.skipped:
            self._skipped += 1
            self.note(
                f"step {metrics.step}: loss or gradient not finite, update skipped ({self._skipped} so far)"
            )
        epoch, left = divmod(metrics.step, self._steps_per_epoch)
        if left == 0:
            text = self._epoch.end(metrics.step, self._steps_per_epoch)
            if epoch % _EPOCHS_BETWEEN_AVERAGES == 0:
                self.note(f"epoch {epoch}: {text}")

    def evaluation(self, *, step: int, loss: float, bits_per_byte: float | None, improved: bool) -> None:
        """Show a validation: the loss in nats per token, and whether it is the best so far."""
        per_byte = "" if bits_per_byte is None else f", {bits_per_byte:.4f} bits a byte"
        self.note(f"step {step}: validation loss {loss:.4f}{per_byte}{', best so far' if improved else ''}")

    def note(self, text: str) -> None:
        """Write a line of its own, above the bar."""
        text = printable(text)
        if self._view:
            self._view.note(text)
        elif not self._quiet:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def close(self) -> None:
        """Show where the run stands and end the line; may be called again."""
        view, self._view = self._view, None
        if view:
            view.close()

    def _line(self, width: int | None) -> str:
        return progress_line(self._last, self._steps, width)
