"""Documents from files, folders and standard input, read one after another in constant memory.

A text file, a JSON record and a row of a table are one document each. A text file is read in pieces, cut
where the token ids stay those of the whole text.
"""

from __future__ import annotations

import codecs
import csv
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
from typing import IO, Any, Literal, NamedTuple, cast

from fusedgpt.kernels.errors import InputError, installs

Cut = Literal["anywhere", "words", "never"]
Errors = Literal["strict", "replace", "ignore"]
_Bytes = IO[bytes] | io.BufferedIOBase

_STANDARD_INPUT = Path("-")
_IN_FOLDERS = (".txt", ".md", ".jsonl", ".ndjson", ".parquet")  # what is read of a folder
_BLOCK_BYTES = 1 << 18
_BINARY_BYTES = 8192  # a zero byte among the first means binary, as for git
_ROWS = 256  # of a table, in memory at once
csv.field_size_limit(2**31 - 1)  # by default a text may have 131,072 characters
_IDEOGRAPH_END = re.compile("[\u4e00-\u9fa5\u3041-\u3096\u30a1-\u30fa](?=[。、，！？])")


class DataError(InputError):
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
        readers = {".jsonl": _lines, ".ndjson": _lines, ".json": _json, ".csv": _csv, ".tsv": _csv}
        readers |= {".parquet": _rows, ".arrow": _rows}
        for path in _files(self.inputs):
            with _readable(path):
                if reader := readers.get(_suffix(path.name)):
                    yield from (Piece(text, True) for text in reader(self, path) if not _is_blank(text))
                else:
                    yield from _text_pieces(self, path)

    @property
    def size(self) -> int:
        """Bytes of all files, compressed as they are. Raises as iterating does for unusable paths."""
        return sum(path.stat().st_size for path in _files(self.inputs) if path != _STANDARD_INPUT)

    @property
    def read_once(self) -> Path | None:
        """An input that cannot be read a second time: standard input, or a pipe."""
        pipes = (p for p in self.inputs if p.exists() and not (p.is_file() or p.is_dir()))
        return _STANDARD_INPUT if _STANDARD_INPUT in self.inputs else next(pipes, None)

    def check_rereadable(self, why: str) -> None:
        """Raises DataError where one cannot be read twice."""
        if (path := self.read_once) is not None:
            raise DataError(f"{path} can be read only once, but {why}: write it to a file first")


def no_text(paths: Sequence[Path]) -> DataError:
    """The error for inputs without text."""
    return DataError(f"{', '.join(map(str, paths[:4]))} is empty")


# Which files


def _files(inputs: Sequence[Path]) -> Iterator[Path]:
    """Each input that is a file, and the files with text below each that is a folder, in order of names.

    Raises FileNotFoundError for a missing input, DataError for a folder without text and a symlink loop.
    """
    for path in inputs:
        if path == _STANDARD_INPUT or not stat.S_ISDIR(_status(path).st_mode):
            yield path
            continue
        files = _below(path, ())
        if (first := next(files, None)) is None:
            suffixes = f"{', '.join(_IN_FOLDERS[:-1])} or {_IN_FOLDERS[-1]}"
            raise DataError(f"{path} holds no {suffixes} files (nor any compressed as .gz or .zst)")
        yield first
        yield from files


def _below(folder: Path, above: tuple[tuple[int, int], ...]) -> Iterator[Path]:
    here = _status(folder)
    if (here.st_dev, here.st_ino) in above:
        raise DataError(f"{folder} is a symlink loop, it leads back to a folder above it: remove the link")
    with _readable(folder):
        names = sorted(os.listdir(folder))
    if "dataset_dict.json" in names and "train" in names:  # a saved DatasetDict
        names = ["train"]
    elif "state.json" in names and (tables := [name for name in names if name.endswith(".arrow")]):
        names = tables  # a saved Dataset
    else:
        names = [name for name in names if (folder / name).is_dir() or _suffix(name) in _IN_FOLDERS]
    for path in (folder / name for name in names):
        if stat.S_ISDIR(_status(path).st_mode):
            yield from _below(path, (*above, (here.st_dev, here.st_ino)))
        else:
            yield path


