"""Fixtures of the kernel benchmarks, their order, and the table at their end."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from typing import Any

os.environ["GOMP_SPINCOUNT"] = "1000"  # before anything imports torch; see kernels/cpu/process.py

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported, for the check

from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.kernels.harness import DTYPE, Bench, table
from benchmarks.report import record

IMPORTANCE = ("attention", "linear_cross_entropy", "layer_norm", "adamw", "activation", "decode_attention")
FIRST = ((64, 1024), (64, 4096))  # head size and T of the attention benchmarks that come first
_RESULTS = pytest.StashKey[list[record.Row]]()
_CEILINGS = pytest.StashKey[Ceilings]()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = []
    config.option.benchmark_quiet = True  # pytest-benchmark's own table is of the host's clock


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Most important first, what compiles for long last: a time limit cuts the end."""
    if all("bench" in getattr(item, "fixturenames", ()) for item in items):
        items.sort(key=_importance)


def _importance(item: pytest.Item) -> tuple[bool, bool, int]:
    parameters = item.callspec.params  # type: ignore[attr-defined]
    op = item.path.stem.removeprefix("test_bench_")
    later = op == "attention" and (parameters["D"], parameters["T"]) not in FIRST
    place = IMPORTANCE.index(op) if op in IMPORTANCE else len(IMPORTANCE)
    return parameters["contender"] in ("compiled", "flex"), later, place


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest) -> Ceilings:
    measured = measure_ceilings(DTYPE)
    request.config.stash[_CEILINGS] = measured
    return measured


@pytest.fixture
def bench(request: pytest.FixtureRequest, benchmark: Any, ceilings: Ceilings) -> Iterator[Bench]:
    """Measures one contender at one point."""
    torch.manual_seed(0)
    yield Bench(benchmark, ceilings)
    if benchmark.extra_info:
        request.config.stash[_RESULTS].append(benchmark.extra_info)
        _keep(benchmark.extra_info)
    torch.cuda.empty_cache()  # the next contender starts with all memory


def _keep(row: record.Row) -> None:
    """Write the row to the results of bench.py at once, if that runs these benchmarks."""
    if path := os.environ.get("BENCHMARK_RESULTS"):
        with open(path, "a") as file:
            file.write(json.dumps(record.stamp({"part": "kernels", **row})) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"not enough GPU memory: {str(error).splitlines()[0]}")


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Keep why a benchmark has no figures."""
    error = call.excinfo
    if (
        "bench" in getattr(item, "fixturenames", ())
        and error
        and not error.errisinstance(pytest.skip.Exception)
    ):
        _keep({"suite": "kernels", "name": item.name, "fault": str(error.value).splitlines()[0]})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    if not results:
        return
    terminalreporter.section("kernel benchmarks")
    for line in table(results):
        terminalreporter.write_line(line)
    for when, c in (("first", config.stash[_CEILINGS]), ("last", measure_ceilings(DTYPE))):
        terminalreporter.write_line(f"ceilings {when}: {c.tflops:.1f} TFLOP/s, {c.gbps:.0f} GB/s")
