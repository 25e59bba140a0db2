"""`fusedgpt` on two ranks: what is printed, what is on disk, and how it ends."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ranks import command, launch

from fusedgpt.train import pipeline
from fusedgpt.train.data.tokens.dataset import TokenDataset
from fusedgpt.train.loop.step import Step
from fusedgpt.train.loop.validation import Validation
from fusedgpt.train.report.step_log import TrainingLog
from fusedgpt.train.run import ranks as ranks_
from fusedgpt.train.run.checkpoint import CheckpointStore

TINY = [
    "--tokenizer", "byte", "--n-layer", 1, "--n-head", 1, "--n-embd", 8, "--block-size", 16,
    "--device", "cpu", "--batch-size", 2, "--val-fraction", 0.2,
]  # fmt: skip


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text("\n\n".join(f"{i} and {i + 1} make {2 * i + 1}" for i in range(99)))
    return tmp_path / "text.txt"


def said(outcomes: list[tuple[int, str, str]]) -> str:
    """What all ranks together wrote as errors."""
    return "".join(
        line for _, _, err in outcomes for line in err.splitlines(keepends=True) if "fusedgpt: " in line
    )


def test_train_and_eval_on_two_ranks(text: Path) -> None:
    """One log, one run, and the model folder of one process to the byte.

    Each rank has a window, and sums of two windows' gradients have no order.
    """
    folder = text.parent
    run = ["train", "--data", text, *TINY, "--batch-size", 1, "--batch-tokens", 32, "--json"]
    run += ["--steps", 4, "--eval-every", 2]
    (code, out, err), silent = command(2, [*run, "--run-dir", "run"], folder)
    assert (code, *silent) == (0, 0, "", ""), err
    model = folder / json.loads(out)["model_path"]
    assert sorted(path.name for path in (folder / "models").iterdir()) == [model.name]
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    ((_, out, _),) = command(1, [*run, "--run-dir", "alone", "--output-dir", "models-of-one"], folder)
    check_same_bytes(model, folder / json.loads(out)["model_path"])
    check = ["eval", model, "--data", text, "--device", "cpu", "--json"]
    (_, on_two, _), other = command(2, check, folder)
    ((_, on_one, _),) = command(1, check, folder)
    one, two = json.loads(on_one), json.loads(on_two)
    assert other == (0, "", "")
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-12)
    assert [two[name] for name in ("tokens", "bytes", "documents")] == [
        one[name] for name in ("tokens", "bytes", "documents")
    ]


def check_same_bytes(ours: Path, theirs: Path) -> None:
    """Two model folders differ in times and memory only."""
    names = {path.name for path in ours.iterdir()}
    assert names == {path.name for path in theirs.iterdir()} > {"model.safetensors", "generation_info.json"}
    for name in names - {"generation_info.json"}:
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    infos = [json.loads((folder / "generation_info.json").read_text()) for folder in (ours, theirs)]
    for info in infos:
        del info["created"]
        for name in ("seconds", "tokens_per_second", "peak_bytes"):
            del info["training"][name]
    assert infos[0] == infos[1]


def test_create_on_two_ranks_makes_the_texts_once(tmp_path: Path) -> None:
    arguments = ["create", "A GPT that writes recipes", *TINY, "--steps", 2, "--json"]
    arguments += ["--raw-tokens", 2000, "--refined-tokens", 1000, "--run-dir", "run"]
    (code, out, err), silent = command(2, arguments, tmp_path)
    assert (code, *silent) == (0, 0, "", ""), err
    assert (tmp_path / json.loads(out)["model_path"] / "dataset.json").read_text() == (
        tmp_path / "run/dataset.json"
    ).read_text()


def other_text() -> None:
    """Rank 1 has another text."""
    TokenDataset.fingerprint = "another"  # type: ignore[assignment,method-assign]


def other_torch() -> None:
    """Rank 1 has another version."""
    pipeline.versions = lambda: {"torch": "1.0"}  # type: ignore[assignment]


def broken_disk() -> None:
    """Rank 1 cannot read."""

    def fails(*_: Any, **__: Any) -> None:
        raise OSError("the disk is broken")

    TokenDataset.train_batch = fails  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    ("changes", "fault", "code", "message"),
    [
        (["--batch-size", 3], None, 2, "3 windows cannot be divided among 2 ranks: make --batch-tokens a"),
        (["--compile", "model", "--parallel", "fsdp"], None, 2, "FSDP gathers block by block: use --compile"),
        (["--no-such-option"], None, 2, "No such option"),
        (["--data", "-"], None, 1, "- can be read only once, but every rank reads the text"),
        ([], other_text, 1, "the ranks differ in training text: rank 1 has another, rank 0 has "),
        ([], other_torch, 1, "the ranks differ in torch: rank 1 has 1.0, rank 0 has "),
        ([], broken_disk, 1, "rank 1: the disk is broken"),
    ],
)
def test_an_error_of_any_rank_is_said_once(
    text: Path, changes: list[Any], fault: Any, code: int, message: str
) -> None:
    arguments = ["train", "--data", text, *TINY, "--steps", 4, "--run-dir", "run", *changes]
    outcomes = command(2, arguments, text.parent, faulty={1: fault} if fault else {})
    assert [outcome[0] for outcome in outcomes] == [code] * 2
    assert said(outcomes).count("fusedgpt: ") == 1
    assert message in said(outcomes)


# --- ends that nobody planned ---

LONG = [
    *TINY,
    "--steps",
    100000,
    "--save-every",
    5,
    "--eval-every",
    7,
    "--run-dir",
    "run",
    "--resume",
    "auto",
]


def saved(folder: Path) -> list[int]:
    return CheckpointStore(folder / "run/checkpoints", keep_last=1).steps()


def wait_for_a_save(folder: Path) -> None:
    deadline = time.monotonic() + 60
    while not saved(folder) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert saved(folder)


def impatient() -> None:
    """Every rank gives the others a few seconds."""
    ranks_.TIMEOUT = 6.0


def test_a_stop_of_one_rank_is_all_ranks_stop(text: Path) -> None:
    """It is saved after the same step on all, and a resume goes on behind it, here with one rank."""
    processes, _store = launch(2, ["train", "--data", text, *LONG], text.parent)
    wait_for_a_save(text.parent)
    os.kill(processes[1].pid, signal.SIGTERM)
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [128 + signal.SIGTERM] * 2
    err = (text.parent / "err0").read_text()
    (step,) = map(
        int, re.findall(r"rank 0: stopped by SIGTERM after step (\d+); go on with --resume run", err)
    )
    assert saved(text.parent) == [step]
    ((code, _, _),) = command(1, ["train", "--data", text, *LONG, "--steps", step + 1], text.parent)
    assert code == 0


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_the_others_end_when_a_rank_is_gone(text: Path, number: signal.Signals) -> None:
    """Row 9 of docs/dev/fault_tests.md, with a shorter timeout than users have."""
    faulty = dict.fromkeys(range(2), impatient)
    processes, _store = launch(2, ["train", "--data", text, *LONG], text.parent, faulty=faulty)
    wait_for_a_save(text.parent)
    os.kill(processes[0].pid, number)
    processes[1].join(60)
    assert processes[1].exitcode == 1
    said = (text.parent / "err1").read_text()
    assert re.search("rank 1: (another rank is gone or hangs|rank 0 has shown no sign of life)", said), said
    processes[0].kill()
    processes[0].join()


CRASHING = """
import os, signal, sys
from fusedgpt.train.cli.main import main
from fusedgpt.train.loop.step import Step
run, steps = Step.run, []
def crashing(self, batch):
    steps.append(0)
    if os.environ["RANK"] == "1" and os.environ["TORCHELASTIC_RESTART_COUNT"] == "0" and len(steps) == 8:
        os.kill(os.getpid(), signal.SIGKILL)
    return run(self, batch)
