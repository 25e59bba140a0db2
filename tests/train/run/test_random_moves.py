"""Random moves over run directories: whatever is done to one, its newest whole state stays within reach."""

from __future__ import annotations

import json
import os
import random
import signal
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_disk import Crash, FaultyDisk
from training_runs import config, counting

from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import ConfigError, RunConfig
from fusedgpt.train.loop.trainer import train
from fusedgpt.train.report.progress import Monitor, StepMetrics
from fusedgpt.train.run.checkpoint import CheckpointError, CheckpointStore
from fusedgpt.train.run.directory import open_run, read_run
from fusedgpt.train.run.signals import Stopped

LAST = 200  # steps; then a new directory is begun
DATA = counting()


class Told(Monitor):
    """Keeps what the user is told; `at_step` is called after each step."""

    def __init__(self, at_step: dict[int, Any]) -> None:
        super().__init__(quiet=True)
        self.notes, self.at_step = list[str](), at_step

    def note(self, text: str) -> None:
        self.notes.append(text)

    def update(self, metrics: StepMetrics) -> None:
        self.at_step.get(metrics.step, lambda: None)()


def settings(steps: int, **changes: Any) -> RunConfig:
    small = {
        "n_layer": 1,
        "n_embd": 8,
        "n_head": 1,
        "dropout": 0.1,
        "batch_tokens": 32,
        "batch_size": 2,
        "warmup": 0,
    }
    return config(**{**small, "keep_last": 3, "save_every": "3", "eval_every": 50, "steps": steps, **changes})


def run(path: Path, told: Told, settings: RunConfig, resume: Path | None = None) -> None:
    torch.set_num_threads(1)
    with open_run(path, settings, {"command": "train"}, resume=resume) as opened:
        train(GPT(settings.model.gpt_config(61), seed=5), DATA, settings.train, told, opened)
        if problems := opened.finish({"model_path": "models/tiny"}):
            told.notes += problems


def outcome(function: Any, *args: Any) -> BaseException | None:
    """What function(*args) raises."""
    try:
        function(*args)
    except BaseException as error:
        return error
    return None


def whole(path: Path) -> list[int]:
    """The steps of a run's undamaged checkpoints."""
    store = CheckpointStore(path / "checkpoints", keep_last=1)
    return [step for step, folder in sorted(store._checkpoints().items()) if store._is_whole(step, folder)]


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.startswith("trainer."))
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


