"""Documents from files, folders and standard input, read one after another in constant memory.

A text file, a line of a .jsonl file and a row of a .parquet file are one document each. A text file is read
in pieces, cut where the token ids stay those of the whole text.
"""

from __future__ import annotations

import codecs
import gzip
import io
import json
import os
import re
import stat
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

STANDARD_INPUT = Path("-")
TEXT_SUFFIXES = (".txt", ".md")
LINE_SUFFIXES = (".jsonl", ".ndjson")
COMPRESSIONS = (".gz", ".zst")
Cut = Literal["anywhere", "words", "never"]
Errors = Literal["strict", "replace", "ignore"]
_Bytes = IO[bytes] | io.BufferedIOBase

_BLOCK_BYTES = 1 << 18
_BINARY_BYTES = 8192  # a zero byte among the first means binary, as for git
_ROWS = 256  # of a table, in memory at once
_IDEOGRAPH_END = re.compile("[\u4e00-\u9fa5\u3041-\u3096\u30a1-\u30fa](?=[。、，！？])")


class DataError(ValueError):
    """Data that cannot be read, or is malformed."""


class Piece(NamedTuple):
    """A part of a document."""

    text: str
    ends: bool  # the document ends with it


@dataclass(frozen=True, kw_only=True)
class Source:
    """What to read, and how. Iterating gives the pieces of all documents that are not blank."""

    inputs: tuple[Path, ...]
    text_field: str = "text"  # of a JSON line or a table
    errors: Errors = "strict"  # for bytes that are not UTF-8
    cut: Cut = "never"
    on_bytes: Callable[[int], None] = lambda _: None  # called with the number of further bytes read

    def __iter__(self) -> Iterator[Piece]:
        """Raises FileNotFoundError for a missing input, DataError for one that cannot be read."""
        for path in find_files(self.inputs):
            with _readable(path):
                yield from _reader(path)(self, path)

    @property
    def size(self) -> int:
        """Bytes of all files, compressed as they are. Raises as iterating does for unusable paths."""
        return sum(path.stat().st_size for path in find_files(self.inputs) if path != STANDARD_INPUT)

    @property
    def read_once(self) -> Path | None:
        """An input that cannot be read a second time: standard input, or a pipe."""
        return next((p for p in self.inputs if p == STANDARD_INPUT or (p.exists() and _is_pipe(p))), None)


def read_documents(paths: Sequence[Path]) -> list[str]:
    """The documents of text, JSON lines and parquet files, and of the folders they are in, in order of names.

    Raises FileNotFoundError for a missing path, DataError for files that cannot be read or hold no text.
    """
    documents = [piece.text for piece in Source(inputs=tuple(paths))]
    if not documents:
        raise no_text(paths)
    return documents


def no_text(paths: Sequence[Path]) -> DataError:
    """The error for inputs without text."""
    return DataError(f"{', '.join(map(str, paths[:4]))} is empty")


def _is_pipe(path: Path) -> bool:
    return not path.is_file() and not path.is_dir()


# Which files


def find_files(inputs: Sequence[Path]) -> Iterator[Path]:
    """Each input that is a file, and the files with text below each that is a folder, in order of names.

    Raises FileNotFoundError for a missing input, DataError for a folder without text and a symlink loop.
    """
    for path in inputs:
        if path == STANDARD_INPUT or not stat.S_ISDIR(_status(path).st_mode):
            yield path
            continue
        empty = True
        for file in _below(path, ()):
            empty = False
            yield file
        if empty:
            suffixes = ", ".join((*TEXT_SUFFIXES, *LINE_SUFFIXES))
            raise DataError(
                f"{path} holds no {suffixes} or .parquet files (nor any compressed as .gz or .zst)"
            )


