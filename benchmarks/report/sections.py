"""The sections of a report: what each says, tabulates and draws of the rows of a run."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import median

from benchmarks.report import record
from benchmarks.report.page import OURS, Bar, Cells, Section
from benchmarks.report.record import Row

Columns = Mapping[str, Callable[[Row], str]]
_NAMES = {
    "peer": "nanoGPT",
    "peer-cudnn": "nanoGPT-cudnn",
    "peer-kept-memory": "nanoGPT, our malloc settings",
    "plain-kept-memory": "plain, our malloc settings",
    "products": "matmuls and AdamW alone",
}

_PRODUCT = re.compile(r"gemm|nvjet|cutlass|splitK|aten\.\w*mm")  # kernels of cuBLAS, and what is predicted


def sections(rows: Sequence[Row], *, old: Sequence[Row] | None = None) -> list[Section]:
    """The whole report; `old` is a run to compare with."""
    rows = named(rows)
    every = [
        failures(rows),
        *([comparison(named(old), rows)] if old is not None else []),
        machine(rows),
        training(rows),
        table("First step, of all that start at once", of_suite(rows, "train", "first step"), FIRST_STEP),
        step_profile(rows),
        ablation(rows),
        table("Gradient checkpointing", of_suite(rows, "train", "checkpointing"), CHECKPOINTING),
        kernels(rows),
        table("Sampling, data, checkpoints, start-up", of_suite(rows, "everyday"), EVERYDAY),
        table("Whole jobs", of_suite(rows, "jobs"), JOBS),
        repeatability(rows),
    ]
    return [section for section in every if section.words or section.table or section.charts]


def named(rows: Iterable[Row]) -> list[Row]:
    """The rows with a peer under its name."""
    return [{**row, "contender": _NAMES.get(name := row.get("contender", ""), name)} for row in rows]


def of_suite(rows: Iterable[Row], suite: str, name: str = "") -> list[Row]:
    """The timed rows of a suite, or only those of that name."""
    return [row for row in record.timed(rows).values() if row["suite"] == suite and name in ("", row["name"])]


def table(title: str, rows: Iterable[Row], columns: Columns) -> Section:
    return Section(title=title, table=tabulate(rows, columns))


def tabulate(rows: Iterable[Row], columns: Columns) -> list[Cells]:
    return [{name: cell(row) for name, cell in columns.items()} for row in rows]


def number(x: float) -> str:
    """About three digits."""
    if x == 0:
        return "0"
    shown = f"{x:,.{max(0, 2 - math.floor(math.log10(abs(x))))}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def percent(x: float | None) -> str:
    return "" if x is None else f"{x:.1%}"


def duration(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    return f"{number(milliseconds)} ms" if milliseconds < 1e4 else f"{number(milliseconds / 1e3)} s"


def figure(name: str, unit: str = "") -> Callable[[Row], str]:
    """The column of a figure with about three digits and the row's unit; empty where there is none."""
    return lambda row: "" if row.get(name) is None else f"{number(row[name])} {row.get(unit, '')}".strip()


def words(*names: str) -> Callable[[Row], str]:
    """The column of these fields, as far as a row has them."""
    return lambda row: " ".join(filter(None, (row.get(name) for name in names)))


def with_interval(row: Row) -> str:
    """The median and its 95% interval, or half the spread where there is none."""
    if "interval" not in row:
        return f"{number(row['ms'])} ± {percent((row.get('spread') or 0) / 2)}"
    return f"{number(row['ms'])} ({' to '.join(map(number, row['interval']))})"


def ratio(row: Row, ours: Row) -> float:
    """How many times faster ours is: the median of runs side by side, so that a machine's drift cancels."""
    times = (found.get("runs_ms", [found["ms"]]) for found in (row, ours))
    return median(theirs / mine for theirs, mine in zip(*times, strict=False))  # one may have been cut short


def speed_up(row: Row) -> str:
    """How many times faster ours is, where that is known; empty for ours itself."""
    return f"{row['ratio']:.2f}x" if row.get("ratio") and row["contender"] != OURS else ""


