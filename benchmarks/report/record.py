"""A result as one JSON object that is complete in itself: writing, reading and comparing such rows.

    suite, name, shape, dtype, contender   what was measured; together the key by which runs are compared
    ms          the median time of one call, step or job; less is better
    spread      the noise the row states of itself: p80 - p20 of what it is the median of, as a share of ms;
                null where nothing was repeated within a run
    runs_ms     the medians of its separate runs, two where the order was A B B A
    fault       instead of ms, why there is no speed; `skipped`, where that is nobody's fault
and where they apply
    rate, unit               work a second
    flops, bytes             counted, of one call
    floor_ms, gap            the time they take at the ceilings of the run, and ms / floor_ms
    peak_mb                  memory
    predicted_mb, predicted_ms               what --estimate says of a step
    train_ms, val_loss, goal, goal_ms, loss_gap    of a job, see jobs.py
`stamp` adds the machine, its state, the versions and the commit.
Suites: ceilings, kernels, train, everyday, jobs, memory.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from benchmarks.report.runner import gpu_state

ROOT = Path(__file__).parents[2]
KEY = ("suite", "name", "shape", "dtype", "contender")
NOISE = 0.03  # no two runs are taken to agree better than this
UNKNOWN_NOISE = 0.2  # of what was measured once
_STATE_SECONDS = 10.0  # how old clocks and temperature may be
Row = dict[str, Any]
Key = tuple[str, ...]


def percentiles(times: Sequence[float]) -> tuple[float, float, float]:
    """(p20, median, p80)."""
    ordered = sorted(times)
    last = len(ordered) - 1
    p20, median, p80 = (ordered[round(share * last)] for share in (0.2, 0.5, 0.8))
    return p20, median if len(ordered) % 2 else (ordered[last // 2] + ordered[last // 2 + 1]) / 2, p80


def summary(runs: Sequence[Sequence[float]]) -> Row:
    """ms, spread and runs_ms of the milliseconds of one or more runs."""
    parts = [percentiles(run) for run in runs]
    _, ms, _ = percentiles([x for run in runs for x in run])
    spread = max((p80 - p20) / median for p20, median, p80 in parts)
    alone = all(len(run) == 1 for run in runs)
    found = {"ms": ms, "spread": None if alone else round(spread, 4)}
    return found | ({"runs_ms": [median for _, median, _ in parts]} if len(parts) > 1 else {})


def floor(ms: float, *, flops: float = 0.0, bytes_: float = 0.0, tflops: float, gbps: float) -> Row:
    """floor_ms and gap of a call whose arithmetic and memory traffic may overlap."""
    least = max(flops / tflops * 1e-9, bytes_ / gbps * 1e-6)
    counted = {"flops": flops or None, "bytes": bytes_ or None}
    return counted | ({"floor_ms": least, "gap": ms / least} if least else {})


def commit() -> str:
    """HEAD's hash, with a + if tracked files differ from it; $COMMIT where there is no repository."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        changed = "+" if head and git("status", "--porcelain", "--untracked-files=no") else ""
    except OSError:
        head = changed = ""
    return os.environ.get("COMMIT") or head + changed or "unknown"


@functools.cache
def machine() -> Row:
    """What does not change during a run."""
    import torch

    state, cores = gpu_state(), len(os.sched_getaffinity(0))
    on_gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if on_gpu else f"{_cpu_name()}, {cores} cores",
        "driver": state.get("driver_version"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "commit": commit(),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu_lines(field: str) -> list[str]:
    """The values of `field` in /proc/cpuinfo, one a core."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(field)]


def _cpu_name() -> str:
    return next(iter(_cpu_lines("model name")), platform.processor() or platform.machine())


@functools.lru_cache(maxsize=1)
def _state(moment: int) -> Row:
    """Clock in MHz, temperature in Celsius (GPUs only), load (CPU only); cached by `moment`."""
    gpu = gpu_state()
    if gpu:
        numbers = {name: gpu[field].split()[0] for name, field in _GPU_FIELDS.items() if field in gpu}
        return {name: float(x) for name, x in numbers.items() if x.replace(".", "").isdigit()}
    clocks = [float(x) for x in _cpu_lines("cpu MHz")]
    return {"clock_mhz": round(max(clocks, default=0.0)) or None, "load": round(os.getloadavg()[0], 2)}


_GPU_FIELDS = {"clock_mhz": "clocks.sm", "memory_clock_mhz": "clocks.mem", "temperature_c": "temperature.gpu"}


def stamp(row: Row) -> Row:
    """`row` with the machine and its state."""
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    return {**row, **machine(), **_state(int(time.monotonic() / _STATE_SECONDS)), "time": moment}


def emit(row: Row) -> None:
    """Print the stamped row as a line of JSON, at once."""
    print(json.dumps(stamp(row)), flush=True)


def emit_each(suite: str, works: Mapping[str, Callable[[], Iterable[Row]]]) -> int:
    """Print the rows of each work, a fault for one that raises; the exit code, 1 if there is a fault."""
    code = 0
    for name, work in works.items():
        try:
            for row in work():
                emit(row)
                code |= "fault" in row
        except Exception as error:  # the others are still worth measuring
            fault = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            emit({"suite": suite, "name": name, "contender": "ours", "fault": fault})
            code = 1
    return code


def read(path: Path) -> list[Row]:
    """The results in a file of JSON lines; other lines, such as one cut short, are left out."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "suite" in row:
            rows.append(row)
    return rows


def key(row: Row) -> Key:
    return tuple(str(row.get(name, "")) for name in KEY)


def timed(rows: Iterable[Row]) -> dict[Key, Row]:
    """The rows with a time, the last of each key."""
    return {key(row): row for row in rows if row.get("ms")}


def faults(rows: Iterable[Row]) -> list[Row]:
    return [row for row in rows if "fault" in row]


def drift(row: Row) -> float:
    """How far apart the row's own runs are, as a share of ms."""
    runs = row.get("runs_ms", [row["ms"]])
    return (max(runs) - min(runs)) / float(row["ms"])


def noise(row: Row) -> float:
    """The share of ms within which another run of the same should lie."""
    return max(stated(row), drift(row))


def agrees(row: Row) -> bool:
    """Whether the row's own runs agree within the spread it states."""
    return drift(row) <= stated(row)


def stated(row: Row) -> float:
    """The spread that the row states, never less than NOISE."""
    spread = row.get("spread")
    return UNKNOWN_NOISE if spread is None else max(NOISE, float(spread))


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
        """ "slower" or "faster" beyond the noise of both, else "same"."""
        if abs(self.ratio - 1.0) <= self.noise:
            return "same"
        return "slower" if self.ratio > 1.0 else "faster"

    @property
    def is_regression(self) -> bool:
        """Whether it is ours that is slower; a rival's pace is the machine's, or its own."""
        return self.verdict == "slower" and self.key[-1].startswith("ours")


def compare(old: Iterable[Row], new: Iterable[Row]) -> list[Change]:
    """What both runs measured, slowest change first; the noise is the greater of the two."""
    before, after = timed(old), timed(new)
    changes = [
        Change(
            key=k,
            old_ms=before[k]["ms"],
            new_ms=after[k]["ms"],
            noise=max(noise(before[k]), noise(after[k])),
        )
        for k in after
        if k in before
    ]
    return sorted(changes, key=lambda change: -change.ratio)
