"""The lock of a run directory, which one process at a time may hold."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from fusedgpt.kernels.errors import InputError
from fusedgpt.train.run.checkpoint import explained, make_directory


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keep every other trainer out of `run_dir`; however the process ends, the kernel drops the lock.

    Raises ValueError naming the process that holds it, OSError where the lock cannot be taken.
    """
    # The holder has a file of its own, because older versions of filelock truncate the lock's when they try.
    holder = run_dir / "trainer.json"
    lock = FileLock(run_dir / "trainer.lock", timeout=0)
    with explained(f"cannot lock {run_dir}"):
        make_directory(run_dir)
        try:
            lock.acquire()
        except Timeout:
            who = _describe_holder(holder)
            raise InputError(f"{run_dir} is in use by {who}; end that or choose another --run-dir") from None
        except NotImplementedError:
            raise OSError(errno.ENOSYS, "its file system has no locks") from None
    try:
        with explained(f"cannot lock {run_dir}"):
            holder.write_text(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
        yield
    finally:
        try:
            with suppress(OSError):
                holder.unlink()
        finally:
            lock.release()


def _describe_holder(path: Path) -> str:
    try:
        holder = json.loads(path.read_text())
        return f"process {int(holder['pid'])} on {str(holder['host'])!a}"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "another process"