def _below(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    here = _status(folder)
    if (here.st_dev, here.st_ino) in above:
        raise DataError(f"{folder} is a symlink loop, it leads back to a folder above it: remove the link")
    above = (*above, (here.st_dev, here.st_ino))
    with _readable(folder):
        names = sorted(os.listdir(folder))
    if "dataset_dict.json" in names and "train" in names:  # a saved DatasetDict
        names = ["train"]
    elif "state.json" in names and (tables := [name for name in names if name.endswith(".arrow")]):
        names = tables  # a saved Dataset
    else:
        names = [name for name in names if (folder / name).is_dir() or _has_text(name)]
    for name in names:
        path = folder / name
        yield from _below(path, above) if stat.S_ISDIR(_status(path).st_mode) else (path,)


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{path} is a symbolic link to nothing: remove it") from None
        raise FileNotFoundError(f"there is no file or folder {path}") from None
    except (OSError, ValueError) as error:  # ELOOP says "too many levels of symbolic links"
        raise DataError(f"cannot read {path}: {_reason(error)}") from None


def _has_text(name: str) -> bool:
    return _suffix(name) in (*TEXT_SUFFIXES, *LINE_SUFFIXES, ".parquet")


def _suffix(name: str) -> str:
    """The suffix below a compression's, in lower case."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in COMPRESSIONS else path.suffix


# How each is read: functions from a source and a path to pieces


def _reader(path: Path) -> Callable[[Source, Path], Iterator[Piece]]:
    readers = {".parquet": _table_pieces, ".arrow": _table_pieces}
    readers |= dict.fromkeys(LINE_SUFFIXES, _line_pieces)
    return readers.get(_suffix(path.name), _text_pieces)


def _text_pieces(source: Source, path: Path) -> Iterator[Piece]:
    """One document. Raises DataError for a binary file, and for bytes that are not UTF-8."""
    with _opened(path, source.on_bytes) as stream:
        texts = cut_again(_decoded(stream, path, source.errors), source.cut)
        held, in_parts = next(texts), False
        for text in texts:
            yield Piece(held, False)
            held, in_parts = text, True
        if in_parts or not _is_blank(held):
            yield Piece(held, True)


def _is_blank(text: str) -> bool:
    return not text or text.isspace()


def _decoded(stream: _Bytes, path: Path, errors: Errors) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8")(errors)
    block = stream.read(_BLOCK_BYTES)
    _refuse_binary(block, path)
    position = len(codecs.BOM_UTF8) if block.startswith(codecs.BOM_UTF8) else 0
    block = block[position:]
    while True:
        kept = len(decoder.getstate()[0])
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            raise _not_utf8(str(path), position - kept + error.start) from None
        if text:
            yield text
        if not block:
            return
        position += len(block)
        block = stream.read(_BLOCK_BYTES)


def _refuse_binary(block: bytes, path: Path) -> None:
    if block.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path} is UTF-16, not UTF-8 text; convert it first (iconv -f UTF-16 -t UTF-8)")
    if (place := block.find(b"\0", 0, _BINARY_BYTES)) >= 0:
        raise DataError(f"{path} is a binary file (byte {place} is zero), not text: leave it out")


def _not_utf8(where: str, place: int) -> DataError:
    return DataError(
        f"{where} is not UTF-8 text (byte {place}); convert it first, or choose --errors replace or ignore"
    )


def cut_again(texts: Iterable[str], cut: Cut) -> Iterator[str]:
    """`texts` joined and cut again near the same places, but where words of the tokenizer end."""
    texts = iter(texts)
    held = [next(texts, "")]
    for following in texts:
        last = held.pop()
        place = {"anywhere": len(last), "never": 0}.get(cut)
        place = last_word_end(last) if place is None else place
        if place:
            yield "".join((*held, last[:place]))
            held = []
        held += [last[place:], following]
    yield "".join(held)


def last_word_end(text: str) -> int:
    """The last place in `text` where GPT-2's words end whatever surrounds it; 0 if there is none.

    That is before a space or line feed that follows no white space: a space belongs to the word after it, and
    the pattern looks ahead only within a run of white space. Text without spaces is cut between an ideograph
    and its punctuation, which never share a word.
    """
    for space in "\n ":
        place = text.rfind(space)
        while place > 0:
            if not text[place - 1].isspace():
                return place
            place = text.rfind(space, 0, place)
    ends = [match.end() for match in _IDEOGRAPH_END.finditer(text)]
    return ends[-1] if ends else 0


def _line_pieces(source: Source, path: Path) -> Iterator[Piece]:
    """One document per line, which is a JSON object with the source's text field."""
    with _opened(path, source.on_bytes) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                _refuse_binary(line, path)
                line = line.removeprefix(codecs.BOM_UTF8)
            text = "" if line.isspace() else _field_of_line(line, source, f"{path}, line {number}")
            if not _is_blank(text):
                yield Piece(text, True)


def _field_of_line(line: bytes, source: Source, where: str) -> str:
    try:
        record = json.loads(line.decode("utf-8", source.errors))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error.start) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {_reason(error)}") from None
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object with a field {source.text_field!r}")
    if source.text_field not in record:
        raise DataError(f"{where} {_no_field(source.text_field, list(record))}")
    return _checked_text(record[source.text_field], where, source.text_field)


