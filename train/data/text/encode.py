"""Text to token ids on all cores, in order, by processes: tiktoken's threads block each other."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain, islice
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fusedgpt.kernels.cpu.process import return_freed_memory
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.data.tokens.shards import token_dtype

_CHUNKS_PER_WORKER = 3  # one being encoded, the others read ahead or waiting to be written


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
