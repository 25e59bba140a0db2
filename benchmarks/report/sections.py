"""The sections of a report: what each says, tabulates and draws of the rows of a run."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from benchmarks.report import record
from benchmarks.report.charts import Bar, Bars, Plot, Series, number
from benchmarks.report.record import Row

Cells = dict[str, str]  # column -> text
Columns = Mapping[str, Callable[[Row], str]]
OURS = "ours"
_NAMES = {"peer": "nanoGPT", "peer-cudnn": "nanoGPT-cudnn"}


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is under it."""

    title: str
    words: Sequence[str] = ()
    charts: Sequence[Bars | Plot] = ()
    table: Sequence[Cells] = ()


def sections(rows: Sequence[Row], *, old: Sequence[Row] | None = None) -> list[Section]:
    """The whole report; `old` is a run to compare with."""
    rows = named(rows)
    every = [
        failures(rows),
        *([comparison(named(old), rows)] if old is not None else []),
        machine(rows),
        repeatability(rows),
        training(rows),
        ablation(rows),
        checkpointing(rows),
        kernels(rows),
        everyday(rows),
        jobs(rows),
    ]
    return [section for section in every if section.words or section.table or section.charts]


def named(rows: Iterable[Row]) -> list[Row]:
    """The rows with a peer under its name."""
    return [{**row, "contender": _NAMES.get(name := row.get("contender", ""), name)} for row in rows]


def tabulate(rows: Iterable[Row], columns: Columns) -> list[Cells]:
    return [{name: cell(row) for name, cell in columns.items()} for row in rows]


def percent(x: float | None) -> str:
    return "" if x is None else f"{x:.1%}"


def duration(milliseconds: float | None) -> str:
    if milliseconds is None:
        return ""
    return f"{number(milliseconds)} ms" if milliseconds < 1e4 else f"{number(milliseconds / 1e3)} s"


def figure(row: Row, name: str, unit: str = "") -> str:
    """A figure of the row with about three digits; empty if it has none."""
    return "" if row.get(name) is None else f"{number(row[name])} {row.get(unit, unit)}".strip()


def what(row: Row) -> str:
    return " ".join(filter(None, [row.get("name"), row.get("shape"), row.get("dtype"), row.get("contender")]))


def with_spread(row: Row) -> str:
    return f"{number(row['ms'])} ± {percent((row.get('spread') or 0) / 2)}"


def speed_up(row: Row) -> str:
    """How many times faster ours is, where `ours_ms` is known; empty for ours itself."""
    return f"{row['ms'] / row['ours_ms']:.2f}x" if row.get("ours_ms") and row["contender"] != OURS else ""


def step_name(row: Row) -> str:
    return f"{row['shape']} {row['dtype']}"


def of_suite(rows: Sequence[Row], suite: str) -> list[Row]:
    return [row for row in record.timed(rows).values() if row["suite"] == suite]


def failures(rows: Sequence[Row]) -> Section:
    """What has no speed because it is wrong, failed or did not fit."""
    faults, skipped = record.faults(rows), [row for row in rows if "skipped" in row]
    words = [f"Failed: {len(faults)}."] if faults else []
    columns = {"what": what, "why": lambda row: row.get("fault") or row["skipped"]}
    return Section(title="Without a speed", words=words, table=tabulate([*faults, *skipped], columns))