def _status(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except FileNotFoundError:
        if path.is_symlink():
            raise DataError(f"{path} is a symbolic link to nothing: remove it") from None
        raise FileNotFoundError(f"there is no file or folder {path}") from None
    except (OSError, ValueError) as error:  # ELOOP says "too many levels of symbolic links"
        raise DataError(f"cannot read {path}: {_reason(error)}") from None


def _suffix(name: str) -> str:
    """The suffix below a compression's, in lower case."""
    path = Path(name.lower())
    return path.with_suffix("").suffix if path.suffix in (".gz", ".zst") else path.suffix


# Text files


def _text_pieces(source: Source, path: Path) -> Iterator[Piece]:
    """One document. Raises DataError for a binary file, and for bytes that are not UTF-8."""
    with _opened(path, source.on_bytes) as stream:
        whole = True
        for piece in cut_again(_decoded(stream, path, source.errors), source.cut):
            if not (whole and piece.ends and _is_blank(piece.text)):
                yield piece
            whole = False


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
            raise _not_utf8(path, position - kept + error.start) from None
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


def _not_utf8(where: object, place: int) -> DataError:
    return DataError(
        f"{where} is not UTF-8 text (byte {place}); convert it first, or choose --errors replace or ignore"
    )


def cut_again(texts: Iterable[str], cut: Cut) -> Iterator[Piece]:
    """A document that comes as `texts`, cut near the same places, but where words of the tokenizer end."""
    texts = iter(texts)
    held = [next(texts, "")]
    for following in texts:
        last = held.pop()
        place = last_word_end(last) if cut == "words" else len(last) if cut == "anywhere" else 0
        if place:
            yield Piece("".join((*held, last[:place])), False)
            held = []
        held += [last[place:], following]
    yield Piece("".join(held), True)


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
    return max((match.end() for match in _IDEOGRAPH_END.finditer(text)), default=0)


# JSON lines and tables: the texts of all documents, perhaps blank


def _lines(source: Source, path: Path) -> Iterator[str]:
    """One document per line, which is a JSON object with the source's text field."""
    with _opened(path, source.on_bytes) as stream:
        for number, line in enumerate(stream, start=1):
            if number == 1:
                _refuse_binary(line, path)
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            where = f"{path}, line {number}"
            yield _text_of(source, _parsed(source, line, where), where)


def _json(source: Source, path: Path) -> Iterator[str]:
    """One document per object of an array, which is read whole; any other file is JSON lines."""
    with _opened(path, source.on_bytes) as stream:
        beginning = stream.read(_BINARY_BYTES).removeprefix(codecs.BOM_UTF8).lstrip()
        records = _parsed(source, beginning + stream.read(), path) if beginning.startswith(b"[") else None
    if records is None:
        yield from _lines(source, path)
        return
    for number, record in enumerate(records, start=1):
        yield _text_of(source, record, f"{path}, record {number}")


def _parsed(source: Source, text: bytes, where: object) -> Any:
    try:
        return json.loads(text.decode("utf-8", source.errors))
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error.start) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not JSON: {_reason(error)}") from None


def _text_of(source: Source, record: object, where: str) -> str:
    if not isinstance(record, dict):
        raise DataError(f"{where} is not a JSON object with a field {source.text_field!r}")
    _check_field(where, source.text_field, list(record))
    return _checked_text(record[source.text_field], where, source.text_field)


def _csv(source: Source, path: Path) -> Iterator[str]:
    """One document per row of a .csv or .tsv file, whose first row names the columns."""
    with _opened(path, source.on_bytes) as stream:
        lines = io.TextIOWrapper(cast("IO[bytes]", stream), "utf-8-sig", errors=source.errors, newline="")
        rows = csv.DictReader(lines, delimiter="\t" if _suffix(path.name) == ".tsv" else ",")
        try:
            _check_field(path, source.text_field, list(rows.fieldnames or []))
            for row in rows:
                yield _checked_text(
                    row[source.text_field], f"{path}, line {rows.line_num}", source.text_field
                )
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}, after line {rows.line_num}", error.start) from None


def _check_field(where: object, name: str, names: list[str]) -> None:
    if name not in names:
        there = ", ".join(names[:8])[:100] or "none"
        raise DataError(
            f"{where} has no field {name!r} (it has: {there}); name the one with the text with --text-field"
        )


def _checked_text(value: object, where: str, field: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{where}: the field {field!r} is not text but {type(value).__name__}")
    return value


def _rows(source: Source, path: Path) -> Iterator[str]:
    """One document per row of a .parquet file, or of an .arrow file that the library `datasets` saved."""
    pa, field = _pyarrow(path), source.text_field
    batches: Iterable[Any]
    if _suffix(path.name) == ".parquet":
        file = import_module("pyarrow.parquet").ParquetFile(path, memory_map=False, pre_buffer=False)
        names, n_rows = file.schema_arrow.names, file.metadata.num_rows
        batches = file.iter_batches(batch_size=_ROWS, columns=[field])
    else:
        batches = file = pa.ipc.open_stream(pa.memory_map(str(path)))
        names, n_rows = file.schema.names, 0  # not known
    _check_field(path, field, names)
    row, size, reported = 0, path.stat().st_size, 0
    for batch in batches:
        for first in range(0, batch.num_rows, _ROWS):
            for value in _values(pa, batch.column(field).slice(first, _ROWS), source.errors, path, row):
                yield _checked_text(value, f"{path}, row {row}", field)
                row += 1
            done = size * row // max(n_rows, row)
            source.on_bytes(done - reported)
            reported = done
    source.on_bytes(size - reported)


def _values(pa: Any, column: Any, errors: Errors, path: Path, row: int) -> Iterator[object]:
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if not (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
        yield from column.to_pylist()
        return
    for i, value in enumerate(column.cast(pa.large_binary()).to_pylist(), start=row):
        try:
            yield value if value is None else value.decode("utf-8", errors)
        except UnicodeDecodeError as error:
            raise _not_utf8(f"{path}, row {i}", error.start) from None


def _pyarrow(path: Path) -> Any:
    """The optional library that reads tables and .zst."""
    if find_spec("pyarrow") is None:
        raise DataError(f"reading {path} takes the package pyarrow: {installs('parquet')}")
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
    if path == _STANDARD_INPUT:  # not counted: its size is not known either
        yield sys.stdin.buffer
        return
    with io.BufferedReader(_CountingFile(path, on_bytes), _BLOCK_BYTES) as stream:
        suffix = path.suffix.lower()
        if suffix == ".gz":
            yield gzip.GzipFile(fileobj=stream)
        elif suffix == ".zst":
            compressed = _pyarrow(path).CompressedInputStream(stream, "zstd")
            yield io.BufferedReader(compressed, _BLOCK_BYTES)
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
    except (OSError, ValueError, csv.Error) as error:  # which pyarrow's are, too
        raise DataError(f"cannot read {path}: {_reason(error)}") from None


def _reason(error: BaseException) -> str:
    said = getattr(error, "strerror", None) or " ".join(str(error).split())
    return said[:200] or type(error).__name__
