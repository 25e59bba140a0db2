"""What a person sees of a run, the progress line and the notes above it, and the fan-out to the logs."""

from __future__ import annotations

import atexit
import math
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol, TextIO

if TYPE_CHECKING:  # rich takes 60 ms to import, and `fusedgpt --help` draws no bar
    from rich.progress import Progress

_SMOOTHED_STEPS = 10
_EPOCHS_BETWEEN_AVERAGES = 5
_REDRAWS_PER_SECOND = 5  # on a terminal; each costs a few hundred microseconds
_SECONDS_BETWEEN_LINES = 10.0  # elsewhere
_SPEED_WINDOW = 30.0  # seconds
_SPEED_RESOLUTION = 0.3  # seconds


@dataclass(frozen=True, kw_only=True)
class StepMetrics:
    """One optimizer step."""

    step: int  # from 1, steps done
    loss: float  # nats a token
    grad_norm: float  # before clipping
    learning_rate: float
    skipped: bool  # loss or gradient was not finite, so nothing was updated
    tokens: int  # seen since the run began, resumes included
    seconds: float  # of training since this process began, evaluation and saving not counted


class Sink(Protocol):
    """Keeps a run's metrics; NaN stands for a speed or an MFU that is not known."""

    def step(self, metrics: StepMetrics, tokens_per_second: float, mfu: float) -> None:
        """Take in one step; `mfu` is a share, 0.4 for 40%."""

    def evaluation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        """Take in a validation after step `step`; loss in nats a token."""

    def close(self) -> None:
        """Write what is left; may be called again."""


class Shown(NamedTuple):
    """What the progress line says; NaN where it is not known yet."""

    seconds: float = 0.0
    step: int = 0
    loss: float = math.nan
    learning_rate: float = math.nan
    steps_per_second: float = math.nan
    tokens_per_second: float = math.nan
    mfu: float = math.nan


def clock(seconds: float) -> str:
    """HH:MM:SS; hours beyond 99 keep counting."""
    whole = max(0, round(seconds))
    return f"{whole // 3600:02d}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def progress_line(shown: Shown, steps: int, width: int | None = None) -> str:
    """E.g. `[00:05:23] [#######...] 156/200 steps | Loss: 3.4521 | ETA: 00:01:31 | lr 2.9e-04 | 1,234 tok/s`.

    At most `width` characters: a shorter bar first, then fewer figures, at last no bar.
    """
    eta = (steps - shown.step) / shown.steps_per_second if shown.steps_per_second else math.nan
    loss = "-" if math.isnan(shown.loss) else f"{shown.loss:.4f}"
    head = f"[{clock(shown.seconds)}]"
    count = f"{shown.step}/{steps} steps | Loss: {loss}"
    rest = f" | ETA: {'--:--:--' if math.isnan(eta) else clock(eta)}"
    rate = "" if math.isnan(shown.learning_rate) else f" | lr {shown.learning_rate:.1e}"
    speed = "" if math.isnan(shown.tokens_per_second) else f" | {shown.tokens_per_second:,.0f} tok/s"
    mfu = "" if math.isnan(shown.mfu) else f" | MFU {shown.mfu:.1%}"
    long, short = (f"{head} [{'#' * (n * shown.step // steps):.<{n}}] {count}{rest}" for n in (20, 10))
    ends = (rate + speed + mfu, speed + mfu, speed, "")
    tries = (
        long + ends[0],
        *(short + end for end in ends),
        f"{head} {count}{rest}",
        f"{head} {count}",
        count,
    )
    return next((line for line in tries if width is None or len(line) <= width), count[:width])


class _Speed:
    """Steps and tokens a second over the last half minute of training.

    A window, as the average since the beginning would carry the first steps' compilation, or what else the
    machine did an hour ago, through the whole run; half a minute evens out the jitter of steps and of bursts,
    and follows a change soon. However slow the steps, it holds at least one whole reading. The very first
    reading, which compiles, is left out as soon as there is another.

    The rows of a burst may share their time. So a time counts only once a later one has come: then all its
    tokens are in.
    """

    def __init__(self, step: int, tokens: int) -> None:
        self._points = deque([(0.0, step, tokens)])
        self._holds_first = True

    def add(self, seconds: float, step: int, tokens: int, *, last: bool = False) -> tuple[float, float]:
        """Steps and tokens a second, NaN before they are known; `last`: no later row will come."""
        points = self._points
        ends_at = points[-1][0]
        close_by = len(points) > 1 and seconds - points[-2][0] < _SPEED_RESOLUTION
        if seconds <= ends_at or close_by:
            points[-1] = (max(seconds, ends_at), step, tokens)
        else:
            points.append((seconds, step, tokens))
            self._drop_what_is_past(seconds)
        from_seconds, from_step, from_tokens = points[0]
        to_seconds, to_step, to_tokens = points[-1 if last else -2] if len(points) > 1 else points[0]
        elapsed = to_seconds - from_seconds
        if elapsed <= 0:
            return math.nan, math.nan
        return (to_step - from_step) / elapsed, (to_tokens - from_tokens) / elapsed

    def _drop_what_is_past(self, seconds: float) -> None:
        points = self._points
        if self._holds_first and len(points) > 3:
            self._holds_first = False
            points.popleft()
        while len(points) > 3 and seconds - points[1][0] >= _SPEED_WINDOW:
            points.popleft()


