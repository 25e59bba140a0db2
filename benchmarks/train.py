"""Training steps per second of ours against nanoGPT's model and loop, side by side.

    python benchmarks/train.py --peer PATH_TO_NANOGPT [--preset 12M] [--batch-sizes 2 16] [--length 128]

Each measurement is a process of its own (ours changes its allocator's settings for good), in the order ours,
peer, peer, ours; a JSON line on standard output has the median step of both runs of a side. Both start from
the same weights and see the same tokens, and no speed is printed unless their losses without dropout agree.
nanoGPT's own loop knows bf16 on CUDA only; its bf16 line here is the same loop under torch.autocast.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.model.gpt import GPT
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.optimizer import build_optimizer
from fusedgpt.train.runtime import keep_freed_memory
from fusedgpt.train.step import train_step

LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 2e-2}  # of a loss near 10.9; bf16 keeps 8 bits of each logit
GRAD_CLIP, LEARNING_RATE = 1.0, 3e-4
Side = tuple[Callable[[], float], Callable[[], float]]  # (loss without dropout, one training step)


def tokens(batch_size: int, length: int) -> tuple[Tensor, Tensor]:
    """Inputs and targets (B, T), Zipf-distributed ids below 50257."""
    generator = torch.Generator().manual_seed(1)
    uniform = torch.rand(batch_size, length + 1, generator=generator, dtype=torch.float64)
    ids = (50257**uniform).long().clamp(max=50256)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def ours(config: GPTConfig, batch: tuple[Tensor, Tensor], precision: str) -> Side:
    """fusedgpt's step, as its trainer runs it."""
    keep_freed_memory()
    model = GPT(config, seed=0)
    model.compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    optimizer = build_optimizer(model, TrainConfig(learning_rate=LEARNING_RATE))

    def loss() -> float:
        model.eval()
        with torch.no_grad():
            return float(model(*batch))

    def step() -> float:
        model.train()
        return train_step(model, batch, optimizer, lr=LEARNING_RATE, grad_clip=GRAD_CLIP)[0].item()

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
    optimizer = model.configure_optimizers(0.01, LEARNING_RATE, (0.9, 0.999), "cpu")
    context: Any = torch.autocast("cpu", torch.bfloat16) if precision == "bf16" else contextlib.nullcontext()

    def loss() -> float:
        model.eval()
        with torch.no_grad(), context:
            logits = model(*batch)[0][..., : config.vocab_size].float()
        return float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[1].flatten()))

    def step() -> float:
        model.train()
        with context:
            _, step_loss = model(*batch)
        step_loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), GRAD_CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return step_loss.item()

    return loss, step


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """One side, in this process: its loss before training and the seconds of each step after two warm-ups."""
    torch.set_num_threads(arguments.threads)
    config, batch = PRESETS[arguments.preset], tokens(arguments.batch_sizes[0], arguments.length)
    precision = arguments.precisions[0]
    loss, step = (
        ours(config, batch, precision)
        if arguments.side == "ours"
        else peer(arguments.peer, config, batch, precision)
    )
    first_loss = loss()
    seconds = []
    for _ in range(arguments.steps + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    return {"loss": first_loss, "seconds": seconds[2:]}


def compare(arguments: argparse.Namespace, batch_size: int, precision: str) -> dict[str, Any]:
    """Ours and the peer in the order A B B A, as one row."""
    runs: dict[str, list[dict[str, Any]]] = {"ours": [], "peer": []}
    for side in ("ours", "peer", "peer", "ours"):
        command = [sys.executable, __file__, "--side", side, "--peer", str(arguments.peer)]
        command += ["--preset", arguments.preset, "--length", str(arguments.length)]
        command += ["--steps", str(arguments.steps), "--threads", str(arguments.threads)]
        command += ["--batch-sizes", str(batch_size), "--precisions", precision]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        runs[side].append(json.loads(done.stdout.splitlines()[-1]))
    losses = [runs[side][0]["loss"] for side in ("ours", "peer")]
    if abs(losses[0] - losses[1]) > LOSS_TOLERANCE[precision]:
        raise SystemExit(f"no speed: the losses differ, ours {losses[0]:.5f}, peer {losses[1]:.5f}")
    median = {
        side: statistics.median(s for run in both for s in run["seconds"]) for side, both in runs.items()
    }
    return {
        "preset": arguments.preset,
        "precision": precision,
        "batch": f"{batch_size} x {arguments.length}",
        "ours_ms": round(1e3 * median["ours"], 1),
        "peer_ms": round(1e3 * median["peer"], 1),
        "ours_tokens_per_second": round(batch_size * arguments.length / median["ours"]),
        "peer_tokens_per_second": round(batch_size * arguments.length / median["peer"]),
        "speedup": round(median["peer"] / median["ours"], 2),
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": arguments.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peer", type=Path, required=True, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--preset", default="12M", choices=PRESETS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--side", choices=["ours", "peer"], help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.side:
        print(json.dumps(measure(arguments)))
        return
    for precision in arguments.precisions:
        for batch_size in arguments.batch_sizes:
            print(json.dumps(compare(arguments, batch_size, precision)), flush=True)


if __name__ == "__main__":
    main()
