"""A run's directory: its files, its states, and the moves between them.

config.toml      the resolved configuration; `--config` reads it
run.json         the command, its data or prompt, versions; of a finished run also the result
checkpoints/     step-00001000/ ..., see checkpoint.py
abandoned/       what going back to an earlier checkpoint moved aside, each a run directory of its own
metrics.jsonl    a line per step and per validation
loss.png         the loss curve, if matplotlib is installed
tensorboard/     with --logger tensorboard; wandb/ with --logger wandb
logger_id        what wandb and trackio know the run by
trace.json       with --profile
input-0 ...      what `train` read from standard input or pipes

A run is new (no run.json), training (a process holds the lock), stopped, finished (run.json has a result) or
broken (a file cannot be read, no checkpoint is whole). Nothing in its directory changes before it is certain
that training goes on; docs/reliability.md has every move.
"""

from __future__ import annotations

import json
import platform
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import count
from pathlib import Path
from typing import Any

from fusedgpt.model.files import sync, sync_all, to_json, write_file
from fusedgpt.model.folder import safe_name
from fusedgpt.train.config import ConfigError, RunConfig, read_toml
from fusedgpt.train.report.loggers import Sink, open_logger
from fusedgpt.train.report.metrics import MetricsFile
from fusedgpt.train.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    load_checkpoint,
)
from fusedgpt.train.run.lock import run_lock

RUNS = Path("runs")
TEXTS = "dataset.json"  # of `create`: the texts it made
_CONFIG, _RUN, _METRICS, _CHECKPOINTS = "config.toml", "run.json", "metrics.jsonl", "checkpoints"
MAX_FAILED_SAVES = 3  # in a row; then one more is tried, and its error ends the run


class RunFinished(ConfigError):
    """There is nothing to resume: the run has done all its steps, and its model is saved."""

    def __init__(self, message: str, result: dict[str, Any]) -> None:
        super().__init__(message)
        self.result = result  # as TrainingResult.as_dict


