"""The training loop."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.data.dataset import Batch, TokenDataset
from fusedgpt.train.monitor import Monitor
from fusedgpt.train.optimizer import build_optimizer
from fusedgpt.train.runtime import keep_freed_memory
from fusedgpt.train.schedule import learning_rate
from fusedgpt.train.step import evaluate, train_step

_EVALUATIONS_PER_RUN = 10
_EVALUATION_TOKENS = 8192  # a batch: without gradients there is room for more than a training step's
_MAX_SKIPPED_STEPS = 10  # in a row, before a run with non-finite gradients is given up


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """How a run went; losses in nats a token, None where nothing was held out."""

    steps: int
    tokens: int
    final_loss: float  # training loss, mean of the last 10 steps
    val_loss: float | None
    best_val_loss: float | None
    tokens_per_second: float  # over the training steps, evaluation not counted
    seconds: float  # all of it

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return asdict(self)


class TrainingDiverged(RuntimeError):
    """Too many steps in a row had a loss or gradient that is not finite."""


def resolve_device(name: str) -> torch.device:
    """ "auto" is cuda where there is one, else cpu. Raises ValueError for a device torch cannot use."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from None
    return device


def resolve_precision(precision: str, device: torch.device) -> torch.dtype:
    """The compute dtype: bf16 where "auto" finds it in hardware, else fp32."""
    if precision == "auto":
        native = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
        precision = "bf16" if native else "fp32"
    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 matrices natively (AVX512-BF16, AMX or Arm's BF16)."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return not flags.isdisjoint({"avx512_bf16", "amx_bf16", "bf16"})


def train_model(model: GPT, dataset: TokenDataset, config: TrainConfig) -> float:
    """Train `model` in place and return the final smoothed training loss; see train."""
    return train(model, dataset, config).final_loss


def train(
    model: GPT, dataset: TokenDataset, config: TrainConfig, monitor: Monitor | None = None
) -> TrainingSummary:
    """Train `model` in place on `dataset`, drawing progress on `monitor`.

    The model ends in eval mode on the device it was trained on, its parameters still fp32. Raises ValueError
    for an unusable device, TrainingDiverged when gradients stop being finite.
    """
    monitor = monitor or Monitor(quiet=True)
    device = resolve_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()
    model.to(device).train()
    model.seed_dropout(config.seed)
    model.compute_dtype = resolve_precision(config.precision, device)
    optimizer = build_optimizer(model, config)
    steps_per_epoch = -(-dataset.windows_per_epoch // config.batch_size)
    steps = config.steps or config.epochs * steps_per_epoch
    monitor.begin(steps=steps, steps_per_epoch=steps_per_epoch)
    validation = _Validation(dataset, config, steps)
    guard = _DivergenceGuard(config.learning_rate)
    tokens, start = 0, time.perf_counter()
    for step, batch in zip(range(steps), training_batches(dataset, config), strict=False):
        inputs, targets = (x.to(device) for x in batch)
        lr = learning_rate(step, steps, config)
        loss, _, skipped = train_step(model, (inputs, targets), optimizer, lr=lr, grad_clip=config.grad_clip)
        tokens += inputs.numel()
        guard.check(bool(skipped), step, monitor)
        monitor.update(loss.item(), tokens=tokens, seconds=time.perf_counter() - start - validation.seconds)
        validation.run_if_due(model, step, monitor)
    monitor.close()
    model.eval()
    seconds = time.perf_counter() - start
    return TrainingSummary(
        steps=steps,
        tokens=tokens,
        final_loss=monitor.smoothed_loss,
        val_loss=validation.last,
        best_val_loss=validation.best,
        tokens_per_second=tokens / (seconds - validation.seconds),
        seconds=seconds,
    )


class _Validation:
    """Evaluates the held-out stream every so often and after the last step, and keeps the time it took."""

    def __init__(self, dataset: TokenDataset, config: TrainConfig, steps: int) -> None:
        self.dataset, self.steps = dataset, steps
        self.batch_size = max(config.batch_size, _EVALUATION_TOKENS // dataset.max_length)
        self.every = config.eval_every or max(1, steps // _EVALUATIONS_PER_RUN)
        self.last: float | None = None
        self.best: float | None = None
        self.seconds = 0.0

    def run_if_due(self, model: GPT, step: int, monitor: Monitor) -> None:
        """Evaluate after step `step` (from 0) if it is time to, and say the loss."""
        done = step + 1
        if len(self.dataset.val) < 2 or (done % self.every and done != self.steps):
            return
        start = time.perf_counter()
        self.last = evaluate(model, self.dataset.val_batches(self.batch_size))
        self.best = self.last if self.best is None else min(self.best, self.last)
        self.seconds += time.perf_counter() - start
        monitor.note(f"step {done}: validation loss {self.last:.4f}")


class _DivergenceGuard:
    """Says which updates were skipped, and ends a run that skips too many in a row."""

    def __init__(self, peak_learning_rate: float) -> None:
        self.peak_learning_rate = peak_learning_rate
        self.in_a_row = 0

    def check(self, skipped: bool, step: int, monitor: Monitor) -> None:
        """Take in whether step `step` (from 0) was skipped. Raises TrainingDiverged."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        if skipped:
            monitor.note(f"step {step + 1}: gradient not finite, update skipped")
        if self.in_a_row >= _MAX_SKIPPED_STEPS:
            raise TrainingDiverged(
                f"{self.in_a_row} steps in a row had gradients that are not finite; "
                f"try a lower --learning-rate (now {self.peak_learning_rate:g}) or --precision fp32"
            )


def training_batches(dataset: TokenDataset, config: TrainConfig) -> Iterator[Batch]:
    """Batch after batch, epoch after epoch, without end; the last of an epoch may be smaller."""
    epoch = 0
    while True:
        for position in range(0, dataset.windows_per_epoch, config.batch_size):
            yield dataset.train_batch(
                seed=config.seed, epoch=epoch, position=position, batch_size=config.batch_size
            )
        epoch += 1
