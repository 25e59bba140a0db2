"""The command line in tests: as a process, and as `fusedgpt` of tests/train/cli/conftest.py without one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

FUSEDGPT = Path(sys.executable).with_name("fusedgpt")

Run = Callable[..., subprocess.CompletedProcess[str]]


def process(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([FUSEDGPT, *arguments], capture_output=True, text=True, timeout=120, **options)
