"""Plots of a run: the learning rate schedule and the losses."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fusedgpt.kernels.errors import InputError, installs
from fusedgpt.train.config import TrainConfig
from fusedgpt.train.loop.schedule import decay_steps, learning_rate, warmup_steps
from fusedgpt.train.report.metrics import Row, read_metrics

if TYPE_CHECKING:  # matplotlib is an extra
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Floats = NDArray[np.float64]

_BLUE, _ORANGE, _GREY = "#1f5fa8", "#d1600a", "#5a5a5a"
_SCHEDULE_POINTS = 2000  # more than the plot has pixels across
_SMALLEST_WINDOW = 10  # steps, as on the progress bar
_WINDOWS_PER_RUN = 50


def plot_schedule(config: TrainConfig, total_steps: int, path: Path) -> Path:
    """Plot the learning rate over a run of total_steps into the PNG `path`; returns `path`.

    Raises ValueError if matplotlib is not installed, OSError where `path` cannot be written.
    """
    figure, axes = new_figure(f"Learning rate: {config.schedule}, {total_steps:,} steps")
    warmup, decay = warmup_steps(total_steps, config), decay_steps(total_steps, config)
    edges = [0, warmup - 1, warmup, total_steps - 1 - decay, total_steps - 1]
    sampled = np.linspace(0, total_steps - 1, min(total_steps, _SCHEDULE_POINTS)).astype(int)
    steps = sorted({min(max(step, 0), total_steps - 1) for step in (*edges, *sampled.tolist())})
    rates = [learning_rate(step, total_steps, config) for step in steps]
    axes.plot([step + 1 for step in steps], rates, color=_BLUE, linewidth=2.2)
    if warmup:
        _shade_phase(axes, 0, min(warmup, total_steps), "warm-up", label_at=0)
    if config.schedule == "wsd" and decay:
        _shade_phase(axes, total_steps - decay, total_steps, "decay", label_at=total_steps)
    axes.set(xlabel="step", ylabel="learning rate", xlim=(0, total_steps))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylim(0, 1.12 * config.learning_rate)  # room above the peak for the names of the phases
    axes.ticklabel_format(axis="y", style="sci", scilimits=(0, 0), useMathText=True)
    return _save(figure, path)


def plot_losses(metrics_path: Path, png: Path) -> Path:
    """Plot the losses of a metrics.jsonl into `png`, with log steps if they fall early; returns `png`.

    Raises ValueError without a loss or matplotlib, OSError for paths that cannot be used.
    """
    rows = read_metrics(metrics_path)
    steps, losses = _series(rows, "loss")
    val_steps, val_losses = _series(rows, "val_loss")
    if not len(steps):
        raise InputError(f"{metrics_path} has no training loss yet")
    window = max(_SMALLEST_WINDOW, len(steps) // _WINDOWS_PER_RUN)
    smooth = running_mean(losses, window)
    figure, axes = new_figure("Training and validation loss" if len(val_steps) else "Training loss")
    axes.plot(steps, losses, color=_BLUE, alpha=0.25, linewidth=0.8, label="training, each step")
    axes.plot(steps, smooth, color=_BLUE, linewidth=2, label=f"training, mean of up to {window} steps")
    if len(val_steps):
        best = int(val_losses.argmin())
        label = f"best validation: {val_losses[best]:.4f} at step {int(val_steps[best]):,}"
        star: dict[str, Any] = {"markersize": 17, "markeredgecolor": "white", "label": label}
        axes.plot(val_steps, val_losses, "o-", color=_ORANGE, linewidth=1.2, markersize=5, label="validation")
        axes.plot(val_steps[best], val_losses[best], "*", color=_ORANGE, **star)
    if falls_early(smooth):
        _show_last_decades(axes, np.concatenate([steps, val_steps]), np.concatenate([losses, val_losses]))
    else:
        axes.set(xlabel="step", xlim=(0, steps[-1] * 1.02))
        axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_ylabel("loss (nats per token)")
    axes.legend(loc="upper right", frameon=False, fontsize=11)
    return _save(figure, png)


def running_mean(values: Floats, window: int) -> Floats:
    """At each place the mean of the last fifth of the values so far, at most `window` of them.

    A fixed window would lag far behind while the loss falls fastest.
    """
    total = np.concatenate([[0.0], np.cumsum(values)])
    ends = np.arange(1, len(values) + 1)
    lengths = np.clip(ends // 5, 1, window)
    means: Floats = (total[ends] - total[ends - lengths]) / lengths
    return means


def falls_early(losses: Floats) -> bool:
    """Whether nine tenths of the fall happen in the first tenth of the run."""
    whole = losses[0] - losses.min()
    return len(losses) >= 100 and bool(losses[0] - losses[len(losses) // 10] > 0.9 * whole)


def _series(rows: list[Row], name: str) -> tuple[Floats, Floats]:
    """Steps and values of `name`, without those that were not finite."""
    pairs = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
    return np.array([s for s, _ in pairs], dtype=float), np.array([v for _, v in pairs], dtype=float)


def _show_last_decades(axes: Axes, steps: Floats, losses: Floats) -> None:
    """Steps on a log scale of three decades; more would give half the width to the first few steps."""
    last = steps.max()
    left = max(1.0, last * 1e-3)
    seen = losses[steps >= left]
    margin = 0.05 * float(np.ptp(seen))
    axes.set_xscale("log")
    axes.set_xlabel("step (log scale)")
    axes.set_xlim(left, last * 1.05)
    axes.set_ylim(seen.min() - margin, seen.max() + margin)
    axes.xaxis.set_major_formatter("{x:,.0f}")


def _shade_phase(axes: Axes, start: float, end: float, name: str, *, label_at: float) -> None:
    """Shade a phase and label it above the curve, aligned to its outer side as the label may be wider."""
    axes.axvspan(start, end, color=_GREY, alpha=0.1, linewidth=0)
    side, indent = ("left", 6) if label_at == start else ("right", -6)
    at: dict[str, Any] = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points"}
    text: dict[str, Any] = {"ha": side, "va": "top", "color": _GREY, "fontsize": 11}
    axes.annotate(name, (label_at, 0.97), xytext=(indent, 0), **at, **text)


def new_figure(title: str = "") -> tuple[Figure, Axes]:
    """A figure with one set of axes, without pyplot and its backend, windows and global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError(f"plots need matplotlib: {installs('plots')}") from None
    figure = Figure(figsize=(9, 5.2), dpi=130, layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, fontsize=15, pad=12)
    axes.xaxis.label.set_fontsize(13)
    axes.yaxis.label.set_fontsize(13)
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="png")
    return path
