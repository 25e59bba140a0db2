"""Writes token sets (see shards.py): in constant memory, and whole or not at all.

A set is made in a hidden folder beside its place, synced to disk and renamed, the index written last.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray

from fusedgpt.model.files import sync
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.data.tokens.shards import (
    BLOCK,
    INDEX,
    SPLITS,
    FileEntry,
    Index,
    StreamEntry,
    TokenStream,
    file_hash,
    map_file,
    token_dtype,
)

_NO_LIMIT = 10**30  # transformers' own word for "no model to limit a text's length"


class _StreamWriter:
    """One stream of a set, written shard by shard; constant memory."""

    def __init__(self, folder: Path, name: str, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.name, self.dtype, self.shard_tokens = folder, name, dtype, shard_tokens
        self.tokens = self.documents = 0
        self.shards: list[FileEntry] = []
        self._shard: _HashedFile | None = None
        self._ends = _HashedFile(folder / f"{name}.documents.bin")

    def append(self, ids: NDArray[Any], ends: NDArray[np.integer]) -> None:
        """More tokens, and where among them documents end."""
        self._ends.write((ends.astype(np.uint64) + np.uint64(self.tokens)).astype("<u8"))
        self.documents += len(ends)
        while len(ids):
            if self._shard is None:
                self._shard = _HashedFile(self.folder / f"{self.name}-{len(self.shards):05d}.bin")
            room = self.shard_tokens - self._shard.size // self.dtype.itemsize
            self._shard.write(ids[:room].astype(self.dtype, copy=False))
            self.tokens += len(ids[:room])
            if len(ids) >= room:
                self._close_shard()
            ids = ids[room:]

    def _close_shard(self) -> None:
        if self._shard is not None:
            self.shards.append(self._shard.close(self.dtype.itemsize))
            self._shard = None

    def blocks(self, start: int = 0) -> Iterator[tuple[NDArray[Any], NDArray[np.integer]]]:
        """What was written from token `start` on, as it was appended; nothing more may be written."""
        self._close_shard()
        stream = TokenStream([map_file(self.folder / s.file, s.count, self.dtype) for s in self.shards])
        self._ends.flush()
        ends = map_file(self._ends.path, self.documents, np.dtype("<u8"))
        for begin in range(start, self.tokens, BLOCK):
            ids = stream[begin : begin + BLOCK]
            low, high = np.searchsorted(ends, [begin, begin + len(ids)], side="right")
            yield ids, ends[low:high].astype(np.int64) - begin

    def truncate(self, tokens: int) -> None:
        """Keep the first `tokens`; a document that is cut ends there. Nothing more may be written."""
        self._close_shard()
        self._ends.flush()
        ends = map_file(self._ends.path, self.documents, np.dtype("<u8"))
        kept = int(np.searchsorted(ends, tokens, side="right"))
        whole = tokens == (int(ends[kept - 1]) if kept else 0)
        del ends
        self._ends.truncate(8 * kept)
        if not whole:
            self._ends.write(np.asarray([tokens], dtype="<u8"))
        self.documents = kept + (not whole)
        while self.shards and self.tokens - self.shards[-1].count >= tokens:
            self.tokens -= self.shards[-1].count
            (self.folder / self.shards.pop().file).unlink()
        if self.tokens > tokens:
            file = _HashedFile.reopen(self.folder / self.shards.pop().file)
            file.truncate(file.size - (self.tokens - tokens) * self.dtype.itemsize)
            self.shards.append(file.close(self.dtype.itemsize))
        self.tokens = tokens

    def close(self) -> StreamEntry:
        """Sync all files; what the index says of them."""
        self._close_shard()
        return StreamEntry(
            tokens=self.tokens,
            documents=self.documents,
            shards=tuple(self.shards),
            document_ends=self._ends.close(8),
        )

    def abandon(self) -> None:
        """Close the files as they are."""
        for file in (self._shard, self._ends):
            if file is not None:
                file.abandon()


class _HashedFile:
    """A file that is written once, front to back, and hashed on the way."""

    def __init__(self, path: Path, mode: str = "wb") -> None:
        self.path, self.size, self._hash = path, 0, hashlib.sha256()
        self._file = path.open(mode)

    @classmethod
    def reopen(cls, path: Path) -> _HashedFile:
        file = cls(path, "r+b")
        file.size = path.stat().st_size
        return file

    def write(self, data: NDArray[Any]) -> None:
        raw = data.tobytes()
        self._file.write(raw)
        self._hash.update(raw)
        self.size += len(raw)

    def flush(self) -> None:
        self._file.flush()

    def truncate(self, size: int) -> None:
        """Cut the file, and hash anew what is left."""
        self._file.flush()
        self._file.truncate(size)
        self._file.seek(size)
        self.size, self._hash = size, file_hash(self.path)

    def close(self, bytes_each: int) -> FileEntry:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()
        count = self.size // bytes_each
        return FileEntry(file=self.path.name, count=count, sha256=self._hash.hexdigest())

    def abandon(self) -> None:
        with suppress(OSError):  # a full disk refuses what is still buffered
            self._file.close()


class SetWriter:
    """A set in the making; see new_set."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, shard_tokens: int) -> None:
        self.folder, self.tokenizer = folder, tokenizer
        self.dtype = token_dtype(tokenizer.vocab_size)
        self.text_bytes = 0
        self._has_tokenizer = False
        self._shard_tokens = shard_tokens
        self._streams = {name: self._new_stream(name) for name in SPLITS}

    def _new_stream(self, name: str) -> _StreamWriter:
        return _StreamWriter(self.folder, name, self.dtype, self._shard_tokens)

    @property
    def tokens(self) -> int:
        """Written so far."""
        return sum(stream.tokens for stream in self._streams.values())

    def append(self, split: str, ids: NDArray[Any], ends: NDArray[np.integer]) -> None:
        """More tokens of "train" or "val", and where among them documents end."""
        if not self._has_tokenizer:  # now, as workers encode what follows, and not when all wait for it
            self.tokenizer.save(self.folder, max_length=_NO_LIMIT)
            self._has_tokenizer = True
        self._streams[split].append(ids, ends)

    def balance(self, val_fraction: float) -> None:
        """Hold out the last tokens instead where the documents drawn are far from val_fraction of them.

        That is where documents are few or very unequal: less than half of the share, or more than twice.
        """
        wanted = round(self.tokens * val_fraction)
        train, val = self._streams["train"], self._streams["val"]
        if wanted / 2 <= val.tokens <= 2 * wanted:
            return
        for ids, ends in val.blocks():
            train.append(ids, ends)
        val.truncate(0)
        val.abandon()
        val = self._streams["val"] = self._new_stream("val")
        for ids, ends in train.blocks(train.tokens - wanted):
            val.append(ids, ends)
        train.truncate(train.tokens - wanted)

    def close(self) -> Index:
        """Write what is missing, the index last, and sync it all; something must have been appended."""
        train, val = (self._streams[name].close() for name in SPLITS)
        index = Index(
            dtype="uint16" if self.dtype.itemsize == 2 else "uint32",
            tokenizer=self.tokenizer.kind,
            tokenizer_sha256=file_hash(self.folder / "tokenizer.json").hexdigest(),
            vocab_size=self.tokenizer.vocab_size,
            eot_id=self.tokenizer.eot_id,
            text_bytes=self.text_bytes,
            train=train,
            val=val,
        )
        (self.folder / INDEX).write_text(index.model_dump_json(indent=1) + "\n", encoding="utf-8")
        for name in ("tokenizer.json", "tokenizer_config.json", INDEX, "."):
            sync(self.folder / name)
        return index

    def abandon(self) -> None:
        """Close the files as they are."""
        for stream in self._streams.values():
            stream.abandon()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A hidden folder beside `out` that becomes `out` at the end of the block, or vanishes with an error.

    Raises OSError where `out` has something in it or cannot be written, or another process is making it. What
    a killed process left is cleared away.
    """
    partial = out.absolute().parent / f".{out.absolute().name}.partial"
    _refuse_taken(out)
    with _write_errors(out):
        if partial.is_symlink():
            raise OSError(f"{partial} is a symbolic link: remove it")
        partial.mkdir(parents=True, exist_ok=True)
    lock = FileLock(partial / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise OSError(f"another process is writing {out}; wait for it, or choose another --out") from None
    try:
        _clear(partial)
        with _write_errors(out):
            yield partial
            _refuse_taken(out)
            (partial / ".lock").unlink(missing_ok=True)
            partial.replace(out)  # onto nothing, or onto an empty folder
            _sync_parent(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    finally:
        lock.release()


def _sync_parent(out: Path) -> None:
    """Bring the new name of `out` down to the disk, or take it back."""
    try:
        sync(out.absolute().parent)
    except OSError:
        shutil.rmtree(out)
        raise


def _refuse_taken(out: Path) -> None:
    if out.is_symlink() or (out.exists() and not out.is_dir()) or (out.is_dir() and any(out.iterdir())):
        raise OSError(f"{out} exists already: remove it, or choose another --out")


def _clear(partial: Path) -> None:
    """Remove what a killed process left in its folder, and nothing that a set does not have."""
    ours = re.compile(r"(train|val)(-\d{5,}|\.documents)\.bin|tokenizer(_config)?\.json|index\.json")
    for file in partial.iterdir():
        if ours.fullmatch(file.name) and not file.is_dir():
            file.unlink()
        elif file.name != ".lock":
            raise OSError(f"{partial} has a {file.name} that fusedgpt did not make: move it away")


@contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    """Say what could not be written, where it is the disk that refuses."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # ours
            raise
        raise OSError(f"cannot write {out}: {error.strerror}; nothing of it was kept") from error
