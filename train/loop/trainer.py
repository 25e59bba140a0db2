"""The training loop."""

from __future__ import annotations

import math
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from fractions import Fraction
from functools import partial

import torch

from fusedgpt.kernels.cpu.process import keep_freed_memory
from fusedgpt.kernels.errors import InputError, UserError
from fusedgpt.kernels.numerics import fp32_sums
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig, windows_per_step
from fusedgpt.train.data.tokens.dataset import TokenDataset
from fusedgpt.train.loop.batches import Loader
from fusedgpt.train.loop.distributed import OneProcess, choose_parallel, named_parameters, share_checkpoint
from fusedgpt.train.loop.execution import choose_compile, choose_cuda_graphs, executed, no_garbage_collection
from fusedgpt.train.loop.optimizer import build_optimizer
from fusedgpt.train.loop.precision import (
    LossScale,
    deterministic,
    resolve_device,
    resolve_precision,
    tf32,
)
from fusedgpt.train.loop.sampling import Sampler
from fusedgpt.train.loop.schedule import learning_rate
from fusedgpt.train.loop.step import GraphedStep, Step
from fusedgpt.train.loop.validation import Validation
from fusedgpt.train.report.progress import Monitor
from fusedgpt.train.report.step_log import TrainingDiverged, TrainingLog
from fusedgpt.train.run.directory import Run
from fusedgpt.train.run.signals import StopSignals
from fusedgpt.train.run.training_state import Training, fingerprint
from fusedgpt.train.run.world import ALONE, World
from fusedgpt.train.tools.estimate import flops_per_token

__all__ = ["TrainingDiverged", "TrainingSummary", "train", "train_model"]


@dataclass(frozen=True, kw_only=True)
class TrainingSummary:
    """How a run went; losses in nats per token, None where nothing was held out."""

    steps: int
    tokens: int
    final_loss: float  # training loss, mean of the last 10 steps
    val_loss: float | None  # of the weights after the last step
    best_val_loss: float | None  # of the weights that are kept
    best_step: int | None  # after which they were
    tokens_per_second: float  # over this process's training steps; evaluation and saving not counted
    seconds: float  # of this process, all of it
    skipped_steps: int  # for a loss or gradient that was not finite
    peak_bytes: int  # of GPU memory that tensors took, on a CPU of the process's

    def as_dict(self) -> dict[str, float | None]:
        """For JSON."""
        return asdict(self)


def train_model(model: GPT, dataset: TokenDataset, config: TrainConfig) -> float:
    """Train `model` in place and return the final smoothed training loss; see train."""
    return train(model, dataset, config).final_loss


class OutOfMemory(UserError):
    """A step does not fit the GPU's memory."""


@contextmanager
def _explain_out_of_memory() -> Iterator[None]:
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutOfMemory(
            f"{str(error).split('. ')[0]}: lower --batch-size (--batch-tokens keeps the tokens per step), or "
            "recompute activations with --checkpointing selective or full; --estimate prints what each needs"
        ) from None


@_explain_out_of_memory()
def train(
    model: GPT,
    dataset: TokenDataset,
    config: TrainConfig,
    monitor: Monitor | None = None,
    run: Run | None = None,
    *,
    sampler: Sampler | None = None,
    profile: bool = False,
    world: World = ALONE,
) -> TrainingSummary:
    """Train `model` in place on `dataset`, drawing progress on `monitor`, saving into `run`.

    The model ends in eval mode and fp32 on the device it was trained on, with the weights of the best
    validation if there was one. sampler: what to sample meanwhile. profile: trace a few steps into `run`, the
    most expensive ops on the monitor. world: the ranks that train together; the model of the first one gets
    the weights, and its `run` is on disk, the others' a Follower.

    Raises InputError for an unusable device or too little data for a step, CheckpointError where what `run`
    resumes does not fit, RunFinished where nothing is left to do, OutOfMemory, TrainingDiverged when losses
    stop being finite, Stopped (once `run` is saved) on a signal, OSError where `run` cannot be written.
    """
    monitor = monitor or Monitor(quiet=True)
    steps, steps_per_epoch = count_steps(dataset, config)
    parallel = choose_parallel(config, model, dataset.max_length, world)
    training = _prepare(model, dataset, config, run, parallel, world)
    progress = training.progress
    execution = _choose_execution(training, config, steps, dataset.max_length, profiled=profile)
    step = _build_step(training, config, dataset, monitor, parallel)
    validation = Validation(dataset, config, steps, progress.validation)
    if run is not None:
        run.begin(nothing_left=progress.step >= steps or validation.out_of_patience)
    log = TrainingLog(training, config, monitor, run, profile=profile)
    log.begin(steps, steps_per_epoch, flops_per_token(model.config, dataset.max_length))
    device = training.model.wte.weight.device
    slow_start = device.type == "cuda" or execution["compile"] != "off"
    with (
        deterministic(config.deterministic and device.type == "cuda"),
        tf32(training.dtype == torch.float32 and device.type == "cuda"),
        fp32_sums(),  # of weight gradients over all tokens of a batch
        no_garbage_collection(),
        executed(
            training.model, checkpointing=config.checkpointing, compile_blocks=execution["compile"] == "block"
        ),
        StopSignals() as stop,
        Loader(dataset, config, device, progress.cursor, world) as batches,
        log,
    ):
        while True:
            if validation.due(progress.step):
                log.validate(validation, stop)
            signal_number, save = log.ask(stop)
            if signal_number:
                raise log.stopped(signal_number)
            if run is not None and (save or run.due_by_step(progress.step)):
                log.save(run)
            if progress.step >= steps or validation.out_of_patience:
                break
            batch, lr = next(batches), learning_rate(progress.step, steps, config)
            if slow_start:  # compiling may take minutes, and before the first step there is nothing to save
                result = stop.unless_stopped(partial(step, batch, lr))
                slow_start = False
                world.meet()
            else:
                result = step(batch, lr)
            if result is None:
                raise log.stopped(stop.received or 0, save=False)
            progress.step += 1
            progress.tokens += batch.tokens
            progress.cursor = batch.following
            log.add(result, lr)
            if sampler is not None and progress.step % sampler.every == 0:
                log.sample(sampler, model, stop)
        if validation.out_of_patience:
            monitor.note(f"no improvement in {config.patience} validations: stopped early")
        if run is not None:
            log.save_last(run)  # in the background of what the caller does with the model
    training.finish(model)
    return _summarise(training, log)


