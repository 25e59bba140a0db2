"""A run's directory: its configuration, checkpoints, metrics and pictures; and what it was told to do.

config.toml      the resolved configuration; `--config` reads it
run.json         the command, its data or prompt, versions
checkpoints/     step-00001000/ ..., see checkpoint.py
metrics.jsonl    a line a step, and one a validation
loss.png         the curve, where matplotlib is installed
tensorboard/     with --tensorboard
trace.json       with --profile
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fusedgpt.model.folder import safe_name
from fusedgpt.train.config import ConfigError, RunConfig, SavingConfig, read_toml
from fusedgpt.train.report.progress import Sink
from fusedgpt.train.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    load_checkpoint,
    run_lock,
)

RUNS = Path("runs")
_CONFIG, _RUN, _METRICS, _CHECKPOINTS = "config.toml", "run.json", "metrics.jsonl", "checkpoints"
_FILES = (_CONFIG, _RUN, _METRICS, "dataset.json", "trace.json", "trainer.lock")


@dataclass(kw_only=True)
class Run:
    """An open run directory; see open_run."""

    path: Path
    saving: SavingConfig
    store: CheckpointStore
    resumed: Checkpoint | None = None
    notes: list[str] = field(default_factory=list)  # for the user: checkpoints that were passed over
    last_save: float = field(default_factory=time.monotonic)
    last_saved_step: int = 0

    def sinks(self) -> list[Sink]:
        """Where metrics go, continued from the checkpoint that was resumed."""
        from fusedgpt.train.report.metrics import MetricsFile, TensorBoardSink

        resume_step = self.resumed.step if self.resumed else 0
        sinks: list[Sink] = [MetricsFile(self.path / _METRICS, resume_step=resume_step)]
        if self.saving.tensorboard:
            sinks.append(TensorBoardSink(self.path / "tensorboard", resume_step=resume_step))
        return sinks

    def save_due(self, step: int) -> bool:
        """Whether a checkpoint is due after so many steps in all."""
        if step == self.last_saved_step:
            return False
        if self.saving.save_steps is not None:
            return step % self.saving.save_steps == 0
        return time.monotonic() - self.last_save >= (self.saving.save_seconds or 0.0)

    def save(self, checkpoint: Checkpoint) -> None:
        """Save in the background; raises what the save before failed with."""
        self.last_save, self.last_saved_step = time.monotonic(), checkpoint.step
        self.store.save_in_background(checkpoint)

    def finish(self) -> None:
        """The model is made: drop the checkpoints if none are to be kept, draw the curve."""
        self.store.wait()
        if self.saving.keep_last == 0:
            self.store.remove_all()
        if find_spec("matplotlib") is not None:
            from fusedgpt.train.report.plots import plot_losses

            plot_losses(self.path / _METRICS, self.path / "loss.png")


@contextmanager
def open_run(path: Path, config: RunConfig, told: dict[str, Any], *, resume: Path | None) -> Iterator[Run]:
    """The run directory `path`, locked, with the checkpoint to resume from; every save is done at the end.

    told: what run.json is to hold, such as the data. resume: None for a fresh run, `path` for its newest
    whole checkpoint, or one of its checkpoints. Raises ConfigError where a fresh run would mix with an older
    one, CheckpointError where `resume` is damaged, ValueError where another process holds the run.
    """
    fresh = not path.exists()
    try:
        with run_lock(path):
            run = _open(path, config, resume)
            (path / _CONFIG).write_text(config.to_toml(), encoding="utf-8")
            text = json.dumps({**told, "versions": versions()}, ensure_ascii=False, indent=2) + "\n"
            (path / _RUN).write_text(text, encoding="utf-8")
            try:
                yield run
            finally:
                run.store.wait()
    except BaseException:
        if fresh:
            _remove_traces(path)
        raise


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
    """A run that failed before its first step leaves nothing behind."""
    metrics = path / _METRICS
    if metrics.is_file() and metrics.stat().st_size:
        return
    for name in _FILES:
        (path / name).unlink(missing_ok=True)
    for folder in (path / _CHECKPOINTS, path):
        with suppress(OSError):  # somebody else's files are in it
            folder.rmdir()


def versions() -> dict[str, str]:
    """What made a run."""
    return {"python": platform.python_version()} | {p: version(p) for p in ("fusedgpt", "torch")}


def new_run_path(name: str) -> Path:
    """A path for a fresh run of a model called `name`, below RUNS."""
    return RUNS / f"{safe_name(name)}_{time.strftime('%Y%m%d_%H%M%S')}"


def find_run(resume: str, run_dir: Path | None) -> Path | None:
    """What `--resume` names: a run directory or one of its checkpoints; None if "auto" finds nothing.

    "auto" means run_dir, or without it the newest run below RUNS. Raises ConfigError for a path that is none.
    """
    if resume == "auto":
        found = [run_dir] if run_dir else sorted(RUNS.glob("*"), key=lambda p: p.stat().st_mtime)
        return next((p for p in reversed(found) if p and (p / _RUN).is_file()), None)
    path = Path(resume)
    if not (directory_of(path) / _RUN).is_file():
        raise ConfigError(f"{path} is neither a run directory nor one of its checkpoints")
    return path


def directory_of(resume: Path) -> Path:
    """The run directory of what find_run found."""
    return resume.parent.parent if resume.parent.name == _CHECKPOINTS else resume


def read_run(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(what run.json holds, the sections of config.toml) of a run directory. Raises ConfigError."""
    try:
        told = json.loads((path / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path / _RUN} cannot be read: {error}") from None
    if not isinstance(told, dict):
        raise ConfigError(f"{path / _RUN} is no JSON object")
    return told, read_toml(path / _CONFIG)
