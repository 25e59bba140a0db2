"""A result is one row, a JSON object that is complete in itself: measuring, writing, reading, comparing rows.

    suite, name, shape, dtype, contender   what was measured; together the key by which runs are compared
    ms          median time of one call, step or job
    interval    [low, high], ms with 95% confidence; where there are 6 repetitions
    spread      p80 - p20 within a run as a fraction of ms: the noise; null if nothing was repeated in a run
    runs_ms     medians of the separate runs, two a round for each contender of a `contest` that ended
    fault       why there is no ms; `skipped` if that is no failure, e.g. out of memory
and where they apply
    rate, unit               work per second
    flops, bytes             of one call, counted by hand
    floor_ms, gap            their time at the ceilings of the run, and ms / floor_ms
    captured                 whether a kernel was timed as a CUDA graph, see clock.py
    peak_mb, predicted_mb    memory, and what `fusedgpt train --estimate` predicts
    train_ms, val_loss, goal, goal_ms, loss_gap    of a job, see workloads/jobs.py
    curve                                          of a training, see workloads/optimizers.py
    idle_ms, between_us, kernels                   of a profile, see workloads/step_profile.py
`stamp` adds the machine, its clocks, the versions and the commit.
Suites: ceilings, kernels, train, profile, everyday, jobs, optimizers.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[2]
KEY = ("suite", "name", "shape", "dtype", "contender")
NOISE = 0.03  # two runs are never assumed to agree better than this
UNKNOWN_NOISE = 0.2  # of what was measured once
_STATE_SECONDS = 10  # how old clocks and temperature may be
_GPU_FIELDS = {"clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem", "temperature_c": "temperature.gpu"}
Row = dict[str, Any]
Key = tuple[str, ...]


def summary(runs: Sequence[Sequence[float]]) -> Row:
    """ms, interval, spread and runs_ms from the milliseconds of one or more runs."""
    parts = [np.percentile(run, [20, 50, 80]).tolist() for run in runs]
    repeated, every = any(len(run) > 1 for run in runs), [x for run in runs for x in run]
    found: Row = {"ms": float(np.percentile(every, 50))}
    if interval := median_interval(every):
        found["interval"] = interval
    found["spread"] = round(max((p80 - p20) / p50 for p20, p50, p80 in parts), 4) if repeated else None
    return found | ({"runs_ms": [p50 for _, p50, _ in parts]} if len(runs) > 1 else {})


def median_interval(sample: Sequence[float]) -> list[float]:
    """[low, high]: the median with 95% confidence, by order statistics; [] for fewer than 6 values."""
    n, ordered = len(sample), sorted(sample)
    below = itertools.accumulate(math.comb(n, k) / 2**n for k in range(n))  # P(at most k values are less)
    left_out = sum(probability <= 0.025 for probability in below)  # at either end, and one more is the bound
    return [ordered[left_out - 1], ordered[n - left_out]] if left_out else []


def contest(
    base: Row,
    contenders: Iterable[str],
    run: Callable[[str], Row],
    figures: Callable[[Row, list[Row]], Row] = lambda row, runs: {},
    rounds: int = 1,
) -> list[Row]:
    """Run every contender twice a round, in the order A B C C B A; the last row of each.

    A row is emitted after each run, of all runs so far: whatever is cut short leaves figures.

    base: what the rows have in common. run(contender): {"times": [milliseconds, ...], ...}, or {"fault": why}
    or {"skipped": why}, after which that contender is not run again. figures(row, runs): what to add to a row
    that has a time.
    """
    contenders = list(contenders)
    runs: dict[str, list[Row]] = {name: [] for name in contenders}
    rows: dict[str, Row] = {}
    for name in [*contenders, *reversed(contenders)] * rounds:
        mine = runs[name]
        if mine and "times" not in mine[0]:
            continue
        mine.append(run(name))
        row = {**base, "contender": name}
        if "times" in mine[-1]:
            row |= summary([found["times"] for found in mine])
            rows[name] = row | figures(row, mine)
        else:
            rows[name] = row | mine[-1]
        emit(rows[name])
    return list(rows.values())


@functools.cache
def machine() -> Row:
    """What does not change during a run; a + after the commit: tracked files differ from it."""
    import torch

    cpu = next(iter(_cpu_lines("model name")), platform.processor() or platform.machine())
    cpu += f", {len(os.sched_getaffinity(0))} cores, {torch.backends.cpu.get_cpu_capability()}"
    git = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+"]
    return {
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else cpu,
        "driver": gpu_state().get("driver_version"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": next((found.version for found in distributions(name="triton")), None),
        "commit": os.environ.get("COMMIT") or _output(git) or "unknown",
    }


def _output(command: list[str]) -> str:
    """What the command prints; empty if it is not there, fails or hangs."""
    with suppress(OSError, subprocess.SubprocessError):
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()
    return ""


def _cpu_lines(field: str) -> list[str]:
    """The values of `field` in /proc/cpuinfo, one for each core."""
    with suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]
    return []


def gpu_state() -> dict[str, str]:
    """Clocks, temperature, power and so on from nvidia-smi; {} without it."""
    names = "name,driver_version,pstate,clocks.sm,clocks.mem,temperature.gpu,power.draw,memory.used"
    text = _output(["nvidia-smi", f"--query-gpu={names}", "--format=csv,noheader"])
    return dict(zip(names.split(","), text.splitlines()[0].split(", "), strict=False)) if text else {}


@functools.lru_cache(maxsize=1)
def _state(moment: int) -> Row:
    """Clock in MHz, temperature in Celsius (GPU only), load (CPU only); cached by `moment`."""
    if gpu := gpu_state():
        numbers = {name: gpu[field].split()[0] for name, field in _GPU_FIELDS.items() if field in gpu}
        return {name: float(x) for name, x in numbers.items() if x.replace(".", "").isdigit()}
    clocks = [float(x) for x in _cpu_lines("cpu MHz")]
    return {"clock_mhz": round(max(clocks, default=0.0)) or None, "load": round(os.getloadavg()[0], 2)}


def stamp(row: Row) -> Row:
    """`row` with the machine and its state."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**row, **machine(), **_state(int(time.monotonic() / _STATE_SECONDS)), "time": moment}