def beside_ours(rows: Iterable[Row], *point: str) -> list[Row]:
    """The rows with their `ratio` to ours at the same point, None without; fastest first at each point."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in point), []).append(row)
    found: list[Row] = []
    for group in groups.values():
        ours = next((row for row in group if row["contender"] == OURS), None)
        compared = [{**row, "ratio": ours and ratio(row, ours)} for row in group]
        found += sorted(compared, key=lambda row: row["ms"])
    return found


what, step_name = words("name", "shape", "dtype", "contender"), words("shape", "dtype")


def failures(rows: Sequence[Row]) -> Section:
    """What has no speed because it is wrong, failed or did not fit."""
    faults, skipped = record.faults(rows), [row for row in rows if "skipped" in row]
    columns = {"what": what, "why": lambda row: row.get("fault") or row["skipped"]}
    return Section(
        title="Without a speed",
        words=[f"Failed: {len(faults)}."] if faults else [],
        table=tabulate([*faults, *skipped], columns),
    )


def comparison(old: Sequence[Row], rows: Sequence[Row]) -> Section:
    """Against an older run: what changed beyond the noise of both."""
    changes = record.compare(old, rows)
    beyond = [change for change in changes if change.verdict != "same"]
    slower = sum(change.verdict == "slower" for change in beyond)
    text = "The two runs have nothing in common."
    if changes:
        text = (
            f"Of {len(changes)} measurements in both runs, {slower} are slower and {len(beyond) - slower} "
            f"faster beyond the noise of both. The older run: commit {_commit(old)}, "
            f"{old[0].get('time', '')[:10]}."
        )
    cells = [
        {
            "what": " ".join(filter(None, change.key)),
            "before": duration(change.old_ms),
            "now": duration(change.new_ms),
            "change": f"{change.ratio - 1:+.1%}",
            "noise": percent(change.noise),
            "verdict": "REGRESSION" if change.is_regression else change.verdict,
        }
        for change in beyond
    ]
    return Section(title="Compared with the older run", words=[text], table=cells)


def _commit(rows: Sequence[Row]) -> str:
    found = rows[0].get("commit", "unknown") if rows else "unknown"
    return found[:10] + ("+" if found.endswith("+") else "")


def machine(rows: Sequence[Row]) -> Section:
    """Device, versions, and the ceilings at the start and the end."""
    first, last = rows[0], rows[-1]
    names = ("driver", "python", "torch", "triton")
    versions = [f"{name} {first[name]}" for name in names if first.get(name)]
    commit = _commit(rows)
    lines = [
        f"{first.get('device', 'unknown device')}. {', '.join(versions)}. Commit {commit}"
        f"{', with changes' if commit.endswith('+') else ''}. "
        f"{first.get('time', '')} to {last.get('time', '')}."
    ]
    state = {"clock_mhz": "clock (MHz)", "temperature_c": "temperature (C)", "load": "system load"}
    ranges = []
    for name, title in state.items():
        if values := [row[name] for row in rows if row.get(name) is not None]:
            ranges.append(f"{title} {number(min(values))} to {number(max(values))}")
    lines += [f"During the run: {', '.join(ranges)}."] if ranges else []
    cells = [
        {
            "ceiling": f"{dtype}, {when} of the run",
            "matmul": f"{number(row['tflops'])} TFLOP/s",
            "copy": f"{number(row['gbps'])} GB/s",
        }
        for dtype, found in ceilings(rows).items()
        for when, row in zip(("start", "end"), [found[0], *found[1:][-1:]], strict=False)
    ]
    return Section(title="Machine", words=lines, table=cells)


def ceilings(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By dtype, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["suite"] == "ceilings":
            found.setdefault(row["dtype"], []).append(row)
    return found


def repeatability(rows: Sequence[Row]) -> Section:
    """Which measurements differ between their two runs by more than the spread they state."""
    repeated = [row for row in record.timed(rows).values() if len(row.get("runs_ms", [])) > 1]
    apart = [row for row in repeated if not record.agrees(row)]
    text = (
        f"{len(repeated) - len(apart)} of {len(repeated)} measurements taken twice agree within the "
        f"spread they state (p80 - p20 of a run, at least {record.NOISE:.0%})."
    )
    columns = {
        "do not agree": what,
        "runs": lambda row: ", ".join(duration(x) for x in row["runs_ms"]),
        "apart": lambda row: percent(record.drift(row)),
        "stated": lambda row: percent(record.stated(row)),
    }
    cells = tabulate(apart, columns)
    for dtype, found in ceilings(rows).items():
        for name, unit in (("tflops", "TFLOP/s"), ("gbps", "GB/s")):
            first, last = found[0][name], found[-1][name]
            if abs(last / first - 1) > record.NOISE:
                texts = [f"{dtype} ceiling, start and end of the run"]
                texts += [f"{number(first)}, {number(last)} {unit}", percent(abs(last / first - 1))]
                cells.append(dict(zip(columns, [*texts, percent(record.NOISE)], strict=True)))
    return Section(title="Repeatability", words=[text] if repeated else [], table=cells)


TRAINING: Columns = {
    "step": step_name,
    "contender": words("contender"),
    "tok/s": lambda row: number(round(row["rate"])),
    "ms": with_interval,
    "ours faster": speed_up,
    "MFU, causal": lambda row: percent(row["mfu_causal_measured"]),
    "MFU, 6N+12LCT": lambda row: percent(row["mfu_palm_measured"]),
    "of datasheet": lambda row: " / ".join(
        percent(row[name]) for name in ("mfu_causal_datasheet", "mfu_palm_datasheet") if row.get(name)
    ),
    "gap": lambda row: f"{row['gap']:.2f}",
    "peak MB": lambda row: number(round(row["peak_mb"])),
    "first step": lambda row: f"{row['first_step_s']:.1f} s",
}


FIRST_STEP: Columns = {
    "step": step_name,
    "contender": words("contender"),
    "from launch": lambda row: duration(row["ms"]),
}


def training(rows: Sequence[Row]) -> Section:
    """Training steps of ours and its rivals."""
    found = beside_ours(of_suite(rows, "train", "step"), "shape", "dtype")
    bars = [
        Bar(f"{step_name(row)}, {row['contender']}", row["ratio"], speed_up(row))
        for row in found
        if speed_up(row) and row["contender"] != _NAMES["products"]
    ]
    text = (
        "MFU counts the FLOPs of the matmuls and of causal attention, or 6 N + 12 L C T per token, as a "
        "fraction of the measured matmul rate and of the datasheet's. The gap is the step's time over its "
        "floor: those FLOPs at the measured rate, then AdamW's bytes at the copy bandwidth. "
        "Matmuls and AdamW alone do nothing else of a step: a floor at the rates of its own shapes."
    )
    return Section(
        title="Training",
        words=[text] if found else [],
        charts={"Training: how many times faster ours is than": bars} if bars else {},
        table=tabulate(found, TRAINING),
    )


def step_profile(rows: Sequence[Row]) -> Section:
    """Where the GPU's time of a step goes, beside what was predicted."""
    titles = {OURS: "CUDA graph", "ours-eager": "eager", "predicted": "predicted"}
    found = {titles[row["contender"]]: row for row in of_suite(rows, "profile", "step")}
    times = {title: by_work(row, 1) for title, row in found.items()}
    nothing: Counter[str] = Counter()
    measured, predicted = (times.get(title, nothing) for title in ("CUDA graph", "predicted"))
    launches = by_work(found["CUDA graph"], 0) if measured else nothing
    cells = [
        {
            "kernel": work,
            "launches": number(launches[work]),
            "of the step": percent(measured[work] / found["CUDA graph"]["ms"]) if measured else "",
            **{f"{title}, ms": number(ms[work]) for title, ms in times.items()},
            "measured / predicted": f"{measured[work] / predicted[work]:.2f}"
            if measured[work] and predicted[work]
            else "",
        }
        for work in sorted({work for ms in times.values() for work in ms}, key=lambda work: -measured[work])
    ]
    words = [
        f"{title}: a step takes {number(row['ms'])} ms with the profiler on, idle for "
        f"{number(row['idle_ms'])} of them, {number(row['between_us'])} us between two kernels."
        for title, row in found.items()
        if "idle_ms" in row
    ]
    return Section(title="Where the time of a step goes", words=words, table=cells)