def _no_field(name: str, names: list[str]) -> str:
    there = ", ".join(names[:8])[:100] or "none"
    return f"has no field {name!r} (it has: {there}); name the one with the text with --text-field"


def _checked_text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {field!r} is not text but {type(value).__name__}")
    return value


def _table_pieces(source: Source, path: Path) -> Iterator[Piece]:
    """One document per row of a .parquet file, or of an .arrow file that the library `datasets` saved."""
    row, size, reported = 0, path.stat().st_size, 0
    batches, n_rows = _table_batches(path, source.text_field)
    for column in batches:
        for value in _texts_of(column, source.errors, path, row):
            text = _checked_text(value, f"{path}, row {row}", source.text_field)
            if not _is_blank(text):
                yield Piece(text, True)
            row += 1
        done = size * row // max(n_rows, row, 1)
        source.on_bytes(done - reported)
        reported = done
    source.on_bytes(size - reported)


def _table_batches(path: Path, field: str) -> tuple[Iterator[Any], int]:
    """(the column in slices of some rows, the number of rows or 0 if it is unknown)."""
    pa = _pyarrow(path)
    if _suffix(path.name) == ".parquet":
        file = import_module("pyarrow.parquet").ParquetFile(path, memory_map=False, pre_buffer=False)
        names, n_rows = file.schema_arrow.names, file.metadata.num_rows
        batches = file.iter_batches(batch_size=_ROWS, columns=[field] if field in names else [])
    else:
        reader = pa.ipc.open_stream(pa.memory_map(str(path)))
        names, n_rows, batches = reader.schema.names, 0, reader
    if field not in names:
        raise DataError(f"{path} {_no_field(field, names)}")
    slices = (
        batch.column(field).slice(i, _ROWS) for batch in batches for i in range(0, batch.num_rows, _ROWS)
    )
    return slices, n_rows


def _texts_of(column: Any, errors: Errors, path: Path, row: int) -> Iterator[object]:
    pa = _pyarrow(path)
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        yield from column.to_pylist()
        return
    raw = column.cast(pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary())
    for i, value in enumerate(raw.to_pylist(), start=row):
        try:
            yield value if value is None else value.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}, row {i}", error.start) from None


def _pyarrow(path: Path) -> Any:
    """The optional library that reads tables and .zst."""
    if find_spec("pyarrow") is None:
        raise DataError(f"reading {path} takes the package pyarrow: pip install 'fusedgpt[parquet]'")
    return import_module("pyarrow")


# Bytes


class _CountingFile(io.FileIO):
    """A file that reports the number of bytes read."""

    def __init__(self, path: Path, on_bytes: Callable[[int], None]) -> None:
        super().__init__(path)
        self._on_bytes = on_bytes

    def readinto(self, buffer: Any) -> int:
        n = super().readinto(buffer)
        self._on_bytes(n or 0)  # None: a pipe has nothing yet
        return n


@contextmanager
def _opened(path: Path, on_bytes: Callable[[int], None]) -> Iterator[_Bytes]:
    """The bytes of a file, or of standard input, decompressed."""
    if path == STANDARD_INPUT:  # not counted: its size is not known either
        yield sys.stdin.buffer
        return
    with io.BufferedReader(_CountingFile(path, on_bytes), _BLOCK_BYTES) as stream:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            yield gzip.GzipFile(fileobj=stream)
        elif suffix == ".zst":
            pa = _pyarrow(path)
            yield io.BufferedReader(pa.CompressedInputStream(stream, "zstd"), _BLOCK_BYTES)
        else:
            yield stream


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn read errors into a DataError that names the file."""
    try:
        yield
    except DataError:
        raise
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path} is damaged: {_reason(error)}") from None
    except (OSError, ValueError) as error:  # which pyarrow's are
        raise DataError(f"cannot read {path}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return said[:200] or type(error).__name__
