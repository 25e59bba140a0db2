"""The page that compares runs."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

from fusedgpt.kernels.errors import InputError
from fusedgpt.train.config import ConfigError, build_config
from fusedgpt.train.report.comparison import compare


def run(folder: Path, *, peak: int | None, **settings: object) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(build_config(settings).to_toml())
    result = None if peak is None else {"best_val_loss": 1.25, "peak_bytes": peak}
    (folder / "run.json").write_text(json.dumps({"command": "train", "result": result}))
    rows: list[dict[str, object]] = []
    for step in range(1, 41):
        speed = None if step == 1 else 100.0 * step
        row = {"step": step, "loss": 4.0 / step, "tokens": 64 * step, "seconds": 0.5 * step}
        rows.append({**row, "tokens_per_second": speed})
    rows += [{"step": 40, "val_loss": 1.25}, {"step": 40, "prompt": "", "sample": "a"}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_page_of_two_runs(tmp_path: Path) -> None:
    runs = [
        run(tmp_path / "a" / "run<1>", peak=2_000_000_000, seed=1),
        run(tmp_path / "b" / "run<1>", peak=None, seed=2, batch_size=5),
    ]
    page = compare(runs, tmp_path / "page.html").read_text()
    table, settings = page.split("</table>")[0], page.split("Settings that differ")[1]
    first, second = table.split("<tr>")[2:]
    assert "a/run&lt;1&gt;" in first
    assert "run<1>" not in page
    for cell in ("40", "2,560", "20", "1.2500", "2,100", "2.00 GB"):
        assert f"<td>{cell}</td>" in first
    assert "GB" not in second
    differing = [row.split("</td>")[0].removeprefix("<td>") for row in settings.split("<tr>")[2:]]
    assert differing == ["train.batch_size", "train.seed"]
    assert "<td>2</td><td>5</td>" in settings
    charts = page.split('<div class="charts">')[1].split("</div>")[0].split("</svg>")[:-1]
    assert len([ElementTree.fromstring(chart + "</svg>") for chart in charts]) == 3


def test_what_is_no_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"run\.json cannot be read"):
        compare([tmp_path], tmp_path / "page.html")
    empty = run(tmp_path / "a", peak=None)
    (empty / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="has no training loss yet"):
        compare([empty], tmp_path / "page.html")
