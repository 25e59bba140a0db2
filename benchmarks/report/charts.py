"""Charts of the report: as SVG, drawn by matplotlib, and as text for Markdown."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

_TEXT_BAR = 30  # characters of the longest bar in Markdown
_SVG = {"svg.fonttype": "none", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


@dataclass(frozen=True, kw_only=True)
class Bar:
    """From `start` to start + value; a negative value goes left."""

    label: str
    value: float
    note: str  # the value as text
    start: float = 0.0
    colour: int = 0


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Horizontal bars, with a line across them at `mark`."""

    title: str
    bars: Sequence[Bar]
    mark: float

    @property
    def height(self) -> float:
        return 0.5 + 0.25 * len(self.bars)

    def draw(self, axes: Any) -> None:
        places = range(len(self.bars))
        widths, starts = [bar.value for bar in self.bars], [bar.start for bar in self.bars]
        drawn = axes.barh(places, widths, left=starts, color=[f"C{bar.colour}" for bar in self.bars])
        axes.bar_label(drawn, [bar.note for bar in self.bars], padding=4)
        axes.set_yticks(places, [bar.label for bar in self.bars])
        axes.invert_yaxis()
        axes.xaxis.set_visible(False)
        axes.margins(x=0.25)
        axes.axvline(self.mark, color="black", linestyle="--", linewidth=1)

    def markdown(self) -> str:
        """A code block whose bars are full blocks."""
        end = max(max(bar.start, bar.start + bar.value) for bar in self.bars) or 1.0
        width = max(len(bar.label) for bar in self.bars)
        lines = []
        for bar in self.bars:
            low, high = sorted((bar.start, bar.start + bar.value))
            blank, full = (round(_TEXT_BAR * x / end) for x in (low, high))
            blocks = " " * blank + "█" * max(1, full - blank)
            lines.append(f"{bar.label:<{width}}  {blocks:<{_TEXT_BAR + 1}} {bar.note}")
        return "\n".join(["```text", *lines, "```"])


@dataclass(frozen=True, kw_only=True)
class Series:
    """(x, y, name of the point) in one colour, as a line through points, points only, or a line only."""

    name: str
    points: Sequence[tuple[float, float, str]]
    style: str = "o-"  # of matplotlib


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Series over x, both axes logarithmic."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    height: float = 4.0

    def draw(self, axes: Any) -> None:
        axes.set(xlabel=self.x_label, ylabel=self.y_label, xscale="log", yscale="log")
        for series in self.series:
            x, y, _ = zip(*series.points, strict=True)
            axes.plot(x, y, series.style, label=series.name)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)

    def markdown(self) -> str:
        """The named points as bars."""
        bars = [
            Bar(label=f"{series.name}, {name}", value=y, note=number(y))
            for series in self.series
            for _, y, name in series.points
            if name
        ]
        return Bars(title=self.title, bars=bars, mark=0.0).markdown() if bars else ""


@contextmanager
def drawn(chart: Bars | Plot) -> Iterator[Any]:
    """The chart as a matplotlib figure, with its settings in force."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_SVG):
        figure = Figure(figsize=(7.6, chart.height), layout="constrained")
        chart.draw(figure.add_subplot())
        yield figure


def svg(chart: Bars | Plot) -> str:
    """An <svg> element whose black is the text colour around it; a line of text without matplotlib."""
    if find_spec("matplotlib") is None:
        return "<p>no chart: matplotlib is not installed</p>"
    written = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with drawn(chart) as figure:
        figure.savefig(written, format="svg", transparent=True, metadata=no_metadata)
    text = written.getvalue()
    return text[text.index("<svg") :].replace("#000000", "currentColor")


def number(x: float) -> str:
    """About three digits."""
    if x == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(x))))
    shown = f"{x:,.{digits}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown
