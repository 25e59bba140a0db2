"""The loss of a model over text or token ids: sliding windows, every token weighed the same.

Each document starts from end-of-text, so that all of its tokens are scored, in the context of those before
them in the document. A window moves on by `stride` tokens; only the tokens that no earlier window scored
count. So each token but a document's first `window` has at least window - stride tokens of context.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import NamedTuple

import numpy as np
import torch

from fusedgpt.kernels.errors import InputError, UsageError
from fusedgpt.model.gpt import GPT
from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.data.text.sources import DataError, Piece
from fusedgpt.train.data.tokens.dataset import IGNORE_INDEX, Batch
from fusedgpt.train.data.tokens.shards import Tokens
from fusedgpt.train.loop.validation import evaluate
from fusedgpt.train.run.world import ALONE, World

_BATCH_TOKENS = 8192
_CHUNK = 1 << 16  # ids of a stream at a time
_POOL = 16  # batches whose windows are sorted by length, so that little is padded

Window = tuple[list[int], int]  # T + 1 ids, of which the last `scored` are scored


class _Part(NamedTuple):
    """Of a document."""

    ids: list[int]
    bytes: int  # of its text
    ends: bool  # the document ends with it


@dataclass(frozen=True, kw_only=True)
class TextEvaluation:
    """What a model makes of a text."""

    loss: float  # nats per token
    perplexity: float
    bits_per_byte: float | None  # of the text in UTF-8; None for ids whose lengths are not known
    tokens: int
    bytes: int
    documents: int
    window: int
    stride: int
    seconds: float


@dataclass
class _Counts:
    tokens: int = 0
    bytes: int = 0
    documents: int = 0


def evaluate_text(
    model: GPT,
    tokenizer: Tokenizer,
    pieces: Iterable[Piece],  # cut where the tokenizer says they may be
    *,
    window: int | None = None,
    stride: int | None = None,
    dtype: torch.dtype | None = None,  # of the activations
    report: Callable[[int], None] = lambda _: None,
    world: World = ALONE,
) -> TextEvaluation:
    """Loss, perplexity and bits per byte of `pieces`, in constant memory.

    window: the context in tokens (None: what training has seen); stride: None is half of it. report gets the
    number of tokens scored so far. world: the ranks that share the batches. Raises ValueError for settings
    out of range or text that the tokenizer cannot encode, DataError where there is no text.
    """
    return _evaluate(
        model, _encoded(pieces, tokenizer), tokenizer.eot_id, window, stride, dtype, report, world
    )


def evaluate_tokens(
    model: GPT,
    tokenizer: Tokenizer,  # that made the ids
    streams: Sequence[Tokens],
    *,
    window: int | None = None,
    stride: int | None = None,
    dtype: torch.dtype | None = None,  # of the activations
    report: Callable[[int], None] = lambda _: None,
    world: World = ALONE,
) -> TextEvaluation:
    """The same over ids whose documents end-of-text separates; they are mapped, not loaded."""
    parts = (part for stream in streams for part in _documents(stream, tokenizer))
    return _evaluate(model, parts, tokenizer.eot_id, window, stride, dtype, report, world)


def _evaluate(
    model: GPT,
    parts: Iterable[_Part],
    eot_id: int,
    window: int | None,
    stride: int | None,
    dtype: torch.dtype | None,
    report: Callable[[int], None],
    world: World,
) -> TextEvaluation:
    window = model.config.window if window is None else window
    stride = max(1, window // 2) if stride is None else stride
    if not 1 <= window <= model.config.block_size:
        raise UsageError(f"--window: expected 1 to the model's {model.config.block_size}, got {window}")
    if not 1 <= stride <= window:
        raise UsageError(f"--stride: expected 1 to the window of {window}, got {stride}")
    counts = _Counts()
    start = time.perf_counter()
    windows = _windows(parts, eot_id, window, stride, counts)
    batches = _batches(windows, max(1, _BATCH_TOKENS // window), eot_id, report)
    result = evaluate(model, batches, dtype=dtype, world=world)
    if result is None or not counts.tokens:
        raise DataError("there is no text to evaluate: the data is empty")
    if not math.isfinite(result.loss):
        raise InputError(f"the loss is {result.loss}: the numbers overflow, try --precision fp32")
    nats = result.loss * counts.tokens
    return TextEvaluation(
        loss=result.loss,
        perplexity=math.exp(min(result.loss, 700.0)),  # beyond that there is no double
        bits_per_byte=nats / math.log(2.0) / counts.bytes if counts.bytes else None,
        tokens=counts.tokens,
        bytes=counts.bytes,
        documents=counts.documents,
        window=window,
        stride=stride,
        seconds=time.perf_counter() - start,
    )


def _encoded(pieces: Iterable[Piece], tokenizer: Tokenizer) -> Iterator[_Part]:
    for text, ends in pieces:
        yield _Part(tokenizer.encode(text), len(text.encode("utf-8", "surrogatepass")), ends)


def _documents(stream: Tokens, tokenizer: Tokenizer) -> Iterator[_Part]:
    lengths = np.asarray(tokenizer.token_bytes() or [0] * tokenizer.vocab_size)
    for start in range(0, len(stream), _CHUNK):
        ids = stream[start : start + _CHUNK]
        begin = 0
        for end in [*np.flatnonzero(ids == tokenizer.eot_id).tolist(), len(ids)]:
            part = ids[begin:end]
            yield _Part(part.tolist(), int(lengths[part].sum()), end < len(ids))
            begin = end + 1
    yield _Part([], 0, True)


def _windows(
    parts: Iterable[_Part], eot_id: int, window: int, stride: int, counts: _Counts
) -> Iterator[Window]:
    held = [eot_id]  # ids from the start of the next window
    unscored = 0  # at the end of them
    for ids, n_bytes, ends in parts:
        counts.bytes += n_bytes
        counts.tokens += len(ids)
        held += ids
        unscored += len(ids)
        first = 0
        while len(held) - first > window + 1:
            scored = window + 1 - (len(held) - first - unscored)
            yield held[first : first + window + 1], scored
            unscored -= scored
            first += stride
        del held[:first]
        if ends:
            if unscored:
                yield held, unscored
                counts.documents += 1
            held, unscored = [eot_id], 0


def _batches(
    windows: Iterator[Window], batch_size: int, eot_id: int, report: Callable[[int], None]
) -> Iterator[Batch]:
    done = 0
    while pool := sorted(islice(windows, _POOL * batch_size), key=lambda window: len(window[0])):
        for i in range(0, len(pool), batch_size):
            rows = pool[i : i + batch_size]
            T = len(rows[-1][0]) - 1
            inputs = torch.full((len(rows), T), eot_id)
            targets = torch.full((len(rows), T), IGNORE_INDEX)
            for row, (ids, scored) in enumerate(rows):
                inputs[row, : len(ids) - 1] = torch.tensor(ids[:-1])
                targets[row, len(ids) - 1 - scored : len(ids) - 1] = torch.tensor(ids[-scored:])
                done += scored
            yield inputs, targets
            report(done)
