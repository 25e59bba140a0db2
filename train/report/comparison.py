"""A page that compares runs: losses over tokens and time, throughput, memory, the settings that differ."""

from __future__ import annotations

import html
import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.files import write_file
from fusedgpt.train.report.metrics import MetricsFile, Row, read_metrics
from fusedgpt.train.report.plots import new_figure, running_mean
from fusedgpt.train.run.directory import read_run

_COLOURS = ("#2f7fd8", "#d1600a", "#3a9a4e", "#a05bc8", "#c23b5a", "#8a7a1f")
_POINTS = 400  # of a curve; a chart has not many more pixels
_INK = "#7d8590"  # on a light and on a dark page
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>{title}</title><style>
:root {{ color-scheme: light dark }}
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 70rem; margin: 2rem auto; padding: 0 1rem }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1rem }}
.charts svg {{ width: 100%; height: auto }}
.wide {{ overflow-x: auto }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums }}
td, th {{ padding: .25rem .8rem; text-align: left; border-bottom: 1px solid #8884; white-space: nowrap }}
</style></head><body>
<h1>{title}</h1>
<div class="wide">{results}</div>
<div class="charts">{charts}</div>
<h2>Settings that differ</h2>
<div class="wide">{settings}</div>
</body></html>
"""


def compare(folders: Sequence[Path], out: Path) -> Path:
    """Write a page about the run directories `folders` into the HTML file `out`; returns it.

    Raises ConfigError for a folder that is no run, InputError for one without a loss or where matplotlib is
    missing, OSError where `out` cannot be written.
    """
    names = _short_names(folders)
    runs = [read_run(folder) for folder in folders]
    rows = [_steps(folder) for folder in folders]
    results = [
        {"run": name, **_result(about.get("result") or {}, steps)}
        for name, (about, _), (steps, _) in zip(names, runs, rows, strict=True)
    ]
    charts = [_chart(names, rows, *axes) for axes in (("tokens", "loss"), ("seconds", "loss"))]
    charts.append(_chart(names, rows, "seconds", "tokens_per_second"))
    page = _PAGE.format(
        title=html.escape(", ".join(names)),
        results=_table(results),
        charts="\n".join(charts),
        settings=_table(_differing(names, [settings for _, settings in runs])),
    )
    write_file(out, page.encode())
    return out


def _short_names(folders: Sequence[Path]) -> list[str]:
    """The last parts of the paths, as many as tell them apart."""
    paths = [folder.resolve() for folder in folders]
    for length in range(1, max(len(path.parts) for path in paths) + 1):
        names = [os.sep.join(path.parts[-length:]) for path in paths]
        if len(set(names)) == len(names):
            break
    return names


def _steps(folder: Path) -> tuple[list[Row], list[Row]]:
    """(the rows of steps, those of validations with the tokens and seconds at which they were made)."""
    rows = read_metrics(folder / MetricsFile.name)
    steps = [row for row in rows if row.get("loss") is not None]
    if not steps:
        raise InputError(f"{folder} has no training loss yet")
    at = {row["step"]: row for row in steps}
    validations = [at[row["step"]] | row for row in rows if "val_loss" in row and row["step"] in at]
    return steps, [row for row in validations if row["val_loss"] is not None]


def _result(result: dict[str, Any], steps: list[Row]) -> dict[str, str]:
    """A line of the first table; a run that goes on has none of what comes at its end."""
    best, peak = result.get("best_val_loss"), result.get("peak_bytes")
    speed = np.array([row["tokens_per_second"] for row in steps], dtype=float)  # NaN of the first step
    return {
        "steps": f"{steps[-1]['step']:,}",
        "tokens": f"{steps[-1]['tokens']:,}",
        "seconds": f"{steps[-1]['seconds']:,.0f}",
        "best validation": "" if best is None else f"{best:.4f}",
        "tok/s, median": f"{np.nanmedian(speed):,.0f}",
        "peak memory": "" if peak is None else f"{peak / 1e9:.2f} GB",
    }


def _differing(names: Sequence[str], settings: Sequence[dict[str, dict[str, Any]]]) -> list[dict[str, str]]:
    keys = sorted({(section, name) for one in settings for section, values in one.items() for name in values})
    table = []
    for section, key in keys:
        values = [str(one.get(section, {}).get(key, "")) for one in settings]
        if len(set(values)) > 1:
            table.append({"setting": f"{section}.{key}", **dict(zip(names, values, strict=True))})
    return table


def _table(rows: Sequence[dict[str, str]]) -> str:
    if not rows:
        return "<p>None.</p>"
    lines = [[*rows[0]], *([*row.values()] for row in rows)]
    cells = [[html.escape(cell) for cell in line] for line in lines]
    head, *body = (f"<tr><td>{'</td><td>'.join(line)}</td></tr>" for line in cells)
    return f"<table>{head.replace('td>', 'th>')}{''.join(body)}</table>"


def _chart(names: Sequence[str], rows: Sequence[tuple[list[Row], list[Row]]], x: str, y: str) -> str:
    """An SVG: a line per run; of losses the running mean, with the validations as dots."""
    figure, axes = new_figure()
    figure.set_size_inches(6.2, 4)
    seen: list[float] = []
    for i, (name, (steps, validations)) in enumerate(zip(names, rows, strict=True)):
        colour = _COLOURS[i % len(_COLOURS)]
        known = [row for row in steps if row[y] is not None]
        xs, ys = (np.array([row[key] for row in known], dtype=float) for key in (x, y))
        ys = running_mean(ys, max(10, len(ys) // 50))
        kept = np.unique(np.linspace(0, len(xs) - 1, _POINTS).astype(int))
        axes.plot(xs[kept], ys[kept], color=colour, linewidth=1.6, label=name)
        seen += [ys[len(ys) // 20], ys.min()]
        if y == "loss":
            seen += [row["val_loss"] for row in validations]
            axes.plot(
                [r[x] for r in validations], [r["val_loss"] for r in validations], "o", color=colour, ms=4
            )
    titles = {"loss": "loss, nats per token", "tokens_per_second": "tokens per second"}
    axes.set(xlabel=x, ylabel=titles[y], facecolor="none")
    if y == "loss":  # the first steps would take most of the height
        axes.set_ylim(min(seen) - 0.05 * np.ptp(seen), max(seen))
    else:
        axes.set_ylim(0)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.yaxis.set_major_formatter("{x:,.0f}" if y != "loss" else "{x:g}")
    axes.tick_params(colors=_INK)
    axes.xaxis.label.set_color(_INK)
    axes.yaxis.label.set_color(_INK)
    axes.spines[:].set_color(_INK)
    axes.legend(frameon=False, labelcolor=_INK)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None})
    return svg.getvalue()[svg.getvalue().index("<svg") :]
