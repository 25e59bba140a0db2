"""Writes the sections of a report as Markdown or as one HTML file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from string import Template
from typing import NamedTuple

OURS = "ours"
Cells = dict[str, str]  # column -> text
_BAR = 30  # characters of the longest bar


class Bar(NamedTuple):
    """From `start` to start + value; a negative value goes left."""

    label: str
    value: float
    note: str  # the value as text
    start: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading and what is under it."""

    title: str
    words: Sequence[str] = ()
    charts: Mapping[str, Sequence[Bar]] = field(default_factory=dict)  # by title
    table: Sequence[Cells] = ()


def bar_chart(bars: Sequence[Bar]) -> str:
    """Lines of text whose bars are full blocks."""
    end = max(max(bar.start, bar.start + bar.value) for bar in bars) or 1.0
    width = max(len(bar.label) for bar in bars)
    lines = []
    for bar in bars:
        blank, full = sorted(round(_BAR * x / end) for x in (bar.start, bar.start + bar.value))
        blocks = " " * blank + "█" * max(1, full - blank)
        lines.append(f"{bar.label:<{width}}  {blocks:<{_BAR + 1}} {bar.note}")
    return "\n".join(lines)


def _lines(table: Sequence[Cells]) -> list[list[str]]:
    """The names of the columns, then the rows; columns that are empty in every row are left out."""
    names = dict.fromkeys(name for cells in table for name in cells)
    used = [name for name in names if any(cells.get(name) for cells in table)]
    return [used, *([cells.get(name, "") for name in used] for cells in table)]


def markdown(sections: Sequence[Section], *, level: int = 2) -> str:
    """The sections, without a title above them."""
    parts = []
    for section in sections:
        parts += [f"{'#' * level} {section.title}", *section.words]
        for title, bars in section.charts.items():
            parts += [f"**{title}**", f"```text\n{bar_chart(bars)}\n```"]
        if section.table:
            names, *rows = _lines(section.table)
            lines = [names, ["---"] * len(names), *rows]
            cells = (" | ".join(cell.replace("|", "/") for cell in line) for line in lines)
            parts.append("\n".join(f"| {line} |" for line in cells))
    return "\n\n".join(parts) + "\n"


def html(title: str, sections: Sequence[Section]) -> str:
    """One file that needs no other, light or dark as the reader's browser is."""
    body = []
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        body += [f"<p>{escape(words)}</p>" for words in section.words]
        for caption, bars in section.charts.items():
            body.append(f"<h3>{escape(caption)}</h3>\n<pre>{escape(bar_chart(bars))}</pre>")
        if section.table:
            names, *rows = _lines(section.table)
            lines = ["".join(f"<th>{escape(name)}</th>" for name in names)]
            lines += ["".join(f"<td{_style(cell)}>{escape(cell)}</td>" for cell in row) for row in rows]
            body.append("<table>" + "".join(f"<tr>{line}</tr>\n" for line in lines) + "</table>")
    return _PAGE.substitute(title=escape(title), body="\n".join(body))


def _style(cell: str) -> str:
    return {OURS: ' class="ours"', "REGRESSION": ' class="bad"'}.get(cell, "")


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>$title</title>
<style>
:root { color-scheme: light dark; }
body { font-family: sans-serif; max-width: 1100px; margin: auto; padding: 1em; }
pre, table { overflow-x: auto; display: block; line-height: 1.5; }
pre { font-size: min(13px, 1.9vw); }
td:first-child { white-space: nowrap; }
th, td { text-align: left; padding-right: 1em; border-bottom: 1px solid #8885; }
.ours { font-weight: bold; }
.bad { background: #d9362d66; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
