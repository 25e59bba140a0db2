"""Trains a byte-pair tokenizer: 50,000 ids would take most of a small model's weights."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from fusedgpt.model.tokenizer import END_OF_TEXT, MAX_VOCAB_SIZE, Tokenizer
from fusedgpt.model.tokenizer_json import CustomTokenizer
from fusedgpt.train.data.text.sources import DataError, Piece

_SMALLEST_VOCAB = 257  # every byte, and end-of-text
_MAX_CHARACTERS = 1 << 28  # more hardly improve a vocabulary, and word counts take memory


def train_tokenizer(pieces: Iterable[Piece], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` ids that splits words as GPT-2's does; end-of-text is the last id.

    Learns from the first 268 million characters of `pieces`; gives fewer ids if the text has no more pairs to
    merge. Raises ValueError for an impossible size, DataError if there is no text.
    """
    if not _SMALLEST_VOCAB <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"--train-tokenizer: expected {_SMALLEST_VOCAB} to {MAX_VOCAB_SIZE} ids, got {vocab_size}"
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=False)
    n_characters = 0

    def texts() -> Iterator[str]:
        nonlocal n_characters
        for text, _ in pieces:
            n_characters += len(text)
            yield text
            if n_characters >= _MAX_CHARACTERS:
                return

    library.train_from_iterator(texts(), trainer)
    if not n_characters:
        raise DataError("there is no text to train a tokenizer on")
    library.add_special_tokens([END_OF_TEXT])
    return CustomTokenizer(json.loads(library.to_str()))
