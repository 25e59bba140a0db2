"""Rows of metrics, and how a run writes them into a sink."""

from __future__ import annotations

from fusedgpt.train.report.loggers import Sink
from fusedgpt.train.report.progress import StepMetrics


def row(step: int, *, loss: float | None = None, skipped: bool = False) -> StepMetrics:
    return StepMetrics(
        step=step,
        loss=step / 3 if loss is None else loss,
        grad_norm=1.5,
        learning_rate=3e-4,
        skipped=skipped,
        tokens=256 * step,
        seconds=0.12345 * step,
        tokens_per_second=1234.5678,
        mfu=0.3999999,
    )


def write(sink: Sink, steps: range, *, evaluate_every: int = 5) -> None:
    for step in steps:
        sink.step(row(step))
        if step % evaluate_every == 0:
            sink.evaluation(step, 2.0 + step, 1.0)
