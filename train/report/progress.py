"""What a person sees of a run: the progress line and the notes above it."""

from __future__ import annotations

import atexit
import math
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, TextIO

from fusedgpt.train.report.terminal import moves, printable

if TYPE_CHECKING:
    from fractions import Fraction

    from rich.progress import Progress

_EPOCHS_BETWEEN_AVERAGES = 5
_SECONDS_BETWEEN_LINES = 10.0  # where there is no terminal


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
    long, short = (f"{head} [{'#' * min(n, n * m.step // steps):.<{n}}] {count}{rest}" for n in (20, 10))
    figures = rate + speed + mfu
    tries = [long + figures, *(short + end for end in (figures, speed + mfu, speed, ""))]
    tries += [f"{head} {count}{rest}", f"{head} {count}", count]
    return next((line for line in tries if width is None or len(line) <= width), count[:width])


def _start_bar(stream: TextIO, line: Callable[[int | None], str]) -> Progress:
    """One moving line on a terminal, redrawn by a thread of rich."""
    from rich.console import Console  # rich takes 60 ms to import, and `fusedgpt --help` draws no bar
    from rich.progress import Progress, ProgressColumn, Task
    from rich.text import Text

    class Line(ProgressColumn):
        def render(self, task: Task) -> Text:
            # one column stays free: a full line wraps on some terminals
            return Text(line(console.width - 1), no_wrap=True, overflow="crop")

    console = Console(file=stream, force_terminal=True)
    bar = Progress(
        Line(),
        console=console,
        refresh_per_second=5,  # each costs a few hundred microseconds
        redirect_stdout=False,  # stdout holds the results, and may be a file
        redirect_stderr=stream is sys.stderr,  # so that a warning comes out above the bar
    )
    bar.add_task("")
    bar.start()
    console.show_cursor(True)  # rich hides it, and a killed run could not bring it back
    atexit.register(bar.stop)  # a thread that draws must not outlive the interpreter's state
    return bar


class Monitor:
    """Draws a run's progress on `stream`, by default standard error.

    One moving line on a terminal, else a line every ten seconds; `quiet` draws nothing.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._bar: Progress | None = None
        self._last = self._written = StepMetrics()

    def begin(self, *, steps: int, steps_per_epoch: Fraction | int, step: int = 0) -> None:
        """Start to draw a run of `steps`, which has done `step` of them.

        A step that takes text of two epochs counts for the first.
        """
        self.close()
        self._steps, self._steps_per_epoch = steps, steps_per_epoch
        self._skipped = 0
        self._epoch_start, self._epoch_sum, self._epoch_count = step, 0.0, 0
        self._last = self._written = StepMetrics(step=step)
        self._next_line = -math.inf
        if moves(self._stream) and not self._quiet:
            self._bar = _start_bar(self._stream, self._line)

    def update(self, metrics: StepMetrics) -> None:
        """Show a step; of steps that come together the line shows the last."""
        self._last = metrics
        if metrics.step == self._steps or time.monotonic() >= self._next_line:
            self._write_line()
        if metrics.skipped:
            self._skipped += 1
            why = f"loss or gradient not finite, update skipped ({self._skipped} so far)"
            self.note(f"step {metrics.step}: {why}")
        if math.isfinite(metrics.loss):
            self._epoch_sum += metrics.loss
            self._epoch_count += 1
        epoch = metrics.step // self._steps_per_epoch
        if epoch > (metrics.step - 1) // self._steps_per_epoch:
            if epoch % _EPOCHS_BETWEEN_AVERAGES == 0:
                mean = self._epoch_sum / self._epoch_count if self._epoch_count else math.nan
                resumed = self._epoch_start > math.ceil((epoch - 1) * self._steps_per_epoch)
                part = f" (from step {self._epoch_start + 1})" if resumed else ""
                self.note(f"epoch {epoch}: average loss {mean:.4f}{part}")
            self._epoch_start, self._epoch_sum, self._epoch_count = metrics.step, 0.0, 0

    def _line(self, width: int | None = None) -> str:
        return progress_line(self._last, self._steps, width)

    def _write_line(self) -> None:
        """Without a bar: write the progress as a line of its own, once per step."""
        if self._bar is None and self._last is not self._written:
            self._next_line = time.monotonic() + _SECONDS_BETWEEN_LINES
            self._written = self._last
            self.note(self._line())

    def evaluation(self, *, step: int, loss: float, bits_per_byte: float | None, improved: bool) -> None:
        """Show a validation: the loss in nats per token, and whether it is the best so far."""
        per_byte = "" if bits_per_byte is None else f", {bits_per_byte:.4f} bits per byte"
        self.note(f"step {step}: validation loss {loss:.4f}{per_byte}{', best so far' if improved else ''}")

    def samples(self, step: int, texts: Mapping[str, str]) -> None:
        """Show samples, by prompt, each as one block."""
        for prompt, text in texts.items():
            self.note(f"--- step {step}: sample for {prompt!r}\n{text.rstrip()}\n---")

    def note(self, text: str) -> None:
        """Write a line of its own, above the bar."""
        if self._bar:
            console = self._bar.console
            console.print(printable(text), markup=False, highlight=False, emoji=False, soft_wrap=True)
        elif not self._quiet:
            self._stream.write(f"{printable(text)}\n")
            self._stream.flush()

    def close(self) -> None:
        """Show where the run stands and end the line; may be called again."""
        self._write_line()
        bar, self._bar = self._bar, None
        self._written = self._last
        if bar:
            bar.stop()
            atexit.unregister(bar.stop)
