"""The token set: a folder of raw token files with an index, read through memory maps.

    index.json              format, tokenizer, dtype, and each file's size and SHA-256
    tokenizer.json          the tokenizer of the ids; tokenizer_config.json beside it
    train-00000.bin ...     raw token ids, uint16 or uint32, little-endian, as nanoGPT reads them
    train.documents.bin     where each document ends in the training stream, uint64, little-endian
    val-00000.bin ...       the same for the held-out documents
    val.documents.bin

shard_writer.py writes it atomically.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.model.tokenizer_json import load_tokenizer
from fusedgpt.train.config import explain
from fusedgpt.train.data.text.sources import DataError

INDEX = "index.json"
SPLITS = ("train", "val")
_MAX_INDEX_BYTES = 64 << 20
_HASHED_ON_OPENING = 256 << 20  # bytes; of larger sets only the file sizes are checked
_CHECKED_ON_OPENING = 64 << 20  # tokens per stream whose ids are checked before training starts
BLOCK = 4 << 20  # tokens or bytes in memory at once

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Field(pattern=r"^(train|val)(-\d{5,9}|\.documents)\.bin$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Strict):
    """A file of a set: its number of tokens (or documents) and its SHA-256."""

    file: _Name
    count: _Count
    sha256: _Hash


class StreamEntry(_Strict):
    """The training or the validation stream."""

    tokens: _Count
    documents: _Count
    shards: tuple[FileEntry, ...]
    document_ends: FileEntry


class Index(_Strict):
    """index.json."""

    format: Literal["fusedgpt-tokens"] = "fusedgpt-tokens"
    version: Literal[1] = 1
    dtype: Literal["uint16", "uint32"]
    tokenizer: str  # its kind
    tokenizer_sha256: _Hash  # of tokenizer.json
    vocab_size: Annotated[int, Field(ge=1, le=2**32)]
    eot_id: _Count
    text_bytes: _Count  # of the text, in UTF-8
    train: StreamEntry
    val: StreamEntry


def shard_file(split: str, number: int) -> str:
    """The name of a shard."""
    return f"{split}-{number:05d}.bin"


def ends_file(split: str) -> str:
    """The name of the file that says where documents end."""
    return f"{split}.documents.bin"


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest dtype that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class Part(NamedTuple):
    """Consecutive token ids of one file."""

    ids: NDArray[Any]
    file: str = ""
    vocab_size: int | None = None
    offset: int = 0  # of the first id in the file

    def read(self, start: int, stop: int) -> NDArray[Any]:
        """The ids from start to stop. Raises DataError for one outside the vocabulary."""
        ids = self.ids[start:stop]
        if self.vocab_size is not None and len(ids) and int(ids.max()) >= self.vocab_size:
            place = int(np.argmax(ids >= self.vocab_size))
            raise DataError(
                f"{self.file}: token {self.offset + start + place} is id {int(ids[place])}, outside the "
                f"vocabulary of {self.vocab_size}; the file is damaged, or was made with another tokenizer"
            )
        return ids


class TokenStream:
    """Token ids in memory-mapped files, read as one array: len(), and slices with a step of 1.

    Ids are checked as they are read: one outside the vocabulary raises a DataError that says where it is.
    """

    def __init__(self, parts: Sequence[Part], fingerprint: str = "") -> None:
        self._parts, self.fingerprint = parts, fingerprint
        self._starts = np.cumsum([0, *(len(part.ids) for part in parts)], dtype=np.int64)

    @classmethod
    def join(cls, streams: Sequence[TokenStream]) -> Self:
        """`streams`, one after another."""
        parts = [part for stream in streams for part in stream._parts]
        return cls(parts, " ".join(stream.fingerprint for stream in streams))

    def cut(self, start: int, stop: int) -> TokenStream:
        """Tokens start .. stop - 1 as a stream of their own; nothing is read."""
        parts = []
        for part, begin in zip(self._parts, self._starts.tolist(), strict=False):
            low, high = max(start - begin, 0), max(stop - begin, 0)
            parts.append(part._replace(ids=part.ids[low:high], offset=part.offset + low))
        return TokenStream(parts, f"{self.fingerprint}[{start}:{stop}]")

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, where: slice) -> NDArray[Any]:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"a token stream is read with a step of 1, not {step}")
        found = []
        i = int(np.searchsorted(self._starts, start, side="right")) - 1
        while start < stop:
            begin = int(self._starts[i])
            found.append(self._parts[i].read(start - begin, stop - begin))
            start += len(found[-1])
            i += 1
        return found[0] if len(found) == 1 else np.concatenate(found or [np.empty(0, dtype=np.uint16)])

    def check_ids(self) -> None:
        """Read the ids at the beginning. Raises DataError for one outside the vocabulary."""
        end = min(len(self), _CHECKED_ON_OPENING)
        for start in range(0, end, BLOCK):
            self[start : min(start + BLOCK, end)]


Tokens = NDArray[np.integer] | TokenStream  # in memory, or memory-mapped shards


@dataclass(frozen=True, kw_only=True)
class TokenSet:
    """A training and a validation stream, where documents end (None: unknown), the tokenizer of the ids."""

    train: Tokens
    val: Tokens
    train_ends: NDArray[np.integer] | None
    val_ends: NDArray[np.integer] | None
    tokenizer: Tokenizer


def open_token_set(folder: Path) -> TokenSet:
    """A folder that `fusedgpt prepare` made, memory-mapped.

    Raises DataError for a file that is missing, truncated, inconsistent or (in sets under 256 MiB) damaged.
    """
    index = read_index(folder)
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: {error}") from None
    if (tokenizer.vocab_size, tokenizer.eot_id) != (index.vocab_size, index.eot_id):
        raise DataError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} ids, the index says {index.vocab_size}: "
            f"one of them belongs to another set"
        )
    train, train_ends = open_stream(folder, index, "train")
    val, val_ends = open_stream(folder, index, "val")
    return TokenSet(train=train, val=val, train_ends=train_ends, val_ends=val_ends, tokenizer=tokenizer)


def read_index(folder: Path) -> Index:
    """The index of a set. Raises DataError if it is missing, malformed or inconsistent."""
    path = folder / INDEX
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise DataError(f"{path} has over {_MAX_INDEX_BYTES} bytes, which no index needs")
        index = Index.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{folder} is not a token set: cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise DataError(f"{path} is not the index of a token set: {explain(error)[:300]}") from None
    for split in SPLITS:
        stream: StreamEntry = getattr(index, split)
        files = [shard.file for shard in stream.shards], stream.document_ends.file
        expected = [shard_file(split, i) for i in range(len(stream.shards))], ends_file(split)
        counts = sum(shard.count for shard in stream.shards), stream.document_ends.count
        if files != expected or counts != (stream.tokens, stream.documents):
            raise DataError(f"{path} is inconsistent in {split!r}: prepare the set again")
    if index.dtype != token_dtype(index.vocab_size).name:
        raise DataError(f"{path}: {index.dtype} does not go with a vocabulary of {index.vocab_size}")
    return index


def open_stream(folder: Path, index: Index, split: str) -> tuple[TokenStream, NDArray[np.integer]]:
    """The "train" or "val" stream of a set, and where its documents end; raises as open_token_set does."""
    entry: StreamEntry = getattr(index, split)
    dtype = token_dtype(index.vocab_size)
    arrays = [map_file(folder / shard.file, shard.count, dtype) for shard in entry.shards]
    ends_path = folder / entry.document_ends.file
    ends = map_file(ends_path, entry.documents, np.dtype("<u8"))
    if (index.train.tokens + index.val.tokens) * dtype.itemsize <= _HASHED_ON_OPENING:
        for path, sha256 in (
            (folder / file.file, file.sha256) for file in (*entry.shards, entry.document_ends)
        ):
            if file_hash(path) != sha256:
                raise DataError(f"{path} is damaged, its SHA-256 is another: copy or prepare the set again")
    ascending = (np.diff(ends[:BLOCK].astype(np.int64)) > 0).all()
    if len(ends) and not (ascending and int(ends[-1]) == entry.tokens):
        raise DataError(f"{ends_path} is damaged: prepare the set again")
    names = (str(folder / shard.file) for shard in entry.shards)
    parts = [Part(ids, name, index.vocab_size) for ids, name in zip(arrays, names, strict=True)]
    stream = TokenStream(parts, hashlib.sha256(entry.model_dump_json().encode()).hexdigest())
    stream.check_ids()
    return stream, ends


def map_file(path: Path, count: int, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A file of `count` numbers as a read-only array. Raises DataError for one of another size."""
    try:
        size = path.stat().st_size
        if size != count * dtype.itemsize:
            raise DataError(
                f"{path} has {size:,} bytes instead of {count * dtype.itemsize:,}: it was cut or changed; "
                f"copy or prepare the set again"
            )
        return np.memmap(path, dtype=dtype, mode="r") if count else np.empty(0, dtype=dtype)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def file_hash(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
