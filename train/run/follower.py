"""A run on several ranks: the first has the run directory, the others follow it."""

from __future__ import annotations

import os
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from fusedgpt.train.config import RunConfig
from fusedgpt.train.report.loggers import Sink
from fusedgpt.train.run.checkpoint import Checkpoint, CheckpointStore
from fusedgpt.train.run.directory import Run, open_run
from fusedgpt.train.run.world import World


def opened_run(
    world: World,
    path: Path,
    config: RunConfig,
    command: dict[str, Any],
    resume: Path | None,
    output_dir: Path | None,
) -> AbstractContextManager[Run]:
    """open_run on the first rank; the others follow it."""
    if not world.first:
        return nullcontext(Follower(config))
    return open_run(path, config, command, resume=resume, output_dir=output_dir)


class Follower(Run):
    """A run as the ranks after the first see it: when to save, and nothing on disk."""

    def __init__(self, config: RunConfig) -> None:
        nowhere = Path(os.devnull)
        store = CheckpointStore(nowhere / "checkpoints", keep_last=1)
        super().__init__(path=nowhere, config=config, command={}, store=store)

    def check_space(self, checkpoint_bytes: int, model_bytes: int) -> None:
        """The first rank's business, as all that follows."""

    def begin(self, *, nothing_left: bool = False) -> None:
        """Nothing."""

    def sinks(self) -> list[Sink]:
        """None."""
        return []

    def due_by_time(self) -> bool:
        """Never: the first rank's clock counts."""
        return False

    def save(self, checkpoint: Checkpoint) -> None:
        """Only note the step."""
        self.last_saved_step = checkpoint.step
