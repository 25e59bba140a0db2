"""Whole jobs, from launch to exit: their time and validation loss, and nanoGPT's.

    python -m benchmarks.workloads.jobs [NAME ...] [--text FILE] [--peer NANOGPT] [--presets 12M 33M 117M]
        [--steps N]

NAME is of these, default those that FILE and the machine allow:
    pipeline       `fusedgpt create --config original`, with other presets too: 20 epochs of GPT-2 tokens,
                   batches of 2 x 128
    shakespeare    FILE, tiny Shakespeare, by characters with nanoGPT's settings for a GPU or a CPU: ours,
                   ours with Muon in half of the steps, and NANOGPT's train.py on the same split
    muon           gpt2 in bf16, 16 x 1024, on FILE, on a GPU: AdamW, and Muon in half of the steps, to
                   AdamW's best validation loss
    parity         gpt2 in bf16, 16 x 1024, on FILE: the losses with our kernels and with the reference; on a
                   GPU. No speed if they differ by more than 0.02 on average over the last fifth of the steps

ms is from launch to exit, train_ms the training alone, goal_ms from launch to a validation loss <= goal.
nanoGPT validates on random windows of both splits, ours on the whole validation split.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle  # nanoGPT reads its vocabulary from one
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np

from benchmarks.arguments import make_parser
from benchmarks.clock import DEVICE
from benchmarks.report import record
from benchmarks.report.record import Row

CLI = [sys.executable, "-m", "fusedgpt.train.cli.main"]
PROMPT = "A fun GPT that writes cooking recipes"
ORIGINAL = Path(__file__).parents[2] / "train/recipes/original.toml"
KIND = DEVICE.type
SHAPE = {"cuda": (6, 384, 256, 64, 0.2), "cpu": (4, 128, 64, 12, 0.0)}[KIND]  # layers, C, T, batch, dropout
STEPS, EVAL_BATCHES, GOAL = {"cuda": (5000, 200, 1.47), "cpu": (2000, 20, 1.90)}[KIND]
PARITY_STEPS, LARGEST_GAP = 300, 0.02  # nats
OPTIMIZER_STEPS = 200  # AdamW's: 3.3 million tokens, about eleven epochs of tiny Shakespeare
VALIDATION = re.compile(r"step \d+: .*val(?:idation)? loss ([\d.]+)")


class Run(NamedTuple):
    """How a command ran."""

    ms: float  # from launch to exit
    matches: list[tuple[float, str]]  # (milliseconds since its launch, what the pattern matched)
    result: dict[str, Any]  # what --json printed


def run(command: list[str], folder: Path, pattern: re.Pattern[str] = VALIDATION, **environment: str) -> Run:
    """Run the command in `folder`; raises RuntimeError with the end of its output if it fails."""
    start, matches, output = time.perf_counter(), [], []
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, cwd=folder, env=os.environ | environment, **pipes) as process:
        for line in process.stdout or ():
            output.append(line)
            if found := pattern.search(line):
                matches.append((1e3 * (time.perf_counter() - start), found[1]))
    if process.returncode:
        raise RuntimeError(" ".join(output[-5:]).strip())
    ms, result = 1e3 * (time.perf_counter() - start), record.json_rows("".join(output))
    return Run(ms, matches, result[0] if result else {})


def row(name: str, shape: str, contender: str, done: Run, dtype: str = "auto") -> Row:
    """One result; the JSON of ours says how long it trained."""
    found = {"suite": "jobs", "name": name, "shape": shape, "dtype": dtype, "contender": contender}
    found |= {"ms": done.ms, "spread": None}
    if told := done.result:
        found |= {"train_ms": 1e3 * told["seconds"], "rate": told["tokens_per_second"], "unit": "tok/s"}
    if done.matches:
        found["val_loss"] = min(float(loss) for _, loss in done.matches)
    return found


def pipeline(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    for preset in arguments.presets:
        toy = shlex.split(
            "--n-layer 1 --n-head 1 --n-embd 16 --raw-tokens 4000 --refined-tokens 2000 --epochs 1"
        )
        size = toy if preset == "toy" else ["--size", preset]
        done = run([*CLI, "create", PROMPT, "--config", str(ORIGINAL), *size, "--json"], scratch)
        yield row("pipeline", preset, "ours", done)


def shakespeare(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    layers, width, length, batch, dropout = SHAPE
    steps = arguments.steps or STEPS
    every, warmup = min(250, steps), min(100, steps // 2)
    size = {"n_layer": layers, "n_head": layers, "n_embd": width, "block_size": length, "dropout": dropout}
    setting = size | {"batch_size": batch, "learning_rate": 1e-3, "beta2": 0.99, "weight_decay": 0.1}
    ours = setting | {"steps": steps, "min_learning_rate": 1e-4, "warmup": warmup, "eval_every": every}
    half = size | {"batch_size": batch, "steps": steps // 2, "eval_every": max(1, every // 2)}
    theirs = setting | {"max_iters": steps, "lr_decay_iters": steps, "min_lr": 1e-4, "warmup_iters": warmup}
    theirs |= {"eval_interval": every, "eval_iters": EVAL_BATCHES, "gradient_accumulation_steps": 1}
    theirs |= {"device": KIND, "compile": KIND == "cuda", "always_save_checkpoint": False}
    train = [*CLI, "train", f"--data={arguments.text}", "--tokenizer=char", "--json"]
    commands = {"ours": [*train, *flags(ours)], "ours-muon": [*train, "--optimizer=muon", *flags(half)]}
    if arguments.peer:
        install_nanogpt(arguments.peer, arguments.text, scratch)
        named = [f"--{name}={value}" for name, value in theirs.items()]
        commands["peer"] = [sys.executable, "train.py", "--dataset=text", *named]
    for contender, command in commands.items():
        done = run(command, scratch)
        taken = steps // 2 if contender == "ours-muon" else steps
        shape = f"{layers} layers of {width}, {batch} x {length}, {taken} steps"
        yield row("shakespeare", shape, contender, done) | to_goal(done, GOAL)


def flags(settings: dict[str, Any]) -> list[str]:
    return [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]


def to_goal(done: Run, goal: float) -> Row:
    return {"goal": goal, "goal_ms": next((ms for ms, loss in done.matches if float(loss) <= goal), None)}


def install_nanogpt(peer: Path, text: Path, folder: Path) -> None:
    """Put nanoGPT's loop into `folder`, with `text` encoded as its data/shakespeare_char does."""
    for name in ("train.py", "model.py", "configurator.py"):
        shutil.copy(peer / name, folder)
    characters = text.read_text(encoding="utf-8")
    stoi = {character: i for i, character in enumerate(sorted(set(characters)))}
    ids = np.array([stoi[character] for character in characters], dtype=np.uint16)
    data = folder / "data" / "text"
    data.mkdir(parents=True)
    cut = int(0.9 * len(ids))
    ids[:cut].tofile(data / "train.bin")
    ids[cut:].tofile(data / "val.bin")
    meta = {"vocab_size": len(stoi), "stoi": stoi, "itos": {i: c for c, i in stoi.items()}}
    (data / "meta.pkl").write_bytes(pickle.dumps(meta))


