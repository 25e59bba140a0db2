"""Training steps of ours and its rivals, and what each fused op and checkpointing change.

    python -m benchmarks.workloads.training_step [--peer NANOGPT] [--presets 12M] [--batch-sizes 2 16]
        [--lengths 128] [--contenders ours plain-compiled ours-without-linear ...] [--rounds 4]

contenders.py says who they are. Each is a process of its own. They start and compile, all at once on a GPU,
then take turns in the order A B C C B A, --rounds times; --steps 0 ends before that, with the times to the
first step. Tokens are Zipf-distributed. A contender gets no speed unless its losses without dropout, before
and after the first steps, are those of eager plain PyTorch, and the steps that are timed lower the loss; else
the exit code is 1. `products` has no loss: its time is the floor of whoever multiplies with PyTorch.

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
import sys

import torch
from torch.nn.attention import SDPBackend

from benchmarks.arguments import make_parser
from benchmarks.ceilings import DTYPES, Ceilings, default_precisions, measure_ceilings
from benchmarks.clock import CUDA, DEVICE
from benchmarks.report import record
from benchmarks.report.record import Row
from benchmarks.workloads import contenders
from benchmarks.workloads.entrant import SHAPES, Entrant, Point, wait_for
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.tools.estimate import estimate, flops_per_token, peak_flops

ADAMW_BYTES = 32  # per parameter, see kernels/test_bench_adamw.py


def judged(row: Row, truth: Row, precision: str) -> Row:
    """A contender's row of the gate, with its time to the first step; a fault if its losses are wrong."""
    if "losses" not in row:
        return row
    has_none = row["losses"] == [None, None]  # products
    gap = 0.0 if has_none else max(abs(a - b) for a, b in zip(row["losses"], truth["losses"], strict=True))
    if gap <= contenders.LOSS_TOLERANCE[precision]:  # False for NaN
        return {**row, "ms": 1e3 * row["first_step_s"]}
    shown = [", ".join(f"{x:.4f}" for x in found["losses"]) for found in (row, truth)]
    return {"fault": f"no speed: losses {shown[0]}, of plain PyTorch {shown[1]}"}


def compare(names: list[str], point: Point, steps: int, rounds: int = 1) -> list[Row]:
    """All contenders at one point; without steps, how long the first one takes to come."""
    kinds = {"ablation": "-without-", "checkpointing": "-checkpointing-"}
    kind = next((kind for kind, sign in kinds.items() if any(sign in name for name in names)), "step")
    base = {
        "suite": "train",
        "name": kind if steps else "first step",
        "shape": f"{point.preset} {point.batch_size} x {point.length}",
        "dtype": point.precision,
        **{name: getattr(point, name) for name in ("preset", "batch_size", "length", "dropout")},
    }
    same, entrants = doubles(names), dict[str, Entrant]()
    gates = {name: {"skipped": f"as {twin}: PyTorch chooses cuDNN itself"} for name, twin in same.items()}
    with contextlib.ExitStack() as stack:

        def enter(name: str) -> None:
            entrants[name] = stack.enter_context(contextlib.closing(Entrant(name, point)))

        for name in dict.fromkeys([*names, "plain"]):
            if name not in same:
                enter(name)
        truth = entrants["plain"].answer()
        gates["plain"] = judged(truth, truth, point.precision)
        if "losses" not in gates["plain"]:
            names, steps = ["plain"], 0

        def run(contender: str) -> Row:
            if contender not in gates:
                gates[contender] = judged(entrants[contender].answer(), truth, point.precision)
            if steps and "skipped" in gates[contender] and contender not in same:
                enter(contender)  # again: it had too little memory while all were starting
                gates[contender] = judged(entrants[contender].answer(), truth, point.precision)
            if not steps or "losses" not in gates[contender]:
                return gates[contender]
            found = entrants[contender].time(steps)
            return {**gates[contender], **found} if "times" in found else found

        if not steps:
            rows = []
            for name in names:
                rows.append({**base, "contender": name, **run(name)})
                record.emit(rows[-1])
            return rows
        wait_for(entrant for name, entrant in entrants.items() if name not in gates)
        ceilings = measure_ceilings(DTYPES[point.precision])
        torch.cuda.empty_cache()  # for the contenders
        return record.contest(base, names, run, lambda row, runs: figures(row, runs, point, ceilings), rounds)


def doubles(names: list[str]) -> dict[str, str]:
    """Contender -> the other one that is the same here, since PyTorch chooses cuDNN's attention by itself."""
    twins = {"plain-cudnn": "plain-compiled", "peer-cudnn": "peer"}
    found = {name: twin for name, twin in twins.items() if name in names and twin in names}
    if not (CUDA and found):
        return {}
    q = torch.empty(1, 1, 1024, 64, dtype=torch.bfloat16, device=DEVICE, requires_grad=True)
    choice = torch._fused_sdp_choice(q, q, q, is_causal=True)
    return found if choice == SDPBackend.CUDNN_ATTENTION.value else {}


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
    parser.add_argument("--precisions", nargs="+", default=default_precisions(), choices=DTYPES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128])
    parser.add_argument("--contenders", nargs="+", help="default: ours and the peer, or plain-compiled")
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=1, help="several where the machine's speed drifts")
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
        rows += compare(arguments.contenders, point, arguments.steps, arguments.rounds)
    return 1 if record.faults(rows) else 0


if __name__ == "__main__":
    sys.exit(main())
