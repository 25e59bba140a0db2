"""Training steps per second of ours against nanoGPT's model and loop, side by side.

    python benchmarks/train.py --peer PATH_TO_NANOGPT [--preset 12M] [--batch-sizes 2 16] [--length 128]

Each measurement is a process of its own (ours changes its allocator's settings for good), in the order ours,
peer, peer, ours; a JSON line on standard output has the median step of both runs of a side. Both start from
the same weights and see the same tokens, and no speed is printed unless their losses without dropout agree.
Without --peer the other side is ours on the reference ops, plain PyTorch.

On a GPU, which is taken where there is one, steps are timed between events and nothing waits for the device;
nanoGPT runs there as its train.py runs it: TF32 allowed, compiled, bf16 autocast, fused AdamW. Its own loop
knows bf16 on CUDA only; its bf16 line on a CPU is the same loop under torch.autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loader import Cursor, StepBatch
from fusedgpt.train.optimizer import build_optimizer
from fusedgpt.train.precision import set_precision
from fusedgpt.train.runtime import keep_freed_memory
from fusedgpt.train.step import Step

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of a loss near 10.9; bf16 keeps 8 bits of each logit
GRAD_CLIP, LEARNING_RATE = 1.0, 3e-4
WARM_UPS = 3
Side = tuple[Callable[[], float], Callable[[], object]]  # (loss without dropout, one training step)


def tokens(batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), Zipf-distributed ids below 50257."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(batch_size, length + 1, generator=generator, dtype=torch.float64)
    ids = (50257**uniform).long().clamp(max=50256)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def ours(config: GPTConfig, batch: tuple[Tensor, Tensor], precision: str) -> Side:
    """fusedgpt's step, as its trainer runs it."""
    device = batch[0].device
    if device.type == "cpu":
        keep_freed_memory()
    model = GPT(config, seed=0).to(device)
    set_precision(model, torch.bfloat16 if precision == "bf16" else torch.float32)
    train_config = TrainConfig(learning_rate=LEARNING_RATE, grad_clip=GRAD_CLIP)
    train_step = Step(model, build_optimizer(model, train_config), train_config)
    step_batch = StepBatch.collect([batch], Cursor())

    def loss() -> float:
        model.eval()
        with torch.no_grad():
            return float(model(*batch))

    def step() -> None:
        model.train()
        train_step(step_batch, LEARNING_RATE)

    return loss, step


def peer(path: Path, config: GPTConfig, batch: tuple[Tensor, Tensor], precision: str) -> Side:
    """nanoGPT's model, its optimizer and what its loop does in a step, from the weights ours starts with."""
    sys.path.insert(0, str(path))
    import model as nanogpt

    shape = {k: getattr(config, k) for k in ("block_size", "n_layer", "n_head", "n_embd", "dropout")}
    model = nanogpt.GPT(nanogpt.GPTConfig(vocab_size=config.padded_vocab_size, bias=True, **shape))
    weights = GPT(config, seed=0).state_dict()
    missing, unexpected = model.load_state_dict(
        {f"transformer.{k}": v for k, v in weights.items()}, strict=False
    )
    assert not unexpected
    assert set(missing) <= {"lm_head.weight"}  # tied
    with torch.no_grad():  # ours leaves the padding out of the softmax; here it must lose by itself
        model.lm_head.weight[config.vocab_size :] = 0.0
    device = batch[0].device.type
    model.to(device)
    optimizer = model.configure_optimizers(0.01, LEARNING_RATE, (0.9, 0.999), device)
    context: Any = torch.autocast(device, torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()
    torch.set_float32_matmul_precision("high")  # TF32, on a GPU
    forward = torch.compile(model) if device == "cuda" else model

    def loss() -> float:
        model.eval()
        with torch.no_grad(), context:
            logits = model(*batch)[0][..., : config.vocab_size].float()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()))

    def step() -> None:
        model.train()
        with context:
            _, step_loss = forward(*batch)
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return loss, step


def step_seconds(step: Callable[[], object], steps: int, device: str) -> list[float]:
    """Of each step after the warm-ups, on the device's own clock."""
    if device == "cpu":
        moments = [time.perf_counter()]
        for _ in range(WARM_UPS + steps):
            step()
            moments.append(time.perf_counter())
        return [end - begin for begin, end in pairwise(moments)][WARM_UPS:]
    events: list[Any] = [torch.cuda.Event(enable_timing=True) for _ in range(WARM_UPS + steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [1e-3 * begin.elapsed_time(end) for begin, end in pairwise(events)][WARM_UPS:]


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process: its loss before training, the seconds of each step and the peak memory."""
    torch.set_num_threads(arguments.threads)
    config = PRESETS[arguments.preset].model_copy(update={"dropout": arguments.dropout})
    inputs, targets = (x.to(arguments.device) for x in tokens(arguments.batch_sizes[0], arguments.length))
    precision, batch = arguments.precisions[0], (inputs, targets)
    if arguments.side == "peer":
        loss, step = peer(arguments.peer, config, batch, precision)
    else:
        loss, step = ours(config, batch, precision)
    first_loss = loss()
    seconds = step_seconds(step, arguments.steps, arguments.device)
    peak = torch.cuda.max_memory_allocated() / 1e6 if arguments.device == "cuda" else None
    return {"loss": first_loss, "seconds": seconds, "peak_mb": peak}


def compare(arguments: argparse.Namespace, batch_size: int, precision: str) -> dict[str, Any]:
    """Ours and the other side in the order A B B A, as one row."""
    other = "peer" if arguments.peer else "reference"
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], other: []}
    for side in ("ours", other, other, "ours"):
        command = [sys.executable, __file__, "--side", side, "--device", arguments.device]
        command += ["--preset", arguments.preset, "--length", str(arguments.length)]
        command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
        command += ["--batch-sizes", str(batch_size), "--precisions", precision]
        command += ["--dropout", str(arguments.dropout)]
        command += ["--peer", str(arguments.peer)] if arguments.peer else []
        environment = {**os.environ, **({"FUSEDGPT_KERNELS": "reference"} if side == "reference" else {})}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
        runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    losses = {side: both[0]["loss"] for side, both in runs.items()}
    if not abs(losses["ours"] - losses[other]) <= LOSS_TOLERANCE[precision]:
        raise SystemExit(
            f"no speed: the losses differ, ours {losses['ours']:.5f}, {other} {losses[other]:.5f}"
        )
    row = {
        "preset": arguments.preset,
        "precision": precision,
        "batch": f"{batch_size} x {arguments.length}",
        "dropout": arguments.dropout,
    }
    median = {
        side: statistics.median(s for run in both for s in run["seconds"]) for side, both in runs.items()
    }
    for side, both in runs.items():
        row[f"{side}_ms"] = round(1e3 * median[side], 1)
        row[f"{side}_tokens_per_second"] = round(batch_size * arguments.length / median[side])
        row |= {f"{side}_peak_mb": round(both[0]["peak_mb"])} if both[0]["peak_mb"] else {}
    return row | {
        "speedup": round(median[other] / median["ours"], 2),
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if arguments.device == "cuda" else platform.machine(),
        "threads": arguments.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--preset", default="12M", choices=PRESETS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--side", choices=["ours", "peer", "reference"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    for precision in arguments.precisions:
        for batch_size in arguments.batch_sizes:
            print(json.dumps(compare(arguments, batch_size, precision)), flush=True)


if __name__ == "__main__":
    main()