@dataclass(kw_only=True)
class Run:
    """An open run directory; see open_run."""

    path: Path
    config: RunConfig
    command: dict[str, Any]  # for run.json
    store: CheckpointStore
    resumed: Checkpoint | None = None
    result: dict[str, Any] | None = None  # of a run that was finished before
    notes: list[str] = field(default_factory=list)  # for the user
    output_dir: Path | None = None  # where the model folder will be written
    last_save: float = field(default_factory=time.monotonic)
    last_saved_step: int = 0
    failed_saves: int = 0  # in a row
    overdue: bool = False  # so many failed that another is to follow at once

    def check_space(self, checkpoint_bytes: int, model_bytes: int) -> None:
        """Raises OSError where checkpoints of this size, or the model folder, would not fit."""
        needs = [(self.path, self.store.further_bytes(checkpoint_bytes), "--run-dir")]
        if self.output_dir is not None:
            needs.append((self.output_dir, model_bytes, "--output-dir"))
        check_space(needs)

    def begin(self, *, nothing_left: bool = False) -> None:
        """Write the run's files, now that it is sure to train; move what lies after its checkpoint aside.

        Raises RunFinished where it is finished and there is nothing left to do.
        """
        step = self.resumed.step if self.resumed else 0
        if self.result is not None and nothing_left:
            model = self.result.get("model_path")
            raise RunFinished(
                f"{self.path} is finished after {step} steps, its model folder is {model}: "
                "give it more --steps or --patience, or leave out --resume to train anew",
                self.result,
            )
        if later := self.store.steps_after(step):
            branch = self._set_aside(step)
            what = f"{len(later)} later checkpoint{'s' * (len(later) > 1)}"
            self.notes.append(f"moved {what} to {branch}; --resume {branch} goes on from there")
        write_file(self.path / _CONFIG, self.config.to_toml())
        self._write_run_json({})

    def _set_aside(self, step: int) -> Path:
        """Move the checkpoints after `step` to a new run directory in abandoned/.

        The newest moves last: until then a plain resume finds the run as it was.
        """
        branch = new_directory(self.path / "abandoned" / f"after-step-{step:08d}")
        for name in (_CONFIG, _RUN, _METRICS, TEXTS):
            if (self.path / name).is_file():
                shutil.copyfile(self.path / name, branch / name)
        sync_all(branch)
        self.store.move_after(step, branch / _CHECKPOINTS)
        return branch

    def _write_run_json(self, more: dict[str, Any]) -> None:
        content = {**self.command, "versions": versions(), **more}
        # ASCII, since a path may hold bytes that are not UTF-8
        write_file(self.path / _RUN, to_json(content, indent=2) + "\n")

    def sinks(self) -> list[Sink]:
        """Where metrics go, continued from the resumed checkpoint."""
        step = self.resumed.step if self.resumed else 0
        sinks: list[Sink] = [MetricsFile(self.path / _METRICS, resume_step=step)]
        for name in self.config.saving.logger or ():
            sinks.append(open_logger(name, self.path, self.config.model_dump(mode="json"), resume_step=step))
        return sinks

    def due_by_time(self) -> bool:
        """Whether a checkpoint is due by the clock, or because the last ones failed."""
        seconds = self.config.saving.save_seconds
        late = seconds is not None and time.monotonic() - self.last_save >= seconds
        return late or self.overdue

    def due_by_step(self, step: int) -> bool:
        """Whether a checkpoint is due after `step` steps in total."""
        steps = self.config.saving.save_steps
        return steps is not None and step % steps == 0 and step != self.last_saved_step

    def save(self, checkpoint: Checkpoint) -> None:
        """Save in the background, once the save in flight is done; see failed_save for its error."""
        self.last_save, self.last_saved_step = time.monotonic(), checkpoint.step
        self.overdue = False
        self.store.save_in_background(checkpoint)

    def failed_save(self, *, wait: bool = False) -> str | None:
        """Why the last save failed, told once; None while it is under way, unless `wait`.

        Raises the error of a save that ends the run: it is one of several in a row.
        """
        if not wait and not self.store.is_idle():
            return None
        try:
            if self.store.wait():
                self.failed_saves = 0
            return None
        except OSError as error:
            self.last_saved_step = 0
            self.failed_saves += 1
            if self.failed_saves > MAX_FAILED_SAVES:
                raise
            self.overdue = self.failed_saves == MAX_FAILED_SAVES
            return str(error)

    @contextmanager
    def model_not_lost(self) -> Iterator[None]:
        """Where writing the model folder raises OSError, say where the weights are and how to go on."""
        try:
            yield
        except OSError as error:
            self.store.wait()
            raise OSError(
                f"the model folder could not be written: {error}; the trained weights are in a checkpoint of "
                f"{self.path}: --resume {self.path} writes the folder, with another --output-dir if need be"
            ) from None

    def finish(self, result: dict[str, Any]) -> list[str]:
        """After the model is saved: note the result, remove checkpoints not to be kept, plot the loss.

        Returns what failed, a line each; the model folder is complete without it.
        """
        problems = []
        for part in (self.store.wait, partial(self._write_run_json, {"result": result}), self._tidy):
            try:
                part()
            except OSError as error:
                problems.append(f"the model is saved, but: {error}")
        return problems

    def _tidy(self) -> None:
        if self.config.saving.keep_last == 0:
            self.store.remove_all()
        if find_spec("matplotlib") is not None:
            from fusedgpt.train.report.plots import plot_losses

            plot_losses(self.path / _METRICS, self.path / "loss.png")


@contextmanager
def open_run(
    path: Path,
    config: RunConfig,
    command: dict[str, Any],
    *,
    resume: Path | None,
    output_dir: Path | None = None,
) -> Iterator[Run]:
    """The run directory `path`, locked, with the checkpoint to resume from; on exit all saves are finished.

    command: the content of run.json. resume: None for a new run, `path` for its newest undamaged checkpoint,
    or one of its checkpoints. Raises ConfigError where a new run would mix with an older one, RunFinished,
    CheckpointError where `resume` is damaged, ValueError where another process holds the run.
    """
    with run_lock(path):
        fresh = all(file.name.startswith("trainer.") for file in path.iterdir())
        try:
            run = _open(path, config, command, resume)
            run.output_dir = output_dir
            try:
                yield run
            finally:
                run.store.wait()
        except BaseException:
            if fresh:
                _remove_traces(path)
            raise


def check_space(needs: Sequence[tuple[Path, int, str]]) -> None:
    """Raises OSError where a disk has too little room for (folder, bytes, the option that chooses it).

    A folder need not exist yet. Folders on the same disk share its room.
    """
    wanted: Counter[int] = Counter()
    for folder, n_bytes, option in needs:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
        wanted[existing.stat().st_dev] += n_bytes
        free, total = shutil.disk_usage(existing).free, wanted[existing.stat().st_dev]
        if free < total:
            raise OSError(
                f"{folder} has {free:,} bytes free and needs {total:,}; "
                f"free some space or choose another {option}"
            )