def train_gpt2(arguments: argparse.Namespace, options: str) -> list[str]:
    """The command; on a CPU a toy's."""
    gpt2 = "--preset=gpt2 --batch-size=16 --max-length=1024"
    toy = "--n-layer=1 --n-head=2 --n-embd=32 --batch-size=2 --max-length=16 --block-size=16"
    setting = f"--json --dropout=0 --precision=bf16 {toy if KIND == 'cpu' else gpt2} {options}"
    return [*CLI, "train", f"--data={arguments.text}", *shlex.split(setting)]


def muon(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    steps, goal = arguments.steps or OPTIMIZER_STEPS, None
    for contender, taken, options in (
        ("ours", steps, "--optimizer=adamw --learning-rate=6e-4"),
        ("ours-muon", steps // 2, "--optimizer=muon"),
    ):
        often = f"--steps={taken} --eval-every={max(1, taken // 10)}"
        done = run(train_gpt2(arguments, f"{options} {often}"), scratch)
        found = row("muon", f"gpt2 16 x 1024, {taken} steps", contender, done, "bf16")
        goal = goal or found["val_loss"]
        yield found | to_goal(done, goal)


def parity(arguments: argparse.Namespace, scratch: Path) -> Iterator[Row]:
    steps = arguments.steps or PARITY_STEPS
    options = f"--steps={steps} --log-every=1 --eval-every={steps} --learning-rate=6e-4"
    command = train_gpt2(arguments, f"{options} --compile=off --cuda-graphs=off")
    found, losses = [], []
    for contender, kernels in {"ours": "auto", "ours-reference": "reference"}.items():
        done = run(command, scratch, FUSEDGPT_KERNELS=kernels)
        metrics = scratch / done.result["run_path"] / "metrics.jsonl"
        losses.append([r["loss"] for r in map(json.loads, metrics.open()) if "loss" in r])
        found.append(row("parity", f"gpt2 16 x 1024, {steps} steps", contender, done, "bf16"))
    yield from judged(found, losses)


def judged(rows: list[Row], losses: list[list[float]]) -> list[Row]:
    """The rows, ours first, with the difference of its losses from the reference's; a fault if too large."""
    ours, reference = (curve[-max(1, len(curve) // 5) :] for curve in losses)
    apart = abs(fmean(ours) - fmean(reference))
    rows[0] |= {"loss_gap": apart}
    if not apart <= LARGEST_GAP:
        del rows[0]["ms"]
        rows[0] |= {"fault": f"no speed: at the end the losses are {apart:.3f} from the reference's"}
    return rows


Job = Callable[[argparse.Namespace, Path], Iterator[Row]]
JOBS: dict[str, Job] = {"pipeline": pipeline, "shakespeare": shakespeare, "muon": muon, "parity": parity}


def parse() -> argparse.Namespace:
    parser = make_parser(__doc__, "--text", "--peer")
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(JOBS))
    parser.add_argument("--presets", nargs="+", default=["12M", "33M", "117M"])
    parser.add_argument("--steps", type=int, help="instead of a job's own number")
    found = parser.parse_args()
    by_default = ["pipeline"] + ["shakespeare"] * bool(found.text)
    by_default += ["muon", "parity"] * bool(found.text and KIND != "cpu")
    found.names = found.names or by_default
    if wrong := [name for name in found.names if name not in JOBS or (name != "pipeline" and not found.text)]:
        parser.error(f"{wrong[0]}: needs --text" if wrong[0] in JOBS else f"no job {wrong[0]}")
    return found


def in_scratch(job: Job, arguments: argparse.Namespace) -> Iterator[Row]:
    with tempfile.TemporaryDirectory() as scratch:
        yield from job(arguments, Path(scratch))


def main() -> int:
    arguments = parse()
    works = {name: partial(in_scratch, JOBS[name], arguments) for name in arguments.names}
    return record.emit_each("jobs", works)


if __name__ == "__main__":
    sys.exit(main())
