"""Checks, tests and measures everything on a CUDA GPU within a time limit: scripts/gpu_check.

    scripts/gpu_check --out DIR --minutes N [--peer NANOGPT] [--text FILE] [--parts A,B]

A part is one or more processes with a share of the time that is left; a part that fails, hangs or breaks its
CUDA context does not stop the next. `first` and `second` are the sets of parts in parts.toml. All is in
DIR as soon as it is known:
    summary.txt                part, verdict, seconds, one line each; printed last
    log.txt                    the output of every command
    results.jsonl              every figure, finding and verdict, with the state of the GPU after each part
    report.html, report.md     the page of bench.py, whose parts are among these
    step-*.json.gz             traces of a training step
    tuning.json                the fastest attention tiles of this GPU, which parts after tune use
Exit code: 0 if every part passed, 1 if not, 2 for wrong usage or no GPU.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
import triton

from benchmarks.arguments import make_parser
from benchmarks.report import bench
from benchmarks.report.record import ROOT
from benchmarks.report.runner import Part, choose_parts, run_parts
from fusedgpt.kernels.tools import cases, check

# By name, at the interpreter's sizes: small enough for sanitizers, which take a process each.
SMALL_CASES = {f"{case.op} {case.shape}": case for case in cases.cases(torch.device("cpu"))}
MODULE = [sys.executable, "-m"]
CLI = [*MODULE, "fusedgpt.train.cli.main"]
PYTEST = [sys.executable, *shlex.split(bench.PYTEST), "--durations=10"]
GRAPH_TESTS = [
    ROOT / "tests" / name
    for name in (
        "train/loop/test_execution.py",
        "train/loop/test_sampling.py",
        "model/test_decode.py",
    )
]


def all_parts(out: Path, *, gpu: bool, peer: Path | None = None, text: Path | None = None) -> list[Part]:
    """Every part in its order."""
    ops = list(dict.fromkeys(case.op for case in cases.cases(torch.device("cuda"))))
    dtypes = ("bf16", "fp16", "fp32") if gpu else ("fp32", "fp16")
    checks = [[*CLI, "kernels", "check", "--json", "--op", op, "--dtype", d] for d in dtypes for op in ops]
    jobs = len(os.sched_getaffinity(0))
    on_any = [
        Part(name="environment", seconds=10, commands=[[*CLI, "doctor", "--json"]]),
        Part(name="check", seconds=45, commands=checks, jobs=jobs),
    ]
    if not gpu:
        return on_any
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    small_checks = [[*MODULE, "benchmarks.report.gpu_check", "--small-check", name] for name in SMALL_CASES]
    sanitized = [
        [sanitizer, "--error-exitcode", "9", "--tool", tool, *command]
        for tool in ("memcheck", "racecheck")
        for command in small_checks
        if sanitizer
    ]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else an overrun lands in another tensor, unseen
    render = [*MODULE, "benchmarks.report.bench", "--out", str(out), "--render"]
    tune = [*CLI, "kernels", "tune", "--json", "--minutes", "{minutes}", "--head-size", "64", "--feature"]
    tuning = [[*tune, feature] for feature in ("plain", "dropout")]  # what the presets train with
    consan = {"TRITON_INSTRUMENTATION_MODE": "consan"}  # Triton's own check of what is shared in a kernel
    tests = [*(ROOT / "tests" / "kernels").glob("test_*.py"), *(ROOT / "tests/train/loop").glob("test_*.py")]
    return [
        *on_any,
        Part(name="graphs", seconds=35, commands=by_file("gpu", GRAPH_TESTS), jobs=jobs),
        *bench.all_parts(gpu=gpu, out=out, peer=peer, text=text),
        Part(name="gpu_tests", seconds=50, commands=by_file("gpu", files_with_gpu_tests()), jobs=jobs),
        Part(name="tests", seconds=90, commands=by_file("not gpu", tests), jobs=jobs),
        Part(name="report", seconds=4, commands=[render]),
        Part(name="consan", seconds=70, commands=small_checks, jobs=jobs, environment=consan),
        Part(name="sanitizer", seconds=16, commands=sanitized, jobs=jobs, environment=uncached),
        Part(name="tune", seconds=85, commands=tuning),
    ]


def with_tuned_tiles(parts: Sequence[Part], out: Path) -> list[Part]:
    """The parts: tune writes into `out`, and those after it launch attention with what it has found."""
    names = [part.name for part in parts]
    first = names.index("tune") if "tune" in names else len(names)
    tuned = {"FUSEDGPT_TUNING": str(out / "tuning.json")}
    return [*parts[:first], *(replace(p, environment=p.environment | tuned) for p in parts[first:])]


def files_with_gpu_tests() -> list[Path]:
    """Collecting the others too takes seconds and needs packages that a GPU machine may lack."""
    return [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text()]


def by_file(mark: str, files: Iterable[Path]) -> list[list[str]]:
    """The tests with that mark, several processes a file: a broken CUDA context costs few of them."""
    slices = [f"{i}/{bench.SLICES}" for i in range(bench.SLICES)]
    return [[*PYTEST, "-m", mark, str(file), "--slice", part] for file in sorted(files) for part in slices]


def scratch(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Memory in which ConSan keeps what it has seen."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def small_check(name: str) -> list[str]:
    """What is wrong with one of SMALL_CASES on the GPU."""
    triton.set_allocator(scratch)
    with torch.autograd.set_multithreading_enabled(False):  # Triton knows its allocator in this thread only
        findings = check.measure(SMALL_CASES[name], torch.bfloat16, torch.device("cuda"))
    return [finding.fault for finding in findings if not finding.ok]


def main() -> int:
    start = time.monotonic()
    parser = make_parser(__doc__, "--out", "--minutes", "--parts", "--peer", "--text")
    parser.add_argument("--small-check", metavar="CASE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.small_check:
        faults = small_check(arguments.small_check)
        print(*faults, sep="\n")
        return int(bool(faults))
    if not (arguments.out and arguments.minutes):
        parser.error("--out and --minutes are needed")
    gpu = torch.cuda.is_available()
    options = {"peer": arguments.peer, "text": arguments.text}
    parts = all_parts(arguments.out, gpu=gpu, **options)
    if not (gpu or arguments.parts):
        names = ", ".join(part.name for part in parts)
        print(f"gpu_check: no CUDA GPU; --parts here: {names}", file=sys.stderr)
        return 2
    sets = bench.PARTS["sets"]
    names = [name for asked in arguments.parts or () for name in sets.get(asked, [asked])]
    chosen = with_tuned_tiles(choose_parts("gpu_check", parts, names), arguments.out)
    return run_parts(chosen, arguments.out, 60 * arguments.minutes - (time.monotonic() - start))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the finally that ends the children
    sys.exit(main())
