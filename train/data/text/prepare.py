"""From files to documents, from documents to token windows or to a token set on disk."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from fusedgpt.model.tokenizer import Tokenizer, build_tokenizer, char_tokenizer
from fusedgpt.train.config import RunConfig
from fusedgpt.train.data.text.encode import Chunk, encode_chunks, usable_cores
from fusedgpt.train.data.text.sources import DataError, Errors, Piece, Source
from fusedgpt.train.data.text.tokenizer_training import train_tokenizer
from fusedgpt.train.data.tokens.shard_writer import SetWriter, new_folder
from fusedgpt.train.data.tokens.shards import Index

if TYPE_CHECKING:  # it imports torch, which preparing does not need and which takes a second
    from fusedgpt.train.data.tokens.dataset import TokenDataset

SHARD_TOKENS = 100_000_000
_CHUNK_CHARACTERS = 1 << 19  # encoded by a worker at a time
_CHUNK_PIECES = 1 << 13
_HASHED_CHARACTERS = 1 << 16  # of a document, to decide whether it is held out; pieces are no shorter

Report = Callable[[str, int, int, int], None]  # what is being done, bytes read, bytes in all, tokens so far


def read_documents(paths: Sequence[Path]) -> list[str]:
    """The documents of text, JSON line and parquet files, and of the folders they are in, in order of names.

    Raises FileNotFoundError for a missing path, DataError for files that cannot be read or hold no text.
    """
    documents = [piece.text for piece in Source(inputs=tuple(paths))]
    if not documents:
        raise _no_text(paths)
    return documents


def _no_text(paths: Sequence[Path]) -> DataError:
    return DataError(f"{', '.join(map(str, paths[:4]))} is empty")


def tokenise(documents: Sequence[str], tokenizer: Tokenizer, config: RunConfig) -> TokenDataset:
    """The dataset of `documents`. Raises ValueError where there is too little text for one window."""
    from fusedgpt.train.data.tokens.dataset import build_dataset, token_bytes

    dataset = build_dataset(
        tokenizer.encode_batch(documents),
        eot_id=tokenizer.eot_id,
        max_length=config.max_length,
        val_fraction=config.data.val_fraction,
        seed=config.train.seed,
        packing=config.data.packing,
    )
    return replace(dataset, token_bytes=token_bytes(tokenizer), document_masks=config.data.document_masks)


def prepare(
    inputs: Sequence[Path],
    out: Path,
    *,
    tokenizer: str = "gpt2",
    vocab_size: int | None = None,
    val_fraction: float = 0.1,
    shard_tokens: int = SHARD_TOKENS,
    workers: int | None = None,
    text_field: str = "text",
    errors: Errors = "strict",
    report: Report = lambda *_: None,
) -> Index:
    """Tokenise text of any size into a token set `out` (see shards.py), in constant memory.

    vocab_size: train a byte-pair tokenizer of that many ids on the text, not `tokenizer`. Documents are
    held out by a hash of their text, or the end of the text where they are few. The set does not depend on
    the number of workers. Returns its index. Raises FileNotFoundError, DataError or ValueError for what
    cannot be read or tokenised, OSError where `out` cannot be written; then there is no `out`.
    """
    _check_options(val_fraction, shard_tokens, workers)
    source = Source(inputs=tuple(inputs), text_field=text_field, errors=errors, cut="words")
    progress = _Progress(report, source.size)
    with new_folder(out) as folder:
        chosen = _choose_tokenizer(tokenizer, vocab_size, source, progress)
        source = replace(source, cut=chosen.safe_cut, on_bytes=progress.begin("tokenising"))
        writer = SetWriter(folder, chosen, shard_tokens)
        try:
            chunks = chunked(source, val_fraction)
            for encoded in encode_chunks(chunks, chosen, workers or usable_cores()):
                writer.append("train", *encoded.train)
                writer.append("val", *encoded.val)
                writer.text_bytes += encoded.text_bytes
                progress.show(writer.tokens)
            if not writer.tokens:
                raise _no_text(inputs)
            writer.balance(val_fraction)
            return writer.close()
        finally:
            writer.abandon()


def _check_options(val_fraction: float, shard_tokens: int, workers: int | None) -> None:
    if not 0.0 <= val_fraction < 1.0:
        raise ValueError(f"--val-fraction: expected 0 <= fraction < 1, got {val_fraction}")
    if shard_tokens < 1:
        raise ValueError(f"--shard-tokens: expected 1 or more, got {shard_tokens}")
    if workers is not None and workers < 1:
        raise ValueError(f"--workers: expected 1 or more, got {workers}")


class _Progress:
    """What has been read, told to `report` from time to time."""

    def __init__(self, report: Report, total: int) -> None:
        self._report, self._total = report, total

    def begin(self, title: str) -> Callable[[int], None]:
        """A new pass over the text; returns what counts its bytes."""
        self._title, self._done = title, 0
        self.show(0)
        return self._count

    def _count(self, n_bytes: int) -> None:
        self._done += n_bytes

    def show(self, tokens: int) -> None:
        """Report how far it is."""
        self._report(self._title, self._done, self._total, tokens)

    def watched(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """`pieces`, reported on as they pass."""
        for piece in pieces:
            self.show(0)
            yield piece


def _choose_tokenizer(name: str, vocab_size: int | None, source: Source, progress: _Progress) -> Tokenizer:
    if vocab_size is None and name != "char":
        return build_tokenizer(name)
    if source.read_once is not None:
        raise DataError(
            f"{source.read_once} can be read only once, and this tokenizer takes two passes over the text: "
            f"write it to a file first"
        )
    if vocab_size is not None:
        source = replace(source, on_bytes=progress.begin("training the tokenizer"))
        return train_tokenizer(progress.watched(source), vocab_size)
    source = replace(source, cut="anywhere", on_bytes=progress.begin("collecting characters"))
    characters: set[str] = set()
    for piece in progress.watched(source):
        characters.update(piece.text)
    if not characters:
        raise _no_text(source.inputs)
    return char_tokenizer("".join(characters))


def chunked(pieces: Iterable[Piece], val_fraction: float) -> Iterator[Chunk]:
    """Pieces in portions for the workers, with the verdict for each whether its document is held out."""
    chunk, size = Chunk([], [], []), 0
    held_out = begins = True
    for text, ends in pieces:
        if begins:
            held_out = is_held_out(text, val_fraction)
        begins = ends
        chunk.texts.append(text)
        chunk.ends.append(ends)
        chunk.held_out.append(held_out)
        size += len(text)
        if size >= _CHUNK_CHARACTERS or len(chunk.texts) >= _CHUNK_PIECES:
            yield chunk
            chunk, size = Chunk([], [], []), 0
    if chunk.texts:
        yield chunk


def is_held_out(beginning: str, val_fraction: float) -> bool:
    """Whether the document that begins so is for validation: a share of all, the same for the same text."""
    if not val_fraction:
        return False
    digest = blake2b(beginning[:_HASHED_CHARACTERS].encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < val_fraction * 2**64
