"""Settings of the process that make a CPU step fast, and keep it fast beside other work."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

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


def spin_briefly(count: int) -> None:
    """Let OpenMP threads sleep after `count` looks at what they wait for. Call before torch is imported.

    By default they spin for milliseconds on cores that another process could use: two trainings at once on
    two cores ran 50 times slower (docs/experiments.md, "Spinning"). The user's own setting stands.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", str(count))


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Keep torch's own CUDA ops deterministic for a while, if `wanted`; an op that cannot be raises.

    Call before the process first multiplies matrices on a GPU: cuBLAS reads its setting then.
    """
    if not wanted:
        yield
        return
    import torch  # here, for spin_briefly comes before it

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    filling: Any = torch.utils.deterministic  # whose settings its stub does not know
    before = torch.are_deterministic_algorithms_enabled(), filling.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    filling.fill_uninitialized_memory = False  # it finds bugs, and writes everything twice
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        filling.fill_uninitialized_memory = before[1]
