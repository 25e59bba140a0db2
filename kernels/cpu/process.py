"""What the CPU is, and settings of the process that make its steps fast, beside other work too."""

from __future__ import annotations

import ctypes
import os
import platform
from functools import cache
from pathlib import Path

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -2, -3, -4  # <malloc.h>


@cache
def cpu_description() -> str:
    """What the system says of the CPU, vendor and features among it, in the system's own words."""
    path = Path("/proc/cpuinfo")
    return path.read_text() if path.exists() else platform.processor()


def keep_freed_memory() -> bool:
    """Make malloc keep what is freed, for the rest of the process; False where it is not glibc's.

    glibc returns large blocks to the kernel on every free, and the next allocation faults each of their pages
    in again, zeroed: a large part of a CPU training step (docs/experiments.md, "Page faults").
    """
    return _mallopt({_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_TOP_PAD: 256 << 20})


def return_freed_memory() -> bool:
    """Make malloc return large blocks at once, for the rest of the process; False where it is not glibc's.

    glibc would otherwise learn to keep blocks of the size that a process keeps freeing, and fragmentation
    between them grows slowly without end.
    """
    return _mallopt({_M_MMAP_THRESHOLD: 128 << 10})


def _mallopt(settings: dict[int, int]) -> bool:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    return all(libc.mallopt(option, value) for option, value in settings.items())


def spin_briefly(count: int) -> None:
    """Make idle OpenMP threads sleep after `count` spins. Call before torch is imported.

    By default they spin for milliseconds on cores that another process could use (docs/experiments.md,
    "Spinning"). A setting of the user's takes precedence.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(count))
