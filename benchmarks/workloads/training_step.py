"""Training steps of ours beside its rivals, and what each fused op brings.

    python benchmarks/train.py [--peer NANOGPT] [--presets 12M] [--batch-sizes 2 16] [--lengths 128]
                               [--contenders ours plain-compiled ours-without-linear ...] [--data FILE.bin]

contenders.py says who they are. Each measurement is a process of its own (ours changes its allocator's
settings for good), in the order A B C C B A; both runs of a contender make one row, printed when it is
known. Tokens are Zipf-distributed, or the first of a .bin of uint16. No speed is printed for a contender
whose losses, before and after GATE_STEPS steps without dropout, are not those of eager plain PyTorch; the
exit code is then 1.

MFU is given for two counts of FLOPs a token, 6 N + 12 L C T (PaLM's and nanoGPT's) and 6 M + 6 L C T (what
the matmuls and causal attention need, M their weights and the head's), as shares of the datasheet's rate and
of the matmul rate measured here. The floor of a step is the second count at that rate and AdamW's bytes at
the copy bandwidth, one after the other; the gap is how many times longer a step takes.

On a GPU steps are timed between events and nothing waits for the device. Peak memory is torch's there, the
whole process's on a CPU. The time to the first step counts from the launch of the process.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.ceilings import DTYPES, Ceilings, measure_ceilings
from benchmarks.report import record
from benchmarks.workloads import contenders
from fusedgpt.model.config import PRESETS, GPTConfig
from fusedgpt.train.tools.estimate import flops_per_token, peak_flops

TOY = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)
SHAPES = {**PRESETS, "toy": TOY}
GATE_STEPS = 3
ADAMW_BYTES = 32  # a parameter, see test_bench_adamw.py


def measure(contender: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One contender, in this process: losses, seconds of each step and to the first, peak memory."""
    torch.set_num_threads(arguments.threads)
    (batch_size,), (length,), (preset,) = arguments.batch_sizes, arguments.lengths, arguments.presets
    config = SHAPES[preset].model_copy(
        update={"dropout": arguments.dropout, "block_size": max(length, SHAPES[preset].block_size)}
    )
    ids = contenders.tokens(batch_size, length, config.vocab_size, arguments.data)
    inputs, targets = (x.to(arguments.device) for x in ids)
    backends = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
    backend = backends.get(contender.rpartition("-")[2])
    with sdpa_kernel(backend) if backend else contextlib.nullcontext():
        loss, step, model = contenders.build(
            contender, config, (inputs, targets), arguments.precisions[0], arguments.peer
        )
        model.train(arguments.dropout == 0.0)  # the losses of the gate are without
        losses, first_step_s = gate(loss, step, arguments)
        model.train()
        seconds = contenders.step_seconds(step, arguments.steps, arguments.device) if arguments.steps else []
    return {"losses": losses, "seconds": seconds, "first_step_s": first_step_s, "peak_mb": peak_mb()}


def gate(
    loss: Callable[[], Tensor], step: Callable[[], object], arguments: argparse.Namespace
) -> tuple[list[float], float]:
    """The losses before and after GATE_STEPS steps, and the seconds from launch to the end of the first."""

    def current() -> float:
        with torch.no_grad():
            return float(loss())

    start = time.time()
    losses, lost = [current()], time.time() - start
    step()
    if arguments.device == "cuda":
        torch.cuda.synchronize()
    first_step_s = time.time() - arguments.began - lost
    for _ in range(GATE_STEPS - 1):
        step()
    return [*losses, current()], first_step_s


def peak_mb() -> float:
    """The most memory this process has had: torch's on a GPU, else all of it."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def run(contender: str, arguments: argparse.Namespace, point: list[str], steps: int) -> dict[str, Any]:
    """`measure` in a process of its own; {"fault": ...} or {"skipped": ...} where that fails."""
    command = [sys.executable, "-m", __spec__.name, "--contender", contender, "--steps", str(steps), *point]
    command += ["--device", arguments.device, "--threads", str(arguments.threads)]
    command += ["--dropout", str(arguments.dropout), "--began", str(time.time())]
    command += ["--peer", str(arguments.peer)] if arguments.peer else []
    command += ["--data", str(arguments.data)] if arguments.data else []
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
        return found
    sys.stderr.write(done.stderr)
    said = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    return {"skipped" if "OutOfMemoryError" in said else "fault": said[:300]}


def different(losses: list[float], expected: list[float], precision: str) -> str:
    """What is wrong with a contender's losses; empty if nothing."""
    gap = max(abs(a - b) for a, b in zip(losses, expected, strict=True))
    if gap <= contenders.LOSS_TOLERANCE[precision]:  # False for NaN
        return ""
    shown = [", ".join(f"{x:.4f}" for x in values) for values in (losses, expected)]
    return f"losses {shown[0]}, of plain PyTorch {shown[1]}"


