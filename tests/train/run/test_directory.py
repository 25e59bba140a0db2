"""Run directories: what they hold, who may use them, and kill -9 while one is written."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import config, in_fresh_process, outcome, train_tiny

from fusedgpt.train.config import ConfigError, build_config, read_toml
from fusedgpt.train.run.checkpoint import CheckpointError
from fusedgpt.train.run.directory import directory_of, find_run, open_run, read_run, run_path


def test_a_run_directory_holds_what_a_resume_needs(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_tiny(run_dir, steps=10)
    names = {path.name for path in run_dir.iterdir() if not path.name.startswith("trainer.")}
    assert names == {"config.toml", "run.json", "checkpoints", "metrics.jsonl", "loss.png"}
    assert run_dir.stat().st_mode & 0o777 == 0o700
    assert build_config({}, layers=[read_toml(run_dir / "config.toml")]) == config(steps=10)
    command, layer = read_run(run_dir)
    assert command["command"] == "train"
    assert layer["train"]["steps"] == 10


def test_a_fresh_run_does_not_mix_with_an_older_one(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_tiny(run_dir, steps=3)
    with pytest.raises(ConfigError, match=f"{run_dir} holds a run: go on with --resume {run_dir}"):
        train_tiny(run_dir, steps=3)


def test_no_whole_checkpoint_is_no_fresh_start(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    train_tiny(run_dir, steps=3)
    (run_dir / "checkpoints/step-00000003/model.safetensors").write_bytes(b"?")
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole: .*model\.safetensors"):
        train_tiny(run_dir, resume=run_dir, steps=5)


def test_keep_last_0_leaves_no_checkpoint(tmp_path: Path) -> None:
    train_tiny(tmp_path / "run", steps=10, save_every="3", keep_last=0)
    assert not list((tmp_path / "run" / "checkpoints").iterdir())


def test_a_run_that_fails_before_it_began_leaves_nothing(tmp_path: Path) -> None:
    with (
        pytest.raises(ValueError, match="no"),
        open_run(tmp_path / "run", config(), {"command": "train"}, resume=None),
    ):
        raise ValueError("no")
    assert not list(tmp_path.iterdir())


def test_a_second_trainer_is_refused(tmp_path: Path) -> None:
    """Row 10 of docs/dev/fault_tests.md."""
    train_tiny(tmp_path / "run", steps=3)
    with (
        open_run(tmp_path / "run", config(), {"command": "train"}, resume=tmp_path / "run"),
        pytest.raises(ValueError, match=r"in use by process \d+"),
    ):
        in_fresh_process(train_tiny, tmp_path / "run", resume=tmp_path / "run")


def test_resume_auto_finds_the_newest_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert find_run("auto", None, {"command": "train"}) is None
    for name in ("a", "b"):
        train_tiny(Path("runs") / name, steps=2)
    (Path("runs") / "c").mkdir()  # no run
    assert find_run("auto", None, {"command": "train"}) == Path("runs/b")
    assert find_run("auto", Path("runs/a"), {}) == Path("runs/a")
    assert find_run("auto", Path("elsewhere"), {}) is None
    assert find_run("runs/a", None, {}) == Path("runs/a")
    step = Path("runs/a/checkpoints/step-00000002")
    found = find_run(str(step), None, {})
    assert found is not None
    assert (found, directory_of(found)) == (step, Path("runs/a"))
    for wrong in ("runs/c", "absent", "/"):
        with pytest.raises(ConfigError, match="is neither a run directory nor one of its checkpoints"):
            find_run(wrong, None, {})
    assert str(run_path("../Évil name", None, None, None)).startswith("runs/")


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 10**5, "\xff"])
def test_a_damaged_run_json_is_one_line(tmp_path: Path, content: str) -> None:
    train_tiny(tmp_path / "run", steps=2)
    (tmp_path / "run" / "run.json").write_text(content, encoding="latin-1")
    with pytest.raises(ConfigError, match=r"run\.json"):
        read_run(tmp_path / "run")


@pytest.mark.parametrize("kills", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_kill_9_while_training_and_saving(tmp_path: Path, kills: int) -> None:
    """Row 1 of docs/dev/fault_tests.md: at most one save interval is lost, the end is the same bits."""
    steps, every = 4 * kills, 3
    in_fresh_process(train_tiny, tmp_path / "expected", steps=steps)
    context = multiprocessing.get_context("forkserver")
    run_dir = tmp_path / "run"
    waits = random.Random(0)
    done = 0
    for _ in range(kills):
        resume = run_dir if (run_dir / "run.json").exists() else None
        options: dict[str, Any] = {"resume": resume, "steps": steps, "save_every": str(every)}
        child = context.Process(target=train_tiny, args=(run_dir,), kwargs=options)
        child.start()
        target = last_step(run_dir) + waits.randint(1, 6)
        while child.is_alive() and last_step(run_dir) < min(target, steps):
            time.sleep(0.001)
        time.sleep(waits.random() * 0.01)
        assert child.pid is not None
        child.kill()
        child.join()
        assert child.exitcode in (-signal.SIGKILL, 0)
        done += child.exitcode != 0
        assert resumable_step(run_dir) >= last_step(run_dir) - 2 * every  # one in flight, one not yet begun
    train_tiny(run_dir, resume=run_dir, steps=steps, save_every=str(every))
    losses, tensors, state = outcome(run_dir)
    expected = outcome(tmp_path / "expected")
    assert done > kills // 2  # were in time to hit
    assert losses == expected[0]
    assert all(torch.equal(tensors[name], x) for name, x in expected[1].items())
    assert state == expected[2]


def last_step(run_dir: Path) -> int:
    """The last step in metrics.jsonl, whose last line may be cut."""
    metrics = run_dir / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    whole = [line for line in lines if line.endswith("}") and '"loss"' in line]
    return int(whole[-1].split('"step": ')[1].split(",")[0]) if whole else 0


def resumable_step(run_dir: Path) -> int:
    from fusedgpt.train.run.checkpoint import CheckpointStore

    newest, _ = CheckpointStore(run_dir / "checkpoints", keep_last=1).newest()
    return newest.step if newest else 0