def by_work(row: Row, column: int) -> Counter[str]:
    """Launches (column 0) or milliseconds (1) of our kernels by name, matrix products and all others."""
    sums: Counter[str] = Counter()
    for name, figures in row["kernels"].items():
        ours = re.fullmatch(r"_(\w+)_kernel", name)
        sums[ours[1] if ours else "matrix products" if _PRODUCT.search(name) else "others"] += figures[column]
    return sums


def ablation(rows: Sequence[Row]) -> Section:
    """Ours, and the step's time with one fused op replaced by its reference."""
    charts: dict[str, list[Bar]] = {}
    measured = of_suite(rows, "train", "ablation")
    for ours in (row for row in measured if row["contender"] == OURS):
        point, ours_ms = step_name(ours), ours["ms"]
        bars = [Bar("ours, all fused", ours_ms, duration(ours_ms))]
        for row in measured:
            if row is ours or step_name(row) != point:
                continue
            lost, op = row["ms"] - ours_ms, row["contender"].removeprefix("ours-without-")
            change = f"{lost / ours_ms:+.1%}"
            note = f"{number(abs(lost))} ms {'more' if lost > 0 else 'less'}, {change}"
            bars.append(Bar(f"without {op}", lost, f"{note} ± {percent(record.noise(row))}", start=ours_ms))
        charts[f"One fused op undone at a time, {point}"] = bars
    return Section(title="Ablation", charts=charts)


