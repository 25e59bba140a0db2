"""All that can be asked of a CUDA GPU, most important first, within a time limit: scripts/gpu_check.

A part is one or more processes with a share of the time that is left; none that fails, hangs or breaks its
CUDA context stops the next. Everything is in DIR as soon as it is known:
    summary.txt        part, verdict, seconds, one line each; printed last
    log.txt            the output of every command
    results.jsonl      every figure, finding and verdict, with the state of the GPU after each part
    report.html, report.md    the page of report.py, whose parts are among these
    environment.json, check.json, tuning.json
Exit code: 0 if every part passed, 1 if not, 2 for wrong usage or no GPU. README.md says how to run it there.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import signal
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.report import bench, record
from benchmarks.report.runner import Part, gpu_state, run_parts

PYTHON = sys.executable
SCRIPT, CLI = [PYTHON, "-m", "benchmarks.report.gpu_check"], [PYTHON, "-m", "fusedgpt.train.cli.main"]
PYTEST = [
    PYTHON,
    *shlex.split(
        "-m pytest -p benchmarks.kernels.collect -p no:cacheprovider -vv -ra --tb=short --durations=10"
    ),
]
PYTEST += shlex.split("--continue-on-collection-errors -o faulthandler_timeout=90")
TESTED = "attention decode_attention layer_norm activation dropout linear_cross_entropy adamw optimizer"
TESTED += " training_kernels"


def all_parts(
    out: Path, *, gpu: bool, peer: Path | None = None, text: Path | None = None, tune: bool = False
) -> list[Part]:
    """Every part in its order; tuning, which is long and no check, only if asked for."""
    import torch

    from fusedgpt.kernels.tools import cases

    ops = list(dict.fromkeys(case.op for case in cases.cases(torch.device("cuda"))))
    dtypes = ("bf16", "fp16", "fp32") if gpu else ("fp32", "fp16")
    checks = [[*CLI, "kernels", "check", "--json", "--op", op, "--dtype", d] for op in ops for d in dtypes]
    jobs = min(8, max(1, (os.cpu_count() or 1) // 2))
    workers = ["-n", str(jobs), "--dist", "worksteal"] if find_spec("xdist") else []
    files = [f"tests/test_{stem}.py" for stem in TESTED.split()]
    sanitizer = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    tools = ("memcheck", "racecheck") if sanitizer else ()
    sanitize = [str(sanitizer), "--error-exitcode", "9"]
    sanitized = [[*sanitize, "--tool", tool, *SCRIPT, "--small-check", op] for tool in tools for op in ops]
    uncached = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # else one tensor's end is another's beginning
    memory = [
        PYTHON,
        *["-m", "benchmarks.workloads.memory"],
        "--presets",
        "12M",
        "gpt2",
        "gpt2-medium",
        "--compile",
    ]
    describe = [[*SCRIPT, "--environment"], [*CLI, "doctor", "--json"]]
    tuning = [*CLI, "kernels", "tune", "--json", "--minutes", "{minutes}"]
    tuned = {"FUSEDGPT_TUNING": str(out / "tuning.json")}
    return [
        Part(name="environment", share=5, commands=describe, jobs=2, needs_gpu=False, keeps_rows=True),
        Part(name="check", share=18, commands=checks, jobs=jobs, needs_gpu=False, keeps_rows=True),
        Part(name="gpu_tests", share=20, commands=[[*PYTEST, *workers, "-m", "gpu", "tests"]]),
        Part(name="tests", share=15, commands=[[*PYTEST, *workers, "-m", "not gpu", *files]]),
        *bench.parts(gpu=gpu, peer=peer, text=text),
        Part(name="memory", share=4, commands=[memory], may_be_cut=True),
        Part(
            name="report",
            share=2,
            commands=[[PYTHON, "-m", "benchmarks.report.bench", "--out", str(out), "--render"]],
        ),
        Part(name="sanitizer", share=10, commands=sanitized, jobs=jobs, environment=uncached),
        *([Part(name="tune", share=30, commands=[tuning], environment=tuned)] if tune else []),
    ]


def environment() -> dict[str, Any]:
    """The machine and the versions, apart from what `fusedgpt doctor` knows."""
    import torch

    found: dict[str, Any] = {"commit": record.commit(), "python": platform.python_version()}
    found |= {"torch": torch.__version__, "cuda": torch.version.cuda, "nvidia_smi": gpu_state()}
    if torch.cuda.is_available():
        found["gpu"] = str(torch.cuda.get_device_properties(0))
    return {**found, "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "cores": os.cpu_count()}


def small_check(op: str) -> list[str]:
    """What is wrong with `op` at the interpreter's sizes, on the GPU: small enough for compute-sanitizer."""
    import torch

    from fusedgpt.kernels.tools import cases, check

    small = [case for case in cases.cases(torch.device("cpu")) if case.op == op]
    findings = [f for case in small for f in check.measure(case, torch.bfloat16, torch.device("cuda"))]
    return [finding.fault for finding in findings if not finding.ok]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=lambda path: Path(path).absolute(), metavar="DIR")
    parser.add_argument("--minutes", type=float, metavar="N", help="all parts together")
    parser.add_argument("--peer", type=lambda path: Path(path).absolute(), help="a checkout of nanoGPT")
    parser.add_argument("--text", type=lambda path: Path(path).absolute(), help="tiny Shakespeare, for jobs")
    parser.add_argument("--parts", type=lambda names: names.split(","), help="only these, in this order")
    parser.add_argument("--tune", action="store_true", help="search for faster attention tiles at the end")
    parser.add_argument("--environment", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--small-check", help=argparse.SUPPRESS)
    found = parser.parse_args()
    if not (found.environment or found.small_check or (found.out and found.minutes)):
        parser.error("--out and --minutes are needed")
    return found


def main() -> int:
    start, arguments = time.monotonic(), parse()
    if arguments.environment:
        print(json.dumps(environment()))
        return 0
    if arguments.small_check:
        faults = small_check(arguments.small_check)
        print(*faults, sep="\n")
        return int(bool(faults))
    import torch

    os.environ["COMMIT"] = record.commit()  # one for all parts
    gpu = torch.cuda.is_available()
    options = {"peer": arguments.peer, "text": arguments.text, "tune": arguments.tune}
    parts = all_parts(arguments.out, gpu=gpu, **options)
    names = arguments.parts or [part.name for part in parts]
    chosen = [part for name in names for part in parts if part.name == name]
    if len(chosen) < len(names) or (not gpu and any(part.needs_gpu for part in chosen)):
        known = ", ".join(part.name for part in parts if gpu or not part.needs_gpu)
        print(f"gpu_check: {'' if gpu else 'no CUDA GPU; '}--parts here: {known}", file=sys.stderr)
        return 2
    return run_parts(chosen, arguments.out, 60 * arguments.minutes - (time.monotonic() - start))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # through the finally that ends the children
    sys.exit(main())
