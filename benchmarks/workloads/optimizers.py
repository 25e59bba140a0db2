"""Validation loss over steps and seconds: Muon against AdamW, each with the settings that suit it.

    python -m benchmarks.workloads.optimizers --text FILE [NAME ...] [--seeds 0 1 2] [--steps N]
    python -m benchmarks.workloads.optimizers --plot losses.svg RESULTS.jsonl

FILE is the text of tiny Shakespeare. NAME is of these, default all:
    nanogpt   AdamW as nanoGPT sets it for characters on a CPU: 1e-3, cosine to a tenth, 2,000 steps
    adamw     AdamW at its best rate, linear to 0, 2,000 steps
    muon      Muon for the blocks, AdamW for the rest, linear to 0, 2,000 steps
    half      the same in 1,000 steps
    quick     in 420, with rates for so few: to the loss that nanoGPT's setting reaches in 2,000
    quick-adamw    AdamW to that loss, in 1,010
The model is that of nanoGPT's setting: 4 layers of 128, windows of 64, 12 a step. curve holds
[step, seconds of training, validation loss], seconds without the validations themselves (null: not known).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arguments import absolute, make_parser
from benchmarks.report import record
from benchmarks.report.record import Row
from benchmarks.workloads.jobs import CLI, run
from fusedgpt.train.report.metrics import read_metrics

MODEL = "--tokenizer char --n-layer 4 --n-head 4 --n-embd 128 --block-size 64 --dropout 0 --batch-size 12"
SHARED = "--json --beta2 0.99 --weight-decay 0.1 --warmup 0.05"
LINEAR = "--schedule linear --min-learning-rate 0 --learning-rate 4e-3"
QUICK = "--schedule linear --min-learning-rate 0 --beta1 0.8"
QUICK_MUON = (
    "--muon-learning-rate 0.025 --muon-momentum 0.9 --learning-rate 8e-3 --beta2 0.95 --weight-decay 0"
)
SETTINGS = {
    "nanogpt": (2000, "--optimizer adamw --learning-rate 1e-3 --min-learning-rate 1e-4"),
    "adamw": (2000, f"--optimizer adamw {LINEAR}"),
    "muon": (2000, f"--optimizer muon {LINEAR}"),
    "half": (1000, f"--optimizer muon {LINEAR}"),
    "quick": (420, f"--optimizer muon {QUICK} {QUICK_MUON} --warmup 0 --grad-clip 0"),
    "quick-adamw": (1010, f"--optimizer adamw {QUICK} --learning-rate 6e-3 --warmup 0.02"),
}
_INK = "#7d8590"
LINES = {  # colour, label
    "nanogpt": ("#8a8a8a", "AdamW as nanoGPT sets it"),
    "adamw": ("#d1600a", "AdamW, tuned"),
    "muon": ("#2f7fd8", "Muon"),
    "half": ("#6aa5dd", "Muon, half of the steps"),
    "quick": ("#a9cdf0", "Muon, 420 steps"),
    "quick-adamw": ("#eaa06a", "AdamW, 1,010 steps"),
}


def train(name: str, seed: int, arguments: argparse.Namespace) -> Iterator[Row]:
    """A run's row."""
    steps, options = SETTINGS[name]
    steps = arguments.steps or steps
    every = max(1, steps // 10)
    with tempfile.TemporaryDirectory() as scratch:
        flags = shlex.split(f"{MODEL} {SHARED} {options} --steps {steps} --seed {seed} --eval-every {every}")
        command = [*CLI, "train", f"--data={arguments.text}", "--run-dir=run", "--log-every=1", *flags]
        done = run(command, Path(scratch))
        rows = read_metrics(Path(scratch) / "run/metrics.jsonl")
    losses = curve(rows)
    yield {
        "suite": "optimizers",
        "name": "shakespeare",
        "shape": f"{steps} steps, seed {seed}",
        "dtype": "auto",
        "contender": name,
        "ms": done.ms,
        "spread": None,
        "train_ms": 1e3 * done.result["seconds"],
        "val_loss": losses[-1][2],
        "curve": losses,
    }


def curve(rows: list[Row]) -> list[list[float]]:
    """[step, seconds of training so far, loss] of each validation in a run's metrics.

    A step that follows a validation counts as long as the one before it.
    """
    found: list[list[float]] = []
    seconds = took = before = 0.0
    validated = False
    for row in rows:
        if row.get("val_loss") is not None:
            found.append([row["step"], round(seconds, 2), row["val_loss"]])
            validated = True
        elif "loss" in row:
            took = took if validated else row["seconds"] - before
            seconds, before, validated = seconds + took, row["seconds"], False
    return found


def plot(rows: list[Row], path: Path) -> None:
    """The curves of each contender, a line per seed: over steps, and over seconds where they are known.

    Readable on a light and on a dark page.
    """
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams.update(dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor"), _INK))
    rcParams.update({"xtick.color": _INK, "ytick.color": _INK, "svg.hashsalt": "", "font.size": 11})

    units = ["step", "seconds"] if any(row["curve"][0][1] is not None for row in rows) else ["step"]
    figure = Figure(figsize=(5.5 * len(units), 4), layout="constrained")
    panels = figure.subplots(1, len(units), sharey=True, squeeze=False)[0]
    for i, (axes, unit) in enumerate(zip(panels, units, strict=True)):
        unlabelled = {name: label for name, (_, label) in LINES.items()}
        for row in rows:
            name = row["contender"]
            axes.plot(
                [point[i] for point in row["curve"] if point[i] is not None],
                [point[2] for point in row["curve"] if point[i] is not None],
                color=LINES[name][0],
                linewidth=1.6,
                label=unlabelled.pop(name, None),
            )
        axes.set(xlabel=unit, ylim=(1.55, 2.35), xlim=(0, None), facecolor="none")
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("validation loss (nats per character)")
    figure.axes[-1].legend(frameon=False, loc="lower right")
    figure.savefig(path, transparent=True, metadata={"Date": None})


def parse() -> Any:
    parser = make_parser(__doc__, "--text")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(SETTINGS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="instead of a setting's own number")
    parser.add_argument("--plot", type=absolute, metavar="SVG", help="draw the results in the files NAME")
    found = parser.parse_args()
    if not found.plot:
        if not found.text:
            parser.error("needs --text")
        if wrong := set(found.names) - set(SETTINGS):
            parser.error(f"no setting {wrong.pop()}")
    return found


def main() -> int:
    arguments = parse()
    if arguments.plot:
        rows = [row for name in arguments.names for row in record.read(Path(name))]
        plot([row for row in rows if "curve" in row], arguments.plot)
        return 0
    names = arguments.names or list(SETTINGS)
    works = {
        f"{name}, seed {seed}": partial(train, name, seed, arguments)
        for seed in arguments.seeds
        for name in names
    }
    return record.emit_each("optimizers", works)


if __name__ == "__main__":
    sys.exit(main())