def count_steps(dataset: TokenDataset, config: TrainConfig) -> tuple[int, Fraction]:
    """(steps of the run, steps of an epoch); the last step is filled up from the epoch after config.epochs.

    Raises ValueError where a step is larger than the data or the warmup longer than the run.
    """
    windows = windows_per_step(config, dataset.max_length)
    if windows > dataset.windows_per_epoch:
        raise InputError(
            f"a step takes {windows} windows of {dataset.max_length} tokens, the training text has only "
            f"{dataset.windows_per_epoch}: lower --batch-size or --batch-tokens, or add text"
        )
    steps_per_epoch = Fraction(dataset.windows_per_epoch, windows)
    steps = config.steps or math.ceil(config.epochs * steps_per_epoch)
    config.check_phases(steps)
    return steps, steps_per_epoch


def _prepare(
    model: GPT,
    dataset: TokenDataset,
    config: TrainConfig,
    run: Run | None,
    parallel: OneProcess,
    world: World,
) -> Training:
    """The model on its device, in its precision, with its optimizer, and as `run` left it."""
    device = resolve_device(world.device(config.device))
    if device.type == "cpu":
        keep_freed_memory()
    dtype = resolve_precision(config.precision, device)
    trained = parallel.place(model, device, dtype).train()
    trained.seed_dropout(config.seed)
    micro_batches = -(-windows_per_step(config, dataset.max_length) // (config.batch_size * world.size))
    training = Training(
        model=trained,
        dtype=dtype,
        optimizer=build_optimizer(trained, config, micro_batches=micro_batches),
        loss_scale=LossScale(device) if dtype == torch.float16 else None,
        fingerprint=fingerprint(dataset, config),
        world=world,
    )
    if run is not None:
        run.check_space(training.checkpoint_bytes, model_bytes=4 * sum(p.numel() for p in model.parameters()))
        resumed = share_checkpoint(run.resumed, world, named_parameters(trained))
        if resumed is not None:
            training.restore(resumed)
            run.last_saved_step = resumed.step
            then, now = training.execution.get("precision"), _name(dtype)
            if then not in (None, now):
                run.notes.append(f"the checkpoint was trained in {then}, the run goes on in {now}")
    parallel.begin(trained)
    return training


def _choose_execution(
    training: Training, config: TrainConfig, steps: int, max_length: int, *, profiled: bool
) -> dict[str, str | bool]:
    """What "auto" means for this run; a resume on the same kind of device compiles what was compiled then."""
    model, then = training.model, training.execution
    now: dict[str, str | bool] = {
        "device": model.wte.weight.device.type,
        "precision": _name(training.dtype),
        "compile": choose_compile(config, model, steps - training.progress.step, max_length),
        "cuda_graphs": choose_cuda_graphs(
            config, model.wte.weight.device, profiled=profiled, ranks=training.world.size
        ),
    }
    if then.get("device") == now["device"] and config.compile == "auto":
        now["compile"] = then["compile"]
    training.execution = now
    return now


def _build_step(
    training: Training, config: TrainConfig, dataset: TokenDataset, monitor: Monitor, parallel: OneProcess
) -> Step | GraphedStep:
    model = training.model
    whole = training.execution["compile"] == "model"
    forward = torch.compile(model, fullgraph=True, dynamic=False) if whole else model
    forward = parallel.connect(forward, training.optimizer)
    step = Step(
        partial(forward, dtype=training.dtype),
        training.optimizer,
        config,
        training.loss_scale,
        dataset.document_ids,
        parallel,
    )
    if training.world.size > 1 and model.wte.weight.is_cuda:
        monitor.note("CUDA graphs are off: they cannot hold the communication between ranks")
    return GraphedStep(step, model, monitor.note) if training.execution["cuda_graphs"] else step


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _summarise(training: Training, log: TrainingLog) -> TrainingSummary:
    progress = training.progress
    return TrainingSummary(
        steps=progress.step,
        tokens=progress.tokens,
        final_loss=progress.smoothed_loss,
        val_loss=progress.validation.last_loss,
        best_val_loss=progress.validation.best_loss,
        best_step=progress.validation.best_step or None,
        tokens_per_second=log.tokens_per_second,
        seconds=log.seconds,
        skipped_steps=progress.skipped_steps,
        peak_bytes=_peak_bytes(training.model.wte.weight.device),
    )


def _peak_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak
