"""Where the GPU's time of a training step goes, kernel by kernel, and what was predicted of it.

    python -m benchmarks.workloads.step_profile [--traces DIR]

gpt2 in bf16, 16 x 1024, without dropout, as `fusedgpt train` runs it in a long run ("ours": a CUDA graph) and
neither compiled nor captured ("ours-eager"); "predicted" is `fusedgpt kernels report --step`. Each row has
    ms          of a step on the GPU's clock, with the profiler on
    idle_ms     during which nothing ran
    between_us  median microseconds from the end of a kernel to the start of the next
    kernels     name -> [launches, milliseconds] in a step, the longest first
--traces keeps step-CONTENDER.json.gz there, for Perfetto or chrome://tracing. The exit code is 1 if the
profiler saw nothing on the GPU.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from benchmarks.arguments import absolute, make_parser
from benchmarks.clock import CUDA
from benchmarks.report import record
from benchmarks.report.record import Row
from benchmarks.workloads import contenders
from fusedgpt.model.config import PRESETS

PRESET, BATCH_SIZE, LENGTH, PRECISION = "gpt2", 16, 1024, "bf16"  # what is predicted
WARM_UPS, STEPS = 5, 4
PREDICT = [sys.executable, "-m", "fusedgpt.train.cli.main", "kernels", "report", "--step", "--json"]
CONTENDERS = ("ours", "ours-eager", "predicted")
BASE = {"suite": "profile", "name": "step", "shape": f"{PRESET} {BATCH_SIZE} x {LENGTH}", "dtype": PRECISION}


class Work(NamedTuple):
    """Something that ran on the GPU; times in microseconds."""

    name: str
    start: float
    end: float


def measured(contender: str, traces: Path | None) -> Row:
    """The figures of one of ours, from STEPS steps under the profiler."""
    config = PRESETS[PRESET].model_copy(update={"dropout": 0.0})
    batch = contenders.tokens(BATCH_SIZE, LENGTH, config.vocab_size)
    _, step, _ = contenders.ours(contender, config, batch, PRECISION)
    for _ in range(WARM_UPS):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(STEPS):
            step()
        torch.cuda.synchronize()
    if traces:
        profiler.export_chrome_trace(str(traces / f"step-{contender}.json.gz"))
    return figures(
        [
            Work(event.name, event.time_range.start, event.time_range.end)
            for event in profiler.events() or ()
            if event.device_type == DeviceType.CUDA and not event.is_user_annotation
        ],
        STEPS,
    )


def figures(work: Iterable[Work], steps: int) -> Row:
    """The figures of a step, from the work of `steps` equal ones."""
    ordered = sorted(work, key=lambda one: one.start)
    if not ordered:
        return {"fault": "the profiler saw nothing on the GPU"}
    kernels: dict[str, list[float]] = {}
    busy, end = 0.0, ordered[0].start
    for one in ordered:
        busy += max(0.0, one.end - max(one.start, end))  # of several streams only once
        end = max(end, one.end)
        found = kernels.setdefault(one.name, [0, 0.0])
        found[0] += 1 / steps
        found[1] += (one.end - one.start) / steps / 1e3
    span = end - ordered[0].start
    return {
        "ms": span / steps / 1e3,
        "spread": None,
        "idle_ms": (span - busy) / steps / 1e3,
        "between_us": median(max(0.0, after.start - before.end) for before, after in pairwise(ordered)),
        "kernels": dict(sorted(kernels.items(), key=lambda item: -item[1][1])),
    }


def predicted() -> Row:
    """What the model of the hardware says of the step, in a process of its own: it acts as a GPU there."""
    done = subprocess.run(PREDICT, stdout=subprocess.PIPE, text=True, check=True)
    *parts, together = record.json_rows(done.stdout)
    kernels = {part["kernel"]: [part["launches"], part["milliseconds"]] for part in parts}
    return {"ms": together["milliseconds"], "spread": None, "kernels": kernels}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("--traces", type=absolute, metavar="DIR")
    traces = parser.parse_args().traces
    if not CUDA:
        parser.error("there is no CUDA GPU to profile")

    def work(name: str) -> list[Row]:
        found = predicted() if name == "predicted" else measured(name, traces)
        return [{**BASE, "contender": name, **found}]

    return record.emit_each("profile", {name: partial(work, name) for name in CONTENDERS})


if __name__ == "__main__":
    sys.exit(main())