Step.run = crashing
main(sys.argv[1:])
"""


def test_torchrun_restarts_a_run_and_it_goes_on(text: Path) -> None:
    """Here with a sharded model, which samples while it is trained."""
    folder = text.parent
    (folder / "crashing.py").write_text(CRASHING)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    torchrun += ["--max-restarts", "1", "crashing.py", "train", "--data", str(text), *map(str, LONG)]
    done = subprocess.run(
        [*torchrun, "--steps", "12", "--json", "--parallel", "fsdp", "--sample-every", "10"],
        cwd=folder,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["steps"] == 12
    assert "resuming after step 5 of 12" in done.stderr
    assert "step 10: sample" in done.stderr
    rows = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 13))


# Where a rank dies: what it enters there, and how long that takes at most, in seconds.
PLACES: dict[str, tuple[Any, str, float]] = {
    "start": (None, "", 2.5),
    "step": (Step, "run", 0.01),
    "validation": (Validation, "run", 0.01),
    "save": (TrainingLog, "save", 0.05),
}


def dies(place: str, nth: int, delay: float) -> None:
    """This rank is killed `delay` s after it enters a place for the nth time."""
    kill = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL))
    owner, name, _ = PLACES[place]
    if owner is None:
        kill.start()
        return
    enter, entered = getattr(owner, name), itertools.count(1)

    def entering(*args: Any, **options: Any) -> Any:
        if next(entered) == nth:
            kill.start()
        return enter(*args, **options)

    setattr(owner, name, entering)


def logged(folder: Path) -> list[int]:
    """The steps in the log of the run; its last line may be cut."""
    path = folder / "run/metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["step"] for line in lines if line.endswith("}") and '"loss"' in line]


@pytest.mark.soak
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ranks", [2, 4])
def test_kills_at_random_moments_leave_a_run_that_goes_on(text: Path, ranks: int, place: str) -> None:
    """Row 9 of docs/dev/fault_tests.md: seven kills of a random rank; no torchrun ends the others."""
    chance, last = random.Random(f"{ranks} {place}"), 0
    run = ["train", "--data", text, *LONG, "--batch-size", 4]
    for _ in range(7):
        victim, nth, delay = chance.randrange(ranks), chance.randint(1, 9), chance.random() * PLACES[place][2]
        fault = {victim: partial(dies, place, nth, delay)}
        processes, _store = launch(ranks, run, text.parent, faulty=fault)
        processes[victim].join(60)
        assert processes[victim].exitcode == -signal.SIGKILL, (text.parent / f"err{victim}").read_text()
        killed = time.monotonic()
        for rank, process in enumerate(processes):
            process.join(max(0.0, 60 - (time.monotonic() - killed)))
            assert process.exitcode not in (0, None), (rank, (text.parent / f"err{rank}").read_text())
        seconds, now, steps = (
            time.monotonic() - killed,
            max(saved(text.parent), default=0),
            logged(text.parent),
        )
        print(f"rank {victim} of {ranks} in {place}: all ended after {seconds:.1f} s, step {now} is saved")
        assert now >= last  # nothing that was saved is lost
        assert max(steps, default=0) <= now + 2 * 5  # one save in flight, one not yet begun
        last = now
    ((code, _, err),) = command(1, [*run, "--steps", last + 1], text.parent)
    assert code == 0, err
    assert logged(text.parent) == list(range(1, last + 2))


@pytest.mark.soak
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_end_within_a_minute_of_a_hang(text: Path, victim: int) -> None:
    processes, _store = launch(2, ["train", "--data", text, *LONG], text.parent)
    wait_for_a_save(text.parent)
    os.kill(processes[victim].pid, signal.SIGSTOP)
    stopped = time.monotonic()
    processes[1 - victim].join(60)
    assert processes[1 - victim].exitcode == 1
    print(f"ended {time.monotonic() - stopped:.0f} s after the hang")
    processes[victim].kill()
