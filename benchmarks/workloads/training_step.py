"""Training steps of ours and its rivals, and what each fused op and checkpointing change.

    python -m benchmarks.workloads.training_step [--peer NANOGPT] [--presets 12M] [--batch-sizes 2 16]
        [--lengths 128] [--contenders ours plain-compiled ours-without-linear ...]

contenders.py says who they are. Each measurement is a process of its own, in the order A B C C B A. Tokens
are Zipf-distributed. A contender gets no speed unless its losses without
dropout, before and after GATE_STEPS steps, are those of eager plain PyTorch; else the exit code is 1.

MFU is given for two counts of FLOPs per token, 6 N + 12 L C T (PaLM's and nanoGPT's) and 6 M + 6 L C T (what
the matmuls and causal attention need; M counts the weights of the blocks and the output projection), as
fractions of the datasheet's rate and of the matmul rate measured here. The floor of a step is the second
count at the measured rate plus AdamW's bytes at the copy bandwidth; the gap is the step's time over that.

On a GPU steps are timed between events, and nothing waits for the device. Peak memory is torch's there, the
whole process's on a CPU. The time to the first step counts from the launch of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import resource
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.arguments import make_parser
from benchmarks.ceilings import CUDA, DTYPES, Ceilings, measure_ceilings
from benchmarks.report import record
from benchmarks.report.record import Row
from benchmarks.workloads import contenders
from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.tools.estimate import estimate, flops_per_token, peak_flops

TOY = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)
SHAPES = {**PRESETS, "toy": TOY}
GATE_STEPS = 3
ADAMW_BYTES = 32  # per parameter, see kernels/test_bench_adamw.py


@dataclass(frozen=True, kw_only=True)
class Point:
    """What all contenders of one comparison are given."""

    preset: str
    precision: str
    batch_size: int
    length: int
    dropout: float
    peer: Path | None

    @property
    def config(self) -> GPTConfig:
        shape = SHAPES[self.preset]
        block_size = max(self.length, shape.block_size)
        return shape.model_copy(update={"dropout": self.dropout, "block_size": block_size})


def measure(contender: str, point: Point, steps: int, began: float) -> Row:
    """Losses, times of each step and of the first since `began`, peak memory; in this process."""
    batch = contenders.tokens(point.batch_size, point.length, point.config.vocab_size)
    backends = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    backend = backends.get(contender.rpartition("-")[2])
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        loss, step, model = contenders.build(contender, point.config, batch, point.precision, point.peer)
        model.train(point.dropout == 0.0)  # the losses of the gate are without dropout
        losses, first_step_s = gate(loss, step, began)
        model.train()
        times = contenders.step_times(step, steps) if steps else []
    peak = 1e3 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if CUDA:
        peak = torch.cuda.max_memory_allocated()
    return {"times": times, "losses": losses, "first_step_s": first_step_s, "peak_mb": peak / 1e6}


def gate(loss: Callable[[], Tensor], step: Callable[[], object], began: float) -> tuple[list[float], float]:
    """The losses before and after GATE_STEPS steps, and the seconds from `began` to the end of the first."""
    start = time.time()
    with torch.no_grad():
        before = float(loss())
    lost = time.time() - start
    step()
    if CUDA:
        torch.cuda.synchronize()
    first_step_s = time.time() - began - lost
    for _ in range(GATE_STEPS - 1):
        step()
    with torch.no_grad():
        return [before, float(loss())], first_step_s


def run(contender: str, point: Point, steps: int) -> Row:
    """`measure` in a process of its own; {"fault": ...} or {"skipped": ...} if that fails."""
    try:
        with ProcessPoolExecutor(1, get_context("spawn")) as pool:
            return pool.submit(measure, contender, point, steps, time.time()).result()
    except Exception as error:  # whatever a contender raises, the others are still worth measuring
        memory = isinstance(error, torch.OutOfMemoryError)
        return {"skipped" if memory else "fault": record.text(error)}


def different(losses: list[float], expected: list[float], precision: str) -> str:
    """What is wrong with a contender's losses; empty if nothing."""
    gap = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    if gap <= contenders.LOSS_TOLERANCE[precision]:  # False for NaN
        return ""
    shown = [", ".join(f"{x:.4f}" for x in values) for values in (losses, expected)]
    return f"losses {shown[0]}, of plain PyTorch {shown[1]}"


