"""Text to token ids on all cores, in order, by processes: tiktoken's threads block each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from hashlib import blake2b
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedgpt.kernels.cpu.process import return_freed_memory
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.data.text.sources import Piece
from fusedgpt.train.data.tokens.shards import token_dtype

_CHUNKS_PER_WORKER = 3  # one being encoded, the others read ahead or waiting to be written
_CHUNK_CHARACTERS = 1 << 19  # encoded by a worker at a time
_CHUNK_PIECES = 1 << 13
_HASHED_CHARACTERS = 1 << 16  # of a document, to decide whether it is held out; pieces are no shorter


# Texts to encode, each with whether a document ends with it and whether it belongs to the validation stream
Chunk = list[tuple[str, bool, bool]]


class Ids(NamedTuple):
    """Token ids with end-of-text after each document, and the position at which each document ends."""

    ids: NDArray[Any]
    document_ends: NDArray[np.int64]


class Encoded(NamedTuple):
    """What a chunk adds to each stream."""

    train: Ids
    val: Ids
    text_bytes: int  # in UTF-8


def chunked(pieces: Iterable[Piece], val_fraction: float) -> Iterator[Chunk]:
    """Pieces in chunks for the workers, each marked as held out if its document is."""
    chunk: Chunk = []
    size = 0
    held_out = begins = True
    for text, ends in pieces:
        if begins:
            held_out = is_held_out(text, val_fraction)
        begins = ends
        chunk.append((text, ends, held_out))
        size += len(text)
        if size >= _CHUNK_CHARACTERS or len(chunk) >= _CHUNK_PIECES:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk


def note_special_token(
    pieces: Iterable[Piece], tokenizer: Tokenizer, note: Callable[[str], object]
) -> Iterator[Piece]:
    """`pieces`; `note` is told the first special token that they name, which is encoded as text."""
    noted = False
    for piece in pieces:
        if not noted and (name := tokenizer.find_special(piece.text)):
            note(f"{name} in the text is ordinary text, not a special token")
            noted = True
        yield piece


def characters(pieces: Iterable[Piece]) -> str:
    """Each character of a text once."""
    found: set[str] = set()
    for text, _ in pieces:
        found.update(text)
    return "".join(found)


def is_held_out(beginning: str, val_fraction: float) -> bool:
    """Whether the document with this beginning is for validation; equal texts always get the same answer."""
    digest = blake2b(beginning[:_HASHED_CHARACTERS].encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64


def tail_to_hold_out(tokens: int, held_out: int, val_fraction: float) -> int | None:
    """How many of all tokens to hold out at their end, in place of the documents chosen by hash.

    None where those have between half and twice val_fraction of the tokens; they have not where documents are
    few or very unequal.
    """
    wanted = round(tokens * val_fraction)
    return None if wanted / 2 <= held_out <= 2 * wanted else wanted


def encode_chunk(tokenizer: Tokenizer, chunk: Chunk) -> Encoded:
    """Encode the texts, with end-of-text after each document, and split them into the two streams."""
    dtype = token_dtype(tokenizer.vocab_size)
    eot = np.array([tokenizer.eot_id], dtype=dtype)
    parts: list[list[NDArray[Any]]] = [[eot[:0]], [eot[:0]]]  # of the training and the validation stream
    lengths = [0, 0]
    ends: list[list[int]] = [[], []]
    text_bytes = 0
    arrays = tokenizer.encode_arrays([text for text, _, _ in chunk])
    for ids, (text, ends_document, stream) in zip(arrays, chunk, strict=True):
        text_bytes += len(text if text.isascii() else text.encode("utf-8", "surrogatepass"))
        parts[stream] += [ids, eot] if ends_document else [ids]
        lengths[stream] += len(ids) + ends_document
        ends[stream] += [lengths[stream]] * ends_document
    train, val = (
        Ids(np.concatenate(part, dtype=dtype, casting="unsafe"), np.array(end, dtype=np.int64))
        for part, end in zip(parts, ends, strict=True)
    )
    return Encoded(train, val, text_bytes)


def encode_streams(pieces: Iterable[Piece], tokenizer: Tokenizer, val_fraction: float) -> tuple[Ids, Ids]:
    """The training and the validation stream that `prepare` writes for the same text, in memory."""
    dtype = token_dtype(tokenizer.vocab_size)
    buffers, ends = (bytearray(), bytearray()), ([np.empty(0, np.int64)], [np.empty(0, np.int64)])
    workers = all_cores() if sys.platform == "linux" else 1  # a spawned one imports the caller's main module
    for encoded in encode_chunks(chunked(pieces, val_fraction), tokenizer, workers):
        for buffer, found, part in zip(buffers, ends, (encoded.train, encoded.val), strict=True):
            found.append(part.document_ends + len(buffer) // dtype.itemsize)
            buffer += part.ids.data
    train, val = (Ids(np.frombuffer(b, dtype), np.concatenate(e)) for b, e in zip(buffers, ends, strict=True))
    tail = tail_to_hold_out(len(train.ids) + len(val.ids), len(val.ids), val_fraction)
    if tail is None:
        return train, val
    ids = np.concatenate((train.ids, val.ids))
    places = np.concatenate((train.document_ends, val.document_ends + len(train.ids)))
    border = len(ids) - tail
    before = np.union1d(places[places < border], [border])
    return Ids(ids[:border], before), Ids(ids[border:], places[places > border] - border)


def all_cores() -> int:
    """How many processes can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def encode_chunks(chunks: Iterable[Chunk], tokenizer: Tokenizer, workers: int) -> Iterator[Encoded]:
    """`encode_chunk` of each, in order, in `workers` processes, or in this one if that is enough.

    Raises OSError if a worker was killed.
    """
    chunks = iter(chunks)
    first = list(islice(chunks, 2))
    chunks = chain(first, chunks)
    if workers == 1 or len(first) < 2:
        yield from (encode_chunk(tokenizer, chunk) for chunk in chunks)
        return
    # fork shares the vocabulary, and does not need to import the main module
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(workers, context, _begin_worker, (tokenizer, os.getpid()))
    waiting: deque[Future[Encoded]] = deque()
    try:
        for chunk in chunks:
            waiting.append(pool.submit(_encode_in_worker, chunk))
            if len(waiting) >= _CHUNKS_PER_WORKER * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise OSError(
            "a worker process was killed, perhaps for lack of memory: try fewer --workers"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


_worker_tokenizer: list[Tokenizer] = []  # in a worker, the one to encode with


def _begin_worker(tokenizer: Tokenizer, parent: int) -> None:
    return_freed_memory()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # its threads do not survive a fork
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its workers
    _worker_tokenizer.append(tokenizer)
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Exit when the parent has: a killed one leaves its workers waiting for work."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode_in_worker(chunk: Chunk) -> Encoded:
    return encode_chunk(_worker_tokenizer[0], chunk)
