"""A run's metrics and samples in TensorBoard, Weights & Biases and Trackio, through their own libraries."""

from __future__ import annotations

import html
import math
import os
import sys
import time
import uuid
from collections.abc import Mapping
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from fusedgpt.kernels.errors import InputError, installs
from fusedgpt.model.files import write_file
from fusedgpt.train.report.progress import StepMetrics

_PROJECT = "fusedgpt"
_SECONDS_BETWEEN_MEMORY_READINGS = 1.0  # each takes some 100 us
_DT_STRING = 7  # TensorBoard's proto types_pb2
_SECONDS_BETWEEN_FLUSHES = 10  # of TensorBoard's files: what a kill loses


class Sink(Protocol):
    """Where a run's metrics go. What a method raises is said once and does not stop the run."""

    name: str

    def step(self, metrics: StepMetrics) -> None:
        """Take a step."""

    def evaluation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        """Take a validation: the loss in nats per token."""

    def samples(self, step: int, texts: Mapping[str, str]) -> None:
        """Take samples: by prompt, the prompt and its continuation."""

    def close(self) -> None:
        """Write what is left; may be called again."""


class _Logger:
    """A Sink that hands a library scalars and texts by name; what is not finite is left out.

    train/loss train/grad_norm train/learning_rate eval/loss eval/bits_per_byte throughput/tokens_per_second
    throughput/mfu memory/peak_bytes (on CUDA) samples/1 ... by the order of the prompts
    """

    name: str
    _memory_read = -math.inf
    _closed = False

    def step(self, metrics: StepMetrics) -> None:
        scalars = {f"train/{name}": getattr(metrics, name) for name in ("loss", "grad_norm", "learning_rate")}
        scalars |= {f"throughput/{name}": getattr(metrics, name) for name in ("tokens_per_second", "mfu")}
        if metrics.seconds - self._memory_read >= _SECONDS_BETWEEN_MEMORY_READINGS:
            self._memory_read = metrics.seconds
            scalars |= _memory()
        self._scalars(metrics.step, scalars)

    def evaluation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        per_byte = {} if bits_per_byte is None else {"eval/bits_per_byte": bits_per_byte}
        self._scalars(step, {"eval/loss": loss, **per_byte})

    def samples(self, step: int, texts: Mapping[str, str]) -> None:
        for number, text in enumerate(texts.values(), 1):
            self._log_text(step, f"samples/{number}", text)

    def close(self) -> None:
        """Write what is left; may be called again."""
        if not self._closed:
            self._closed = True
            with redirect_stdout(sys.stderr):  # standard output is for results
                self._finish()

    def _scalars(self, step: int, scalars: dict[str, float]) -> None:
        self._log(step, {tag: value for tag, value in scalars.items() if math.isfinite(value)})

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        raise NotImplementedError

    def _log_text(self, step: int, tag: str, text: str) -> None:
        raise NotImplementedError

    def _finish(self) -> None:
        raise NotImplementedError


class TensorBoardSink(_Logger):
    """Event files for TensorBoard; steps that a resume repeats are shown once."""

    name = "tensorboard"

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Continue in `folder` after `resume_step`, 0 for a new run.

        Raises InputError where TensorBoard is not installed, OSError where the folder cannot be written.
        """
        self._proto = _library("tensorboard", "tensorboard.compat.proto.event_pb2")
        self._summary = _library("tensorboard", "tensorboard.compat.proto.summary_pb2").Summary
        writer = _library("tensorboard", "tensorboard.summary.writer.event_file_writer")
        self._writer = writer.EventFileWriter(str(folder), flush_secs=_SECONDS_BETWEEN_FLUSHES)
        # Readers then ignore what earlier files say about later steps; also at 0, since a run that was killed
        # before its first save may start again in the same folder.
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._add_event(resume_step + 1, session_log=start)

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        # one event for all: torch's SummaryWriter makes one per scalar, which is four times as slow
        values = [{"tag": tag, "simple_value": value} for tag, value in scalars.items()]
        self._add_event(step, summary=self._summary(value=values))

    def _log_text(self, step: int, tag: str, text: str) -> None:
        tensor = {"dtype": _DT_STRING, "string_val": [_as_code(text).encode()]}
        value = {"tag": tag, "tensor": tensor, "metadata": {"plugin_data": {"plugin_name": "text"}}}
        self._add_event(step, summary=self._summary(value=[value]))

    def _finish(self) -> None:
        self._writer.close()

    def _add_event(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._proto.Event(step=step, wall_time=time.time(), **content))


class WandbSink(_Logger):
    """A run of Weights & Biases, in its online or, with WANDB_MODE=offline, in a local form.

    The x axis is the metric "step": W&B's own would drop the steps that a resume repeats.
    """

    name = "wandb"

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Begin the run that belongs to `run_dir`, or continue it. Raises what wandb raises, InputError."""
        self._wandb = _library("wandb")
        self._run = self._wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            id=_run_id(run_dir),
            name=run_dir.name,
            resume="allow",
            dir=str(run_dir),
            config=config,
            allow_val_change=True,  # by a resume
            settings=self._wandb.Settings(console="off"),  # it would capture the progress bar
        )
        self._run.define_metric("*", step_metric="step")

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log({**scalars, "step": step})

    def _log_text(self, step: int, tag: str, text: str) -> None:
        self._run.log({tag: self._wandb.Html(f"<pre>{html.escape(text)}</pre>"), "step": step})

    def _finish(self) -> None:
        self._run.finish()


class TrackioSink(_Logger):
    """A run of Trackio, on this machine unless its environment variables name a server."""

    name = "trackio"

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Begin the run that belongs to `run_dir`, or continue it. Raises what trackio raises, InputError."""
        self._trackio = _library("trackio")
        name = f"{run_dir.name}-{_run_id(run_dir)[:8]}"  # which is what a resume finds it by
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        self._run = self._trackio.init(project, name, config=config, resume="allow", embed=False)

    def _log(self, step: int, scalars: dict[str, float]) -> None:
        self._run.log(scalars, step=step)

    def _log_text(self, step: int, tag: str, text: str) -> None:
        self._run.log({tag: self._trackio.Markdown(_as_code(text))}, step=step)

    def _finish(self) -> None:
        self._trackio.finish()


def open_logger(name: str, run_dir: Path, config: dict[str, Any], *, resume_step: int) -> Sink:
    """The logger `name` of the run in `run_dir`, continued after `resume_step`. Raises InputError.

    config: the settings of the run, for those that show them.
    """
    try:
        with redirect_stdout(sys.stderr):
            if name == "tensorboard":
                return TensorBoardSink(run_dir / "tensorboard", resume_step=resume_step)
            return {"wandb": WandbSink, "trackio": TrackioSink}[name](run_dir, config)
    except InputError:
        raise
    except Exception as error:  # no account, no network, no space: each library has errors of its own
        raise InputError(f"--logger {name}: {error}") from None


def _library(extra: str, module: str | None = None) -> Any:
    try:
        return import_module(module or extra)
    except ImportError:
        raise InputError(f"{extra} is not installed: {installs(extra)}") from None


def _run_id(run_dir: Path) -> str:
    """What loggers know the run by, the same after a resume."""
    path = run_dir / "logger_id"
    if not path.exists():
        write_file(path, uuid.uuid4().hex)
    return path.read_text()


def _as_code(text: str) -> str:
    """Markdown that shows `text` as it is."""
    return "\n".join("    " + line for line in text.splitlines())


def _memory() -> dict[str, float]:
    """The peak GPU memory of tensors so far; empty without a GPU."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"memory/peak_bytes": float(torch.cuda.max_memory_allocated())}
