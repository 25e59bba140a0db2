"""Writes the sections of a report as Markdown or as one HTML file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from string import Template

from benchmarks.report.charts import svg
from benchmarks.report.sections import OURS, Cells, Section


def markdown(sections: Sequence[Section], *, level: int = 2) -> str:
    """The sections, without a title above them."""
    parts = []
    for section in sections:
        parts += [f"{'#' * level} {section.title}", *section.words]
        for chart in section.charts:
            parts += [f"**{chart.title}**", chart.markdown()]
        parts += [_markdown_table(section.table)] if section.table else []
    return "\n\n".join(part for part in parts if part) + "\n"


def _used_columns(table: Sequence[Cells]) -> list[str]:
    """In their order, without those that are empty in every row."""
    names = dict.fromkeys(name for cells in table for name in cells)
    return [name for name in names if any(cells.get(name) for cells in table)]


def _markdown_table(table: Sequence[Cells]) -> str:
    names = _used_columns(table)
    lines = [names, ["---"] * len(names), *([cells.get(name, "") for name in names] for cells in table)]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines)


def html(title: str, sections: Sequence[Section]) -> str:
    """One file that needs no other, light or dark as the reader's browser is."""
    body = []
    for section in sections:
        body.append(f"<h2>{escape(section.title)}</h2>")
        body += [f"<p>{escape(words)}</p>" for words in section.words]
        for chart in section.charts:
            caption = f"<figcaption>{escape(chart.title)}</figcaption>"
            body.append(f"<figure>{caption}{svg(chart)}</figure>")
        body += [_html_table(section.table)] if section.table else []
    return _PAGE.substitute(title=escape(title), body="\n".join(body))


def _html_table(table: Sequence[Cells]) -> str:
    names = _used_columns(table)
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = []
    for cells in table:
        bad = cells.get("verdict") == "REGRESSION" or "why" in cells
        style = "bad" if bad else "ours" if cells.get("contender") == OURS else ""
        row = "".join(f"<td>{escape(cells.get(name, ''))}</td>" for name in names)
        lines.append(f'<tr class="{style}">{row}</tr>')
    return f'<div class="wide"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
:root { color-scheme: light dark; --line: #8885; --ours: #1f6fc426; --bad: #d9362d33; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1040px; margin: 0 auto; padding: 16px; }
h2 { margin-top: 36px; }
p { max-width: 75ch; }
.wide, figure { overflow-x: auto; margin: 24px 0; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: 3px 10px 3px 0; text-align: left; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
.ours { background: var(--ours); }
.bad { background: var(--bad); }
.bad td { white-space: normal; }
figcaption { font-weight: 600; }
svg { max-width: 100%; height: auto; }
svg text { fill: currentColor; }
</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
