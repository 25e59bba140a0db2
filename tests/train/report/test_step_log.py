"""What the loop's reports go to."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from training_runs import train_tiny

from fusedgpt.train.loop import trainer
from fusedgpt.train.report import step_log
from fusedgpt.train.report.progress import Monitor, StepMetrics
from fusedgpt.train.report.step_log import TrainingLog
from fusedgpt.train.run.directory import Run
from fusedgpt.train.run.training_state import Progress


@dataclass
class Recorder:
    """A sink that keeps what it is handed."""

    name: str = "recorder"
    rows: list[StepMetrics] = field(default_factory=list)
    evaluations: list[tuple[int, float, float | None]] = field(default_factory=list)
    texts: dict[int, dict[str, str]] = field(default_factory=dict)
    closed: int = 0

    def step(self, metrics: StepMetrics) -> None:
        self.rows.append(metrics)

    def evaluation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        self.evaluations.append((step, loss, bits_per_byte))

    def samples(self, step: int, texts: Mapping[str, str]) -> None:
        self.texts[step] = dict(texts)

    def close(self) -> None:
        self.closed += 1


def test_sinks_get_every_row_and_are_closed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sinks = [Recorder(), Recorder()]
    monkeypatch.setattr(Run, "sinks", lambda _: sinks)
    monkeypatch.setattr(Run, "finish", lambda run, result: run.store.wait())  # else it plots metrics.jsonl
    train_tiny(tmp_path, steps=20, log_every=3)
    for sink in sinks:
        assert [metrics.step for metrics in sink.rows] == list(range(1, 21))
        assert [step for step, _, _ in sink.evaluations] == [7, 14, 20]
        assert sink.closed == 1
    losses = [metrics.loss for metrics in sinks[0].rows]
    assert sinks[0].rows[-1].smoothed_loss == pytest.approx(sum(losses[-10:]) / 10)
    assert sinks[0].rows[-1].tokens_per_second > 0
    assert all(math.isnan(metrics.mfu) for metrics in sinks[0].rows)  # nobody knows a CPU's peak


class Broken(Recorder):
    """A sink whose library fails."""

    def step(self, metrics: StepMetrics) -> None:
        raise RuntimeError("no network")

    def close(self) -> None:
        raise RuntimeError("still no network")


def test_a_sink_that_fails_is_said_once_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sink, notes = Recorder(), []
    monkeypatch.setattr(Run, "sinks", lambda _: [Broken(name="broken"), sink])
    monkeypatch.setattr(Run, "finish", lambda run, result: run.store.wait())
    monkeypatch.setattr(Monitor, "note", lambda _, text: notes.append(text))
    train_tiny(tmp_path, steps=20)
    assert [metrics.step for metrics in sink.rows] == list(range(1, 21))
    assert sink.closed == 1
    assert [note for note in notes if "network" in note] == ["broken fails, training goes on: no network"]


def test_mfu_follows_the_speed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink, begin = Recorder(), TrainingLog.begin

    def with_peak(self: TrainingLog, *args: float) -> None:
        begin(self, *args)  # type: ignore[arg-type]
        self.mfu_per_token = 2e-9

    monkeypatch.setattr(Run, "sinks", lambda _: [sink])
    monkeypatch.setattr(Run, "finish", lambda run, result: run.store.wait())
    monkeypatch.setattr(TrainingLog, "begin", with_peak)
    train_tiny(tmp_path, steps=4)
    assert sink.rows[-1].mfu == 2e-9 * sink.rows[-1].tokens_per_second


def test_the_peak_is_that_of_the_precision_in_the_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[bool] = []
    asked: list[bool] = []

    @contextmanager
    def tf32(wanted: bool) -> Iterator[None]:
        chosen.append(wanted)
        yield
        chosen.clear()

    monkeypatch.setattr(trainer, "tf32", tf32)
    monkeypatch.setattr(step_log, "peak_flops", lambda *_: asked.append(bool(chosen)) or 0.0)
    train_tiny(tmp_path, steps=4)
    assert asked == [True]


def test_sinks_are_closed_after_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sink = Recorder()
    monkeypatch.setattr(Run, "sinks", lambda _: [sink])
    monkeypatch.setattr(Monitor, "evaluation", None)  # calling it is a TypeError
    with pytest.raises(TypeError):
        train_tiny(tmp_path, steps=4)
    assert sink.closed == 1


def test_loss_is_smoothed_over_ten_finite_losses() -> None:
    progress = Progress()
    assert math.isnan(progress.smoothed_loss)
    for loss in [100.0, *map(float, range(5)), math.nan, math.inf, *map(float, range(5, 10))]:
        progress.add(loss, skipped=not math.isfinite(loss))
    assert progress.smoothed_loss == 4.5
    assert (progress.skipped_steps, progress.skipped_in_a_row) == (2, 0)
