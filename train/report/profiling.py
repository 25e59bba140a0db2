"""A profile of a few steps: a trace for chrome://tracing or Perfetto, and a table of the slowest ops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, schedule

_SKIPPED, _WARMUP, _PROFILED = 3, 2, 5  # steps
_ROWS = 10


class StepProfiler:
    """Profiles a few of a run's steps; call step() after each. `table` is set once they are over."""

    def __init__(self, trace: Path | None) -> None:
        self.trace = trace
        self.table: str | None = None
        self._cuda = torch.cuda.is_available()
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self._cuda else [])]
        when = schedule(skip_first=_SKIPPED, wait=0, warmup=_WARMUP, active=_PROFILED, repeat=1)
        self._profile = profile(activities=activities, schedule=when, on_trace_ready=self._keep)
        self._profile.start()

    def step(self) -> None:
        """Count a step."""
        self._profile.step()

    def close(self) -> None:
        """Stop; if the run ended during the profiled steps, keep those there are."""
        self._profile.stop()

    def _keep(self, result: Any) -> None:
        by = "self_device_time_total" if self._cuda else "self_cpu_time_total"
        self.table = result.key_averages().table(sort_by=by, row_limit=_ROWS, max_name_column_width=50)
        if self.trace is not None:
            result.export_chrome_trace(str(self.trace))
