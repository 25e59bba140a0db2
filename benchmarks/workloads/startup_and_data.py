"""What surrounds the training step: start-up, generating data, tokenising, saving and loading.

    python -m benchmarks.workloads.startup_and_data [NAME ...] [--preset 12M] [--tokens 100000] [--rounds 3]

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
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from benchmarks.arguments import make_parser
from benchmarks.report import record
from benchmarks.workloads.jobs import CLI, PROMPT, run
from benchmarks.workloads.tokenising import stock_tiktoken
from benchmarks.workloads.training_step import SHAPES
from fusedgpt.model.config import GPTConfig
from fusedgpt.model.folder import load_model, save_folder
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import gpt2_tokenizer
from fusedgpt.train.data.synthetic.grammar import generate_samples
from fusedgpt.train.data.text.prepare import prepare
from fusedgpt.train.run.checkpoint import Checkpoint, CheckpointStore, load_checkpoint

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR")


def timed(work: Callable[[], object], rounds: int) -> list[float]:
    """Milliseconds of each of `rounds` calls, after a first one that fills imports and caches."""
    work()
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        work()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def row(name: str, shape: str, times: list[float], work: float = 0.0, unit: str = "") -> record.Row:
    """One result; `work` is the amount done in the time, for a rate in `unit`."""
    found = {"suite": "everyday", "name": name, "shape": shape, "dtype": "fp32", "contender": "ours"}
    found |= record.summary([times])
    return found | ({"rate": work / (1e-3 * found["ms"]), "unit": unit} if work else {})


def measure_help(arguments: argparse.Namespace) -> Iterator[record.Row]:
    def work() -> None:
        subprocess.run([*CLI, "--help"], check=True, stdout=subprocess.DEVNULL)

    yield row("help", "", timed(work, arguments.rounds))


def measure_first_step(arguments: argparse.Namespace) -> Iterator[record.Row]:
    toy = arguments.preset == "toy"
    small = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32"] if toy else ["--preset", arguments.preset]
    with tempfile.TemporaryDirectory() as scratch:
        text = Path(scratch) / "text.txt"
        text.write_text("\n\n".join(texts(2000)[0]))
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
        for _, text in zip(made, generate_samples(PROMPT), strict=False):
            assert text

    yield row("templates", f"{arguments.tokens:,} tokens", timed(work, arguments.rounds), count, "tok/s")


def measure_tokenise(arguments: argparse.Namespace) -> Iterator[record.Row]:
    made, count = texts(arguments.tokens)
    shape = f"{arguments.tokens:,} tokens"
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "text.txt"
        file.write_text("\n\n".join(made))

        def work() -> None:
            prepare([file], Path(scratch) / "out", val_fraction=0.0)
            shutil.rmtree(Path(scratch) / "out")

        yield row("tokenise", shape, timed(work, arguments.rounds), count, "tok/s")
    encode = stock_tiktoken().encode_ordinary
    alone = timed(lambda: [encode(text) for text in made], arguments.rounds)
    yield {**row("tokenise", shape, alone, count, "tok/s"), "contender": "tiktoken, one thread"}


def measure_folder(arguments: argparse.Namespace) -> Iterator[record.Row]:
    gpt, tokenizer = GPT(SHAPES[arguments.preset]), gpt2_tokenizer()
    if arguments.preset == "toy":
        gpt = GPT(GPTConfig(n_layer=1, n_head=1, n_embd=8))  # with the vocabulary of the tokenizer
    megabytes = 4e-6 * gpt.config.parameter_counts()[0]
    with tempfile.TemporaryDirectory() as scratch:
        saved = iter(range(1_000_000))
        save = timed(lambda: save_folder(gpt, tokenizer, Path(scratch), f"m{next(saved)}"), arguments.rounds)
        yield row("save folder", arguments.preset, save, megabytes, "MB/s")
        load = timed(lambda: load_model(Path(scratch) / "m0"), arguments.rounds)
        yield row("load folder", arguments.preset, load, megabytes, "MB/s")


def measure_checkpoint(arguments: argparse.Namespace) -> Iterator[record.Row]:
    model = {name: p.detach() for name, p in GPT(SHAPES[arguments.preset]).named_parameters()}
    moments = {f"{name}.{kind}": p.clone() for name, p in model.items() for kind in ("exp_avg", "exp_avg_sq")}
    megabytes = 1e-6 * sum(p.nbytes for p in (*model.values(), *moments.values()))
    with tempfile.TemporaryDirectory() as scratch:
        store, step = CheckpointStore(Path(scratch) / "checkpoints", keep_last=1), iter(range(1, 1_000_000))

        def save() -> Path:
            tensors = {"model": model, "optimizer": moments}
            return store.save(Checkpoint(step=next(step), tensors=tensors, state={}))

        yield row("save checkpoint", arguments.preset, timed(save, arguments.rounds), megabytes, "MB/s")
        path = save()
        load = timed(lambda: load_checkpoint(path), arguments.rounds)
        yield row("load checkpoint", arguments.preset, load, megabytes, "MB/s")


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
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    if unknown := set(arguments.names) - set(MEASURES):
        parser.error(f"no measurement {min(unknown)}; there are {', '.join(MEASURES)}")
    works = {name: partial(MEASURES[name], arguments) for name in arguments.names}
    return record.emit_each("everyday", works)


if __name__ == "__main__":
    sys.exit(main())
