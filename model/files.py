"""Files and folders that are on the disk as a whole or not at all: written aside, synced, renamed."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.ENOTTY, errno.EBADF)


def to_json(value: Any, **options: Any) -> str:
    """`value` as JSON, which has neither NaN nor infinity: they become null. options: json.dumps's."""
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(x) for x in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_file(path: Path, data: bytes | str) -> None:
    """Write or replace `path`; text as UTF-8. Raises OSError: what was there before is then still there."""
    with beside(path) as temporary:
        temporary.write_bytes(data.encode() if isinstance(data, str) else data)
        publish(temporary, path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A free path on the same disk as `path`, to write what `publish` renames; it is removed otherwise.

    A process that is killed leaves a hidden folder `.NAME-*` beside `path`.
    """
    path = path.absolute()
    holder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        yield holder / path.name
    finally:
        shutil.rmtree(holder, ignore_errors=True)


def publish(temporary: Path, path: Path) -> None:
    """Sync a file or folder and rename it to `path`, replacing a file or an empty folder. Raises OSError."""
    sync_all(temporary)
    temporary.replace(path)
    try:
        sync(path.absolute().parent)
    except OSError:
        if path.is_dir():  # whose name may not last; a file has already replaced its predecessor
            shutil.rmtree(path, ignore_errors=True)
        raise


def sync_all(path: Path) -> None:
    """`sync` a file, or a folder and what is in it."""
    for child in path.iterdir() if path.is_dir() else ():
        sync(child)
    sync(path)


def sync(path: Path) -> None:
    """`flush` a file, or a folder, which makes the names in it durable: new files, renames.

    Some network file systems cannot sync a folder; there a power cut may undo the last renames.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        flush(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def flush(descriptor: int) -> None:
    """fsync an open file; on macOS, whose fsync stops at the drive's cache, with F_FULLFSYNC."""
    import fcntl  # which Windows lacks, where the command line starts only to say so

    full = getattr(fcntl, "F_FULLFSYNC", None)
    try:
        if full is not None:
            fcntl.fcntl(descriptor, full)
            return
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise
    os.fsync(descriptor)
