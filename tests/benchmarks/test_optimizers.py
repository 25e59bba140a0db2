"""The comparison of optimizers: its curves, its picture."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.report import record
from benchmarks.workloads import optimizers

ROOT = Path(__file__).parents[2]


def test_a_curve_leaves_out_the_time_of_validations() -> None:
    rows = [
        {"step": 1, "loss": 4.0, "seconds": 1.0},
        {"step": 2, "loss": 3.0, "seconds": 1.5},
        {"step": 2, "val_loss": 3.5},
        {"step": 3, "loss": 2.0, "seconds": 9.0},  # of which the validation took 7
        {"step": 4, "loss": 2.0, "seconds": 9.5},
        {"step": 4, "val_loss": 2.5},
    ]
    assert optimizers.curve(rows) == [[2, 1.5, 3.5], [4, 2.5, 2.5]]


def test_both_optimizers_train_and_are_drawn(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 99)
    program = [sys.executable, "-m", "benchmarks.workloads.optimizers"]
    command = [*program, "--text", str(text), "adamw", "muon", "--seeds", "3", "--steps", "20"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True)
    results = tmp_path / "results.jsonl"
    results.write_text(done.stdout)
    adamw, muon = record.read(results)
    assert [len(row["curve"]) for row in (adamw, muon)] == [10, 10]
    assert muon["val_loss"] < 0.9 * adamw["val_loss"]
    picture = tmp_path / "losses.svg"
    subprocess.run([*program, "--plot", str(picture), str(results)], cwd=ROOT, check=True)
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize("options", [["--seeds", "0"], ["--text", "x", "sgd"]])
def test_what_it_cannot_run_it_refuses(options: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["optimizers", *options])
    with pytest.raises(SystemExit, match="2"):
        optimizers.parse()
