"""The whole benchmark suite at toy sizes, and that nothing wrong is given a speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.report import record
from benchmarks.workloads import jobs

ROOT = Path(__file__).parents[2]
WRONG_LOSS = """
import fusedgpt.kernels.linear_cross_entropy as op
right = op.linear_cross_entropy
op.linear_cross_entropy = lambda *args, **options: right(*args, **options) * 1.02
"""
WRONG_GELU = """
import os
os.environ["TRITON_INTERPRET"] = "1"
import fusedgpt.kernels.activation as op
right = op.bias_gelu
op.bias_gelu = lambda x, bias: right(x, bias) * 1.01
"""
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="gpu_check runs these on a GPU, in full")


def bench(out: Path, *options: str, planted: str = "") -> subprocess.CompletedProcess[str]:
    """scripts/bench; every Python it starts first runs `planted`."""
    environment = {**os.environ, "PYTHON": sys.executable}
    if planted:
        site = out.with_name("site")
        site.mkdir(exist_ok=True)
        (site / "sitecustomize.py").write_text(planted)
        environment["PYTHONPATH"] = str(site)
    command = [ROOT / "scripts" / "bench", "--out", out, "--minutes", "4", "--toy", *options]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd="/")


def rows(out: Path) -> list[dict[str, Any]]:
    every = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    return [row for row in every if "suite" in row]


def test_the_whole_suite_runs_and_reports_within_three_minutes(tmp_path: Path) -> None:
    start, out = time.monotonic(), tmp_path / "out"
    done = bench(out)
    assert done.returncode == 0, done.stdout + done.stderr + (out / "log.txt").read_text()[-5000:]
    assert time.monotonic() - start < 180
    found = rows(out)
    assert [row["suite"] for row in found if row["suite"] == "ceilings"] == [
        found[0]["suite"],
        found[-1]["suite"],
    ]
    for row in found:
        assert {"device", "driver", "python", "torch", "triton", "commit", "time", "clock_mhz"} <= set(row)
        assert row.get("ms", 1.0) > 0
        assert row["suite"] not in ("kernels", "train") or row["gap"] > 0
    names = {row["name"] for row in found if row["suite"] == "everyday"}
    assert names >= {
        "sampling",
        "help",
        "first_step",
        "templates",
        "tokenise",
        "save folder",
        "load checkpoint",
    }
    ops = {row["name"].split()[0] for row in found if row["suite"] == "kernels"}
    assert ops >= {
        "attention",
        "decode_attention",
        "layer_norm",
        "bias_gelu",
        "linear_cross_entropy",
        "adamw",
        "muon",
        "dropout",
    }
    train = {(row["name"], row["contender"]): row for row in found if row["suite"] == "train"}
    assert set(train) == {
        ("step", "ours"),
        ("step", "plain"),
        ("ablation", "ours"),
        ("ablation", "ours-without-linear"),
    }
    ours = train["step", "ours"]
    assert len(ours["runs_ms"]) == 2
    assert min(ours["rate"], ours["peak_mb"], ours["first_step_s"], ours["mfu_causal_measured"]) > 0
    assert "█" in (out / "report.html").read_text()
    assert "## Training" in (out / "report.md").read_text()


def test_a_wrong_loss_gets_no_training_speed(tmp_path: Path) -> None:
    done = bench(tmp_path / "out", "--parts", "train", planted=WRONG_LOSS)
    assert done.returncode == 1
    assert "NO SPEED step toy 2 x 32 fp32 ours: no speed: losses" in done.stdout
    by_name = {row["contender"]: row for row in rows(tmp_path / "out")}
    assert "ms" not in by_name["ours"]
    assert "rate" not in by_name["ours"]
    assert by_name["plain"]["ms"] > 0  # which is right


def test_a_wrong_kernel_gets_no_speed(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "planted",
        "-p",
        "no:cacheprovider",
    ]
    (tmp_path / "planted.py").write_text(WRONG_GELU)
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"}
    environment["BENCHMARK_RESULTS"] = str(tmp_path / "results.jsonl")
    files = [f"benchmarks/kernels/test_bench_{name}.py" for name in ("activation", "dropout")]
    done = subprocess.run(
        [*command, *files, "-k", "forward and ours"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    wrong, right = sorted(rows(tmp_path), key=lambda row: "ms" in row)
    assert wrong["fault"].startswith("no speed for a wrong kernel: bias_gelu (3, 64) fp32 forward")
    assert "ms" not in wrong
    assert right["name"] == "dropout forward"
    table = done.stdout[done.stdout.index("kernel benchmarks") :]
    assert "| dropout forward" in table
    assert "| bias_gelu forward" not in table


def test_wrong_usage_is_told_in_one_line(tmp_path: Path) -> None:
    done = bench(tmp_path / "out", "--parts", "train,trains")
    assert done.returncode == 2
    assert done.stderr.startswith("bench: --parts here: ceilings, train, kernels")
    assert not (tmp_path / "out").exists()


NANOGPTS_LOOP = """
import pickle, sys
from pathlib import Path
assert {"--device=cpu", "--n_layer=4", "--max_iters=10", "--dataset=text"} <= set(sys.argv)
ids = Path("data/text/train.bin").read_bytes() + Path("data/text/val.bin").read_bytes()
meta = pickle.loads(Path("data/text/meta.pkl").read_bytes())
assert "".join(meta["itos"][i] for i in ids[::2]) == Path(TEXT).read_text()
print("step 0: train loss 4.2000, val loss 4.1000")
print("step 10: train loss 1.8000, val loss 1.8500")
"""


def test_whole_jobs_beside_nanogpts_loop(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be, that is the question. " * 60)
    peer = tmp_path / "peer"
    peer.mkdir()
    for name in ("model.py", "configurator.py"):
        (peer / name).touch()
    (peer / "train.py").write_text(NANOGPTS_LOOP.replace("TEXT", repr(str(text))))
    names = ["pipeline", "shakespeare", "muon"]
    options = [*names, "--peer", peer, "--text", text, "--presets", "toy", "--steps", "10"]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.workloads.jobs", *options],
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    pipeline, ours, half, theirs, adamw, muon = map(json.loads, done.stdout.splitlines())
    assert (pipeline["name"], pipeline["shape"]) == ("pipeline", "toy")
    assert pipeline["ms"] > pipeline["train_ms"] > 0
    assert (ours["contender"], ours["shape"]) == ("ours", "4 layers of 128, 12 x 64, 10 steps")
    assert 1.0 < ours["val_loss"] < 4.0
    assert (ours["goal_ms"] is None) is (ours["val_loss"] > ours["goal"])
    assert (half["contender"], half["shape"]) == ("ours-muon", "4 layers of 128, 12 x 64, 5 steps")
    assert (theirs["contender"], theirs["val_loss"]) == ("peer", 1.85)
    assert 0 < theirs["goal_ms"] < theirs["ms"]
    assert [adamw["contender"], muon["contender"]] == ["ours", "ours-muon"]
    assert muon["goal"] == adamw["goal"] == adamw["val_loss"]
    assert 0 < adamw["goal_ms"] < adamw["ms"]
    assert (muon["goal_ms"] is None) is (muon["val_loss"] > muon["goal"])


def test_a_job_that_fails_is_told_and_a_wrong_one_refused(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.workloads.jobs"]
    (tmp_path / "empty").touch()
    done = subprocess.run(
        [*command, "shakespeare", "--text", tmp_path / "empty"], capture_output=True, cwd=ROOT
    )
    assert done.returncode == 1
    assert "empty" in json.loads(done.stdout)["fault"]
    done = subprocess.run([*command, "shakespeare"], capture_output=True, cwd=ROOT)
    assert done.returncode == 2
    assert b"needs --text" in done.stderr


def test_what_raises_is_a_fault_and_the_rest_is_measured(capsys: pytest.CaptureFixture[str]) -> None:

    def broken() -> Iterator[dict[str, object]]:
        yield {"name": "first half", "ms": 1.0}
        raise KeyError("lost\nhere")

    good = {"good": lambda: [{"name": "good", "ms": 2.0}]}
    assert record.emit_each("everyday", {"broken": broken, **good}) == 1
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["first half", "broken", "good"]
    assert rows[1]["fault"] == r"KeyError: 'lost\nhere'"
    assert record.emit_each("everyday", good) == 0
    assert record.emit_each("everyday", {"bad": lambda: [{"name": "bad", "fault": "wrong"}]}) == 1


def test_losses_that_part_from_the_references_get_no_speed() -> None:
    falling = [10.0 - 0.1 * i for i in range(50)]
    for late, fault in ((0.01, False), (0.05, True), (float("nan"), True)):
        ours = [*falling[:40], *(x + late for x in falling[40:])]
        first, second = jobs.judged([{"ms": 1.0}, {"ms": 2.0}], [ours, falling])
        assert ("fault" in first, "ms" in first) == (fault, not fault)
        assert second == {"ms": 2.0}
