"""A pytest plugin for tests that share a GPU with those of other processes.

--slice I/N    only every N-th test, from the I-th on
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch

_ALL = "0/1"
_TRIES, _WAIT = 6, 10.0  # for memory that the others hold; seconds


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slice", default=_ALL, metavar="I/N", help="every N-th test, from the I-th on")


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    first, step = map(int, config.getoption("--slice").split("/"))
    items[:] = items[first::step]


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """A slice without tests has passed."""
    if exitstatus == pytest.ExitCode.NO_TESTS_COLLECTED:
        session.exitstatus = pytest.ExitCode.OK


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Iterator[None]:
    """Repeat what finds too little memory beside other slices, which may free it."""
    try:
        return (yield)
    except torch.OutOfMemoryError:
        if item.config.getoption("--slice") == _ALL:
            raise
        for attempt in range(_TRIES):
            torch.cuda.empty_cache()
            time.sleep(_WAIT)
            try:
                return item.runtest()
            except torch.OutOfMemoryError:
                if attempt == _TRIES - 1:
                    raise


@pytest.hookimpl(trylast=True)
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Free memory for the others; end where an error has broken the CUDA context: nothing else can pass."""
    if report.when == "teardown" and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            pytest.exit(f"{report.nodeid} has broken the CUDA context: {error}", returncode=3)
