"""What gpu_check.py adds to pytest, as `-p gpu_pytest`: for a GPU that breaks, and for time that runs out."""

from __future__ import annotations

import json
import os

import pytest

from benchmarks.report import record

BENCHED = ("attention", "linear_cross_entropy", "layer_norm", "adamw", "activation", "decode_attention")
FIRST = ((64, 1024), (64, 4096))  # head size and T of the attention that is measured before all else


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Benchmarks in order of importance, those that compile for long last: a time limit cuts the end."""
    if all("bench" in getattr(item, "fixturenames", ()) for item in items):
        items.sort(key=_importance)


def _importance(item: pytest.Item) -> tuple[bool, bool, int]:
    parameters = item.callspec.params  # type: ignore[attr-defined]
    op = item.path.stem.removeprefix("test_bench_")
    later = op == "attention" and (parameters["D"], parameters["T"]) not in FIRST
    place = BENCHED.index(op) if op in BENCHED else len(BENCHED)
    return parameters["contender"] in ("compiled", "flex"), later, place


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Keep a benchmark's figures at once."""
    benchmark = item.funcargs.get("benchmark")  # type: ignore[attr-defined]
    if benchmark is not None and benchmark.extra_info:
        with open(os.environ["BENCHMARK_RESULTS"], "a") as file:
            file.write(json.dumps(record.stamp({"part": "kernels", **benchmark.extra_info})) + "\n")


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Keep why a benchmark has no figures."""
    error = call.excinfo
    benched = "bench" in getattr(item, "fixturenames", ())
    if benched and error and not error.errisinstance(pytest.skip.Exception):
        row = {"suite": "kernels", "name": item.name, "fault": str(error.value).splitlines()[0]}
        with open(os.environ["BENCHMARK_RESULTS"], "a") as file:
            file.write(json.dumps(record.stamp({"part": "kernels", **row})) + "\n")


@pytest.hookimpl(trylast=True)  # after xdist has sent the report
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Free a worker's GPU memory for the others; end a worker whose CUDA context an error has broken."""
    import torch

    if "PYTEST_XDIST_WORKER" in os.environ and report.when == "teardown" and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            os._exit(1)  # xdist starts another