def emit(row: Row) -> None:
    """Print the stamped row as a line of JSON, at once."""
    print(json.dumps(stamp(row)), flush=True)


def emit_each(suite: str, works: Mapping[str, Callable[[], Iterable[Row]]]) -> int:
    """Print the rows of each work, or a fault if it raises; the exit code, 1 if there is a fault."""
    code = 0
    for name, work in works.items():
        try:
            for row in work():
                emit(row)
                code |= "fault" in row
        except Exception as error:  # the others are still worth measuring
            emit({"suite": suite, "name": name, "contender": "ours", "fault": text(error)})
            code = 1
    return code


def text(error: Exception) -> str:
    """The error as one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def json_rows(lines: str) -> list[Row]:
    """The JSON objects among the lines, also those in lists; other lines are left out."""
    rows: list[Row] = []
    for line in lines.splitlines():
        with suppress(ValueError):
            found = json.loads(line) if line.startswith(("{", "[")) else []
            rows += [row for row in (found if isinstance(found, list) else [found]) if isinstance(row, dict)]
    return rows


def read(path: Path) -> list[Row]:
    """The results in a file of JSON lines; a line that was cut short is left out."""
    return [row for row in json_rows(path.read_text()) if "suite" in row]


def timed(rows: Iterable[Row]) -> dict[Key, Row]:
    """The last row of each key, of those with a time."""
    last = {tuple(str(row.get(name, "")) for name in KEY): row for row in rows}
    return {key: row for key, row in last.items() if row.get("ms")}


def faults(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "fault" in row]


def drift(row: Row) -> float:
    """How far apart the row's own runs are, as a fraction of ms."""
    runs = row.get("runs_ms", [row["ms"]])
    return (max(runs) - min(runs)) / float(row["ms"])


def stated(row: Row) -> float:
    """The spread that the row states, never less than NOISE."""
    spread = row.get("spread")
    return UNKNOWN_NOISE if spread is None else max(NOISE, float(spread))


def agrees(row: Row) -> bool:
    """Whether the row's own runs agree within the spread it states."""
    return drift(row) <= stated(row)


def noise(row: Row) -> float:
    """The fraction of ms within which another run of the same should lie."""
    return max(stated(row), drift(row))


@dataclass(frozen=True, kw_only=True)
class Change:
    """One key in two runs."""

    key: Key
    old_ms: float
    new_ms: float
    noise: float

    @property
    def ratio(self) -> float:
        return self.new_ms / self.old_ms

    @property
    def verdict(self) -> str:
        """ "slower" or "faster" beyond the noise of both runs, else "same"."""
        if abs(self.ratio - 1.0) <= self.noise:
            return "same"
        return "slower" if self.ratio > 1.0 else "faster"

    @property
    def is_regression(self) -> bool:
        """Whether ours became slower; a rival that did says something about the machine, or the rival."""
        return self.verdict == "slower" and self.key[-1].startswith("ours")


def compare(old: Iterable[Row], new: Iterable[Row]) -> list[Change]:
    """What both runs measured, slowest change first; the noise is the greater of the two."""
    before, after = timed(old), timed(new)
    pairs = {key: (before[key], after[key]) for key in after if key in before}
    changes = [
        Change(key=key, old_ms=a["ms"], new_ms=b["ms"], noise=max(noise(a), noise(b)))
        for key, (a, b) in pairs.items()
    ]
    return sorted(changes, key=lambda change: -change.ratio)
