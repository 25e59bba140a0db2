"""The process settings, each tried in a process of its own."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from fusedgpt.kernels.cpu import process

PAGE_FAULTS = """
import resource, sys, torch
from fusedgpt.kernels.cpu import process
setting, MiB = sys.argv[1:]
if setting != "plain":
    assert getattr(process, setting)()
for _ in range(20):
    torch.ones(int(MiB) << 18)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    torch.ones(int(MiB) << 18)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def run(code: str, *arguments: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_kept_memory_is_not_faulted_in_again() -> None:
    """Ten tensors of 32 MiB: without the setting each touches 8,192 fresh pages, fewer if huge."""
    assert int(run(PAGE_FAULTS, "keep_freed_memory", "32")) < 100
    assert int(run(PAGE_FAULTS, "plain", "32")) > 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="mallopt is glibc's")
def test_returned_memory_is_faulted_in_again() -> None:
    """Below 32 MiB glibc learns to keep the blocks, unless it is told not to."""
    assert int(run(PAGE_FAULTS, "return_freed_memory", "28")) > 100
    assert int(run(PAGE_FAULTS, "plain", "28")) < 100


@pytest.mark.parametrize(
    ("environment", "spin_count"),
    [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_spinning_is_short_unless_the_user_says_otherwise(
    environment: dict[str, str], spin_count: str
) -> None:
    code = (
        "import os, sys\n"
        "from fusedgpt.kernels.cpu.process import spin_briefly\n"
        "spin_briefly(1000)\n"
        "assert 'torch' not in sys.modules\n"  # libgomp reads its settings when torch loads it
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    assert run(code, **environment) == spin_count


def test_without_proc_the_processors_name_says_the_vendor(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "exists", lambda _: False)
    monkeypatch.setattr(platform, "processor", lambda: "AMD64 Family 26 Model 2 Stepping 1, AuthenticAMD")
    assert "AuthenticAMD" in process.cpu_description.__wrapped__()
