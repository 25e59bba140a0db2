"""Where a run's metrics are stored: metrics.jsonl and TensorBoard's event files."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

from fusedgpt.model.files import to_json, write_file
from fusedgpt.train.report.progress import StepMetrics

Row = dict[str, Any]

_COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu", "skipped")
_SECONDS_BETWEEN_MEMORY_READINGS = 1.0  # each takes some 100 us
_SECONDS_BETWEEN_FLUSHES = 10  # of TensorBoard's files: what a kill loses


class MetricsFile:
    """metrics.jsonl: one JSON object per line, for each step and each validation.

    {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu", "skipped", "seconds"}
    {"step", "val_loss", "val_bits_per_byte"}

    in the units of StepMetrics, val_loss in nats per token; null where a value is unknown or not finite.
    """

    def __init__(self, path: Path, *, resume_step: int) -> None:
        """Continue `path` after `resume_step`, 0 for a new run. Raises OSError.

        Rows of later steps, which will come again, are dropped, and so is a last line that a kill cut short.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            write_file(path, b"".join(_lines_until(path, resume_step)))
        self._file = path.open("a", buffering=1, encoding="utf-8")  # each line is in the file once written

    def step(self, metrics: StepMetrics) -> None:
        """Append a step's row."""
        row = {name: getattr(metrics, name) for name in _COLUMNS}
        speed, mfu = round(metrics.tokens_per_second, 1), round(metrics.mfu, 5)
        self._append({**row, "tokens_per_second": speed, "mfu": mfu, "seconds": round(metrics.seconds, 3)})

    def evaluation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        """Append a validation's row."""
        self._append({"step": step, "val_loss": loss, "val_bits_per_byte": bits_per_byte})

    def close(self) -> None:
        """Close the file; may be called again."""
        self._file.close()

    def _append(self, row: Row) -> None:
        self._file.write(to_json(row) + "\n")


def read_metrics(path: Path) -> list[Row]:
    """The rows of a metrics.jsonl, without a last line that was cut short.

    Raises OSError, and ValueError for any other file.
    """
    rows: list[Row] = []
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            row = _parse(line)
            if row is not None:
                rows.append(row)
            elif line.endswith(b"\n"):
                raise ValueError(f"{path}, line {number}: not a row of metrics")
    return rows


def _parse(line: bytes) -> Row | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def _lines_until(path: Path, step: int) -> Iterator[bytes]:
    """The rows up to `step`, without lines that are not rows."""
    with path.open("rb") as file:
        for line in file:
            row = _parse(line)
            if row is not None and row["step"] <= step:
                yield line if line.endswith(b"\n") else line + b"\n"


class TensorBoardSink:
    """Event files for TensorBoard, for all steps and validations; steps that a resume repeats are shown once.

    train/loss train/grad_norm train/learning_rate eval/loss eval/bits_per_byte throughput/tokens_per_second
    throughput/mfu memory/peak_bytes (on CUDA)
    """

    def __init__(self, folder: Path, *, resume_step: int) -> None:
        """Continue in `folder` after `resume_step`, 0 for a new run.

        Raises ValueError where TensorBoard is not installed, OSError where the folder cannot be written.
        """
        try:
            self._proto: Any = import_module("tensorboard.compat.proto.event_pb2")
            self._summary: Any = import_module("tensorboard.compat.proto.summary_pb2").Summary
            writer = import_module("tensorboard.summary.writer.event_file_writer")
        except ImportError:
            raise ValueError("TensorBoard is not installed: pip install 'fusedgpt[tensorboard]'") from None
        self._writer: Any = writer.EventFileWriter(str(folder), flush_secs=_SECONDS_BETWEEN_FLUSHES)
        # Readers then ignore what earlier files say about later steps; also at 0, since a run that was killed
        # before its first save may start again in the same folder.
        start = self._proto.SessionLog(status=self._proto.SessionLog.START)
        self._add_event(resume_step + 1, session_log=start)
        self._memory_read = -math.inf

    def step(self, metrics: StepMetrics) -> None:
        """Add a step's scalars."""
        scalars = {f"train/{name}": getattr(metrics, name) for name in ("loss", "grad_norm", "learning_rate")}
        for name in ("tokens_per_second", "mfu"):
            if math.isfinite(value := getattr(metrics, name)):
                scalars[f"throughput/{name}"] = value
        if metrics.seconds - self._memory_read >= _SECONDS_BETWEEN_MEMORY_READINGS:
            self._memory_read = metrics.seconds
            scalars |= _memory()
        self._add(scalars, metrics.step)

    def evaluation(self, step: int, loss: float, bits_per_byte: float | None) -> None:
        """Add a validation's scalars."""
        per_byte = {} if bits_per_byte is None else {"eval/bits_per_byte": bits_per_byte}
        self._add({"eval/loss": loss, **per_byte}, step)

    def close(self) -> None:
        """Write what is left; may be called again."""
        self._writer.close()

    def _add(self, scalars: dict[str, float], step: int) -> None:
        # one event for all: torch's SummaryWriter makes one per scalar, which is four times as slow
        values = [{"tag": tag, "simple_value": value} for tag, value in scalars.items()]
        self._add_event(step, summary=self._summary(value=values))

    def _add_event(self, step: int, **content: Any) -> None:
        self._writer.add_event(self._proto.Event(step=step, wall_time=time.time(), **content))


Sink = MetricsFile | TensorBoardSink


def _memory() -> dict[str, float]:
    """The peak GPU memory of tensors so far; empty without a GPU."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return {}
    return {"memory/peak_bytes": float(torch.cuda.max_memory_allocated())}
