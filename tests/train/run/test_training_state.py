"""Training after a resume is training that never stopped, to the bit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import in_fresh_process, outcome, resume_from, train_tiny

from fusedgpt.train.run.checkpoint import CheckpointError

POINTS = [1, 2, 3, 5, 8, 10, 11, 12, 17, 21, 28, 30]  # an epoch ends in step 11, validations every 7


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 80 steps with a checkpoint after each."""
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    in_fresh_process(train_tiny, run_dir, save_every="1", keep_last=100)
    return run_dir


def same(ours: Any, theirs: Any, point: int) -> bool:
    """Losses from `point` on, and everything the last checkpoint holds, bit by bit."""
    losses, tensors, state = ours
    their_losses, their_tensors, their_state = theirs
    return (
        losses == {step: row for step, row in their_losses.items() if step > point}
        and tensors.keys() == their_tensors.keys()
        and all(torch.equal(tensors[name], their_tensors[name]) for name in tensors)
        and state == their_state
    )


def test_a_resume_anywhere_equals_a_run_without_one(uninterrupted: Path) -> None:
    """Row 5 of docs/dev/fault_tests.md: in a fresh process, at 12 points, for 50 steps and more."""
    expected = outcome(uninterrupted)
    assert len(expected[0]) == 80
    assert "best/wpe.weight" in expected[1]  # the best weights are not the last
    for point, resumed in in_fresh_process(resume_from, uninterrupted, POINTS).items():
        assert same(resumed, expected, point), point


@pytest.mark.parametrize(
    ("fault", "point"),
    [
        *((fault, 10) for fault in ("dropout", "cursor", "step", "exp_avg", "exp_avg_sq")),
        *((fault, 78) for fault in ("best", "validation")),  # behind the best validation
    ],
)
def test_what_is_not_restored_shows(uninterrupted: Path, tmp_path: Path, fault: str, point: int) -> None:
    run_dir = tmp_path / "run"
    run_dir.symlink_to(uninterrupted)
    resumed = in_fresh_process(resume_from, run_dir, [point], fault)[point]
    assert not same(resumed, outcome(uninterrupted), point)


def test_a_damaged_checkpoint_is_passed_over(uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    for step in range(41, 81):
        shutil.rmtree(run_dir / f"checkpoints/step-{step:08d}")
    (run_dir / "checkpoints/step-00000040/optimizer.safetensors").write_bytes(b"?")
    train_tiny(run_dir, resume=run_dir, save_every="1000")
    losses, tensors, _ = outcome(run_dir)
    expected_losses, expected_tensors, _ = outcome(uninterrupted)
    assert losses == expected_losses  # metrics.jsonl continues after step 39, with no gap and no repeat
    assert all(torch.equal(tensors[name], expected_tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n_embd": 24}, "model: .* is .*, expected"),
        ({"n_layer": 3}, "model: missing or unexpected tensors: h.2."),
        ({"seed": 4}, r"another seed \(6, now 4\): give the same, or leave out --resume"),
    ],
)
def test_a_resume_that_does_not_fit_says_why(
    uninterrupted: Path, changes: dict[str, Any], message: str
) -> None:
    before = sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=message):
        train_tiny(uninterrupted, resume=uninterrupted, **changes)
    assert before == sorted(path.name for path in (uninterrupted / "checkpoints").iterdir())


def test_metrics_have_no_gap_and_no_repeat(uninterrupted: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(uninterrupted, run_dir)
    train_tiny(run_dir, resume=run_dir / "checkpoints/step-00000050", save_every="1000")
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 81))
    assert [row["step"] for row in rows if "val_loss" in row] == [*range(7, 80, 7), 80]
