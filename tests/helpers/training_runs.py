"""Tiny runs with everything that a resume must restore; the tests run them in processes of their own."""

from __future__ import annotations

import json
import multiprocessing
import shutil
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from token_data import dataset_of

from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import RunConfig, build_config
from fusedgpt.train.data.tokens.dataset import TokenDataset
from fusedgpt.train.loop import validation
from fusedgpt.train.loop.trainer import train
from fusedgpt.train.report.progress import Monitor
from fusedgpt.train.run.checkpoint import load_checkpoint
from fusedgpt.train.run.follower import opened_run
from fusedgpt.train.run.training_state import Training
from fusedgpt.train.run.world import ALONE, World

# Dropout, micro-batches of which the last is smaller, an epoch that ends in between, validations.
OPTIONS: dict[str, Any] = {
    "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 16, "dropout": 0.2,
    "batch_size": 3, "batch_tokens": 8 * 16, "steps": 80, "learning_rate": 0.05, "schedule": "constant",
    "eval_every": 7,
    "device": "cpu", "precision": "fp32", "tokenizer": "byte", "seed": 6,
}  # fmt: skip


def counting() -> TokenDataset:
    """Documents that count upwards from anywhere: easy to learn."""
    rng = np.random.default_rng(0)
    documents = [[(int(start) + i) % 60 for i in range(24)] for start in rng.integers(60, size=60)]
    return dataset_of(documents, eot_id=60, max_length=16, val_fraction=0.1)


def config(**changes: Any) -> RunConfig:
    """OPTIONS, changed."""
    return build_config({**OPTIONS, **changes})


def train_tiny(run_dir: Path, *, resume: Path | None = None, world: World = ALONE, **changes: Any) -> None:
    """A run in `run_dir`, or the rest of one, or a rank of it."""
    torch.set_num_threads(1)
    settings = config(**changes)
    with opened_run(world, run_dir, settings, {"command": "train"}, resume, None) as run:
        model = GPT(settings.model.gpt_config(61), seed=5)
        train(model, counting(), settings.train, Monitor(quiet=True), run, world=world)
        if world.first:
            run.finish({"model_path": "models/tiny"})


def resume_from(run_dir: Path, points: list[int], fault: str | None = None) -> dict[int, Any]:
    """For each point: the losses of the run resumed there, and its last checkpoint's tensors and state."""
    if fault:
        plant(fault)
    return {point: _resumed(run_dir, point) for point in points}


def _resumed(run_dir: Path, point: int) -> Any:
    copy = run_dir.parent / f"resumed-{point}"
    name = f"checkpoints/step-{point:08d}"
    shutil.copytree(run_dir / name, copy / name)
    for file in ("run.json", "config.toml"):
        shutil.copy(run_dir / file, copy)
    train_tiny(copy, resume=copy, save_every="1000")
    return outcome(copy)


def outcome(run_dir: Path) -> Any:
    """(losses by step, every tensor and the state of the last checkpoint) of a run."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    losses = {
        row["step"]: (row["loss"], row["grad_norm"], row["learning_rate"]) for row in rows if "loss" in row
    }
    last = load_checkpoint(max((run_dir / "checkpoints").glob("step-*")))
    tensors = {f"{stem}/{name}": x for stem, xs in last.tensors.items() for name, x in xs.items()}
    return losses, tensors, last.state


def plant(fault: str) -> None:
    """Forget to restore something."""
    restore = Training.restore

    def forgetful(self: Training, checkpoint: Any) -> None:
        before = int(self.model.dropout_windows)
        restore(self, checkpoint)
        state = self.optimizer.state[self.model.wpe.weight]
        if fault == "dropout":
            self.model.seed_dropout(int(self.model.dropout_seed), before)
        elif fault == "cursor":
            self.progress.cursor = type(self.progress.cursor)()
        elif fault == "step":
            state["step"].zero_()
        elif fault == "best":
            self.best = {}
        elif fault == "validation":
            self.progress.validation = validation.ValidationState()
        else:
            state[fault].zero_()

    Training.restore = forgetful  # type: ignore[method-assign]


def in_fresh_process(function: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """function(*args, **options) in a new process, which has imported what this one has, and done nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fusedgpt.train.loop.trainer", "fusedgpt.train.report.metrics"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **options).result()
