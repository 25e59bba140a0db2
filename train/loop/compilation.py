"""Which of torch.compile and CUDA graphs a run uses, and the forward pass that results."""

from __future__ import annotations

import torch

from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig, windows_per_step
from fusedgpt.train.loop.step import DocumentIds, Forward, GraphedStep, Step
from fusedgpt.train.run.training_state import Training
from fusedgpt.train.tools.estimate import REACHED, flops_per_token, peak_flops

_UNKNOWN_PEAK = 100e12  # FLOP/s
_COMPILE_SECONDS = 30.0  # block by block
_COMPILE_GAIN = 0.05  # share of a GPU's step that compiling saves: the kernels it could fuse are ours already
_LAUNCHES_A_BLOCK, _SECONDS_A_LAUNCH = 60, 5e-6  # forward and backward


def choose_compile(config: TrainConfig, model: GPT, steps: int, max_length: int) -> str:
    """ "off", "block" or "model": "auto" compiles on a GPU if `steps` are enough to win the time back.

    On a CPU auto is off: 25 to 30 s of compiling save 0 to 5% of a step there (docs/experiments.md).
    """
    if config.compile != "auto":
        return config.compile
    saved = _COMPILE_GAIN * steps * _predict_step_seconds(config, model, max_length)
    return "block" if model.wte.weight.is_cuda and saved > _COMPILE_SECONDS else "off"


def choose_cuda_graphs(config: TrainConfig, model: GPT, max_length: int) -> bool:
    """Whether to replay steps as a CUDA graph: "auto" where launching would take longer than computing.

    Raises ValueError for "on" without a GPU.
    """
    on_gpu = model.wte.weight.is_cuda
    if config.cuda_graphs == "on" and not on_gpu:
        raise ValueError("--cuda-graphs on needs a CUDA device; leave it at auto")
    if config.cuda_graphs != "auto":
        return config.cuda_graphs == "on"
    micro_batches = -(-windows_per_step(config, max_length) // config.batch_size)
    launching = micro_batches * model.config.n_layer * _LAUNCHES_A_BLOCK * _SECONDS_A_LAUNCH
    return on_gpu and launching > _predict_step_seconds(config, model, max_length)


def _predict_step_seconds(config: TrainConfig, model: GPT, max_length: int) -> float:
    """A guess at the time of a step on a GPU, launches not counted."""
    device = model.wte.weight.device
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0
    tokens = windows_per_step(config, max_length) * max_length
    return tokens * flops_per_token(model.config, max_length) / (REACHED * (peak or _UNKNOWN_PEAK))


def build_step(
    training: Training,
    config: TrainConfig,
    document_ids: DocumentIds,
    *,
    compile_mode: str,
    cuda_graphs: bool,
) -> Step | GraphedStep:
    """The step of a run; evaluation and sampling go on calling the model itself, which compiles nothing."""
    forward: Forward = training.model
    if compile_mode == "block":
        training.model.compile_blocks()
    elif compile_mode == "model":
        forward = torch.compile(training.model, fullgraph=True, dynamic=False)
    step = Step(forward, training.optimizer, config, training.loss_scale, document_ids)
    return GraphedStep(step) if cuda_graphs else step
