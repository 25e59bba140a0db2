"""`fusedgpt prepare` against tiktoken on one thread: speed on all cores, and memory at any size.

    python benchmarks/prepare.py speed FOLDER [--repeat 4] [--rounds 3] [--workers 2]
    python benchmarks/prepare.py memory FOLDER [--megabytes 10 100 1000] [--workers 2]

FOLDER holds at least 20 MB of real text (.txt); --repeat reads it as often, so that starting the workers
counts as little as in real use. speed alternates tiktoken on one thread, prepare, tiktoken in as many
processes, and back (a round); tiktoken encodes documents in memory, prepare goes from files to a synced
token set. A JSON line has the speeds in MB/s and, by their medians, `efficiency`: prepare over workers x
tiktoken, which other work on the machine lowers; `cpu_efficiency`: the same in CPU seconds;
`of_attainable`: prepare over the processes. No speed is printed unless the ids agree. memory prints for
each size, one text file, the largest memory of all processes together.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from fusedgpt.model.tokenizer import gpt2_tokenizer
from fusedgpt.train.data.text.prepare import prepare, read_documents


@lru_cache
def stock_tiktoken() -> tiktoken.Encoding:
    """GPT-2's encoding with the pattern that tiktoken itself has: ours is faster."""
    ours = gpt2_tokenizer()._bpe
    special = {"<|endoftext|>": ours.eot_token}
    return tiktoken.Encoding(
        "gpt2", pat_str=r50k_pat_str, mergeable_ranks=ours._mergeable_ranks, special_tokens=special
    )


def tiktoken_seconds(texts: list[str], repeat: int) -> float:
    encode = stock_tiktoken().encode_ordinary
    start = time.perf_counter()
    for text in texts * repeat:
        encode(text)
    return time.perf_counter() - start


def processes_seconds(texts: list[str], repeat: int, workers: int) -> float:
    """tiktoken alone, on every workers-th text in each of as many processes: what the machine has to give."""
    start = time.perf_counter()
    children = []
    for i in range(workers):
        if not (child := os.fork()):
            tiktoken_seconds((texts * repeat)[i::workers], 1)
            os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return time.perf_counter() - start


def prepare_seconds(folder: Path, scratch: Path, repeat: int, workers: int) -> float:
    out = scratch / "out"
    start = time.perf_counter()
    prepare([folder] * repeat, out, val_fraction=0.0, workers=workers)
    seconds = time.perf_counter() - start
    shutil.rmtree(out)
    return seconds


def check(folder: Path, texts: list[str], scratch: Path, workers: int) -> None:
    prepare([folder], scratch / "check", val_fraction=0.0, workers=workers)
    ids = np.fromfile(scratch / "check" / "train-00000.bin", dtype="<u2")
    encoding = stock_tiktoken()
    wanted = [i for text in texts for i in (*encoding.encode_ordinary(text), encoding.eot_token)]
    if not np.array_equal(ids, wanted):
        raise SystemExit("no speed: the ids are not tiktoken's")
    shutil.rmtree(scratch / "check")


def speed(arguments: argparse.Namespace, scratch: Path) -> dict[str, Any]:
    folder, repeat, workers = arguments.folder, arguments.repeat, arguments.workers
    texts = read_documents([folder])
    check(folder, texts, scratch, workers)
    megabytes = sum(len(text.encode()) for text in texts) * repeat / 1e6
    run = {
        "tiktoken": lambda: tiktoken_seconds(texts, repeat),
        "prepare": lambda: prepare_seconds(folder, scratch, repeat, workers),
        "processes": lambda: processes_seconds(texts, repeat, workers),
    }
    found: dict[str, list[float]] = {name: [] for name in run}
    cpu: dict[str, list[float]] = {name: [] for name in run}
    for _ in range(arguments.rounds):
        for name in (*run, *reversed(run)):
            before = sum(os.times()[:4])
            found[name].append(megabytes / run[name]())
            cpu[name].append(sum(os.times()[:4]) - before)
    median = {name: statistics.median(speeds) for name, speeds in found.items()}
    return {
        "megabytes": round(megabytes, 1),
        "workers": workers,
        **{f"{name}_mb_s": [round(x, 1) for x in speeds] for name, speeds in found.items()},
        "efficiency": round(median["prepare"] / (workers * median["tiktoken"]), 3),
        "cpu_efficiency": round(statistics.median(cpu["tiktoken"]) / statistics.median(cpu["prepare"]), 3),
        "of_attainable": round(median["prepare"] / median["processes"], 3),
        "load": [round(x, 2) for x in os.getloadavg()],
        "machine": platform.machine(),
    }


def memory(arguments: argparse.Namespace, scratch: Path, megabytes: int) -> dict[str, Any]:
    file = scratch / "text.txt"
    sources = sorted(arguments.folder.rglob("*.txt"))
    with file.open("wb") as target:
        while target.tell() < megabytes * 1e6:
            for source in sources:
                target.write(
                    source.read_bytes()[: int(megabytes * 1e6) - target.tell()]
                    .decode(errors="ignore")
                    .encode()
                )
    command = [sys.executable, "-m", "fusedgpt.train.cli.main", "prepare", file, "--out", scratch / "out"]
    start = time.perf_counter()
    running = subprocess.Popen(
        [*map(str, command), "--workers", str(arguments.workers), "--quiet"], stdout=subprocess.DEVNULL
    )
    peak = 0
    while running.poll() is None:
        peak = max(peak, _tree_kilobytes(running.pid))
        time.sleep(0.02)
    if running.returncode:
        raise SystemExit("prepare failed")
    seconds = time.perf_counter() - start
    shutil.rmtree(scratch / "out")
    return {"megabytes": megabytes, "peak_mb": round(peak / 1e3, 1), "seconds": round(seconds, 1)}


def _tree_kilobytes(parent: int) -> int:
    """Anonymous memory of a process and its children, what they share counted once.

    What is mapped from files (libraries) is left out: how much of it counts depends on who else has it open.
    """
    total = 0
    for pid in (parent, *_children(parent)):
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
            total += next(int(line.split()[1]) for line in lines if line.startswith("Pss_Anon:"))
        except (OSError, StopIteration):
            continue  # it has ended
    return total


def _children(parent: int) -> list[int]:
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            _, _, rest = (folder / "stat").read_text().rpartition(")")
        except OSError:
            continue
        if int(rest.split()[1]) == parent:
            found.append(int(folder.name))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["speed", "memory"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--megabytes", type=int, nargs="+", default=[10, 100, 1000])
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.what == "speed":
            print(json.dumps(speed(arguments, Path(scratch))))
        else:
            for megabytes in arguments.megabytes:
                print(json.dumps(memory(arguments, Path(scratch), megabytes)), flush=True)


if __name__ == "__main__":
    main()
