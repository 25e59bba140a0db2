"""The contenders of the training benchmark: each builds its model and returns its loss and its step.

    ours                what `fusedgpt train` does in a long run: its compile and CUDA graph defaults
    ours-eager          neither compiled nor captured
    ours-without-OP     one of ABLATIONS undone: the op's reference in its place, or no compile or CUDA graph
    ours-checkpointing-MODE    with gradient checkpointing
    plain               plain_gpt.py under autocast, torch's fused AdamW, clip_grad_norm_
    plain-compiled      the same under torch.compile; plain-fa2, plain-cudnn: with that attention, on a GPU
    peer                nanoGPT's model and loop, unmodified; peer-cudnn: with cuDNN's attention, on a GPU
    plain-kept-memory, peer-kept-memory    on a CPU with the malloc settings that ours gives itself
    products            on a CPU the matrix products of ours and AdamW alone: no loss, so no gate

All start from the same weights and see the same tokens. On a GPU nanoGPT runs as its train.py does: TF32
allowed, compiled, bf16 autocast, fused AdamW. Its own loop uses bf16 on CUDA only; its bf16 on a CPU is the
same loop under torch.autocast.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.ceilings import DTYPES
from benchmarks.clock import CUDA, DEVICE, choose, moment
from benchmarks.workloads.plain_gpt import PlainGPT
from benchmarks.workloads.products import products
from fusedgpt.kernels import ops, reference
from fusedgpt.kernels.cpu import linear
from fusedgpt.kernels.cpu.process import keep_freed_memory
from fusedgpt.model.config import GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.batches import Cursor, StepBatch
from fusedgpt.train.loop.execution import (
    checkpoint_activations,
    choose_compile,
    choose_cuda_graphs,
    compile_each_block,
)
from fusedgpt.train.loop.optimizer import build_optimizer
from fusedgpt.train.loop.precision import cast_parameters
from fusedgpt.train.loop.step import GraphedStep, Step
from fusedgpt.train.tools.estimate import CHECKPOINTING

LOSS_TOLERANCE = {"fp32": 1e-3, "bf16": 2e-2}  # of a loss near 10.9; bf16 keeps 8 bits of each logit
GRAD_CLIP, LEARNING_RATE = 1.0, 3e-4
WARM_UPS = choose(3, 1)  # a turn; on a GPU also for its clocks
LONG_RUN = 100_000  # steps, by which ours decides whether to compile
_FUSED = ["attention", "linear_cross_entropy", "dropout_add_layer_norm", "layer_norm", "bias_gelu", "adamw"]
ABLATIONS = {
    "cuda": [*_FUSED, "compile", "graphs"],
    "cpu": ["linear_cross_entropy", "linear", "kept_memory"],
}
Side = tuple[Callable[[], Tensor] | None, Callable[[], object], Any]  # (the loss, a training step, the model)


def names(*, gpu: bool, peer: bool) -> list[str]:
    """Every contender on a GPU or a CPU."""
    found = ["ours", "ours-eager", *(f"ours-without-{op}" for op in ABLATIONS["cuda" if gpu else "cpu"])]
    found += [f"ours-checkpointing-{mode}" for mode in CHECKPOINTING if mode != "none"]
    found += ["plain", "plain-compiled"]
    found += ["plain-fa2", "plain-cudnn"] if gpu else ["plain-kept-memory", "products"]
    return found + (["peer", "peer-cudnn" if gpu else "peer-kept-memory"] if peer else [])


def tokens(batch_size: int, length: int, vocab_size: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T): Zipf-distributed ids below vocab_size."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(batch_size, length + 1, generator=generator, dtype=torch.float64)
    ids = (vocab_size**uniform).long().clamp(max=vocab_size - 1).to(DEVICE)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def checkpointing(contender: str) -> str:
    """The gradient checkpointing of one of ours."""
    mode = contender.removeprefix("ours-checkpointing-")
    return mode if mode in CHECKPOINTING else "none"


def ours(name: str, config: GPTConfig, batch: tuple[Tensor, Tensor], precision: str) -> Side:
    """fusedgpt's step as its trainer would build it for a long run, except for what `name` undoes."""
    undone = name.removeprefix("ours-without-")
    undo(undone)
    length = batch[0].shape[1]
    if not CUDA and undone != "kept_memory":
        keep_freed_memory()
    model = GPT(config, seed=0).to(DEVICE)
    cast_parameters(model, DTYPES[precision])
    forward = partial(model, dtype=DTYPES[precision])
    train_config = TrainConfig(batch_size=len(batch[0]), learning_rate=LEARNING_RATE, grad_clip=GRAD_CLIP)
    checkpoint_activations(model, checkpointing(name))
    eager = name == "ours-eager"
    compiles, captures = (not eager and undone != kind for kind in ("compile", "graphs"))
    if compiles and choose_compile(train_config, model, LONG_RUN, length) == "block":
        compile_each_block(model)
    train_step: Step | GraphedStep = Step(forward, build_optimizer(model, train_config), train_config)
    if captures and choose_cuda_graphs(train_config, model.wte.weight.device):
        train_step = GraphedStep(train_step, model, note=print)
    step_batch = StepBatch.collect([batch], Cursor())
    return lambda: forward(*batch), lambda: train_step(step_batch, LEARNING_RATE), model


def undo(op: str) -> None:
    """Replace one fused op by its reference, in this process."""
    backend = ops.backend

    def without(name: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str:
        return "reference" if name == op else backend(name, device, dtype)

    ops.backend = without
    if op == "linear_cross_entropy":
        ops.linear_cross_entropy = reference.linear_cross_entropy
    if op == "linear":
        linear.USES_ONEDNN = False


def plain(config: GPTConfig, batch: tuple[Tensor, Tensor], precision: str, *, compiled: bool) -> Side:
    """Plain PyTorch's step."""
    model = PlainGPT(config)
    model.load_state_dict(GPT(config, seed=0).state_dict())
    model.to(DEVICE)
    forward: Callable[..., Tensor] = torch.compile(model) if compiled else model
    optimizer = model.build_optimizer(LEARNING_RATE)
    return usual(lambda: model(*batch), lambda: forward(*batch), model, optimizer, precision)


def peer_model(path: Path, config: GPTConfig, weights: dict[str, Tensor]) -> Any:
    """nanoGPT's model with the weights of ours."""
    sys.path.insert(0, str(path))
    nanogpt = importlib.import_module("model")
    shape = {k: getattr(config, k) for k in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=config.padded_vocab_size, bias=True, **shape))
    missing, unexpected = model.load_state_dict(
        {f"transformer.{k}": v for k, v in weights.items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    return model


def peer(path: Path, config: GPTConfig, batch: tuple[Tensor, Tensor], precision: str) -> Side:
    """nanoGPT's model, optimizer and step, from the weights that ours starts with."""
    model = peer_model(path, config, GPT(config, seed=0).state_dict()).to(DEVICE)
    optimizer = model.configure_optimizers(0.01, LEARNING_RATE, (0.9, 0.999), DEVICE.type)
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU
    forward = torch.compile(model) if CUDA else model

    def loss() -> Tensor:  # as ours: without the padded vocabulary
        logits = model(*batch)[0][..., : config.vocab_size].float()
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten())

    return usual(loss, lambda: forward(*batch)[1], model, optimizer, precision)


def usual(
    loss: Callable[[], Tensor], forward: Callable[[], Tensor], model: Any, optimizer: Any, precision: str
) -> Side:
    """A rival in the usual loop: backward, clip, step, zero the gradients of the loss of `forward`."""
    autocast = torch.autocast(DEVICE.type, torch.bfloat16, enabled=precision == "bf16")

    def step() -> None:
        with autocast:
            value = forward()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return autocast(loss), step, model


def build(
    name: str, config: GPTConfig, batch: tuple[Tensor, Tensor], precision: str, nanogpt: Path | None
) -> Side:
    """The contender of that name."""
    if name.startswith("ours"):
        return ours(name, config, batch, precision)
    if name.endswith("kept-memory") or name == "products":
        keep_freed_memory()
    if name == "products":
        return None, *products(config, batch, precision)
    if name.startswith("peer"):
        assert nanogpt is not None
        return peer(nanogpt, config, batch, precision)
    return plain(config, batch, precision, compiled=name not in ("plain", "plain-kept-memory"))


def step_times(step: Callable[[], object], steps: int) -> list[float]:
    """Milliseconds of each step after the warm-ups, on the device's own clock."""
    moments = [moment() for _ in range(WARM_UPS + steps + 1)]
    moments[0].record()
    for end in moments[1:]:
        step()
        end.record()
    if CUDA:
        torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in pairwise(moments)][WARM_UPS:]
