"""The token set: a folder of raw token files with an index, read through memory maps.

    index.json              what there is: format, tokenizer, dtype, and of each file its size and SHA-256
    tokenizer.json          made the ids; tokenizer_config.json beside it
    train-00000.bin ...     token ids, uint16 or uint32, little-endian, nothing else: what nanoGPT reads
    train.documents.bin     where each document ends in the training stream, uint64, little-endian
    val-00000.bin ...       the same for what was held out
    val.documents.bin

shard_writer.py writes it, whole or not at all.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fusedgpt.train.config import explain
from fusedgpt.train.data.text.sources import DataError

INDEX = "index.json"
SPLITS = ("train", "val")
_MAX_INDEX_BYTES = 64 << 20
_HASHED_ON_OPENING = 256 << 20  # bytes; larger sets are checked for their sizes alone
_CHECKED_ON_OPENING = 64 << 20  # tokens of a stream whose ids are looked at before training starts
BLOCK = 4 << 20  # tokens or bytes that are in memory at once

_Count = Annotated[int, Field(ge=0, lt=2**63)]
_Hash = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Name = Annotated[str, Field(pattern=r"^(train|val)(-\d{5,9}|\.documents)\.bin$")]


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class FileEntry(_Strict):
    """A file of a set: how many tokens (or documents) it holds, and its SHA-256."""

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


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The narrowest dtype of a shard that holds every id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class TokenStream:
    """Token ids in memory-mapped pieces, read as one array: len(), and slices with a step of 1.

    Ids are looked at as they are read: one outside the vocabulary is a DataError that says where it is.
    """

    def __init__(
        self, parts: Sequence[NDArray[Any]], *, names: Sequence[str] = (), vocab_size: int | None = None
    ) -> None:
        self._parts = list(parts)
        self._names = list(names) or [""] * len(self._parts)
        self._limits = [vocab_size] * len(self._parts)
        self._offsets = [0] * len(self._parts)  # of each piece in its file
        self._place()
        self.fingerprint = ""

    def _place(self) -> None:
        self._starts = np.cumsum([0, *map(len, self._parts)], dtype=np.int64)

    @classmethod
    def join(cls, streams: Sequence[TokenStream]) -> Self:
        """`streams`, one after another."""
        joined = cls([part for one in streams for part in one._parts])
        joined._names = [name for one in streams for name in one._names]
        joined._offsets = [offset for one in streams for offset in one._offsets]
        joined._limits = [limit for one in streams for limit in one._limits]
        joined.fingerprint = " ".join(one.fingerprint for one in streams)
        return joined

    def cut(self, start: int, stop: int) -> TokenStream:
        """Tokens start .. stop - 1 as a stream of their own, with nothing read."""
        part = TokenStream.join([self])
        for i, begin in enumerate(self._starts[:-1].tolist()):
            low, high = max(start - begin, 0), max(stop - begin, 0)
            part._parts[i] = self._parts[i][low:high]
            part._offsets[i] += low
        part._place()
        part.fingerprint = f"{self.fingerprint}[{start}:{stop}]"
        return part

    def __len__(self) -> int:
        return int(self._starts[-1])

    def __getitem__(self, where: slice) -> NDArray[Any]:
        start, stop, step = where.indices(len(self))
        if step != 1:
            raise ValueError(f"a token stream is read with a step of 1, not {step}")
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        found = []
        while start < stop:
            begin, end = int(self._starts[first]), int(self._starts[first + 1])
            if start < end:
                ids = self._parts[first][start - begin : stop - begin]
                self._check(ids, first, self._offsets[first] + start - begin)
                found.append(ids)
                start += len(ids)
            first += 1
        return found[0] if len(found) == 1 else np.concatenate(found or [np.empty(0, dtype=np.uint16)])

    def _check(self, ids: NDArray[Any], part: int, offset: int) -> None:
        limit = self._limits[part]
        if limit is not None and int(ids.max()) >= limit:
            place = int(np.argmax(ids >= limit))
            raise DataError(
                f"{self._names[part]}: token {offset + place} is id {int(ids[place])}, outside the "
                f"vocabulary of {limit}; the file is damaged, or was made with another tokenizer"
            )

    def hash_ends(self) -> None:
        """Fingerprint, where no index has one, the length and the first and last ids of each piece."""
        digest = hashlib.sha256()
        for part in self._parts:
            digest.update(f"{len(part)} ".encode() + part[:BLOCK].tobytes() + part[-BLOCK:].tobytes())
        self.fingerprint = digest.hexdigest()

    def check_ids(self, n_tokens: int = _CHECKED_ON_OPENING) -> None:
        """Look at the first n_tokens ids. Raises DataError as reading them does."""
        for start in range(0, min(len(self), n_tokens), BLOCK):
            self[start : min(start + BLOCK, n_tokens)]


def read_index(folder: Path) -> Index:
    """The index of a set. Raises DataError where it is missing, no index, or at odds with itself."""
    path = folder / INDEX
    try:
        if path.stat().st_size > _MAX_INDEX_BYTES:
            raise DataError(f"{path} has over {_MAX_INDEX_BYTES} bytes, which no index needs")
        index = Index.model_validate_json(path.read_bytes())
    except OSError as error:
        raise DataError(f"{folder} is no token set: cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        raise DataError(f"{path} is no index of a token set: {explain(error)[:300]}") from None
    for name, stream in (("train", index.train), ("val", index.val)):
        names = [f"{name}-{i:05d}.bin" for i in range(len(stream.shards))]
        agreed = [shard.file for shard in stream.shards] == names
        agreed &= stream.tokens == sum(shard.count for shard in stream.shards)
        agreed &= stream.document_ends.file == f"{name}.documents.bin"
        if not agreed or stream.documents != stream.document_ends.count:
            raise DataError(f"{path} is at odds with itself in {name!r}: prepare the set again")
    if index.dtype != token_dtype(index.vocab_size).name:
        raise DataError(f"{path}: {index.dtype} does not go with a vocabulary of {index.vocab_size}")
    return index


def open_stream(folder: Path, index: Index, split: str) -> tuple[TokenStream, NDArray[np.integer]]:
    """The "train" or "val" stream of a set, and where its documents end, memory-mapped.

    Raises DataError for a file that is missing, truncated, or (in sets under 256 MiB) damaged.
    """
    entry: StreamEntry = getattr(index, split)
    dtype = token_dtype(index.vocab_size)
    parts = [map_file(folder / shard.file, shard.count, dtype) for shard in entry.shards]
    ends = map_file(folder / entry.document_ends.file, entry.documents, np.dtype("<u8"))
    if (index.train.tokens + index.val.tokens) * dtype.itemsize <= _HASHED_ON_OPENING:
        for file in (*entry.shards, entry.document_ends):
            check_hash(folder / file.file, file.sha256)
    if len(ends) and (
        int(ends[-1]) != entry.tokens or not (np.diff(ends[:BLOCK].astype(np.int64)) > 0).all()
    ):
        raise DataError(f"{folder / entry.document_ends.file} is damaged: prepare the set again")
    names = [str(folder / shard.file) for shard in entry.shards]
    stream = TokenStream(parts, names=names, vocab_size=index.vocab_size)
    stream.fingerprint = hashlib.sha256(entry.model_dump_json().encode()).hexdigest()
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


def check_hash(path: Path, sha256: str) -> None:
    """Raise DataError where the file is not the one that was hashed."""
    if file_hash(path).hexdigest() != sha256:
        raise DataError(f"{path} is damaged, its SHA-256 is another: copy or prepare the set again")


def file_hash(path: Path) -> hashlib._Hash:
    """The SHA-256 of a file, which more may be added to."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest
