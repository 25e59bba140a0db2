"""What the trainer costs beside its own forward, backward and optimizer: step by step, in the order A B B A.

    python benchmarks/overhead.py [--preset 12M] [--steps 40] [--compile off]

A: the bare step on a batch that lies ready. B: train() with a run directory: loader, metrics.jsonl, progress
line, checks. Validation and saving are left out of both. With --compile, B is compiled and A is not.
"""

from __future__ import annotations

import argparse
import io
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from fusedgpt.kernels.cpu.process import keep_freed_memory
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import build_config
from fusedgpt.train.data.tokens.dataset import TokenDataset
from fusedgpt.train.loop.batches import Cursor, StepBatch
from fusedgpt.train.loop.optimizer import build_optimizer
from fusedgpt.train.loop.precision import resolve_device, resolve_precision, set_precision
from fusedgpt.train.loop.step import Step
from fusedgpt.train.loop.trainer import train
from fusedgpt.train.report.progress import Monitor, StepMetrics
from fusedgpt.train.run.directory import open_run

_WARM_UPS = 5
_LENGTH = 128


class Watch(Monitor):
    """Notes when each step's metrics arrive."""

    def __init__(self) -> None:
        super().__init__(stream=io.StringIO())
        self.moments: list[float] = []

    def update(self, metrics: StepMetrics) -> None:
        super().update(metrics)
        self.moments.append(time.perf_counter())


def dataset() -> TokenDataset:
    """Zipf-distributed ids, none held out."""
    uniform = np.random.default_rng(0).random(200_000)
    ids = np.minimum(50257**uniform, 50256).astype(np.int32)
    return TokenDataset(
        train=ids, val=ids[:0], max_length=_LENGTH, train_documents=1, val_documents=0, eot_id=50256
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--preset", default="12M")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--compile", default="off")
    arguments = parser.parse_args()
    keep_freed_memory()
    options = {k: getattr(arguments, k) for k in ("preset", "steps", "batch_size", "compile")}
    config = build_config({**options, "max_length": _LENGTH, "save_every": "9h", "val_fraction": 0.0})
    shape = config.model.gpt_config(50257)
    data, device = dataset(), resolve_device(config.train.device)

    def bare() -> list[float]:
        model = GPT(shape).to(device).train()
        set_precision(model, resolve_precision(config.train.precision, device))
        step = Step(model, build_optimizer(model, config.train), config.train)
        inputs, targets = data.train_batch(seed=0, epoch=0, position=0, batch_size=arguments.batch_size)
        batch = StepBatch.collect([(inputs.to(device), targets.to(device))], Cursor())
        moments = [time.perf_counter()]
        for _ in range(arguments.steps):
            float(step(batch, 3e-4)[0])
            moments.append(time.perf_counter())
        return moments

    def whole() -> list[float]:
        watch = Watch()
        model, start = GPT(shape), time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            told = {"command": "train"}
            with open_run(Path(folder) / "run", config, told, resume=None) as run:
                run.saving = run.saving.model_copy(update={"keep_last": 0})
                train(model, data, config.train, watch, run)
        first.append(watch.moments[0] - start)
        return watch.moments

    first: list[float] = []
    seconds: dict[str, list[float]] = {"bare step": [], "train()": []}
    for name in ("bare step", "train()", "train()", "bare step"):
        moments = bare() if name == "bare step" else whole()
        seconds[name] += np.diff(moments)[_WARM_UPS:].tolist()
        print(f"{name:<10} {1e3 * float(np.median(np.diff(moments)[_WARM_UPS:])):8.1f} ms")
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    overhead = medians["train()"] / medians["bare step"] - 1
    print("first step after " + " and ".join(f"{s:.1f} s" for s in first) + " of train()")
    print(f"overhead   {overhead:+8.1%}  ({device}, torch {torch.__version__})")


if __name__ == "__main__":
    main()
