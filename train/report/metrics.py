"""metrics.jsonl, where each run keeps its metrics."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.files import to_json, write_file
from fusedgpt.train.report.progress import StepMetrics

Row = dict[str, Any]

_COLUMNS = ("step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu", "skipped")


class MetricsFile:
    """metrics.jsonl: one JSON object per line, for each step, each validation and each sample.

    {"step", "loss", "grad_norm", "learning_rate", "tokens", "tokens_per_second", "mfu", "skipped", "seconds"}
    {"step", "val_loss", "val_bits_per_byte"}
    {"step", "prompt", "sample"}

    in the units of StepMetrics, val_loss in nats per token; null where a value is unknown or not finite.
    """

    name = "metrics.jsonl"

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

    def samples(self, step: int, texts: Mapping[str, str]) -> None:
        """Append a row for each sample."""
        for prompt, text in texts.items():
            self._append({"step": step, "prompt": prompt, "sample": text})

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
                raise InputError(f"{path}, line {number}: not a row of metrics")
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
