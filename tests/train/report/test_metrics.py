"""metrics.jsonl, also across kills and resumes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from metrics_rows import row, write

from fusedgpt.train.report.metrics import MetricsFile, read_metrics


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The rows as strict JSON, which has no NaN."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_rows_are_as_documented(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    sink.step(row(7, loss=1 / 3))
    sink.evaluation(7, 2.5, 1.25)
    sink.evaluation(8, 2.5, None)
    sink.samples(8, {"": "one\n料理", "The": "The cat"})
    sink.close()
    assert json_lines(tmp_path / "metrics.jsonl") == [
        {
            "step": 7,
            "loss": 1 / 3,  # to the last bit, so that two runs can be compared
            "grad_norm": 1.5,
            "learning_rate": 3e-4,
            "tokens": 1792,
            "tokens_per_second": 1234.6,
            "mfu": 0.4,
            "skipped": False,
            "seconds": 0.864,
        },
        {"step": 7, "val_loss": 2.5, "val_bits_per_byte": 1.25},
        {"step": 8, "val_loss": 2.5, "val_bits_per_byte": None},
        {"step": 8, "prompt": "", "sample": "one\n料理"},
        {"step": 8, "prompt": "The", "sample": "The cat"},
    ]


def test_what_is_not_finite_is_null(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    sink.step(replace(row(1, loss=math.nan, skipped=True), tokens_per_second=math.nan, mfu=math.nan))
    sink.step(replace(row(2, loss=-math.inf), tokens_per_second=math.inf, mfu=0.1))
    sink.evaluation(2, math.inf, math.nan)
    sink.close()
    first, second, evaluation = json_lines(tmp_path / "metrics.jsonl")
    assert (first["loss"], first["tokens_per_second"], first["mfu"]) == (None, None, None)
    assert first["skipped"] is True
    assert (second["loss"], second["tokens_per_second"], second["mfu"]) == (None, None, 0.1)
    assert evaluation == {"step": 2, "val_loss": None, "val_bits_per_byte": None}


def test_a_row_is_in_the_file_at_once(tmp_path: Path) -> None:
    sink = MetricsFile(tmp_path / "metrics.jsonl", resume_step=0)
    write(sink, range(1, 4))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    sink.close()


@pytest.mark.parametrize("resume_step", [0, 1, 10, 17, 23])
def test_a_resume_leaves_no_gap_and_no_repeat(tmp_path: Path, resume_step: int) -> None:
    path, straight = tmp_path / "metrics.jsonl", tmp_path / "straight.jsonl"
    for file, steps in ((straight, range(1, 31)), (path, range(1, 24))):
        sink = MetricsFile(file, resume_step=0)
        write(sink, steps)
        sink.close()
    sink = MetricsFile(path, resume_step=resume_step)
    write(sink, range(resume_step + 1, 31))
    sink.close()
    assert path.read_bytes() == straight.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "straight.jsonl"]


def test_a_last_line_cut_anywhere_is_dropped_or_whole(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path, resume_step=0)
    write(sink, range(1, 4))
    sink.close()
    whole = path.read_bytes()
    start = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(start, len(whole)):
        path.write_bytes(whole[:cut])
        survives = cut == len(whole) - 1  # only the newline is missing
        assert [r["step"] for r in read_metrics(path)] == [1, 2, 3][: 2 + survives]
        MetricsFile(path, resume_step=3).close()
        assert path.read_bytes() == (whole if survives else whole[:start])


def test_a_failed_rewrite_leaves_the_log_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = MetricsFile(path, resume_step=0)
    write(sink, range(1, 9))
    sink.close()
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        MetricsFile(path, resume_step=4)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "junk", [b"no json\n", b"[1]\n", b"{}\n", b'{"step": "1"}\n', b"\xff\n", b"[" * 99999 + b"\n"]
)
def test_reading_says_which_line_is_none_of_ours(tmp_path: Path, junk: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + junk + b'{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2: not a row of metrics"):
        read_metrics(path)
    MetricsFile(path, resume_step=3).close()  # a resume goes on all the same
    assert read_metrics(path) == [{"step": 1}, {"step": 3}]


def test_importing_the_sinks_imports_neither_tensorboard_nor_torch() -> None:
    code = "import sys, fusedgpt.train.report.metrics, fusedgpt.train.report.loggers; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"tensorboard", "wandb", "trackio", "torch", "rich"} & set(done.stdout.split())