KERNELS: Columns = {
    "op": words("name", "shape"),
    "contender": words("contender"),
    "ms": with_interval,
    "timed": lambda row: "with its launches" if row.get("driver") and row.get("captured") is False else "",
    "rate": figure("rate", "unit"),
    "of the ceiling": lambda row: percent(1 / row["gap"]),
    "floor, ms": figure("floor_ms"),
    "peak MB": figure("peak_mb"),
    "ours faster": speed_up,
}


def kernels(rows: Sequence[Row]) -> Section:
    """Every op and its rivals; bars for ours against the fastest rival, forward and backward together."""
    found = sorted(of_suite(rows, "kernels"), key=lambda row: (row["name"], row["shape"]))
    found = beside_ours(found, "name", "shape")
    on_gpu = bool(found and found[0].get("driver"))
    best: dict[str, Row] = {}
    for row in found if on_gpu else ():  # fastest first at each point
        whole = not row["name"].endswith(("forward", "backward")) or row["name"].startswith("decode")
        if whole and row["ratio"] and not row["contender"].startswith(OURS):
            best.setdefault(f"{row['name']} {row['shape']}", row)
    bars = [Bar(label, row["ratio"], f"{speed_up(row)} {row['contender']}") for label, row in best.items()]
    toy = ["Toy sizes on a CPU: every line runs, the times mean nothing."]
    return Section(
        title="Kernels",
        words=toy if found and not on_gpu else [],
        charts={"Kernels: how many times faster ours is than its fastest rival": bars} if bars else {},
        table=tabulate(found, KERNELS),
    )


CHECKPOINTING: Columns = {
    "step": step_name,
    "checkpointing": lambda row: row["contender"].removeprefix("ours-checkpointing-"),
    "peak MB": figure("peak_mb"),
    "predicted / measured": lambda row: (
        percent(row["predicted_mb"] / row["peak_mb"]) if row.get("predicted_mb") else ""
    ),
    "ms": with_interval,
    "predicted ms": figure("predicted_ms"),
}
EVERYDAY: Columns = {
    "what": words("name", "shape"),
    "contender": words("contender"),
    "time": lambda row: duration(row["ms"]),
    "rate": figure("rate", "unit"),
    "noise": lambda row: percent(record.noise(row)),
}
JOBS: Columns = {
    "job": words("name", "shape"),
    "contender": words("contender"),
    "launch to exit": lambda row: duration(row["ms"]),
    "training": lambda row: duration(row.get("train_ms")),
    "tok/s": figure("rate"),
    "best validation loss": lambda row: f"{row['val_loss']:.4f}" if row.get("val_loss") else "",
    "time to loss": lambda row: f"{row['goal']}: {duration(row['goal_ms'])}" if row.get("goal_ms") else "",
    "loss difference": lambda row: f"{row['loss_gap']:.4f}" if "loss_gap" in row else "",
}