def compare(
    arguments: argparse.Namespace, preset: str, precision: str, batch_size: int, length: int
) -> list[dict[str, Any]]:
    """All contenders at one point, in the order A B C C B A; prints a row for each as soon as it is known."""
    point = ["--presets", preset, "--precisions", precision, "--batch-sizes", str(batch_size)]
    point += ["--lengths", str(length)]
    ablation = any("-without-" in contender for contender in arguments.contenders)
    base = {
        "suite": "train",
        "name": "ablation" if ablation else "step",
        "shape": f"{preset} {batch_size} x {length}",
        "dtype": precision,
    }
    base |= {"preset": preset, "batch_size": batch_size, "length": length, "dropout": arguments.dropout}
    truth = run("plain", arguments, point, steps=0)
    if "losses" not in truth:
        rows = [{**base, "contender": "plain", **truth}]
        record.emit(rows[0])
        return rows
    ceilings = measure_ceilings(DTYPES[precision])
    torch.cuda.empty_cache()  # for the processes to come
    runs: dict[str, list[dict[str, Any]]] = {}
    rows = []
    for contender in (*arguments.contenders, *reversed(arguments.contenders)):
        before = runs.setdefault(contender, [])
        if any("losses" not in found for found in before):
            continue
        found = run(contender, arguments, point, arguments.steps)
        wrong = different(found["losses"], truth["losses"], precision) if "losses" in found else ""
        before.append({"fault": f"no speed: {wrong}"} if wrong else found)
        if len(before) == 2 or "losses" not in before[-1]:
            row = {**base, "contender": contender}
            row |= figures(before, row, ceilings) if "losses" in before[-1] else before[-1]
            record.emit(row)
            rows.append(row)
    return rows


def figures(runs: list[dict[str, Any]], base: dict[str, Any], ceilings: Ceilings) -> dict[str, Any]:
    """What the runs of one contender come to."""
    row = record.summary([[1e3 * s for s in run["seconds"]] for run in runs])
    config, length = SHAPES[base["preset"]], base["length"]
    tokens_a_step, seconds = base["batch_size"] * length, 1e-3 * row["ms"]
    weights = 12 * config.n_layer * config.n_embd**2 + config.vocab_size * config.n_embd
    palm = flops_per_token(config, length)
    causal = 6.0 * weights + 6.0 * config.n_layer * config.n_embd * length
    bf16_peak = peak_flops(torch.cuda.get_device_name()) if torch.cuda.is_available() else 0.0
    peak = bf16_peak if base["dtype"] == "bf16" else 0.0
    for name, flops in (("palm", palm), ("causal", causal)):
        rate = flops * tokens_a_step / seconds
        row[f"mfu_{name}_measured"] = rate / (1e12 * ceilings.tflops)
        row[f"mfu_{name}_datasheet"] = rate / peak if peak else None
    flops, bytes_ = causal * tokens_a_step, ADAMW_BYTES * config.parameter_counts()[0]
    least = flops / ceilings.tflops * 1e-9 + bytes_ / ceilings.gbps * 1e-6
    return row | {
        "rate": tokens_a_step / seconds,
        "unit": "tok/s",
        "flops": flops,
        "bytes": bytes_,
        "floor_ms": least,
        "gap": row["ms"] / least,
        "peak_mb": max(run["peak_mb"] for run in runs),
        "first_step_s": min(run["first_step_s"] for run in runs),
        "losses": runs[0]["losses"],
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--peer", type=Path, help="a checkout of karpathy/nanoGPT")
    parser.add_argument("--presets", default=["12M"], nargs="+", choices=SHAPES)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[2, 16])
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=DTYPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128])
    parser.add_argument("--contenders", nargs="+", help="default: ours and the peer, or plain-compiled")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--data", type=Path, help="uint16 token ids; default: Zipf-distributed")
    parser.add_argument("--device", default=device, choices=["cpu", "cuda"])
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--contender", help=argparse.SUPPRESS)  # a child's
    parser.add_argument("--began", type=float, default=time.time(), help=argparse.SUPPRESS)
    found = parser.parse_args()
    found.contenders = found.contenders or ["ours", "peer" if found.peer else "plain-compiled"]
    known = contenders.names(found.device, peer=bool(found.peer))
    unknown = set(found.contenders) - set(known)
    if unknown:
        parser.error(f"no contender {', '.join(sorted(unknown))} here; there are {', '.join(known)}")
    return found


def main() -> int:
    arguments = parse()
    if arguments.contender:
        print(json.dumps(measure(arguments.contender, arguments)))
        return 0
    axes = (arguments.presets, arguments.precisions, arguments.batch_sizes, arguments.lengths)
    rows = [row for point in itertools.product(*axes) for row in compare(arguments, *point)]
    return 1 if record.faults(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