class Moves:
    """One run directory after another, what was done to it, and what must therefore be true of it."""

    def __init__(self, root: Path, seed: int, losses: dict[int, float]) -> None:
        self.root, self.random, self.losses = root, random.Random(seed), losses
        self.done = Counter[str]()
        self.new_directory()

    def new_directory(self) -> None:
        self.path = self.root / f"run-{self.done.total()}"
        self.sure = 0  # a step that is saved, or a later one is
        self.branches: dict[Path, int] = {}  # newest step of each

    def move(self) -> None:
        """Do something at random and check what must hold."""
        moves = [self.start, self.go_on, self.go_on, self.go_on, self.go_back, self.change, self.corrupt]
        moves += [self.break_file, self.two_at_once]
        chosen = self.random.choice(moves)
        self.done[chosen.__name__] += 1
        chosen()
        self.check()
        if self.newest() >= LAST:
            self.new_directory()

    def newest(self) -> int:
        return max(whole(self.path), default=0)

    def check(self) -> None:
        assert self.newest() >= self.sure
        for branch, step in self.branches.items():
            assert max(whole(branch)) == step
        if (self.path / "metrics.jsonl").exists():
            lines = (self.path / "metrics.jsonl").read_text().splitlines()
            rows = [row for row in map(json.loads, lines) if "loss" in row]
            assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
            assert all(self.losses[row["step"]] == row["loss"] for row in rows)

    @contextmanager
    def unchanged(self) -> Iterator[None]:
        before = content(self.path)
        yield
        assert content(self.path) == before

    # --- the moves ---

    def start(self) -> None:
        """A new run where there is one is refused."""
        if (self.path / "run.json").exists():
            with (
                self.unchanged(),
                pytest.raises(ConfigError, match=f"holds a run: go on with --resume {self.path}"),
            ):
                run(self.path, Told({}), settings(LAST))
        else:
            self.train(None)

    def go_on(self) -> None:
        if (self.path / "run.json").exists():
            self.train(self.path)

    def go_back(self) -> None:
        """Later checkpoints become a branch, unless the process dies while they are moved."""
        if steps := whole(self.path):
            step, newest = self.random.choice(steps), steps[-1]
            self.sure = step
            known = set(self.path.glob("abandoned/*"))
            self.train(self.path / f"checkpoints/step-{step:08d}")
            for branch in set(self.path.glob("abandoned/*")) - known:
                if newest in whole(branch):
                    self.branches[branch] = newest

    def train(self, resume: Path | None) -> None:
        """Train for a while and end in one of the ways a run ends."""
        before, begins = self.newest(), 0
        if resume is not None:
            begins = before if resume == self.path else int(resume.name[-8:])
        more = begins + self.random.randint(1, 12)
        ending = self.random.choice(["finish", "stop", "die", "kill", "full"])
        self.done[ending] += 1
        at_step: dict[int, Any] = {}
        if ending == "stop":
            at_step[more] = lambda: os.kill(os.getpid(), signal.SIGTERM)
        elif ending == "die":
            at_step[more] = self.die
        told, steps = Told(at_step), more + (0 if ending in ("finish", "full") else 20)
        disk = FaultyDisk(self.path, "kill" if ending == "kill" else "full", self.random.randint(1, 60))
        with pytest.MonkeyPatch.context() as patch:
            if ending in ("kill", "full"):
                disk.install(patch)
            error = outcome(run, self.path, told, settings(steps), resume)
        if isinstance(error, CheckpointError):
            assert not whole(self.path), error
            assert "is whole" in str(error)
            self.new_directory()
            return
        expected: dict[str, Any] = {
            "finish": type(None),
            "stop": Stopped,
            "die": Crash,
            "kill": (Crash, type(None)),  # it had finished before
            "full": (OSError, type(None)),
        }
        assert isinstance(error, expected[ending]), error
        if isinstance(error, Stopped):
            assert str(error).endswith(f"after step {more}; go on with --resume {self.path}")
            self.sure = more
        if ending == "finish":
            self.sure = more
        if isinstance(error, OSError):
            assert "No space left on device" in str(error)
        self.check_words(told.notes, begins, resume)

    def check_words(self, notes: list[str], begins: int, resume: Path | None) -> None:
        """What was said of the beginning is what happened."""
        for note in notes:
            if note.startswith("resuming after step"):
                assert note.startswith(f"resuming after step {begins} of "), (note, begins)
            assert not ("starts from the beginning" in note and begins)

    @staticmethod
    def die() -> None:
        raise Crash

    def change(self) -> None:
        """A setting that does not fit what is saved changes nothing."""
        if whole(self.path):
            with (
                self.unchanged(),
                pytest.raises((CheckpointError, ConfigError), match=r"expected|another seed"),
            ):
                run(
                    self.path,
                    Told({}),
                    settings(LAST, **self.random.choice([{"n_embd": 16}, {"seed": 99}])),
                    self.path,
                )

    def corrupt(self) -> None:
        """A byte of a checkpoint changes; what counts is then the newest whole one."""
        files = sorted((self.path / "checkpoints").glob("step-*/*"))
        if files:
            path = self.random.choice(files)
            raw = bytearray(path.read_bytes())
            raw[self.random.randrange(len(raw))] ^= 1 << self.random.randrange(8)
            path.write_bytes(raw)
            self.sure = min(self.sure, self.newest())

    def break_file(self) -> None:
        """Without a readable run.json or config.toml a resume is refused, and nothing is lost by it."""
        if (self.path / "run.json").exists():
            path = self.path / self.random.choice(["run.json", "config.toml"])
            before = path.read_bytes()
            path.write_bytes(b"{")
            with self.unchanged(), pytest.raises(ConfigError, match=path.name):
                read_run(self.path)
            path.write_bytes(before)

    def two_at_once(self) -> None:
        """The second is refused while the first trains."""
        if not whole(self.path):
            return
        resume = self.path

        def second() -> None:
            with self.unchanged(), pytest.raises(ValueError, match="in use by process"):
                run(self.path, Told({}), settings(LAST), resume)
            raise Crash

        newest = self.newest()
        with pytest.raises(Crash):
            run(self.path, Told({newest + 1: second}), settings(newest + 9), resume)


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The loss of each step of a run without incident."""
    path = tmp_path_factory.mktemp("whole") / "run"
    run(path, Told({}), settings(LAST + 40))
    rows = map(json.loads, (path / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row["loss"] for row in rows if "loss" in row}


@pytest.mark.parametrize("count", [70, pytest.param(10_000, marks=pytest.mark.soak)])
def test_random_moves_lose_nothing(tmp_path: Path, losses: dict[int, float], count: int) -> None:
    moves = Moves(tmp_path, seed=count, losses=losses)
    for _ in range(count):
        moves.move()
    print(f"\n{count} moves, {dict(moves.done)}")
    assert all(
        moves.done[name] for name in ("go_back", "corrupt", "two_at_once", "kill", "full", "stop", "finish")
    )
