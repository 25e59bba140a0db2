"""What the chunked loss alone gains in a CPU training step: against the same step with all logits in memory.

    python benchmarks/chunked_loss.py [--preset 12M] [--batch-sizes 2 16] [--length 128] [--rounds 3]

One process, one model; the loss alternates chunked, materialised, materialised, chunked (a round),
`--steps` steps each after one that is not counted. A JSON line a shape has the median steps of both. No speed
is printed unless both losses agree. With --plain-malloc the page faults of 50 MB logits count, too, which
kernels/cpu/process.py saves every loss.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from typing import Any

os.environ["GOMP_SPINCOUNT"] = "1000"  # before anything imports torch; see kernels/cpu/process.py

import contenders
import torch
import torch.nn.functional as F
from torch import Tensor

from fusedgpt.kernels import ops
from fusedgpt.model.config import PRESETS


def materialised(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, reduction: str, **unused: float
) -> Tensor:
    """kernels.reference without z-loss and smoothing, whose passes over the logits would cost even at 0."""
    logits = (hidden @ weight[:vocab_size].to(hidden.dtype).T).float()
    return F.cross_entropy(logits, targets, reduction=reduction)


LOSSES = {"chunked": ops.linear_cross_entropy, "materialised": materialised}


def compare(arguments: argparse.Namespace, batch_size: int, precision: str) -> dict[str, Any]:
    """Both losses in one training step, as one row."""
    torch.set_num_threads(arguments.threads)
    batch = contenders.tokens(batch_size, arguments.length)
    loss, step, gpt = contenders.ours(
        PRESETS[arguments.preset], batch, precision, keep_memory=not arguments.plain_malloc
    )
    first = {}
    gpt.eval()
    for name, function in LOSSES.items():
        ops.linear_cross_entropy = function
        first[name] = loss().item()
    if abs(first["chunked"] - first["materialised"]) > contenders.LOSS_TOLERANCE[precision]:
        raise SystemExit(f"no speed: the losses differ, {first}")
    gpt.train()
    seconds: dict[str, list[float]] = {name: [] for name in LOSSES}
    for name in ("chunked", "materialised", "materialised", "chunked") * arguments.rounds:
        ops.linear_cross_entropy = LOSSES[name]
        step()
        for _ in range(arguments.steps):
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    row: dict[str, Any] = {
        "preset": arguments.preset,
        "precision": precision,
        "batch": f"{batch_size} x {arguments.length}",
    }
    row |= {f"{name}_ms": round(1e3 * x, 1) for name, x in median.items()}
    row |= {"speedup": round(median["materialised"] / median["chunked"], 2), "threads": arguments.threads}
    malloc = "glibc" if arguments.plain_malloc else "ours"
    return row | {"malloc": malloc, "torch": torch.__version__, "machine": platform.machine()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", default="12M", choices=PRESETS)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=["fp32", "bf16"])
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--plain-malloc", action="store_true", help="leave malloc as glibc sets it")
    arguments = parser.parse_args()
    for precision in arguments.precisions:
        for batch_size in arguments.batch_sizes:
            print(json.dumps(compare(arguments, batch_size, precision)), flush=True)


if __name__ == "__main__":
    main()
