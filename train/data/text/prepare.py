"""`fusedgpt prepare`: from text files to a token set on disk, in constant memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from fusedgpt.kernels.errors import UsageError
from fusedgpt.model.tokenizer import Tokenizer, build_tokenizer, char_tokenizer
from fusedgpt.train.data.text.encode import all_cores, characters, chunked, encode_chunks, note_special_token
from fusedgpt.train.data.text.sources import Cut, Errors, Piece, Source, no_text
from fusedgpt.train.data.text.tokenizer_training import train_tokenizer
from fusedgpt.train.data.tokens.shard_writer import TokenSetWriter, new_set_folder
from fusedgpt.train.data.tokens.shards import Index

Report = Callable[[str, int, int, int], None]  # what is being done, bytes read, bytes in all, tokens so far


def prepare(
    inputs: Sequence[Path],
    out: Path,
    *,
    tokenizer: str = "gpt2",
    vocab_size: int | None = None,
    val_fraction: float = 0.1,
    shard_tokens: int = 100_000_000,
    workers: int | None = None,
    text_field: str = "text",
    errors: Errors = "strict",
    report: Report = lambda *_: None,
    note: Callable[[str], object] = lambda _: None,
) -> Index:
    """Tokenise text of any size into a token set `out` (see shards.py), and return its index.

    vocab_size: train a byte-pair tokenizer of that many ids on the text, instead of using `tokenizer`.
    Documents are held out by a hash of their text; if they are few, the end of the text is held out. The set
    does not depend on the number of workers. note: gets a message for the user if the text names a special
    token. Raises FileNotFoundError, DataError or ValueError for text that cannot be read or tokenised,
    OSError if `out` cannot be written; then there is no `out`.
    """
    if not 0.0 <= val_fraction < 1.0:
        raise UsageError(f"--val-fraction: expected 0 <= fraction < 1, got {val_fraction}")
    workers = all_cores() if workers is None else workers
    for option, value in (("--shard-tokens", shard_tokens), ("--workers", workers)):
        if value < 1:
            raise UsageError(f"{option}: expected 1 or more, got {value}")
    source = Source(inputs=tuple(inputs), text_field=text_field, errors=errors)
    progress = _Progress(report, source)
    with new_set_folder(out) as folder:
        chosen = _choose_tokenizer(tokenizer, vocab_size, source, progress)
        writer = TokenSetWriter(folder, chosen, shard_tokens)
        pieces = note_special_token(progress.begin("tokenising", chosen.safe_cut), chosen, note)
        chunks = chunked(pieces, val_fraction)
        for encoded in encode_chunks(chunks, chosen, workers):
            writer.append(encoded)
            progress.show(writer.tokens)
        if not writer.tokens:
            raise no_text(inputs)
        writer.balance(val_fraction)
        return writer.finish()


class _Progress:
    """Bytes of the text read so far, passed on to `report`."""

    def __init__(self, report: Report, source: Source) -> None:
        self._report, self._source, self._total = report, source, source.size

    def begin(self, title: str, cut: Cut) -> Source:
        """The text for a new pass, which counts its bytes."""
        self._title, self._done = title, 0
        self.show(0)
        return replace(self._source, cut=cut, on_bytes=self._count)

    def _count(self, n_bytes: int) -> None:
        self._done += n_bytes

    def show(self, tokens: int) -> None:
        """Report the progress."""
        self._report(self._title, self._done, self._total, tokens)

    def wait(self, title: str) -> None:
        """Report work of unknown length."""
        self._report(title, 0, 0, 0)


def _choose_tokenizer(name: str, vocab_size: int | None, source: Source, progress: _Progress) -> Tokenizer:
    if vocab_size is None and name != "char":
        return build_tokenizer(name)
    source.check_rereadable("this tokenizer needs two passes over the text")

    def pieces(title: str, cut: Cut) -> Iterator[Piece]:
        for piece in progress.begin(title, cut):
            progress.show(0)
            yield piece

    if vocab_size is not None:
        return train_tokenizer(pieces("training the tokenizer", "words"), vocab_size, progress.wait)
    found = characters(pieces("collecting characters", "anywhere"))
    if not found:
        raise no_text(source.inputs)
    return char_tokenizer(found)
