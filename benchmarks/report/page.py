"""The page of a report: sections of words, tables and charts, made from rows, as HTML or Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template

from benchmarks.report import record
from benchmarks.report.charts import Bar, Bars, Plot, Series, number
from benchmarks.report.record import Row

Cells = dict[str, str]  # column -> text
OURS = "ours"


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is under it."""

    title: str
    words: Sequence[str] = ()
    table: Sequence[Cells] = ()
    charts: Sequence[Bars | Plot] = field(default=())


def sections(
    rows: Sequence[Row], *, old: Sequence[Row] | None = None, history: Sequence[Sequence[Row]] = ()
) -> list[Section]:
    """The whole page; `old` is a run to compare with, `history` earlier runs of this device, oldest first."""
    rows = named(rows)
    every = [
        failures(rows),
        comparison(named(old), rows) if old is not None else None,
        machine(rows),
        agreement(rows),
        training(rows),
        scaling(rows),
        ablation(rows),
        kernels(rows),
        everyday(rows),
        jobs(rows),
        memory(rows),
        past([*history, rows]),
    ]
    return [section for section in every if section and (section.words or section.table or section.charts)]


def named(rows: Iterable[Row]) -> list[Row]:
    """The rows with a peer under its name."""
    names = {"peer": "nanoGPT", "peer-cudnn": "nanoGPT-cudnn"}
    return [
        {**row, "contender": names.get(row.get("contender", ""), row.get("contender", ""))} for row in rows
    ]


def share(x: float | None) -> str:
    return "" if x is None else f"{x:.1%}"


def milliseconds(x: float) -> str:
    return f"{number(x)} ms" if x < 1e4 else f"{number(x / 1e3)} s"


def what(row: Row) -> str:
    return " ".join(filter(None, [row.get("name"), row.get("shape"), row.get("dtype"), row.get("contender")]))


def failures(rows: Sequence[Row]) -> Section | None:
    """What has no speed because it is wrong, fell over or did not fit."""
    faults, skipped = record.faults(rows), [row for row in rows if "skipped" in row]
    words = [f"Failed, and so without a speed: {len(faults)}."] if faults else []
    table = [{"what": what(row), "why": row.get("fault") or row["skipped"]} for row in [*faults, *skipped]]
    return Section(title="Without a speed", words=words, table=table)


def comparison(old: Sequence[Row], rows: Sequence[Row]) -> Section:
    """Against an older run: what is beyond the noise of both."""
    changes = record.compare(old, rows)
    beyond = [change for change in changes if change.verdict != "same"]
    slower = sum(change.verdict == "slower" for change in beyond)
    words = ["The two runs have nothing in common."]
    if changes:
        words = [
            f"Of {len(changes)} measurements that both runs have, {slower} are slower and "
            f"{len(beyond) - slower} faster beyond the noise of both. Ours slower is a regression. "
            f"The older run: commit {_commit(old)}, {old[0].get('time', '')[:10]}."
        ]
    table = [
        {
            "what": " ".join(part for part in change.key if part),
            "before": milliseconds(change.old_ms),
            "now": milliseconds(change.new_ms),
            "change": f"{change.ratio - 1:+.1%}",
            "noise": share(change.noise),
            "verdict": "REGRESSION" if change.is_regression else change.verdict,
        }
        for change in beyond
    ]
    return Section(title="Against the older run", words=words, table=table)


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
    state = {"clock_mhz": "clock (MHz)", "temperature_c": "temperature (C)", "load": "load of the machine"}
    ranges = []
    for name, title in state.items():
        values = [row[name] for row in rows if row.get(name) is not None]
        if values:
            ranges.append(f"{title} {number(min(values))} to {number(max(values))}")
    words += [f"During the run: {', '.join(ranges)}."] if ranges else []
    table = []
    for dtype, found in ceilings(rows).items():
        ends = {"start": found[0], "end": found[-1]}
        for when, row in ends.items() if len(found) > 1 else [("start", found[0])]:
            cells = {"ceiling": f"{dtype}, {when} of the run", "matmul": f"{number(row['tflops'])} TFLOP/s"}
            table.append({**cells, "copy": f"{number(row['gbps'])} GB/s"})
    return Section(title="The machine", words=words, table=table)


