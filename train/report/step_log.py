"""The loop's reports: losses read from the device every few steps, validations, saves, the end."""

from __future__ import annotations

import gc
import math
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, schedule

from fusedgpt.kernels.errors import UserError
from fusedgpt.kernels.ops import fallback
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.sampling import Sampler
from fusedgpt.train.loop.validation import Validation
from fusedgpt.train.report.loggers import Sink
from fusedgpt.train.report.progress import Monitor, StepMetrics
from fusedgpt.train.report.speed import Speed
from fusedgpt.train.run.directory import MAX_FAILED_SAVES, Run
from fusedgpt.train.run.signals import Stopped, StopSignals
from fusedgpt.train.run.training_state import Training
from fusedgpt.train.tools.estimate import peak_flops

_LOG_EVERY = {"cuda": 10}  # steps; elsewhere reading costs nothing


class TrainingDiverged(UserError):
    """Too many steps in a row had a loss or gradient that was not finite."""


class TrainingLog:
    """Keeps each step's results on the device, reads them together every log_every steps, and reports them.

    They go to the monitor and to the run's sinks. A context manager around the loop: on any exit, what it
    opened is closed.
    """

    def __init__(
        self, training: Training, config: TrainConfig, monitor: Monitor, run: Run | None, *, profile: bool
    ) -> None:
        self.training, self.config, self.monitor, self.run = training, config, monitor, run
        self.world = training.world
        self.profiler = _profile_steps(monitor, run.path / "trace.json" if run else None) if profile else None
        device = training.model.wte.weight.device
        self.results = torch.zeros(config.log_every or _LOG_EVERY.get(device.type, 1), 3, device=device)
        self.pending: list[tuple[int, int, float]] = []  # step, tokens, learning rate of the unread results
        self.first_tokens = training.progress.tokens
        self.speed = Speed(training.progress.step, self.first_tokens)
        self.sinks: Sequence[Sink] = ()
        self.failed_sinks: set[str] = set()
        self.paused_seconds = 0.0

    def begin(self, steps: int, steps_per_epoch: Fraction, flops_per_token: float) -> None:
        """Say what is about to happen and open the sinks."""
        step, device = self.training.progress.step, self.results.device
        if self.run is not None:
            for note in self.run.notes:
                self.monitor.note(note)
            if self.run.resumed is not None:
                self.monitor.note(f"resuming after step {step} of {steps} from {self.run.path}")
        if why := fallback(device, self.training.dtype):
            self.monitor.note(f"plain PyTorch ops in place of fused kernels: {why}")
        self.steps, self.flops_per_token = steps, flops_per_token
        self.sinks = self.run.sinks() if self.run else ()
        self.monitor.begin(steps=steps, steps_per_epoch=steps_per_epoch, step=step)

    @cached_property
    def mfu_per_token(self) -> float:
        """Seconds at the GPU's peak, NaN where it is not known; asked in the loop, which chooses TF32."""
        device = self.results.device
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        peak = peak_flops(name, self.training.dtype) * self.world.size
        return self.flops_per_token / peak if peak else math.nan

    def __enter__(self) -> Self:
        self.started = time.perf_counter()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self.read()
        finally:
            if self.profiler is not None:
                self.profiler.stop()
            self.monitor.close()
            self._tell("close")
            self.seconds = time.perf_counter() - self.started

    def add(self, result: Tensor, lr: float) -> None:
        """Take a step's result, fp32 (3,) as Step returns it."""
        progress = self.training.progress
        self.results[len(self.pending)] = result
        self.pending.append((progress.step, progress.tokens, lr))
        if len(self.pending) == len(self.results):
            self.read()
            self._check_saves()
        if self.profiler is not None:
            self.profiler.step()

    def read(self) -> None:
        """Fetch the pending results from the device and report them. Raises TrainingDiverged."""
        results = self.results[: len(self.pending)]
        if self.world.size > 1 and len(results):
            results[:, 0] = self.world.sum(results[:, 0].contiguous())
        rows = results.tolist()
        seconds, progress = time.perf_counter() - self.started - self.paused_seconds, self.training.progress
        for (step, tokens, lr), (loss, norm, skipped) in zip(self.pending, rows, strict=True):
            progress.add(loss, skipped=bool(skipped))
            step_rate, token_rate = self.speed.add(seconds, step, tokens, last=step == self.steps)
            metrics = StepMetrics(
                step=step,
                loss=loss,
                smoothed_loss=progress.smoothed_loss,
                grad_norm=norm,
                learning_rate=lr,
                skipped=bool(skipped),
                tokens=tokens,
                seconds=seconds,
                steps_per_second=step_rate,
                tokens_per_second=token_rate,
                mfu=token_rate * self.mfu_per_token,
            )
            self._tell("step", metrics)
            self.monitor.update(metrics)
        self.pending.clear()
        if progress.skipped_in_a_row >= self.config.max_skipped_steps:
            raise TrainingDiverged(
                f"{progress.skipped_in_a_row} steps in a row had a loss or gradient that is not finite; "
                f"{self._last_good_checkpoint()}"
                f"try a lower --learning-rate (now {self.config.learning_rate:g}) or --precision fp32"
            )

    def _tell(self, method: str, *args: Any) -> None:
        """Call a method of every sink; the first failure of each is said, and none ends the run."""
        for sink in self.sinks:
            try:
                getattr(sink, method)(*args)
            except Exception as error:
                if sink.name not in self.failed_sinks:
                    self.monitor.note(f"{sink.name} fails, training goes on: {error}")
                self.failed_sinks.add(sink.name)

    def _last_good_checkpoint(self) -> str:
        if self.run is None or not (saved := self.run.store.steps()):
            return ""
        return f"the last good checkpoint is step {saved[-1]} in {self.run.path}; "

    @property
    def tokens_per_second(self) -> float:
        """Of this process's training steps."""
        seconds = self.seconds - self.paused_seconds
        return (self.training.progress.tokens - self.first_tokens) / seconds

    @contextmanager
    def _paused(self) -> Iterator[None]:
        """For time that is not training; first reads all steps."""
        self.read()
        start = time.perf_counter()
        gc.collect()  # the loop has switched the collector off
        try:
            yield
        finally:
            self.paused_seconds += time.perf_counter() - start

    def ask(self, stop: StopSignals) -> tuple[int, int]:
        """(the signal that stops the run or 0, whether to save by the clock), as all ranks agree."""
        late = self.run is not None and self.run.due_by_time()
        signal_number, save = self.world.agree(stop.received or 0, int(late))
        return signal_number, save

    def validate(self, validation: Validation, stop: StopSignals) -> None:
        """Validate, report it, keep the weights if they are the best; a signal interrupts it."""
        with self._paused():
            step, training = self.training.progress.step, self.training
            evaluation = validation.run(
                training.model, step, training.dtype, lambda: bool(self.ask(stop)[0]), self.world
            )
            if evaluation is None:
                return
            if validation.improved:
                self.training.keep_best()
            loss, bits_per_byte = evaluation.loss, evaluation.bits_per_byte
            self._tell("evaluation", step, loss, bits_per_byte)
            self.monitor.evaluation(
                step=step, loss=loss, bits_per_byte=bits_per_byte, improved=validation.improved
            )

    def sample(self, sampler: Sampler, model: GPT, stop: StopSignals) -> None:
        """Sample and report it; a signal ends it at once, and the resume does not repeat it.

        model: the caller's, which takes a sharded one's weights.
        """
        with self._paused():
            step, model = self.training.progress.step, self.training.gathered(model)
            if self.world.first:
                texts = stop.unless_stopped(partial(sampler.texts, model))
                if texts is not None:
                    self._tell("samples", step, texts)
                    self.monitor.samples(step, texts)
            self.world.meet()

    def save(self, run: Run) -> None:
        """Save in the background."""
        with self._paused():
            self._check_saves(wait=True)
            self.world.meet()  # the first may have waited for the disk
            run.save(self.training.snapshot())

    def save_last(self, run: Run) -> None:
        """Save unless the newest save is of this step and has not failed."""
        self._check_saves(wait=True)
        if self.world.from_first(lambda: run.last_saved_step != self.training.progress.step):
            self.save(run)

    def _check_saves(self, *, wait: bool = False) -> None:
        """Report a save that failed. Training goes on; after several in a row another is tried at once."""
        run = self.run
        if run is None or (why := run.failed_save(wait=wait)) is None:
            return
        if run.failed_saves < MAX_FAILED_SAVES:
            self.monitor.note(f"{why}; training goes on and saves again later")
            return
        self.monitor.note(f"{why}; {run.failed_saves} saves in a row failed, trying once more")

    def stopped(self, number: int, *, save: bool = True) -> Stopped:
        """The exception that ends the run for a signal, once it is saved; the first rank's has a message."""
        step = self.training.progress.step
        what = f"stopped by {signal.Signals(number).name} after step {step}"
        if self.run is None:
            return Stopped(f"{what}; nothing was saved, there is no run directory", number)
        if save and step:
            self.save_last(self.run)
        if not self.world.first:
            return Stopped("", number)
        self.run.store.wait()
        if not self.run.store.steps():
            return Stopped(f"{what}: there was nothing to save yet", number)
        return Stopped(f"{what}; go on with --resume {self.run.path}", number)


def _profile_steps(monitor: Monitor, trace: Path | None) -> profile:
    """A started profiler of a few steps, which then shows the ten most expensive ops.

    trace: file for chrome://tracing or Perfetto.
    """
    cuda = torch.cuda.is_available()

    def report(result: Any) -> None:
        by = "self_device_time_total" if cuda else "self_cpu_time_total"
        monitor.note(result.key_averages().table(sort_by=by, row_limit=10, max_name_column_width=50))
        if trace is not None:
            result.export_chrome_trace(str(trace))

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    when = schedule(skip_first=3, wait=0, warmup=2, active=5, repeat=1)
    profiler = profile(activities=activities, schedule=when, on_trace_ready=report)
    profiler.start()
    return profiler
