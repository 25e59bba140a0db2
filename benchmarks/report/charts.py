"""Charts for a page: each as SVG that takes its colours from the page's CSS variables, and as Markdown.

--s0 .. --s5 are the series, --fg text, --muted axes, --grid lines. The page sets them for light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape

WIDTH, LINE, CHARACTER = 760, 22, 6.7  # pixels: a chart, a bar with its gap, a letter at 12 px
N_COLOURS = 6
_TEXT_BAR = 30  # characters of the longest bar in Markdown
_HEIGHT, _LEFT, _BOTTOM, _TOP = 320, 70, 46, 12  # of a Plot


@dataclass(frozen=True, kw_only=True)
class Bar:
    """From `start` to start + value (a step of a waterfall, which may go left) with the value as `note`."""

    label: str
    value: float
    note: str
    start: float = 0.0
    series: int = 0


@dataclass(frozen=True, kw_only=True)
class Bars:
    """Horizontal bars; `mark` is a line across them, such as 1.0 for "as fast"."""

    title: str
    bars: Sequence[Bar]
    series: Sequence[str] = ()
    mark: float | None = None

    def svg(self) -> str:
        left = min(44, max(len(bar.label) for bar in self.bars)) * CHARACTER + 12
        right = max(len(bar.note) for bar in self.bars) * CHARACTER + 14
        end = max(max(bar.start, bar.start + bar.value) for bar in self.bars)
        scale = (WIDTH - left - right) / (max(end, self.mark or 0.0) or 1.0)
        mark = None if self.mark is None else left + scale * self.mark
        top = legend_height(self.series, WIDTH)
        parts = [legend(self.series, WIDTH)]
        for i, bar in enumerate(self.bars):
            y, low = top + i * LINE, min(bar.start, bar.start + bar.value)
            x, width = left + scale * low, max(1.0, scale * abs(bar.value))
            parts.append(text(left - 8, y + 14, clip(bar.label), anchor="end", hint=bar.label))
            colour = f"var(--s{bar.series % N_COLOURS})"
            parts.append(f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="14" fill="{colour}"/>')
            aside = x + width + 6
            crossed = mark is not None and aside - 4 < mark < aside + CHARACTER * len(bar.note)
            parts.append(text(mark + 6 if mark and crossed else aside, y + 14, bar.note))
        height = top + LINE * len(self.bars) + 4
        if mark is not None:
            parts.append(f'<line x1="{mark:.1f}" x2="{mark:.1f}" y1="{top}" y2="{height - 4}" class="mark"/>')
        return frame(self.title, height, parts)

    def markdown(self) -> str:
        """A code block; the bars are drawn with full blocks."""
        end = max(max(bar.start, bar.start + bar.value) for bar in self.bars) or 1.0
        width = max(len(bar.label) for bar in self.bars)
        lines = []
        for bar in self.bars:
            low, high = sorted((bar.start, bar.start + bar.value))
            blank, full = (round(_TEXT_BAR * x / end) for x in (low, high))
            drawn = " " * blank + "█" * max(1, full - blank)
            lines.append(f"{bar.label:<{width}}  {drawn:<{_TEXT_BAR + 1}} {bar.note}")
        return "\n".join(["```text", *lines, "```"])


@dataclass(frozen=True, kw_only=True)
class Series:
    """(x, y, what a point is) in one colour; as a line, or as points."""

    name: str
    points: Sequence[tuple[float, float, str]]
    line: bool = True
    dots: bool = True


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Series over x; axes linear or logarithmic, which start at 0 or at the smallest value."""

    title: str
    x_label: str
    y_label: str
    series: Sequence[Series]
    log_x: bool = False
    log_y: bool = False
    x_ticks: Sequence[tuple[float, str]] = field(default=())

    def svg(self) -> str:
        points = [point for series in self.series for point in series.points]
        x_axis = Axis.of((x for x, _, _ in points), log=self.log_x, ticks=self.x_ticks)
        y_axis = Axis.of((y for _, y, _ in points), log=self.log_y)
        names = [series.name for series in self.series]
        top = legend_height(names, WIDTH) + _TOP
        bottom = top + _HEIGHT
        x_at = lambda x: _LEFT + (WIDTH - _LEFT - 24) * x_axis.place(x)  # noqa: E731
        y_at = lambda y: bottom - _HEIGHT * y_axis.place(y)  # noqa: E731
        parts = [legend(names, WIDTH)]
        for value, label in y_axis.ticks:
            y = y_at(value)
            parts.append(f'<line x1="{_LEFT}" x2="{WIDTH - 24}" y1="{y:.1f}" y2="{y:.1f}" class="grid"/>')
            parts.append(text(_LEFT - 8, y + 4, label, anchor="end"))
        for value, label in x_axis.ticks:
            parts.append(text(x_at(value), bottom + 18, label, anchor="middle"))
        parts.append(text((WIDTH + _LEFT) / 2, bottom + 38, self.x_label, anchor="middle"))
        for i, series in enumerate(self.series):
            places = [(x_at(x), y_at(y), what) for x, y, what in series.points]
            parts += drawn(places, f"var(--s{i % N_COLOURS})", line=series.line, dots=series.dots)
        return frame(f"{self.title} ({self.y_label})", bottom + _BOTTOM, parts)

    def markdown(self) -> str:
        """The named points as bars."""
        bars = [
            Bar(label=f"{series.name}, {what}", value=y, note=number(y))
            for series in self.series
            for _, y, what in series.points
            if what
        ]
        return Bars(title=self.title, bars=bars).markdown() if bars else ""