class _EpochAverage:
    """The mean loss of the epoch that is going on."""

    def __init__(self, step: int) -> None:
        self._restart(step)

    def _restart(self, step: int) -> None:
        self._from, self._sum, self._count = step, 0.0, 0

    def add(self, loss: float) -> None:
        """Losses that are not finite are left out."""
        if math.isfinite(loss):
            self._sum += loss
            self._count += 1

    def end(self, step: int, steps_per_epoch: int) -> str:
        """Say the mean after the epoch's last step, and where a resumed one began; start the next."""
        part = "" if step - self._from >= steps_per_epoch else f" (from step {self._from + 1})"
        mean = self._sum / self._count if self._count else math.nan
        self._restart(step)
        return f"average loss {mean:.4f}{part}"


class _Bar:
    """One moving line on a terminal, which a thread of rich's redraws."""

    def __init__(self, stream: TextIO, line: Callable[[int | None], str]) -> None:
        from rich.console import Console
        from rich.progress import Progress, ProgressColumn, Task
        from rich.text import Text

        class Line(ProgressColumn):
            def render(self, task: Task) -> Text:
                # one column is left free: a full line wraps on some terminals
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
        """Nothing to do: the thread looks at the line itself."""

    def note(self, text: str) -> None:
        self._progress.console.print(text, markup=False, highlight=False, emoji=False, soft_wrap=True)

    def close(self) -> None:
        self._progress.stop()
        atexit.unregister(self.close)


class _Lines:
    """The same as lines of a file: the first step, one every ten seconds, the last step."""

    def __init__(self, stream: TextIO, line: Callable[[int | None], str]) -> None:
        self._stream, self._line = stream, line
        self._next = -math.inf
        self._written = line(None)  # nothing done yet says nothing

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
    """Draws progress on `stream` (standard error by default) and hands each row to the sinks.

    One moving line on a terminal, else a line every ten seconds; `quiet` draws nothing.
    """

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._quiet = quiet
        self._view: _Bar | _Lines | None = None
        self._sinks: Sequence[Sink] = ()
        self._start(steps=1, steps_per_epoch=1, step=0, tokens=0)

    def begin(
        self,
        *,
        steps: int,
        steps_per_epoch: int,
        step: int = 0,
        tokens: int = 0,
        flops_per_token: float = 0.0,
        peak_flops: float = 0.0,
        sinks: Sequence[Sink] = (),
    ) -> None:
        """Start a run of `steps`, or go on with it after `step` steps and `tokens` tokens.

        peak_flops is the device's, in FLOP/s at the run's precision; 0 where it is not known: no MFU then.
        """
        self.close()
        self._sinks = tuple(sinks)
        self._mfu_per_token = flops_per_token / peak_flops if peak_flops else math.nan
        self._start(steps=steps, steps_per_epoch=steps_per_epoch, step=step, tokens=tokens)
        if not self._quiet:
            moving = self._stream.isatty() and os.environ.get("TERM") not in ("dumb", "unknown")
            self._view = (_Bar if moving else _Lines)(self._stream, self._line)

    def _start(self, *, steps: int, steps_per_epoch: int, step: int, tokens: int) -> None:
        self._steps, self._steps_per_epoch = steps, steps_per_epoch
        self._recent: deque[float] = deque(maxlen=_SMOOTHED_STEPS)
        self._epoch = _EpochAverage(step)
        self._speed = _Speed(step, tokens)
        self._skipped = 0
        self._shown = Shown(step=step)

    @property
    def smoothed_loss(self) -> float:
        """Mean of the last 10 finite losses, NaN before the first."""
        return self._shown.loss

    def update(self, metrics: StepMetrics) -> None:
        """Take in one step. Steps may come in bursts, after which the line shows the last of them."""
        if math.isfinite(metrics.loss):
            self._recent.append(metrics.loss)
        self._epoch.add(metrics.loss)
        step, is_last = metrics.step, metrics.step == self._steps
        steps_per_second, tokens_per_second = self._speed.add(
            metrics.seconds, step, metrics.tokens, last=is_last
        )
        mfu = tokens_per_second * self._mfu_per_token
        # replaced as a whole, as the bar's thread may be reading it
        self._shown = Shown(
            metrics.seconds,
            step,
            sum(self._recent) / len(self._recent) if self._recent else math.nan,
            metrics.learning_rate,
            steps_per_second,
            tokens_per_second,
            mfu,
        )
        for sink in self._sinks:
            sink.step(metrics, tokens_per_second, mfu)
        if self._view:
            self._view.update(last=is_last)
        self._say_what_happened(metrics)

    def _say_what_happened(self, metrics: StepMetrics) -> None:
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
        """Say a validation's result: loss in nats a token, and whether it is the best so far."""
        for sink in self._sinks:
            sink.evaluation(step, loss, bits_per_byte)
        per_byte = "" if bits_per_byte is None else f", {bits_per_byte:.4f} bits a byte"
        self.note(f"step {step}: validation loss {loss:.4f}{per_byte}{', best so far' if improved else ''}")

    def note(self, text: str) -> None:
        """A line of its own above the bar; control characters, which could drive a terminal, are left out."""
        text = "".join(c for c in text if c in "\n\t" or c.isprintable())
        if self._view:
            self._view.note(text)
        elif not self._quiet:
            self._stream.write(f"{text}\n")
            self._stream.flush()

    def close(self) -> None:
        """Show where the run stands, leave what follows a new line, close the sinks; may be called again."""
        view, self._view = self._view, None
        sinks, self._sinks = self._sinks, ()
        if view:
            view.close()
        for sink in sinks:
            sink.close()

    def _line(self, width: int | None) -> str:
        return progress_line(self._shown, self._steps, width)
