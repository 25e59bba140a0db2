"""The pictures hold what the data say."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import imread

from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.schedule import learning_rate
from fusedgpt.train.report.plots import falls_early, plot_losses, plot_schedule, running_mean


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Axes]:
    """The axes of each picture that was saved."""
    axes: list[Axes] = []
    save = Figure.savefig

    def savefig(figure: Figure, *args: Any, **options: Any) -> None:
        axes.extend(figure.axes)
        save(figure, *args, **options)

    monkeypatch.setattr(Figure, "savefig", savefig)
    return axes


def lines(axes: Axes) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of each curve by its label."""
    data = ((str(line.get_label()), line.get_xdata(), line.get_ydata()) for line in axes.lines)
    return {label: (np.atleast_1d(x).tolist(), np.atleast_1d(y).tolist()) for label, x, y in data}


def texts(axes: Axes) -> set[str]:
    return {text.get_text() for text in axes.texts}


def assert_is_a_picture(path: Path) -> None:
    pixels = imread(path)
    assert pixels.shape[0] > 500
    assert pixels.shape[1] > 900
    assert pixels[..., :3].std() > 0.05


def metrics(path: Path, losses: list[float | None], validations: dict[int, float]) -> Path:
    rows: list[dict[str, Any]] = [{"step": i + 1, "loss": loss} for i, loss in enumerate(losses)]
    rows += [
        {"step": step, "val_loss": loss, "val_bits_per_byte": None} for step, loss in validations.items()
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "wsd", "inverse_sqrt"])
def test_schedule_is_the_one_that_is_trained_with(tmp_path: Path, drawn: list[Axes], schedule: str) -> None:
    config = TrainConfig(schedule=schedule, warmup=7)
    path = plot_schedule(config, 100_000, tmp_path / "new" / "schedule.png")
    assert path == tmp_path / "new" / "schedule.png"
    assert_is_a_picture(path)
    (steps, rates), *_ = lines(drawn[0]).values()
    assert rates == [learning_rate(int(step) - 1, 100_000, config) for step in steps]
    assert {1, 7, 8, 80_000, 100_000} <= set(steps)  # corners are not sampled away
    assert len(steps) < 3000
    assert drawn[0].get_title() == f"Learning rate: {schedule}, 100,000 steps"
    assert (drawn[0].get_xlabel(), drawn[0].get_ylabel()) == ("step", "learning rate")
    assert texts(drawn[0]) == ({"warm-up", "decay"} if schedule == "wsd" else {"warm-up"})


@pytest.mark.parametrize("steps", [1, 2])
def test_schedule_of_a_tiny_run(tmp_path: Path, steps: int) -> None:
    assert_is_a_picture(plot_schedule(TrainConfig(), steps, tmp_path / "schedule.png"))


def test_losses_show_each_step_their_mean_and_the_best_validation(tmp_path: Path, drawn: list[Axes]) -> None:
    losses = [5 - i / 100 for i in range(200)]
    path = metrics(tmp_path / "metrics.jsonl", [*losses], {50: 4.0, 100: 3.5, 150: 3.6})
    assert_is_a_picture(plot_losses(path, tmp_path / "losses.png"))
    curves = lines(drawn[0])
    assert curves["training, each step"] == ([*range(1, 201)], losses)
    assert curves["training, mean of up to 10 steps"][1][-1] == pytest.approx(np.mean(losses[-10:]))
    assert curves["validation"] == ([50, 100, 150], [4.0, 3.5, 3.6])
    assert curves["best validation: 3.5000 at step 100"] == ([100], [3.5])
    assert (drawn[0].get_xlabel(), drawn[0].get_ylabel()) == ("step", "loss (nats per token)")
    assert drawn[0].get_xscale() == "linear"
    assert drawn[0].get_title() == "Training and validation loss"


def test_losses_without_validation_and_with_skipped_steps(tmp_path: Path, drawn: list[Axes]) -> None:
    path = metrics(tmp_path / "metrics.jsonl", [3.0, None, 1.0], {})
    assert_is_a_picture(plot_losses(path, tmp_path / "losses.png"))
    assert lines(drawn[0])["training, each step"] == ([1, 3], [3.0, 1.0])
    assert len(lines(drawn[0])) == 2
    assert drawn[0].get_title() == "Training loss"


def test_a_run_that_falls_early_has_a_log_scale_with_all_validations_in_sight(
    tmp_path: Path, drawn: list[Axes]
) -> None:
    losses: list[float | None] = [2 + 8 * math.exp(-i / 20) for i in range(5000)]
    path = metrics(tmp_path / "metrics.jsonl", losses, {1000: 2.1, 5000: 12.0})
    plot_losses(path, tmp_path / "losses.png")
    axes = drawn[0]
    assert axes.get_xscale() == "log"
    assert axes.get_xlabel() == "step (log scale)"
    assert axes.get_xlim()[0] == 5.0
    assert axes.get_xlim()[1] > 5000
    assert axes.get_ylim()[0] < 2
    assert axes.get_ylim()[1] > 12


def test_falls_early() -> None:
    steps = np.arange(1000.0)
    assert falls_early(np.exp(-steps / 20))
    assert not falls_early(np.exp(-steps / 60))  # 81% of it
    assert not falls_early(np.ones(1000))
    assert not falls_early(np.exp(-np.arange(50.0)))


def test_running_mean_is_of_a_fifth_of_the_run_up_to_the_window() -> None:
    means = running_mean(np.arange(100.0), 10)
    assert means[:10].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 8.5]
    assert means[99] == np.mean(range(90, 100))


def test_a_log_without_losses_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no training loss yet"):
        plot_losses(metrics(tmp_path / "metrics.jsonl", [None], {}), tmp_path / "losses.png")
    assert not (tmp_path / "losses.png").exists()


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"pip install 'fusedgpt\[plots\]'"):
        plot_schedule(TrainConfig(), 100, tmp_path / "schedule.png")