def comparison(old: Sequence[Row], rows: Sequence[Row]) -> Section:
    """Against an older run: what changed beyond the noise of both."""
    changes = record.compare(old, rows)
    beyond = [change for change in changes if change.verdict != "same"]
    slower = sum(change.verdict == "slower" for change in beyond)
    words = "The two runs have nothing in common."
    if changes:
        words = (
            f"Of {len(changes)} measurements in both runs, {slower} are slower and {len(beyond) - slower} "
            f"faster beyond the noise of both. The older run: commit {_commit(old)}, "
            f"{old[0].get('time', '')[:10]}."
        )
    table = [
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
    return Section(title="Compared with the older run", words=[words], table=table)


def _commit(rows: Sequence[Row]) -> str:
    found = rows[0].get("commit", "unknown") if rows else "unknown"
    return found[:10] + ("+" if found.endswith("+") else "")


def machine(rows: Sequence[Row]) -> Section:
    """Device, versions, and the ceilings at the start and the end."""
    first, last = rows[0], rows[-1]
    versions = [
        f"{name} {first[name]}" for name in ("driver", "python", "torch", "triton") if first.get(name)
    ]
    words = [
        f"{first.get('device', 'unknown device')}. {', '.join(versions)}. Commit {_commit(rows)}"
        f"{', with changes' if str(first.get('commit', '')).endswith('+') else ''}. "
        f"{first.get('time', '')} to {last.get('time', '')}."
    ]
    state = {"clock_mhz": "clock (MHz)", "temperature_c": "temperature (C)", "load": "system load"}
    ranges = []
    for name, title in state.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            ranges.append(f"{title} {number(min(values))} to {number(max(values))}")
    words += [f"During the run: {', '.join(ranges)}."] if ranges else []
    table = [
        {
            "ceiling": f"{dtype}, {when} of the run",
            "matmul": f"{number(row['tflops'])} TFLOP/s",
            "copy": f"{number(row['gbps'])} GB/s",
        }
        for dtype, found in ceilings(rows).items()
        for when, row in zip(("start", "end"), [found[0], *found[1:][-1:]], strict=False)
    ]
    return Section(title="Machine", words=words, table=table)


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
    words = []
    if repeated:
        words = [
            f"{len(repeated) - len(apart)} of {len(repeated)} measurements taken twice agree within the "
            f"spread they state (p80 - p20 of a run, at least {record.NOISE:.0%})."
        ]
    columns = {
        "do not agree": what,
        "runs": lambda row: ", ".join(duration(x) for x in row["runs_ms"]),
        "apart": lambda row: percent(record.drift(row)),
        "stated": lambda row: percent(record.stated(row)),
    }
    table = tabulate(apart, columns)
    for dtype, found in ceilings(rows).items():
        for name, unit in (("tflops", "TFLOP/s"), ("gbps", "GB/s")):
            first, last = found[0][name], found[-1][name]
            if abs(last / first - 1) > record.NOISE:
                texts = [f"{dtype} ceiling, start and end of the run"]
                texts += [f"{number(first)}, {number(last)} {unit}", percent(abs(last / first - 1))]
                table.append(dict(zip(columns, [*texts, percent(record.NOISE)], strict=True)))
    return Section(title="Repeatability", words=words, table=table)


def training_points(rows: Sequence[Row], name: str) -> dict[str, dict[str, Row]]:
    """Training rows by shape and dtype, then by contender."""
    found: dict[str, dict[str, Row]] = {}
    for row in of_suite(rows, "train"):
        if row["name"] == name:
            found.setdefault(step_name(row), {})[row["contender"]] = row
    return found


TRAINING: Columns = {
    "step": step_name,
    "contender": lambda row: row["contender"],
    "tok/s": lambda row: number(round(row["rate"])),
    "ms": with_spread,
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


def training(rows: Sequence[Row]) -> Section:
    """Training steps of ours and its rivals."""
    found: list[Row] = []
    for by_name in training_points(rows, "step").values():
        ours_ms = by_name[OURS]["ms"] if OURS in by_name else None
        found += sorted(({**row, "ours_ms": ours_ms} for row in by_name.values()), key=lambda row: row["ms"])
    bars = [
        Bar(label=f"{step_name(row)}, {row['contender']}", value=row["ms"] / row["ours_ms"], note=note)
        for row in found
        if (note := speed_up(row))
    ]
    words = [
        "MFU counts the FLOPs of the matmuls and of causal attention, or 6 N + 12 L C T per token, as a "
        "fraction of the measured matmul rate and of the datasheet's. The gap is the step's time over its "
        "floor: those FLOPs at the measured rate, then AdamW's bytes at the copy bandwidth."
    ]
    charts = [Bars(title="Training: how many times faster ours is than", bars=bars, mark=1.0)] if bars else []
    return Section(
        title="Training", words=words if found else [], charts=charts, table=tabulate(found, TRAINING)
    )


def ablation(rows: Sequence[Row]) -> Section:
    """Ours, and the step's time with one fused op replaced by its reference."""
    charts, table = [], []
    for point, by_name in training_points(rows, "ablation").items():
        if OURS not in by_name:
            continue
        ours = by_name.pop(OURS)["ms"]
        bars = [Bar(label="ours, all fused", value=ours, note=duration(ours))]
        for name, row in by_name.items():
            lost, op = row["ms"] - ours, name.removeprefix("ours-without-")
            change = f"{lost / ours:+.1%}"
            note = f"{number(abs(lost))} ms {'more' if lost > 0 else 'less'}, {change}"
            colour = 1 if lost > 0 else 2
            bars.append(Bar(label=f"without {op}", value=lost, start=ours, note=note, colour=colour))
            cells = {"step": point, "without": op, "ms": number(row["ms"]), "change": change}
            table.append({**cells, "noise": percent(record.noise(row))})
        charts.append(Bars(title=f"One fused op undone at a time, {point}", bars=bars, mark=ours))
    return Section(title="Ablation", charts=charts, table=table)


CHECKPOINTING: Columns = {
    "step": step_name,
    "checkpointing": lambda row: row["contender"].removeprefix("ours-checkpointing-"),
    "peak MB": lambda row: figure(row, "peak_mb"),
    "predicted / measured": lambda row: (
        percent(row["predicted_mb"] / row["peak_mb"]) if row.get("predicted_mb") else ""
    ),
    "ms": with_spread,
    "predicted ms": lambda row: figure(row, "predicted_ms"),
}


def checkpointing(rows: Sequence[Row]) -> Section:
    """What gradient checkpointing saves and costs, and what --estimate predicts."""
    found = [r for by_name in training_points(rows, "checkpointing").values() for r in by_name.values()]
    return Section(title="Gradient checkpointing", table=tabulate(found, CHECKPOINTING))


KERNELS: Columns = {
    "op": lambda row: f"{row['name']} {row['shape']}",
    "contender": lambda row: row["contender"],
    "ms": with_spread,
    "rate": lambda row: figure(row, "rate", "unit"),
    "of the ceiling": lambda row: percent(1 / row["gap"]),
    "floor, ms": lambda row: figure(row, "floor_ms"),
    "peak MB": lambda row: figure(row, "peak_mb"),
    "ours faster": speed_up,
}


def kernels(rows: Sequence[Row]) -> Section:
    """Every op and its rivals, and the roofline."""
    found = sorted(of_suite(rows, "kernels"), key=lambda row: (row["name"], row["shape"], row["ms"]))
    ours = {(row["name"], row["shape"]): row["ms"] for row in found if row["contender"] == OURS}
    found = [{**row, "ours_ms": ours.get((row["name"], row["shape"]))} for row in found]
    on_cpu = bool(found) and not found[0].get("driver")
    words = ["Toy sizes on a CPU: every line runs, the times mean nothing."] if on_cpu else []
    charts = [*([] if on_cpu else speed_ups(found)), *roofline(rows, found)]
    return Section(title="Kernels", words=words, charts=charts, table=tabulate(found, KERNELS))


def speed_ups(found: Sequence[Row]) -> list[Bars]:
    """Ours against the fastest rival at each point, forward and backward together."""
    best: dict[str, Row] = {}
    for row in found:  # fastest first at each point
        whole = not row["name"].endswith(("forward", "backward")) or row["name"].startswith("decode")
        if whole and row["ours_ms"] and not row["contender"].startswith(OURS):
            best.setdefault(f"{row['name']} {row['shape']}", row)
    bars = [
        Bar(label=label, value=row["ms"] / row["ours_ms"], note=f"{speed_up(row)} {row['contender']}")
        for label, row in best.items()
    ]
    title = "Kernels: how many times faster ours is than its fastest rival"
    return [Bars(title=title, bars=bars, mark=1.0)] if bars else []


def roofline(rows: Sequence[Row], found: Sequence[Row]) -> list[Plot]:
    """TFLOP/s over FLOPs per byte, under what the ceilings allow."""
    placed = [row for row in found if row.get("flops") and row.get("bytes")]
    roofs = ceilings(rows).get(placed[0]["dtype"] if placed else "", [])
    if not roofs:
        return []
    tflops, gbps = (max(row[name] for row in roofs) for name in ("tflops", "gbps"))
    clouds: dict[str, list[tuple[float, float, str]]] = {OURS: [], "rivals": []}
    for row in placed:
        name = f"{row['name']} {row['shape']}, {row['contender']}"
        point = (row["flops"] / row["bytes"], row["flops"] / row["ms"] * 1e-9, name)
        clouds[OURS if row["contender"].startswith(OURS) else "rivals"].append(point)
    intensities = [row["flops"] / row["bytes"] for row in placed]
    knee = 1e3 * tflops / gbps
    left, right = min(intensities) / 1.5, 1.5 * max(2 * knee, *intensities)
    roof = [(left, left * gbps * 1e-3, ""), (knee, tflops, ""), (right, tflops, "")]
    series = [Series(name=name, points=points, style="o") for name, points in clouds.items() if points]
    series.append(Series(name=f"{number(tflops)} TFLOP/s, {number(gbps)} GB/s", points=roof, style="k-"))
    return [
        Plot(
            title="Roofline: every op at every shape",
            x_label="FLOPs per byte of memory traffic",
            y_label="TFLOP/s",
            series=series,
        )
    ]


EVERYDAY: Columns = {
    "what": lambda row: f"{row['name']} {row['shape']}".strip(),
    "contender": lambda row: row["contender"],
    "time": lambda row: duration(row["ms"]),
    "rate": lambda row: figure(row, "rate", "unit"),
    "noise": lambda row: percent(record.noise(row)),
}
JOBS: Columns = {
    "job": lambda row: f"{row['name']} {row['shape']}",
    "contender": lambda row: row["contender"],
    "launch to exit": lambda row: duration(row["ms"]),
    "training": lambda row: duration(row.get("train_ms")),
    "tok/s": lambda row: figure(row, "rate"),
    "best validation loss": lambda row: f"{row['val_loss']:.4f}" if row.get("val_loss") else "",
    "time to loss": lambda row: f"{row['goal']}: {duration(row['goal_ms'])}" if row.get("goal_ms") else "",
    "loss difference": lambda row: f"{row['loss_gap']:.4f}" if "loss_gap" in row else "",
}


def everyday(rows: Sequence[Row]) -> Section:
    """What surrounds the training step."""
    table = tabulate(of_suite(rows, "everyday"), EVERYDAY)
    return Section(title="Sampling, data, checkpoints, start-up", table=table)


def jobs(rows: Sequence[Row]) -> Section:
    """Whole trainings from launch to exit."""
    return Section(title="Whole jobs", table=tabulate(of_suite(rows, "jobs"), JOBS))