def ceilings(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """By dtype, in their order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["suite"] == "ceilings":
            found.setdefault(row["dtype"], []).append(row)
    return found


def agreement(rows: Sequence[Row]) -> Section:
    """What does not agree with itself within the spread it states."""
    apart = [row for row in record.timed(rows).values() if not record.agrees(row)]
    repeated = [row for row in record.timed(rows).values() if len(row.get("runs_ms", [])) > 1]
    words = []
    if repeated:
        words = [
            f"{len(repeated) - len(apart)} of {len(repeated)} measurements taken twice agree within the "
            f"spread they state (p80 - p20 of a run, {record.NOISE:.0%} at least)."
        ]
    table = [
        {
            "do not agree": what(row),
            "runs": ", ".join(milliseconds(x) for x in row["runs_ms"]),
            "apart": share(record.drift(row)),
            "stated": share(record.stated(row)),
        }
        for row in apart
    ]
    for dtype, found in ceilings(rows).items():
        for name, unit in (("tflops", "TFLOP/s"), ("gbps", "GB/s")):
            first, last = found[0][name], found[-1][name]
            if abs(last / first - 1) > record.NOISE:
                cells = {"do not agree": f"{dtype} ceiling, start and end of the run"}
                cells["runs"] = f"{number(first)}, {number(last)} {unit}"
                table.append({**cells, "apart": share(abs(last / first - 1)), "stated": share(record.NOISE)})
    return Section(title="Do the runs agree?", words=words, table=table)


def points(rows: Sequence[Row], name: str) -> dict[tuple[str, str], dict[str, Row]]:
    """Training rows by (shape, dtype), then by contender."""
    found: dict[tuple[str, str], dict[str, Row]] = {}
    for row in record.timed(rows).values():
        if (row["suite"], row["name"]) == ("train", name):
            found.setdefault((row["shape"], row["dtype"]), {})[row["contender"]] = row
    return found


def training(rows: Sequence[Row]) -> Section:
    """Every step beside its rivals."""
    table, faster, memory = [], [], []
    for (shape, dtype), by_name in points(rows, "step").items():
        ours = by_name.get(OURS)
        for name, row in sorted(by_name.items(), key=lambda item: item[1]["ms"]):
            versus = row["ms"] / ours["ms"] if ours else None
            table.append(_training_cells(row, versus))
            label = f"{shape} {dtype}, {name}"
            note, series = f"{number(row['peak_mb'])} MB", int(name != OURS)
            memory.append(Bar(label=label, value=row["peak_mb"], note=note, series=series))
            if versus and name != OURS:
                faster.append(Bar(label=label, value=versus, note=f"{versus:.2f}x"))
    charts: list[Bars | Plot] = []
    if faster:
        charts.append(Bars(title="Training: how many times faster ours is than", bars=faster, mark=1.0))
    if memory:
        charts.append(Bars(title="Training: peak memory", bars=memory, series=(OURS, "rivals")))
    words = [
        "MFU counts what causal attention and the matmuls need, or 6 N + 12 L C T a token, as a share of the "
        "measured matmul rate and of the datasheet's. The gap is the step over its floor: those FLOPs at the "
        "measured rate, then AdamW's bytes at the copy bandwidth."
    ]
    return Section(title="Training", words=words if table else [], table=table, charts=charts)


def _training_cells(row: Row, versus: float | None) -> Cells:
    return {
        "step": f"{row['shape']} {row['dtype']}",
        "contender": row["contender"],
        "tok/s": number(round(row["rate"])),
        "ms": f"{number(row['ms'])} ± {share((row.get('spread') or 0) / 2)}",
        "ours faster": "" if versus is None or row["contender"] == OURS else f"{versus:.2f}x",
        "MFU, causal": share(row["mfu_causal_measured"]),
        "MFU, 6N+12LCT": share(row["mfu_palm_measured"]),
        "of datasheet": " / ".join(
            share(row[name]) for name in ("mfu_causal_datasheet", "mfu_palm_datasheet") if row.get(name)
        ),
        "gap": f"{row['gap']:.2f}",
        "peak MB": number(round(row["peak_mb"])),
        "first step": f"{row['first_step_s']:.1f} s",
    }


def scaling(rows: Sequence[Row]) -> Section | None:
    """Tokens a second over the length of the text and over the batch."""
    steps = [row for by_name in points(rows, "step").values() for row in by_name.values()]
    charts = []
    for x, other in (("batch_size", "length"), ("length", "batch_size")):
        groups: dict[str, list[Row]] = {}
        for row in steps:
            sign = "T" if other == "length" else "batch"
            name = f"{row['contender']}, {row['preset']} {row['dtype']}, {sign} {row[other]}"
            groups.setdefault(name, []).append(row)
        series = [
            Series(name=name, points=[(row[x], row["rate"], f"{x} {row[x]}") for row in _by(x, group)])
            for name, group in groups.items()
            if len({row[x] for row in group}) > 1
        ]
        if series:
            ticks = [(v, f"{v}") for v in sorted({row[x] for row in steps})]
            title = f"Tokens a second over the {'batch size' if x == 'batch_size' else 'length T'}"
            charts.append(
                Plot(title=title, x_label=x, y_label="tok/s", series=series, log_x=True, x_ticks=ticks)
            )
    return Section(title="Over batch and length", charts=charts)


def _by(name: str, rows: Iterable[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: float(row[name]))


def ablation(rows: Sequence[Row]) -> Section | None:
    """Ours, and what each fused op alone takes off the step."""
    charts, table = [], []
    for (shape, dtype), by_name in points(rows, "ablation").items():
        if OURS not in by_name:
            continue
        ours = by_name[OURS]["ms"]
        bars = [Bar(label="ours, all fused", value=ours, note=milliseconds(ours))]
        for name, row in by_name.items():
            if name == OURS:
                continue
            lost = row["ms"] - ours
            op, change = name.removeprefix("ours-without-"), f"{lost / ours:+.1%}"
            bars.append(
                Bar(
                    label=f"without {op}",
                    value=lost,
                    start=ours,
                    note=f"{number(abs(lost))} ms {'more' if lost > 0 else 'less'}, {change}",
                    series=1 if lost > 0 else 2,
                )
            )
            cells = {"step": f"{shape} {dtype}", "without": op, "ms": number(row["ms"]), "change": change}
            table.append({**cells, "noise": share(record.noise(row))})
        charts.append(
            Bars(title=f"A step with one fused op undone at a time, {shape} {dtype}", bars=bars, mark=ours)
        )
    return Section(title="What each fused op brings", table=table, charts=charts)


def kernels(rows: Sequence[Row]) -> Section | None:
    """Every op beside its rivals, and the roofline."""
    found = [row for row in record.timed(rows).values() if row["suite"] == "kernels"]
    ours = {(row["name"], row["shape"]): row for row in found if row["contender"] == OURS}
    table = []
    for row in sorted(found, key=lambda row: (row["name"], row["shape"], row["ms"])):
        mine = ours.get((row["name"], row["shape"]))
        versus = f"{row['ms'] / mine['ms']:.2f}x" if mine and row is not mine else ""
        table.append(
            {
                "op": f"{row['name']} {row['shape']}",
                "contender": row["contender"],
                "ms": f"{number(row['ms'])} ± {share((row.get('spread') or 0) / 2)}",
                "rate": f"{number(row['rate'])} {row['unit']}",
                "of the ceiling": share(1 / row["gap"]),
                "floor, ms": number(row["floor_ms"]),
                "peak MB": "" if row.get("peak_mb") is None else number(row["peak_mb"]),
                "ours faster": versus,
            }
        )
    drawn = [speed_ups(found, ours), roofline(rows, found)]
    words = []
    if found and not found[0].get("driver"):
        words, drawn = ["Toy sizes on a CPU: every line runs, the times mean nothing."], drawn[1:]
    charts: list[Bars | Plot] = [chart for chart in drawn if chart]
    return Section(title="Kernels", words=words, table=table, charts=charts)


def speed_ups(found: Sequence[Row], ours: dict[tuple[str, str], Row]) -> Bars | None:
    """Ours against the fastest rival at each point; of the directions, the whole op."""
    bars = []
    for (name, shape), mine in ours.items():
        rivals = [
            row
            for row in found
            if (row["name"], row["shape"]) == (name, shape) and not row["contender"].startswith(OURS)
        ]
        if (rivals and not name.endswith(("forward", "backward"))) or name.startswith("decode"):
            best = min(rivals, key=lambda row: float(row["ms"]))
            ratio = best["ms"] / mine["ms"]
            label = f"{name} {shape}"
            bars.append(Bar(label=label, value=ratio, note=f"{ratio:.2f}x {best['contender']}"))
    title = "Kernels: how many times faster ours is than its fastest rival"
    return Bars(title=title, bars=bars, mark=1.0) if bars else None


def roofline(rows: Sequence[Row], found: Sequence[Row]) -> Plot | None:
    """TFLOP/s over FLOPs a byte, under what the ceilings allow."""
    placed = [row for row in found if row.get("flops") and row.get("bytes")]
    roofs = ceilings(rows).get(placed[0]["dtype"] if placed else "", [])
    if not placed or not roofs:
        return None
    tflops, gbps = (max(row[name] for row in roofs) for name in ("tflops", "gbps"))

    def place(row: Row) -> tuple[float, float, str]:
        title = f"{row['name']} {row['shape']}, {row['contender']}"
        return row["flops"] / row["bytes"], row["flops"] / row["ms"] * 1e-9, title

    reached = [place(row) for row in placed]
    knee = 1e3 * tflops / gbps
    left, right = min(x for x, _, _ in reached) / 1.5, max(knee * 2, *(x for x, _, _ in reached)) * 1.5
    roof = [(left, left * gbps * 1e-3, ""), (knee, tflops, ""), (right, tflops, "")]
    groups = {"ours": True, "rivals": False}
    clouds = [
        Series(
            name=name,
            points=[place(row) for row in placed if row["contender"].startswith(OURS) == mine],
            line=False,
        )
        for name, mine in groups.items()
    ]
    return Plot(
        title="Roofline: each op at each shape",
        x_label="FLOPs a byte of memory traffic",
        y_label="TFLOP/s",
        series=[
            *clouds,
            Series(name=f"{number(tflops)} TFLOP/s, {number(gbps)} GB/s", points=roof, dots=False),
        ],
        log_x=True,
        log_y=True,
    )


def everyday(rows: Sequence[Row]) -> Section | None:
    """What surrounds the training step."""
    found = [row for row in record.timed(rows).values() if row["suite"] == "everyday"]
    table = [
        {
            "what": f"{row['name']} {row['shape']}".strip(),
            "contender": row["contender"],
            "time": milliseconds(row["ms"]),
            "rate": f"{number(row['rate'])} {row['unit']}" if row.get("rate") else "",
            "noise": share(record.noise(row)),
        }
        for row in found
    ]
    return Section(title="Generating, data, checkpoints, starting", table=table)


def jobs(rows: Sequence[Row]) -> Section | None:
    """Whole trainings from launch to exit."""
    found = [row for row in record.timed(rows).values() if row["suite"] == "jobs"]
    table = [
        {
            "job": f"{row['name']} {row['shape']}",
            "contender": row["contender"],
            "launch to exit": milliseconds(row["ms"]),
            "training": milliseconds(row["train_ms"]) if row.get("train_ms") else "",
            "tok/s": number(row["rate"]) if row.get("rate") else "",
            "best validation loss": f"{row['val_loss']:.4f}" if row.get("val_loss") else "",
            "until": f"{row['goal']}: {milliseconds(row['goal_ms'])}" if row.get("goal_ms") else "",
            "losses apart": f"{row['loss_gap']:.4f}" if "loss_gap" in row else "",
        }
        for row in found
    ]
    return Section(title="Whole jobs", table=table)


def memory(rows: Sequence[Row]) -> Section | None:
    """What gradient checkpointing saves and costs, beside what --estimate says."""
    found = [row for row in record.timed(rows).values() if row["suite"] == "memory"]
    table = [
        {
            "step": f"{row['shape']} {row['dtype']}",
            "checkpointing": row["name"],
            "MB": number(row["peak_mb"]),
            "estimate": share(row["predicted_mb"] / row["peak_mb"]),
            "ms": number(row["ms"]),
            "ms, estimate": number(row["predicted_ms"]) if row.get("predicted_ms") else "",
        }
        for row in found
    ]
    return Section(title="Memory by checkpointing", table=table)


def past(runs: Sequence[Sequence[Row]]) -> Section | None:
    """Ours over the runs of this device, in tokens a second of training."""
    if len(runs) < 2:
        return None
    ticks = [(float(i), f"{run[0].get('time', '')[:10]} {_commit(run)[:7]}") for i, run in enumerate(runs)]
    lines: dict[str, list[tuple[float, float, str]]] = {}
    for i, run in enumerate(runs):
        for (shape, dtype), by_name in points(run, "step").items():
            if OURS in by_name:
                place = (float(i), by_name[OURS]["rate"], ticks[i][1])
                lines.setdefault(f"{shape} {dtype}", []).append(place)
    series = [Series(name=name, points=found) for name, found in lines.items() if len(found) > 1]
    title = "Ours, run by run"
    chart = (
        Plot(title=title, x_label="run", y_label="tok/s", series=series, x_ticks=ticks) if series else None
    )
    return Section(title="History", charts=[chart] if chart else [])


def markdown(found: Sequence[Section], *, level: int = 2) -> str:
    """Without a title of its own."""
    parts = []
    for section in found:
        parts += [f"{'#' * level} {section.title}", *section.words]
        for chart in section.charts:
            parts += [f"**{chart.title}**", chart.markdown()]
        parts += [_markdown_table(section.table)] if section.table else []
    return "\n\n".join(part for part in parts if part) + "\n"


def used_columns(table: Sequence[Cells]) -> list[str]:
    """In their order, without those that are empty throughout."""
    names = dict.fromkeys(name for cells in table for name in cells)
    return [name for name in names if any(cells.get(name) for cells in table)]


def _markdown_table(table: Sequence[Cells]) -> str:
    names = used_columns(table)
    lines = [names, ["---"] * len(names), *([cells.get(name, "") for name in names] for cells in table)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def html(title: str, found: Sequence[Section]) -> str:
    """One file that needs no other."""
    body = []
    for section in found:
        body.append(f"<h2>{escape(section.title)}</h2>")
        body += [f"<p>{escape(words)}</p>" for words in section.words]
        body += [chart.svg() for chart in section.charts]
        body += [_html_table(section.table)] if section.table else []
    return _PAGE.substitute(title=escape(title), body="\n".join(body))


def _html_table(table: Sequence[Cells]) -> str:
    names = used_columns(table)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = []
    for cells in table:
        ours = ' class="ours"' if cells.get("contender") == OURS else ""
        bad = ' class="bad"' if cells.get("verdict") == "REGRESSION" or "why" in cells else ours
        lines.append(
            f"<tr{bad}>" + "".join(f"<td>{escape(cells.get(name, ''))}</td>" for name in names) + "</tr>"
        )
    return f'<div class="table"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>$title</title>
<style>
:root { --bg: #ffffff; --fg: #1c2024; --muted: #5b6570; --grid: #dde1e6; --shade: #eef4fb; --bad: #fdecea;
  --s0: #1f6fc4; --s1: #c2570c; --s2: #2e7d4f; --s3: #8a4bb5; --s4: #a8324a; --s5: #5f6b76; }
@media (prefers-color-scheme: dark) {
  :root { --bg: #14171a; --fg: #e4e7ea; --muted: #a3adb7; --grid: #333a41; --shade: #1b2a3a; --bad: #4a2320;
    --s0: #6bb1ff; --s1: #ffa45c; --s2: #6fce97; --s3: #c99cf0; --s4: #ff8f9f; --s5: #a8b3bd; }
}
body { background: var(--bg); color: var(--fg); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif;
  max-width: 1040px; margin: 0 auto; padding: 16px; }
h1 { font-size: 24px; } h2 { font-size: 19px; margin-top: 36px; }
p { max-width: 75ch; }
.table { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px 3px 0; text-align: left; border-bottom: 1px solid var(--grid);
  white-space: nowrap; }
th { color: var(--muted); font-weight: 600; }
.ours td { background: var(--shade); } .bad td { background: var(--bad); white-space: normal; }
figure { margin: 24px 0; overflow-x: auto; } figcaption { font-weight: 600; margin-bottom: 8px; }
svg { width: 100%; min-width: 560px; max-width: 760px; height: auto; display: block; }
svg text { fill: var(--fg); font: 12px system-ui, "DejaVu Sans", sans-serif; }
.grid { stroke: var(--grid); } .mark { stroke: var(--fg); stroke-dasharray: 4 3; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
