"""`fusedgpt prepare` and tiktoken on real text: speed, and memory at any size.

    python -m benchmarks.workloads.tokenising speed FOLDER [--repeat 4] [--workers 2]
    python -m benchmarks.workloads.tokenising memory FOLDER [--megabytes 10 100 1000] [--workers 2]

FOLDER holds at least 20 MB of text in .txt files; --repeat reads it several times, so that starting the
workers counts as little as in real use.
speed: `prepare`, from files to a synced token set; tiktoken on documents in memory, on one thread and in
several processes. Order A B C C B A. No speed unless the ids agree.
memory: the largest memory of all processes together, for one file of each size.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from benchmarks.arguments import make_parser
from benchmarks.report import record
from benchmarks.report.record import Row
from fusedgpt.model.tokenizer import gpt2_tokenizer
from fusedgpt.train.data.text.prepare import prepare
from fusedgpt.train.data.text.sources import Source


@lru_cache
def stock_tiktoken() -> tiktoken.Encoding:
    """GPT-2's encoding with tiktoken's own pattern: ours is faster."""
    ours = gpt2_tokenizer()._bpe
    special = {"<|endoftext|>": ours.eot_token}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ours._mergeable_ranks, special_tokens=special
    )


def encode(texts: list[str]) -> None:
    for text in texts:
        stock_tiktoken().encode_ordinary(text)


def encode_in_processes(texts: list[str], workers: int) -> None:
    """tiktoken on every workers-th text in each process: what the machine can do at most."""
    process = get_context("fork").Process
    children = [process(target=encode, args=(texts[i::workers],)) for i in range(workers)]
    for child in children:
        child.start()
    for child in children:
        child.join()


def speed(arguments: argparse.Namespace) -> int:
    folder, workers = arguments.folder, arguments.workers
    texts = [document.text for document in Source(inputs=(folder,))]
    with tempfile.TemporaryDirectory() as scratch:
        prepare([folder], Path(scratch) / "check", val_fraction=0.0, workers=workers)
        ids = np.fromfile(Path(scratch) / "check" / "train-00000.bin", dtype="<u2")
    eot = stock_tiktoken().eot_token
    wanted = [i for text in texts for i in (*stock_tiktoken().encode_ordinary(text), eot)]
    if not np.array_equal(ids, wanted):
        raise SystemExit("no speed: the ids are not tiktoken's")

    def run(contender: str) -> Row:
        with tempfile.TemporaryDirectory() as scratch:
            start = time.perf_counter()
            if contender == "ours":
                repeated = [folder] * arguments.repeat
                prepare(repeated, Path(scratch) / "out", val_fraction=0.0, workers=workers)
            elif contender == "tiktoken, one thread":
                encode(texts * arguments.repeat)
            else:
                encode_in_processes(texts * arguments.repeat, workers)
            return {"times": [1e3 * (time.perf_counter() - start)]}

    megabytes = sum(len(text.encode()) for text in texts) * arguments.repeat / 1e6
    shape = f"{megabytes:.1f} MB, {workers} workers"
    base = {"suite": "everyday", "name": "prepare", "shape": shape, "dtype": "fp32", "unit": "MB/s"}
    contenders = ["ours", "tiktoken, one thread", f"tiktoken, {workers} processes"]
    record.contest(base, contenders, run, lambda row, _: {"rate": 1e3 * megabytes / row["ms"]})
    return 0


def memory(arguments: argparse.Namespace) -> int:
    text = b"".join(path.read_bytes() for path in sorted(arguments.folder.rglob("*.txt")))
    for megabytes in arguments.megabytes:
        with tempfile.TemporaryDirectory() as scratch:
            file = Path(scratch) / "text.txt"
            repeated = text * (int(megabytes * 1e6) // len(text) + 1)
            file.write_text(repeated[: int(megabytes * 1e6)].decode(errors="ignore"))
            command = [sys.executable, "-m", "fusedgpt.train.cli.main", "prepare", str(file), "--quiet"]
            command += ["--out", f"{scratch}/out", "--workers", str(arguments.workers)]
            peak, start = 0, time.perf_counter()
            with subprocess.Popen(command, stdout=subprocess.DEVNULL) as running:
                while running.poll() is None:
                    peak = max(peak, _anonymous_kilobytes(running.pid))
                    time.sleep(0.02)
        if running.returncode:
            return 1
        row = {"suite": "everyday", "name": "prepare memory", "shape": f"{megabytes} MB", "contender": "ours"}
        record.emit(row | {"ms": 1e3 * (time.perf_counter() - start), "peak_mb": peak / 1e3})
    return 0


def _anonymous_kilobytes(parent: int) -> int:
    """Anonymous memory of a process and its children, shared pages counted once.

    Pages mapped from files (libraries) are left out: who else has them open decides how much of them counts.
    """
    total = 0
    for process in Path("/proc").glob("[0-9]*"):
        try:
            stat = (process / "stat").read_text().rpartition(")")[2].split()
            if parent in (int(process.name), int(stat[1])):
                lines = (process / "smaps_rollup").read_text().splitlines()
                total += next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
        except (OSError, StopIteration):
            continue  # it has ended
    return total


def main() -> int:
    parser = make_parser(__doc__)
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    arguments = parser.parse_args()
    return speed(arguments) if arguments.what == "speed" else memory(arguments)


if __name__ == "__main__":
    sys.exit(main())
