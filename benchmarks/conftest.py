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
from benchmarks.kernels.harness import DTYPE, Bench
from benchmarks.report import page, record, sections

IMPORTANCE = ("attention", "linear_cross_entropy", "layer_norm", "adamw", "activation", "decode_attention")
COMPILED = ("ours", "ours_flat", "compiled", "flex", "liger")  # contenders with something to compile
FIRST = ((64, 1024), (64, 4096))  # head size and T of the attention benchmarks that come first
_ROWS = pytest.StashKey[list[record.Row]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--compile-only", action="store_true", help="run kernel benchmarks once, time nothing")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_ROWS] = []


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Most important first, what compiles for long last: a time limit cuts the end."""
    if all("bench" in getattr(item, "fixturenames", ()) for item in items):
        items.sort(key=_importance)
        if config.getoption("--compile-only"):
            items[:] = [item for item in items if _parameters(item)["contender"] in COMPILED]


def _parameters(item: pytest.Item) -> dict[str, Any]:
    return item.callspec.params  # type: ignore[attr-defined,no-any-return]


def _importance(item: pytest.Item) -> tuple[bool, bool, int]:
    parameters = _parameters(item)
    op = item.path.stem.removeprefix("test_bench_")
    later = op == "attention" and (parameters["D"], parameters["T"]) not in FIRST
    place = IMPORTANCE.index(op) if op in IMPORTANCE else len(IMPORTANCE)
    return parameters["contender"] in ("compiled", "flex"), later, place


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest) -> Ceilings | None:
    return None if request.config.getoption("--compile-only") else measure_ceilings(DTYPE)


@pytest.fixture
def bench(request: pytest.FixtureRequest, ceilings: Ceilings | None) -> Iterator[Bench]:
    """Measures one contender at one point."""
    torch.manual_seed(0)
    made = Bench(ceilings)
    yield made
    if made.row:
        _keep(request.config, made.row)
    torch.cuda.empty_cache()  # the next contender starts with all memory


def _keep(config: pytest.Config, row: record.Row) -> None:
    """Keep the row for the table, and write it at once to the results of bench.py if that runs these."""
    config.stash[_ROWS].append(record.stamp({"part": "kernels", **row}))
    if path := os.environ.get("BENCHMARK_RESULTS"):
        with open(path, "a") as file:
            file.write(json.dumps(config.stash[_ROWS][-1]) + "\n")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"not enough GPU memory: {str(error).splitlines()[0]}")


def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> None:
    """Keep why a benchmark has no figures."""
    fails = call.excinfo and not call.excinfo.errisinstance(pytest.skip.Exception)
    if fails and "bench" in getattr(item, "fixturenames", ()):
        fault = str(call.excinfo.value).splitlines()[0]
        _keep(item.config, {"suite": "kernels", "name": item.name, "fault": fault})


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if rows := record.timed(config.stash[_ROWS]):
        terminalreporter.section("kernel benchmarks")
        terminalreporter.write_line(page.markdown([sections.kernels(list(rows.values()))]))
