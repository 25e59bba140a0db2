"""A run's directory, which one process at a time may hold.

config.toml      the resolved configuration; `--config` reads it
run.json         the command, its data or prompt, versions
checkpoints/     step-00001000/ ..., see checkpoint.py
metrics.jsonl    a line per step and per validation
loss.png         the loss curve, if matplotlib is installed
tensorboard/     with --tensorboard
trace.json       with --profile
"""

from __future__ import annotations

import errno
import json
import os
import platform
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusedgpt.model.files import write_file
from fusedgpt.model.folder import safe_name
from fusedgpt.train.config import ConfigError, RunConfig, SavingConfig, read_toml
from fusedgpt.train.report.metrics import MetricsFile, Sink, TensorBoardSink
from fusedgpt.train.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    explained,
    load_checkpoint,
    make_directory,
)

RUNS = Path("runs")
_CONFIG, _RUN, _METRICS, _CHECKPOINTS = "config.toml", "run.json", "metrics.jsonl", "checkpoints"


@dataclass(kw_only=True)
class Run:
    """An open run directory; see open_run."""

    path: Path
    saving: SavingConfig
    store: CheckpointStore
    resumed: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)  # for the user: checkpoints that were skipped
    last_save: float = field(default_factory=time.monotonic)
    last_saved_step: int = 0

    def sinks(self) -> list[Sink]:
        """Where metrics go, continued from the resumed checkpoint."""
        step = self.resumed.step if self.resumed else 0
        sinks: list[Sink] = [MetricsFile(self.path / _METRICS, resume_step=step)]
        if self.saving.tensorboard:
            sinks.append(TensorBoardSink(self.path / "tensorboard", resume_step=step))
        return sinks

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps in total."""
        if step == self.last_saved_step:
            return False
        if self.saving.save_steps is not None:
            return step % self.saving.save_steps == 0
        return time.monotonic() - self.last_save >= (self.saving.save_seconds or 0.0)

    def save(self, checkpoint: Checkpoint) -> None:
        """Save in the background; raises the error of the previous save."""
        self.last_save, self.last_saved_step = time.monotonic(), checkpoint.step
        self.store.save_in_background(checkpoint)

    def finish(self) -> None:
        """After the model is saved: remove the checkpoints if none are to be kept, plot the loss."""
        self.store.wait()
        if self.saving.keep_last == 0:
            self.store.remove_all()
        if find_spec("matplotlib") is not None:
            from fusedgpt.train.report.plots import plot_losses

            plot_losses(self.path / _METRICS, self.path / "loss.png")


@contextmanager
def open_run(path: Path, config: RunConfig, command: dict[str, Any], *, resume: Path | None) -> Iterator[Run]:
    """The run directory `path`, locked, with the checkpoint to resume from; on exit all saves are finished.

    command: the content of run.json. resume: None for a new run, `path` for its newest undamaged checkpoint,
    or one of its checkpoints. Raises ConfigError where a new run would mix with an older one, CheckpointError
    where `resume` is damaged, ValueError where another process holds the run.
    """
    fresh = not path.exists()
    content = json.dumps({**command, "versions": versions()}, ensure_ascii=False, indent=2) + "\n"
    try:
        with run_lock(path):
            run = _open(path, config, resume)
            write_file(path / _CONFIG, config.to_toml())
            write_file(path / _RUN, content)
            try:
                yield run
            finally:
                run.store.wait()
    except BaseException:
        if fresh:
            _remove_traces(path)
        raise


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keep every other trainer out of `run_dir`; however the process ends, the kernel drops the lock.

    Raises ValueError naming the process that holds it, OSError where the lock cannot be taken.
    """
    # The holder has a file of its own, because older versions of filelock truncate the lock's when they try.
    holder = run_dir / "trainer.json"
    lock = FileLock(run_dir / "trainer.lock", timeout=0)
    with explained(f"cannot lock {run_dir}"):
        make_directory(run_dir)
        try:
            lock.acquire()
        except Timeout:
            who = _describe_holder(holder)
            raise ValueError(f"{run_dir} is in use by {who}; end that or choose another --run-dir") from None
        except NotImplementedError:
            raise OSError(errno.ENOSYS, "its file system has no locks") from None
    try:
        with explained(f"cannot lock {run_dir}"):
            holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _describe_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {int(holder['pid'])} on {str(holder['host'])!a}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"


def _open(path: Path, config: RunConfig, resume: Path | None) -> Run:
    store = CheckpointStore(path / _CHECKPOINTS, keep_last=max(1, config.saving.keep_last))
    run = Run(path=path, saving=config.saving, store=store)
    if resume is None and store.steps():
        raise ConfigError(f"{path} holds a run: go on with --resume {path}, or choose another --run-dir")
    if resume == path:
        run.resumed, run.notes = store.newest()
        if run.resumed is None and run.notes:
            raise CheckpointError(f"no checkpoint in {path} is whole: {'; '.join(run.notes)}")
    elif resume is not None:
        run.resumed = load_checkpoint(resume)
    run.last_saved_step = run.resumed.step if run.resumed else 0
    return run


def _remove_traces(path: Path) -> None:
    """Remove what a run leaves that failed before its first step."""
    with suppress(OSError):
        if (path / _METRICS).stat().st_size:
            return
    for name in (_CONFIG, _RUN, _METRICS, "dataset.json", "trace.json", "trainer.lock"):
        (path / name).unlink(missing_ok=True)
    for folder in (path / _CHECKPOINTS, path):
        with suppress(OSError):  # somebody else's files are in it
            folder.rmdir()


def versions() -> dict[str, str]:
    """The versions of Python, torch and fusedgpt."""
    return {"python": platform.python_version()} | {p: version(p) for p in ("fusedgpt", "torch")}


def run_path(name: str, run_dir: Path | None, resume: Path | None) -> Path:
    """The directory of the run to resume, else `run_dir`, else a new one in RUNS for a model `name`."""
    if resume is not None:
        return directory_of(resume)
    return run_dir or RUNS / f"{safe_name(name)}_{time.strftime('%Y%m%d_%H%M%S')}"


def find_run(resume: str, run_dir: Path | None) -> Path | None:
    """What `--resume` names: a run directory or one of its checkpoints; None if "auto" finds nothing.

    "auto" means run_dir, or without it the newest run in RUNS. Raises ConfigError for any other path.
    """
    if resume == "auto":
        runs = [p for p in ([run_dir] if run_dir else RUNS.glob("*")) if (p / _RUN).is_file()]
        return max(runs, key=lambda p: p.stat().st_mtime, default=None)
    path = Path(resume)
    if not (directory_of(path) / _RUN).is_file():
        raise ConfigError(f"{path} is neither a run directory nor one of its checkpoints")
    return path


def directory_of(resume: Path) -> Path:
    """The run directory of what find_run returned."""
    return resume.parent.parent if resume.parent.name == _CHECKPOINTS else resume


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(the content of run.json, the sections of config.toml) of a run directory. Raises ConfigError."""
    try:
        command = json.loads((path / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path / _RUN} cannot be read: {error}") from None
    if not isinstance(command, dict):
        raise ConfigError(f"{path / _RUN} is no JSON object")
    return command, read_toml(path / _CONFIG)