@dataclass(frozen=True, kw_only=True)
class Axis:
    """Values between low and high, placed at 0 to 1."""

    low: float
    high: float
    log: bool
    ticks: Sequence[tuple[float, str]]

    @classmethod
    def of(cls, values: Iterable[float], *, log: bool, ticks: Sequence[tuple[float, str]] = ()) -> Axis:
        """Around `values`, with round ticks unless they are given."""
        found = list(values)
        if ticks:
            low, high = min(found), max(found)
            margin = (high / low) ** 0.05 if log else 0.05 * (high - low or 1.0)
            low, high = (low / margin, high * margin) if log else (low - margin, high + margin)
            return cls(low=low, high=high, log=log, ticks=ticks)
        if log:
            low, high = math.floor(math.log10(min(found))), math.ceil(math.log10(max(found)))
            steps = [10.0**k for k in range(low, max(high, low + 1) + 1)]
        else:
            step = 10 ** math.floor(math.log10(max(found) or 1.0))
            step /= 1 if max(found) / step > 4 else 2 if max(found) / step > 2 else 5
            steps = [step * k for k in range(math.ceil(max(found) / step - 1e-9) + 1)]
        return cls(low=steps[0], high=steps[-1], log=log, ticks=[(x, number(x)) for x in steps])

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            low, high, value = (math.log10(x) for x in (low, high, value))
        return (value - low) / (high - low)


def drawn(places: Sequence[tuple[float, float, str]], colour: str, *, line: bool, dots: bool) -> list[str]:
    """A series at its places in the picture."""
    parts = []
    if line and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y, _ in places)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
    for x, y, what in places if dots else ():
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{colour}"><title>{escape(what)}</title></circle>'
        )
    return parts


def number(x: float) -> str:
    """About three digits."""
    if x == 0:
        return "0"
    digits = max(0, 2 - math.floor(math.log10(abs(x))))
    shown = f"{x:,.{digits}f}"
    return shown.rstrip("0").rstrip(".") if "." in shown else shown


def clip(label: str) -> str:
    return label if len(label) <= 44 else label[:43] + "…"


def text(x: float, y: float, said: str, *, anchor: str = "start", hint: str = "") -> str:
    title = f"<title>{escape(hint)}</title>" if hint != said and hint else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(said)}{title}</text>'


def _legend_places(names: Sequence[str], width: int) -> list[tuple[float, int]]:
    """Where each name goes, in lines that fit."""
    x, line, places = 0.0, 0, []
    for name in names:
        needs = 34 + CHARACTER * len(name)
        if x and x + needs > width:
            x, line = 0.0, line + 1
        places.append((x, line))
        x += needs
    return places


def legend_height(names: Sequence[str], width: int) -> int:
    return (_legend_places(names, width)[-1][1] + 1) * 20 + 6 if len(names) > 1 else 0


def legend(names: Sequence[str], width: int) -> str:
    """The names in their colours; nothing for a single one."""
    parts = []
    for i, (name, (x, line)) in enumerate(zip(names, _legend_places(names, width), strict=True)):
        colour = f"var(--s{i % N_COLOURS})"
        parts.append(
            f'<rect x="{x:.1f}" y="{line * 20 + 2}" width="12" height="12" fill="{colour}"/>'
            + text(x + 18, line * 20 + 12, name)
        )
    return "".join(parts) if len(names) > 1 else ""


def frame(title: str, height: float, parts: Sequence[str]) -> str:
    return (
        f'<figure><figcaption>{escape(title)}</figcaption><svg viewBox="0 0 {WIDTH} {height:.0f}" '
        f'role="img" aria-label="{escape(title, quote=True)}">{"".join(parts)}</svg></figure>'
    )
