"""Memory and time of a training step by way of checkpointing: predicted by `--estimate`, and measured.

    python benchmarks/memory.py [--presets 12M gpt2 gpt2-medium] [--batch-size 16] [--length 512]

A JSON line for each preset and mode. On a GPU the memory is the peak of torch's allocator over whole steps,
optimizer included; on a CPU it is what autograd keeps of one forward pass, and predicted is the same.
FUSEDGPT_KERNELS, --precision and --compile as in training.
"""

from __future__ import annotations

import argparse
import gc
import statistics
from typing import Any

import torch
from torch import Tensor

from benchmarks.report import record
from benchmarks.workloads import contenders
from fusedgpt.kernels.cpu.process import keep_freed_memory
from fusedgpt.model.config import PRESETS
from fusedgpt.model.gpt import CHECKPOINTING, GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.batches import Cursor, StepBatch
from fusedgpt.train.loop.optimizer import build_optimizer
from fusedgpt.train.loop.precision import resolve_precision, set_precision
from fusedgpt.train.loop.step import Step
from fusedgpt.train.tools.estimate import Row, estimate


def kept_bytes(gpt: GPT, batch: tuple[Tensor, Tensor]) -> int:
    """What autograd keeps of one forward pass, parameters, buffers and the batch itself not counted."""
    known = {x.untyped_storage()._cdata for x in (*gpt.parameters(), *gpt.buffers(), *batch)}
    kept = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x  # alive, so that no other storage takes its place
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = gpt(*batch)
    assert loss.requires_grad
    return sum(x.untyped_storage().nbytes() for key, x in kept.items() if key not in known)


def measure(preset: str, config: TrainConfig, arguments: argparse.Namespace, row: Row) -> dict[str, Any]:
    """One model trained for a few steps."""
    device = torch.device(arguments.device)
    gpt_config = PRESETS[preset].model_copy(update={"dropout": arguments.dropout})
    gpt = GPT(gpt_config).to(device).train()
    set_precision(gpt, resolve_precision(config.precision, device))
    gpt.checkpointing = config.checkpointing
    if arguments.compile:
        gpt.compile_blocks()
    batch = contenders.tokens(config.batch_size, arguments.length)
    batch = batch[0].to(device), batch[1].to(device)
    step = Step(gpt, build_optimizer(gpt, config), config)
    step_batch = StepBatch.collect([batch], Cursor())
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = contenders.step_seconds(
        lambda: step(step_batch, config.learning_rate), arguments.steps, arguments.device
    )
    if device.type == "cuda":
        memory = {"predicted": row.total, "measured": torch.cuda.max_memory_allocated()}
    else:
        embedding_gradient = 4 * gpt_config.padded_vocab_size * gpt_config.n_embd
        hidden_gradient = batch[0].numel() * gpt_config.n_embd * gpt.activation_dtype.itemsize
        kept_by_loss = embedding_gradient + hidden_gradient
        memory = {"predicted": row.activations + kept_by_loss, "measured": kept_bytes(gpt, batch)}
    milliseconds = 1e3 * statistics.median(seconds)
    return {
        "ms": milliseconds,
        "spread": None,
        "peak_mb": memory["measured"] / 1e6,
        "predicted_mb": memory["predicted"] / 1e6,
        "predicted_ms": None if row.seconds_per_step is None else 1e3 * row.seconds_per_step,
        "predicted_relative_time": row.relative_time,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--presets", nargs="+", default=["12M"], choices=PRESETS)
    parser.add_argument("--modes", nargs="+", default=CHECKPOINTING, choices=CHECKPOINTING)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--precision", default="auto", choices=["auto", "bf16", "fp16", "fp32"])
    parser.add_argument("--compile", action="store_true", help="block by block")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    arguments = parser.parse_args()
    if arguments.device == "cpu":
        keep_freed_memory()
    name = torch.cuda.get_device_name() if arguments.device == "cuda" else "cpu"
    for preset in arguments.presets:
        gpt_config = PRESETS[preset].model_copy(update={"dropout": arguments.dropout})
        for mode in arguments.modes:
            config = TrainConfig(
                checkpointing=mode, batch_size=arguments.batch_size, precision=arguments.precision
            )
            rows = {row.checkpointing: row for row in estimate(gpt_config, config, arguments.length, name)}
            shape = f"{preset} {arguments.batch_size} x {arguments.length}"
            found = {"suite": "memory", "name": mode, "shape": shape, "dtype": arguments.precision}
            found |= {"contender": "ours", **measure(preset, config, arguments, rows[mode])}
            record.emit(found)
            gc.collect()  # a model's optimizer and its hooks refer to each other


if __name__ == "__main__":
    main()
