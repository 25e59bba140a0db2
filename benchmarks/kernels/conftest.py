"""Fixtures of the kernel benchmarks, and the table at their end."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

os.environ["GOMP_SPINCOUNT"] = "1000"  # before anything imports torch; see kernels/cpu/process.py

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported, for the check

from benchmarks.ceilings import Ceilings, measure_ceilings
from benchmarks.kernels import harness
from benchmarks.kernels.harness import DTYPE, Bench, Figures

_RESULTS = pytest.StashKey[list[Figures]]()
_CEILINGS = pytest.StashKey[Ceilings]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--interpreted", action="store_true", help="on a CPU, time the Triton kernels in the interpreter"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RESULTS] = []
    config.option.benchmark_quiet = True  # pytest-benchmark's own table is of the host's clock


@pytest.fixture(scope="session")
def ceilings(request: pytest.FixtureRequest) -> Ceilings:
    measured = measure_ceilings(DTYPE)
    request.config.stash[_CEILINGS] = measured
    return measured


@pytest.fixture
def bench(
    request: pytest.FixtureRequest, benchmark: Any, ceilings: Ceilings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bench]:
    """Measures one contender at one point."""
    if request.config.getoption("--interpreted"):
        monkeypatch.setenv("FUSEDGPT_KERNELS", "triton")
    torch.manual_seed(0)
    yield Bench(benchmark, ceilings, request.config.stash[_RESULTS])
    torch.cuda.empty_cache()  # the next contender starts with all memory


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    try:
        return (yield)
    except torch.OutOfMemoryError as error:
        pytest.skip(f"not enough GPU memory: {str(error).splitlines()[0]}")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    results = config.stash[_RESULTS]
    if not results:
        return
    terminalreporter.section("kernel benchmarks")
    for line in harness.table(results):
        terminalreporter.write_line(line)
    for when, c in (("first", config.stash[_CEILINGS]), ("last", measure_ceilings(DTYPE))):
        terminalreporter.write_line(f"ceilings {when}: {c.tflops:.1f} TFLOP/s, {c.gbps:.0f} GB/s")