def compare(names: list[str], point: Point, steps: int) -> list[Row]:
    """All contenders at one point."""
    kinds = {"ablation": "-without-", "checkpointing": "-checkpointing-"}
    base = {
        "suite": "train",
        "name": next((kind for kind, sign in kinds.items() if any(sign in name for name in names)), "step"),
        "shape": f"{point.preset} {point.batch_size} x {point.length}",
        "dtype": point.precision,
        **{name: getattr(point, name) for name in ("preset", "batch_size", "length", "dropout")},
    }
    truth = run("plain", point, 0)
    if "losses" not in truth:
        row = {**base, "contender": "plain", **truth}
        record.emit(row)
        return [row]
    ceilings = measure_ceilings(DTYPES[point.precision])
    torch.cuda.empty_cache()  # for the processes to come

    def gated(contender: str) -> Row:
        found = run(contender, point, steps)
        wrong = different(found["losses"], truth["losses"], point.precision) if "losses" in found else ""
        return {"fault": f"no speed: {wrong}"} if wrong else found

    return record.contest(base, names, gated, lambda row, runs: figures(row, runs, point, ceilings))


def figures(row: Row, runs: list[Row], point: Point, ceilings: Ceilings) -> Row:
    """What the runs of one contender come to."""
    config, length = point.config, point.length
    tokens, seconds = point.batch_size * length, 1e-3 * row["ms"]
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    counts = {
        "palm": flops_per_token(config, length),
        "causal": 6.0 * weights + 6.0 * config.n_layer * config.n_embd * length,
    }
    name = torch.cuda.get_device_name() if CUDA else "cpu"
    peak = peak_flops(name) if point.precision == "bf16" else 0.0
    flops, bytes_ = counts["causal"] * tokens, ADAMW_BYTES * config.parameter_counts()[0]
    floor_ms = flops / ceilings.tflops * 1e-9 + bytes_ / ceilings.gbps * 1e-6
    found: Row = {
        "rate": tokens / seconds,
        "unit": "tok/s",
        "flops": flops,
        "bytes": bytes_,
        "floor_ms": floor_ms,
        "gap": row["ms"] / floor_ms,
        "peak_mb": max(run["peak_mb"] for run in runs),
        "first_step_s": min(run["first_step_s"] for run in runs),
        "losses": runs[0]["losses"],
    }
    for count, per_token in counts.items():
        rate = per_token * tokens / seconds
        found[f"mfu_{count}_measured"] = rate / (1e12 * ceilings.tflops)
        found[f"mfu_{count}_datasheet"] = rate / peak if peak else None
    if row["name"] == "checkpointing" and CUDA:
        mode = contenders.checkpointing(row["contender"])
        train_config = TrainConfig(batch_size=point.batch_size, precision=point.precision)
        (wanted,) = (r for r in estimate(config, train_config, length, name) if r.checkpointing == mode)
        found["predicted_mb"] = wanted.total / 1e6
        found["predicted_ms"] = None if wanted.seconds_per_step is None else 1e3 * wanted.seconds_per_step
    return found


def parse(*, gpu: bool = CUDA) -> argparse.Namespace:
    parser = make_parser(__doc__, "--peer")
    parser.add_argument("--presets", default=["12M"], nargs="+", choices=SHAPES)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128])
    parser.add_argument("--contenders", nargs="+", help="default: ours and the peer, or plain-compiled")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=8)
    found = parser.parse_args()
    found.contenders = found.contenders or ["ours", "peer" if found.peer else "plain-compiled"]
    known = contenders.names(gpu=gpu, peer=bool(found.peer))
    unknown = set(found.contenders) - set(known)
    if unknown:
        parser.error(f"no contender {', '.join(sorted(unknown))} here; there are {', '.join(known)}")
    return found


def main() -> int:
    arguments = parse()
    same = {"dropout": arguments.dropout, "peer": arguments.peer}
    rows: list[Row] = []
    axes = (arguments.presets, arguments.precisions, arguments.batch_sizes, arguments.lengths)
    for preset, precision, batch_size, length in itertools.product(*axes):
        point = Point(preset=preset, precision=precision, batch_size=batch_size, length=length, **same)
        rows += compare(arguments.contenders, point, arguments.steps)
    return 1 if record.faults(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
