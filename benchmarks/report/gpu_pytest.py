"""A pytest plugin of gpu_check.py, for several workers on one GPU."""

from __future__ import annotations

import os

import pytest
import torch


@pytest.hookimpl(trylast=True)  # after xdist has sent the report
def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Free a worker's GPU memory for the others; end a worker whose CUDA context an error has broken."""
    if "PYTEST_XDIST_WORKER" in os.environ and report.when == "teardown" and torch.cuda.is_available():
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError:
            os._exit(1)  # xdist starts another
