"""Writes token sets (see shards.py) in constant memory, atomically: whole or not at all."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fusedgpt.model.files import publish
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.data.text.encode import Encoded, tail_to_hold_out
from fusedgpt.train.data.tokens.shards import (
    BLOCK,
    INDEX,
    SPLITS,
    FileEntry,
    Index,
    Part,
    StreamEntry,
    TokenStream,
    ends_file,
    file_hash,
    map_file,
    shard_file,
    token_dtype,
)

_NO_LIMIT = 10**30  # what transformers writes for "no maximum length"


class _StreamWriter:
    """One stream of a set, written shard by shard in constant memory."""

    def __init__(self, folder: Path, split: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.split, self.dtype, self.shard_tokens = folder, split, dtype, shard_tokens
        self.tokens = self.documents = 0
        self._ends_file = folder / ends_file(split)
        self._ends_file.touch()

    def _shards(self) -> list[Path]:
        """The files that hold the tokens written so far; all but the last are full."""
        n_shards = -(-self.tokens // self.shard_tokens)
        return [self.folder / shard_file(self.split, i) for i in range(n_shards)]

    def append(self, ids: NDArray[Any], ends: NDArray[np.integer]) -> None:
        """Write tokens; `ends`: where documents end among them."""
        append_array(self._ends_file, ends.astype("<u8") + np.uint64(self.tokens))
        self.documents += len(ends)
        while len(ids):
            number, used = divmod(self.tokens, self.shard_tokens)
            fitting = ids[: self.shard_tokens - used]
            append_array(self.folder / shard_file(self.split, number), fitting.astype(self.dtype, copy=False))
            self.tokens += len(fitting)
            ids = ids[len(fitting) :]

    def _ends(self) -> NDArray[Any]:
        return map_file(self._ends_file, self.documents, np.dtype("<u8"))

    def blocks(self, start: int = 0) -> Iterator[tuple[NDArray[Any], NDArray[np.integer]]]:
        """Read back what was written from token `start` on, in the form that append takes."""
        sizes = ((file, file.stat().st_size // self.dtype.itemsize) for file in self._shards())
        stream = TokenStream([Part(map_file(file, size, self.dtype)) for file, size in sizes])
        ends = self._ends()
        for begin in range(start, self.tokens, BLOCK):
            ids = stream[begin : begin + BLOCK]
            low, high = np.searchsorted(ends, [begin, begin + len(ids)], side="right")
            yield ids, ends[low:high].astype(np.int64) - begin

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens`; a document that is cut ends there."""
        ends = self._ends()
        kept = int(np.searchsorted(ends, tokens, side="right"))
        cut = tokens > (int(ends[kept - 1]) if kept else 0)
        del ends
        os.truncate(self._ends_file, 8 * kept)
        append_array(self._ends_file, np.array([tokens] * cut, dtype="<u8"))
        before = self._shards()
        self.tokens, self.documents = tokens, kept + cut
        after = self._shards()
        for file in before[len(after) :]:
            file.unlink()
        if after:
            tokens_in_last = tokens - (len(after) - 1) * self.shard_tokens
            os.truncate(after[-1], tokens_in_last * self.dtype.itemsize)

    def entry(self) -> StreamEntry:
        """The stream's part of the index."""
        return StreamEntry(
            tokens=self.tokens,
            documents=self.documents,
            shards=tuple(_file_entry(file, self.dtype.itemsize) for file in self._shards()),
            document_ends=_file_entry(self._ends_file, 8),
        )


def append_array(file: Path, data: NDArray[Any]) -> None:
    """Add the bytes of an array to a file."""
    with file.open("ab") as opened:
        opened.write(data.tobytes())


def _file_entry(file: Path, itemsize: int) -> FileEntry:
    return FileEntry(file=file.name, count=file.stat().st_size // itemsize, sha256=file_hash(file))


class TokenSetWriter:
    """A token set under construction, in a folder of new_set_folder."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.text_bytes = 0
        self._train, self._val = (_StreamWriter(folder, s, self.dtype, shard_tokens) for s in SPLITS)

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self._train.tokens + self._val.tokens

    def append(self, encoded: Encoded) -> None:
        """Write the tokens of a chunk."""
        if not self.tokens:  # only now, when the worker processes have started on what follows
            self.tokenizer.save(self.folder, max_length=_NO_LIMIT)
        self._train.append(*encoded.train)
        self._val.append(*encoded.val)
        self.text_bytes += encoded.text_bytes

    def balance(self, val_fraction: float) -> None:
        """Hold out the last tokens instead where tail_to_hold_out says so."""
        train, val = self._train, self._val
        tail = tail_to_hold_out(self.tokens, val.tokens, val_fraction)
        if tail is None:
            return
        for ids, ends in val.blocks():
            train.append(ids, ends)
        val.truncate(0)
        for ids, ends in train.blocks(train.tokens - tail):
            val.append(ids, ends)
        train.truncate(train.tokens - tail)

    def finish(self) -> Index:
        """Write the index; something must have been appended."""
        index = Index(
            dtype="uint16" if self.dtype.itemsize == 2 else "uint32",
            tokenizer=self.tokenizer.kind,
            tokenizer_sha256=file_hash(self.folder / "tokenizer.json"),
            vocab_size=self.tokenizer.vocab_size,
            eot_id=self.tokenizer.eot_id,
            text_bytes=self.text_bytes,
            train=self._train.entry(),
            val=self._val.entry(),
        )
        (self.folder / INDEX).write_text(index.model_dump_json(indent=1) + "\n", encoding="utf-8")
        return index


@contextmanager
def new_set_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` to fill; renamed to `out` at the end of the block, removed on an error.

    Raises OSError if `out` is not empty or cannot be written, or if another process is making it. The name is
    fixed, so that what a killed process left is cleared away.
    """
    partial = out.absolute().parent / f".{out.absolute().name}.partial"
    _refuse_taken(out)
    with _write_errors(out):
        if partial.is_symlink():
            raise OSError(f"{partial} is a symbolic link: remove it")
        partial.mkdir(parents=True, exist_ok=True)
        try:
            lock = FileLock(partial / ".lock").acquire(timeout=0)
        except Timeout:
            raise OSError(f"another process is writing {out}; wait for it, or choose another --out") from None
        with lock:
            _clear(partial)
            try:
                yield partial
                _refuse_taken(out)
                (partial / ".lock").unlink(missing_ok=True)
                publish(partial, out)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise


def _refuse_taken(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise OSError(f"{out} exists already: remove it, or choose another --out")


def _clear(partial: Path) -> None:
    """Remove the files of a token set that a killed process left; refuse if there are others."""
    ours = re.compile(r"(train|val)(-\d{5,}|\.documents)\.bin|tokenizer(_config)?\.json|index\.json")
    files = [file for file in partial.iterdir() if file.name != ".lock"]
    for file in files:
        if not ours.fullmatch(file.name) or file.is_dir():
            raise OSError(f"{partial} has a {file.name} that fusedgpt did not make: move it away")
    for file in files:
        file.unlink()


@contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    """Name `out` in the operating system's errors."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # ours
            raise
        raise OSError(f"cannot write {out}: {error.strerror}; nothing of it was kept") from error
