"""What macOS lacks is hidden from a process on Linux: triton, and the calls that only Linux has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

AS_ON_MACOS = """
import importlib.machinery, os, sys, sysconfig
import tokenizers, torch
sysconfig.get_config_vars()  # read by platform name, once

found = importlib.machinery.PathFinder.find_spec
importlib.machinery.PathFinder.find_spec = lambda name, *where: (
    None if name.partition(".")[0] == "triton" else found(name, *where)
)
for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
    del sys.modules[name]
for name in ("sched_getaffinity", "sched_setaffinity", "fdatasync", "posix_fadvise", "memfd_create"):
    if hasattr(os, name):
        delattr(os, name)
sys.platform = "darwin"
from fusedgpt.train.cli.main import main
main(sys.argv[1:])
"""


def on_macos(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", AS_ON_MACOS, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)


def test_create_and_sample(tmp_path: Path) -> None:
    small = ["--n-layer", "1", "--n-embd", "32", "--n-head", "2", "--refined-tokens", "2000", "--steps", "2"]
    done = on_macos("create", "haiku about rain", *small, "--output-dir", tmp_path / "models")
    assert done.returncode == 0, done.stderr
    (folder,) = (path.parent for path in (tmp_path / "models").glob("*/model.safetensors"))
    sampled = on_macos("sample", folder, "--max-new-tokens", "5")
    assert sampled.returncode == 0, sampled.stderr


@pytest.mark.parametrize("arguments", [["doctor"], ["kernels", "check"], ["kernels", "report"]])
def test_what_needs_triton_says_so(arguments: list[str]) -> None:
    done = on_macos(*arguments)
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    assert (done.returncode == 0) == (arguments == ["doctor"]), done.stdout + done.stderr
