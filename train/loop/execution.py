"""How the steps of a run are executed: activation checkpointing, torch.compile and CUDA graphs.

The model knows nothing of them. They replace the `forward` of its blocks while it is trained; evaluation and
sampling go on running the model as it is.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fusedgpt.kernels.errors import UsageError
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig, windows_per_step
from fusedgpt.train.tools.estimate import REACHED, flops_per_token, peak_flops

_UNKNOWN_PEAK = 100e12  # FLOP/s
_COMPILE_SECONDS = 30.0  # block by block
_COMPILE_GAIN = 0.05  # share of a GPU's step that compiling saves: the kernels it could fuse are ours already


@contextmanager
def no_garbage_collection() -> Iterator[None]:
    """Keep Python from searching for cyclic garbage in the middle of a step; gc.collect() still does."""
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()  # what is there stays to the end, and need not be searched
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


@contextmanager
def executed(model: GPT, *, checkpointing: str, compile_blocks: bool) -> Iterator[None]:
    """Train `model` with activation checkpointing and compiled blocks while this is entered."""
    checkpoint_activations(model, checkpointing)
    if compile_blocks:
        compile_each_block(model)
    try:
        yield
    finally:
        for module in model.modules():
            module.__dict__.pop("forward", None)


def checkpoint_activations(model: GPT, mode: str) -> None:
    """Let the backward pass recompute activations: fewer are kept, the gradients stay the same.

    "none" keeps all; "selective" recomputes those within attention and MLP, "full" all but each block's
    inputs. After inductor, which then fuses differently, gradients are the same up to rounding.
    """
    for block in model.blocks():
        recomputed: dict[str, tuple[nn.Module, ...]]
        recomputed = {"none": (), "selective": (block.attn, block.mlp), "full": (block,)}
        for module in recomputed[mode]:
            # Dropout is counter-based: checkpoint need not save and restore torch's random state.
            again = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)
            _replace_forward(module, again)


def compile_each_block(model: GPT, **options: Any) -> None:
    """Compile the blocks with torch.compile's `options`: one graph for the first, one for all others."""
    for block in model.blocks():
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, **options)
        _replace_forward(block, compiled)


def _replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Let `module` run `forward` where it is trained."""
    plain = module.forward

    def choose(*args: Any) -> Any:
        return (forward if module.training and torch.is_grad_enabled() else plain)(*args)

    module.forward = choose


def choose_compile(config: TrainConfig, model: GPT, steps: int, max_length: int) -> str:
    """ "off", "block" or "model": "auto" compiles on a GPU if `steps` are enough to win the time back.

    On a CPU auto is off: 25 to 30 s of compiling save 0 to 5% of a step there (docs/experiments.md).
    """
    if config.compile != "auto":
        return config.compile
    saved = _COMPILE_GAIN * steps * _predict_step_seconds(config, model, max_length)
    return "block" if model.wte.weight.is_cuda and saved > _COMPILE_SECONDS else "off"


def choose_cuda_graphs(
    config: TrainConfig, device: torch.device, *, profiled: bool = False, ranks: int = 1
) -> bool:
    """Whether to replay steps as a CUDA graph: "auto" on one GPU, unless profiled: a replay hides the ops.

    Raises UsageError for "on" without a GPU, or with several.
    """
    if config.cuda_graphs == "on" and ranks > 1:
        raise UsageError("--cuda-graphs on needs one process: leave it at auto under torchrun")
    on_gpu = device.type == "cuda"
    if config.cuda_graphs == "on" and not on_gpu:
        raise UsageError("--cuda-graphs on needs a CUDA device; leave it at auto")
    return config.cuda_graphs == "on" or (
        config.cuda_graphs == "auto" and on_gpu and not profiled and ranks == 1
    )


def _predict_step_seconds(config: TrainConfig, model: GPT, max_length: int) -> float:
    """Estimated time of a step on a GPU."""
    device = model.wte.weight.device
    peak = peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else 0.0
    tokens = windows_per_step(config, max_length) * max_length
    return tokens * flops_per_token(model.config, max_length) / (REACHED * (peak or _UNKNOWN_PEAK))
