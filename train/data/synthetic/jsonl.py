"""JSON lines files: read with checks, and appended to so that no kill loses a line."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.files import flush, sync, write_file

_MAX_LINE_BYTES = 4 << 20


class JsonLines(ExitStack):
    """An open JSONL file that only grows; once append() returns, its lines survive kill -9 and power loss.

    Opening repairs a truncated last line and reads the `records`. Raises ValueError for a malformed file,
    OSError if it cannot be written or another process has it open.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        with ExitStack() as opened:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                opened.enter_context(FileLock(path.with_name(f".{path.name}.lock")).acquire(timeout=0))
                flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
                self._file = os.open(path, flags, 0o644)
            except Timeout:
                busy = f"another process is writing {path}; wait for it or choose another file"
                raise OSError(busy) from None
            except OSError as error:
                raise OSError(f"cannot write {path}: {error.strerror}") from None
            opened.callback(os.close, self._file)
            content = path.read_bytes()  # of which an interrupted write may have left half a line
            whole = content.rfind(b"\n") + 1
            if isinstance(parse_json(content[whole:]), dict):
                os.write(self._file, b"\n")
            elif len(content) > whole:
                os.ftruncate(self._file, whole)
            sync(path.parent)
            self.records = list(read_objects(path))
            self.push(opened.pop_all())

    def append(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write the records and sync them; ASCII escapes keep even lone surrogates, which UTF-8 cannot."""
        data = b"".join(json.dumps(record).encode() + b"\n" for record in records)
        while data:
            data = data[os.write(self._file, data) :]
        flush(self._file)


def parse_json(data: bytes) -> Any:
    """The value of a JSON text, None if it is malformed."""
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def read_objects(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a JSONL file, without blank lines. Raises ValueError that names a bad line."""
    return (value for _, value in _numbered_objects(path))


def read_texts(path: Path) -> list[str]:
    """The "text" of every line. Raises ValueError that names a bad line, or if there is none."""
    texts = [text_of(value, f"{path}, line {number}") for number, value in _numbered_objects(path)]
    if not texts:
        raise InputError(f"{path} holds no texts")
    return texts


def _numbered_objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open("rb") as file:
        for number, line in enumerate(iter(lambda: file.readline(_MAX_LINE_BYTES + 1), b""), 1):
            if len(line) > _MAX_LINE_BYTES:
                raise InputError(f"{path}, line {number}: over {_MAX_LINE_BYTES:,} bytes long")
            if line.isspace():
                continue
            value = parse_json(line)
            if not isinstance(value, dict):
                raise InputError(f"{path}, line {number}: expected a JSON object, found {line[:40]!r}")
            yield number, value


def text_of(record: Mapping[str, Any], where: str | Path) -> str:
    """The "text" of a record. Raises ValueError if there is none."""
    text = record.get("text")
    if not isinstance(text, str):
        raise InputError(f'{where}: every line needs a "text"; this has only {sorted(record)[:5]}')
    return text


def write_objects(path: Path, objects: Iterable[Mapping[str, Any]]) -> None:
    """Write a whole JSONL file. Raises OSError if it cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "".join(json.dumps(value) + "\n" for value in objects))
