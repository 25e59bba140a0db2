"""Settings of the process that make a CPU step fast, and keep it fast beside other work."""

from __future__ import annotations

import ctypes
import os
import sys

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # <malloc.h>


def keep_freed_memory() -> bool:
    """Tell malloc to keep what is freed, for the rest of the process; False where it is not glibc's.

    glibc hands large blocks back to the kernel on every free and faults each of their pages in again, zeroed,
    on the next allocation: half of a CPU training step (docs/experiments.md, "Page faults").
    """
    if not sys.platform.startswith("linux"):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    settings = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 256 << 20))
    return all(libc.mallopt(option, value) for option, value in settings)


def spin_briefly() -> None:
    """Let OpenMP threads sleep soon when they wait for each other. Call before torch is imported.

    By default they spin for milliseconds on cores that another process could use: two trainings at once on
    two cores ran 50 times slower (docs/experiments.md, "Spinning"). The user's own setting stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
