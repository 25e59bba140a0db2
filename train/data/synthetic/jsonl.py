"""Files with one JSON object a line: read with care, appended to so that no kill loses a line."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Self

from filelock import FileLock, Timeout

from fusedgpt.model.files import sync

_MAX_LINE_BYTES = 4 << 20


class JsonLines:
    """An open JSONL file that only grows. What append() returned from survives kill -9 and power loss.

    A last line that was cut is completed or removed on opening; `records` is what was there then. Raises
    ValueError for a file that is no such JSONL, OSError where it cannot be written or another process has it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise OSError(f"another process is writing {path}; wait for it or choose another file") from None
        except OSError as error:
            raise OSError(f"cannot write {path}: {error.strerror}") from None
        try:
            no_follow = getattr(os, "O_NOFOLLOW", 0)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | no_follow, 0o644)
        except OSError as error:
            self._lock.release()
            raise OSError(f"cannot write {path}: {error.strerror}") from None
        try:
            self._repair()
            sync(path.parent)
            self.records = list(read_objects(path))
        except BaseException:
            self.close()
            raise

    def _repair(self) -> None:
        """A write that was cut leaves a last line without its end."""
        content = self.path.read_bytes()
        whole = content.rfind(b"\n") + 1
        rest = content[whole:]
        if _is_object(rest):
            os.write(self._file, b"\n")
        elif rest:
            os.ftruncate(self._file, whole)

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the records in one go, down to the disk."""
        # ASCII escapes keep even a lone surrogate, which UTF-8 could not
        data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        while data:
            data = data[os.write(self._file, data) :]
        os.fsync(self._file)

    def close(self) -> None:
        os.close(self._file)
        self._lock.release()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file; blank lines are skipped. Raises ValueError naming the line at fault."""
    return (value for _, value in _numbered_objects(path))


def read_texts(path: Path) -> list[str]:
    """The "text" of every line. Raises ValueError naming the line at fault, or where there is none."""
    texts = [text_of(value, f"{path}, line {number}") for number, value in _numbered_objects(path)]
    if not texts:
        raise ValueError(f"{path} holds no texts")
    return texts


def _numbered_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > _MAX_LINE_BYTES:
                raise ValueError(f"{path}, line {number}: over {_MAX_LINE_BYTES:,} bytes long")
            if line.isspace():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError):
                value = None
            if not isinstance(value, dict):
                raise ValueError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}")
            yield number, value


def text_of(record: Mapping[str, Any], where: str | Path) -> str:
    """The record's "text". Raises ValueError where it has none."""
    text = record.get("text")
    if not isinstance(text, str):
        raise ValueError(f'{where}: every line needs a "text"; this has only {sorted(record)[:5]}')
    return text


def write_objects(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Make a JSONL file in one go. Raises OSError where it cannot be written."""
    write_atomically(path, "".join(json.dumps(value) + "\n" for value in objects))


def write_atomically(path: Path, text: str) -> None:
    """Replace a file, so that whoever reads it finds the old or the new one whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(handle)
        Path(name).chmod(0o644)
        Path(name).replace(path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