def _open(path: Path, config: RunConfig, command: dict[str, Any], resume: Path | None) -> Run:
    store = CheckpointStore(path / _CHECKPOINTS, keep_last=max(1, config.saving.keep_last))
    run = Run(path=path, config=config, command=command, store=store)
    if resume is None:
        if (path / _RUN).exists() or store.steps():
            raise ConfigError(f"{path} holds a run: go on with --resume {path}, or choose another --run-dir")
        return run
    run.result = read_run(path)[0].get("result")
    if resume == path:
        run.resumed, run.notes = store.newest()
        if run.resumed is None and run.notes:
            raise CheckpointError(f"no checkpoint in {path} is whole: {'; '.join(run.notes)}")
    else:
        run.resumed = load_checkpoint(resume)
    if run.resumed is None and run.result is not None:
        model = run.result.get("model_path")
        raise RunFinished(
            f"{path} is finished and kept no checkpoint, its model folder is {model}: "
            f"--init-from {model} starts a new run from its weights",
            run.result,
        )
    if run.resumed is None:
        run.notes.append(f"{path} has no checkpoint yet: it starts from the beginning")
    run.last_saved_step = run.resumed.step if run.resumed else 0
    return run


def _remove_traces(path: Path) -> None:
    """Remove what a run leaves that failed before its first step."""
    with suppress(OSError):
        if (path / _METRICS).stat().st_size:
            return
    for name in (_CONFIG, _RUN, _METRICS, TEXTS, "trace.json", "logger_id", "trainer.json", "trainer.lock"):
        (path / name).unlink(missing_ok=True)
    for copy in path.glob("input-*"):
        copy.unlink()
    for folder in (path / _CHECKPOINTS, path):
        with suppress(OSError):  # somebody else's files are in it
            folder.rmdir()


def versions() -> dict[str, str]:
    """The versions of Python, torch and fusedgpt."""
    return {"python": platform.python_version()} | {p: version(p) for p in ("fusedgpt", "torch")}


def run_path(kind: str, name: str | None, run_dir: Path | None, resume: Path | None) -> Path:
    """The directory of the run to resume, else `run_dir`, else a new one made in RUNS.

    It is called `name`, or by the kind of model and the time. Raises ConfigError for a name too many.
    """
    if name is not None and (resume or run_dir):
        option = "--resume" if resume else "--run-dir"
        raise ConfigError(f"--name: {option} names the run already, and the model's folder is called like it")
    if resume is not None:
        return directory_of(resume)
    stem = safe_name(name) if name else f"{safe_name(kind)}_{time.strftime('%Y%m%d_%H%M%S')}"
    return run_dir or new_directory(RUNS / stem)


def new_directory(path: Path) -> Path:
    """Make `path`, or `path` with _2, _3, ... where that exists; return what was made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    for number in count(1):
        candidate = path if number == 1 else path.with_name(f"{path.name}_{number}")
        with suppress(FileExistsError):
            candidate.mkdir(mode=0o700)
            break
    sync(path.parent)
    return candidate


def find_run(resume: str, run_dir: Path | None, command: dict[str, Any]) -> Path | None:
    """What `--resume` names: a run directory or one of its checkpoints; None if "auto" finds nothing.

    "auto" means run_dir, or without it the newest run in RUNS of the same `command` (as in run.json; None for
    what is not given). Raises ConfigError for any other path.
    """
    if resume == "auto" and run_dir is not None:
        return run_dir if (run_dir / _RUN).is_file() else None
    if resume == "auto":
        given = {name: value for name, value in command.items() if value}
        return next((path for path in _newest_first(RUNS) if given.items() <= _recorded(path).items()), None)
    path = Path(resume)
    if not (directory_of(path) / _RUN).is_file():
        raise ConfigError(f"{path} is neither a run directory nor one of its checkpoints")
    return path


def _newest_first(runs: Path) -> list[Path]:
    ages: dict[Path, float] = {}
    for path in runs.glob("*"):
        with suppress(OSError):  # no run, or one that is just being removed
            ages[path] = (path / _RUN).stat().st_mtime
    return sorted(ages, key=ages.__getitem__, reverse=True)


def _recorded(path: Path) -> dict[str, Any]:
    try:
        return read_run(path)[0]
    except ConfigError:
        return {}


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
