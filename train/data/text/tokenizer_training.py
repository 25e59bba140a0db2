"""A byte-pair tokenizer trained on one's own text, for small models, whose weights 50,000 ids would eat."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from fusedgpt.model.tokenizer import END_OF_TEXT, MAX_VOCAB_SIZE, Tokenizer, load_tokenizer
from fusedgpt.train.data.text.sources import DataError, Piece

SMALLEST_VOCAB = 257  # every byte, and end-of-text
_ENOUGH_CHARACTERS = 1 << 28  # more teaches a vocabulary little, and word counts take memory


def train_tokenizer(pieces: Iterable[Piece], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of `vocab_size` ids that cuts words as GPT-2's does, end-of-text the last id.

    Learns from the first 268 million characters of `pieces`; fewer ids where the text has no more pairs to
    join. Raises ValueError for a size that cannot be, DataError where there is no text.
    """
    if not SMALLEST_VOCAB <= vocab_size <= MAX_VOCAB_SIZE:
        raise ValueError(
            f"--train-tokenizer: expected {SMALLEST_VOCAB} to {MAX_VOCAB_SIZE} ids, got {vocab_size}"
        )
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    library = tokenizers.Tokenizer(models.BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    texts = _Texts(pieces)
    library.train_from_iterator(texts, trainer)
    if not texts.characters:
        raise DataError("there is no text to train a tokenizer on")
    library.add_special_tokens([END_OF_TEXT])
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.json"
        library.save(os.fspath(file))
        return load_tokenizer(file)


class _Texts:
    """The texts of pieces, until there are enough characters."""

    def __init__(self, pieces: Iterable[Piece]) -> None:
        self._pieces = pieces
        self.characters = 0

    def __iter__(self) -> Iterator[str]:
        for piece in self._pieces:
            self.characters += len(piece.text)
            yield piece.text
            if self.characters >= _ENOUGH_CHARACTERS:
                return
