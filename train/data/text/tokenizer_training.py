"""Trains a byte-pair tokenizer: 50,000 ids would take most of a small model's weights."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.tokenizer import END_OF_TEXT, MAX_VOCAB_SIZE, Tokenizer, gpt2_tokenizer
from fusedgpt.model.tokenizer_json import CustomTokenizer
from fusedgpt.train.data.text.sources import DataError, Piece

_SMALLEST_VOCAB = 257  # every byte, and end-of-text
_MAX_CHARACTERS = 1 << 28  # more hardly improve a vocabulary, and word counts take memory
# For text that is made: an id for so many bytes, in powers of two. More text has more words worth an id.
_BYTES_PER_ID = 600
_FITTING_SIZES = [1 << n for n in range(9, 14)]  # beyond them, GPT-2's
_LEARNED_BYTES = 2_000_000  # enough for so few ids
# The time to train grows with the square of a word's length, and text without spaces is a single word.
_LONG_WORD = r"\S{256}|\s{256}"


def fitting_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """A byte-level BPE whose size fits the amount of text, 512 to 8,192 ids; GPT-2's for more text."""
    n_bytes = sum(len(text.encode("utf-8", "replace")) for text in texts)
    sizes = [size for size in _FITTING_SIZES if size * 1.5 > n_bytes / _BYTES_PER_ID]
    if not sizes:
        return gpt2_tokenizer()
    n_learned = max(1, len(texts) * _LEARNED_BYTES // max(n_bytes, _LEARNED_BYTES))
    return train_tokenizer((Piece(text, True) for text in texts[:n_learned]), sizes[0])


def train_tokenizer(
    pieces: Iterable[Piece], vocab_size: int, waiting: Callable[[str], object] = lambda _: None
) -> Tokenizer:
    """A byte-level BPE of `vocab_size` ids that splits words as GPT-2's does; end-of-text is the last id.

    Learns from the first 268 million characters of `pieces`; gives fewer ids if the text has no more pairs to
    merge. waiting: called often with what is being done, once the text is read. Raises ValueError for an
    impossible size, DataError if there is no text, and what iterating over `pieces` raises.
    """
    if not _SMALLEST_VOCAB <= vocab_size <= MAX_VOCAB_SIZE:
        raise InputError(
            f"--train-tokenizer: expected {_SMALLEST_VOCAB} to {MAX_VOCAB_SIZE} ids, got {vocab_size}"
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bounded = pre_tokenizers.Split(tokenizers.Regex(_LONG_WORD), "isolated")
    library.pre_tokenizer = pre_tokenizers.Sequence([bounded, words])
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    n_characters = 0
    read = threading.Event()

    def texts() -> Iterator[str]:
        nonlocal n_characters
        for text, _ in pieces:
            if read.is_set():
                return
            n_characters += len(text)
            yield text
            if n_characters >= _MAX_CHARACTERS:
                break
        read.set()

    try:
        _in_thread(
            lambda: library.train_from_iterator(texts(), trainer),
            lambda: waiting("merging pairs") if read.is_set() else None,
        )
    finally:
        read.set()  # an interrupt ends the reading
    if not n_characters:
        raise DataError("there is no text to train a tokenizer on")
    library.pre_tokenizer = words
    library.add_special_tokens([END_OF_TEXT])
    return CustomTokenizer(json.loads(library.to_str()))


def _in_thread(work: Callable[[], object], waiting: Callable[[], object]) -> None:
    """Do `work`, and raise what it raises, but heed Ctrl-C: the tokenizers library does not."""
    errors: list[BaseException] = []

    def run() -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    while thread.is_alive():
        thread.join(0.1)
        waiting()
    if errors:
        raise errors[0]
