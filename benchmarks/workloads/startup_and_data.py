"""What surrounds the training step: start-up, generating data, tokenising, saving and loading.

    python -m benchmarks.workloads.startup_and_data [NAME ...] [--preset 12M] [--tokens 3000000] [--rounds 3]

NAME is of these, default all:
    help             `fusedgpt --help`, from launch to exit
    first_step       `fusedgpt train` on a small text, from launch to the end of its first step: with an empty
                     cache of compiled kernels (cold), then with a full one (warm)
    templates        text from the templates
    tokenise         the same text to GPT-2 tokens on disk, and tiktoken on one thread in memory
    folder           saving and loading a model folder
    checkpoint       saving and loading a resumable checkpoint with AdamW's moments
"""

from __future__ import annotations

import argparse
import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.arguments import make_parser
from benchmarks.report import record
from benchmarks.workloads.entrant import SHAPES
from benchmarks.workloads.jobs import CLI, PROMPT, run
from benchmarks.workloads.tokenising import encode
from fusedgpt.model.config import GPTConfig
from fusedgpt.model.folder import load_model, save_folder
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import gpt2_tokenizer
from fusedgpt.train.data.synthetic.grammar import generate_samples
from fusedgpt.train.data.text.prepare import prepare
from fusedgpt.train.run.checkpoint import Checkpoint, CheckpointStore, load_checkpoint

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def timed(name: str, shape: str, work: Callable[[], object], rounds: int, **rate: Any) -> record.Row:
    """The result of `rounds` calls, after a first one that fills imports and caches; see `row`."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return row(name, shape, times, **rate)


def row(name: str, shape: str, times: list[float], amount: float = 0.0, unit: str = "") -> record.Row:
    """One result from its milliseconds; `amount` is the work done in the time, for a rate in `unit`."""
    found = {"suite": "everyday", "name": name, "shape": shape, "dtype": "fp32", "contender": "ours"}
    found |= record.summary([times])
    return found | ({"rate": amount / (1e-3 * found["ms"]), "unit": unit} if amount else {})


def measure_help(arguments: argparse.Namespace) -> Iterator[record.Row]:
    work = partial(subprocess.run, [*CLI, "--help"], check=True, stdout=subprocess.DEVNULL)
    yield timed("help", "", work, arguments.rounds)


def measure_first_step(arguments: argparse.Namespace) -> Iterator[record.Row]:
    toy = arguments.preset == "toy"
    small = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32"] if toy else ["--preset", arguments.preset]
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        enough = max(2000, 8 * SHAPES[arguments.preset].block_size)  # a step takes two windows
        text.write_text("\n\n".join(texts(enough)[0]))
        caches = {name: str(Path(scratch) / name) for name in CACHES}
        for cache in ("cold", "warm"):
            command = [*CLI, "train", "--data", str(text), "--steps", "1", *small]
            command += ["--run-dir", f"{scratch}/{cache}", "--output-dir", f"{scratch}/models"]
            done = run(command, Path(scratch), re.compile("(1/1 steps)"), **caches)
            yield row("first_step", f"{arguments.preset}, {cache} cache", [done.matches[0][0]])


def texts(n_tokens: int) -> tuple[list[str], int]:
    """Texts from the templates with at least that many tokens in all, and their number of tokens."""
    tokenizer, found, count = gpt2_tokenizer(), [], 0
    for text in generate_samples(PROMPT):
        found.append(text)
        count += len(tokenizer.encode(text))
        if count >= n_tokens:
            break
    return found, count


def measure_templates(arguments: argparse.Namespace) -> Iterator[record.Row]:
    made, count = texts(arguments.tokens)

    def work() -> None:
        for _ in zip(made, generate_samples(PROMPT), strict=False):
            pass

    shape = f"{arguments.tokens:,} tokens"
    yield timed("templates", shape, work, arguments.rounds, amount=count, unit="tok/s")


def measure_tokenise(arguments: argparse.Namespace) -> Iterator[record.Row]:
    made, count = texts(arguments.tokens)
    measure = partial(timed, "tokenise", f"{arguments.tokens:,} tokens", amount=count, unit="tok/s")
    with tempfile.TemporaryDirectory() as scratch:
        file, out = Path(scratch) / "text.txt", Path(scratch) / "out"
        file.write_text("\n\n".join(made))

        def work() -> None:
            prepare([file], out, val_fraction=0.0)
            shutil.rmtree(out)

        yield measure(work, arguments.rounds)
    yield {**measure(lambda: encode(made), arguments.rounds), "contender": "tiktoken, one thread"}


def measure_folder(arguments: argparse.Namespace) -> Iterator[record.Row]:
    preset, rounds = arguments.preset, arguments.rounds
    toy = GPTConfig(n_layer=1, n_head=1, n_embd=8)  # with the vocabulary of the tokenizer
    gpt, tokenizer = GPT(toy if preset == "toy" else SHAPES[preset]), gpt2_tokenizer()
    rate = {"amount": 4e-6 * gpt.config.parameter_counts()[0], "unit": "MB/s"}
    with tempfile.TemporaryDirectory() as scratch:
        root, saved = Path(scratch), itertools.count()
        save = partial(save_folder, gpt, tokenizer, root)
        yield timed("save folder", preset, lambda: save(f"m{next(saved)}"), rounds, **rate)
        yield timed("load folder", preset, lambda: load_model(root / "m0"), rounds, **rate)


def measure_checkpoint(arguments: argparse.Namespace) -> Iterator[record.Row]:
    preset, rounds = arguments.preset, arguments.rounds
    model = {name: p.detach() for name, p in GPT(SHAPES[preset]).named_parameters()}
    moments = {f"{name}.{kind}": p.clone() for name, p in model.items() for kind in ("exp_avg", "exp_avg_sq")}
    rate = {"amount": 1e-6 * sum(p.nbytes for p in (*model.values(), *moments.values())), "unit": "MB/s"}
    with tempfile.TemporaryDirectory() as scratch:
        store, step = CheckpointStore(Path(scratch) / "checkpoints", keep_last=1), itertools.count(1)

        def save() -> Path:
            tensors = {"model": model, "optimizer": moments}
            return store.save(Checkpoint(step=next(step), tensors=tensors, state={}))

        yield timed("save checkpoint", preset, save, rounds, **rate)
        path = save()
        yield timed("load checkpoint", preset, lambda: load_checkpoint(path), rounds, **rate)


MEASURES: dict[str, Callable[[argparse.Namespace], Iterator[record.Row]]] = {
    "help": measure_help,
    "first_step": measure_first_step,
    "templates": measure_templates,
    "tokenise": measure_tokenise,
    "folder": measure_folder,
    "checkpoint": measure_checkpoint,
}


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("names", nargs="*", default=list(MEASURES), metavar="NAME")
    parser.add_argument("--preset", default="12M", choices=SHAPES)
    parser.add_argument("--tokens", type=int, default=3_000_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(MEASURES):
        parser.error(f"no measurement {min(unknown)}; there are {', '.join(MEASURES)}")
    works = {name: partial(MEASURES[name], arguments) for name in arguments.names}
    return record.emit_each("everyday", works)


if __name__ == "__main__":
    sys.exit(main())
