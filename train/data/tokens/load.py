"""What --data names, as datasets: text, token sets of `fusedgpt prepare`, nanoGPT's .bin files, mixes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from fusedgpt.model.tokenizer import Tokenizer, build_tokenizer, char_tokenizer
from fusedgpt.train.config import RunConfig
from fusedgpt.train.data.text.encode import characters, encode_streams, note_special_token
from fusedgpt.train.data.text.sources import DataError, Piece, Source, no_text
from fusedgpt.train.data.tokens.dataset import TokenDataset, check_length, mix_datasets
from fusedgpt.train.data.tokens.nanogpt import bin_tokenizer, open_bin, open_nanogpt_set
from fusedgpt.train.data.tokens.shards import INDEX, Tokens, TokenSet, open_token_set
from fusedgpt.train.data.tokens.windows import pack_documents


def split_weight(path: Path) -> tuple[Path, float | None]:
    """`folder:0.3` as (folder, 0.3); (path, None) without a weight, or if a file has that whole name."""
    name, colon, weight = str(path).rpartition(":")
    try:
        return (path, None) if not colon or path.exists() else (Path(name), float(weight))
    except ValueError:
        return path, None


def is_token_set(path: Path) -> bool:
    """Whether `path`, with or without a weight, holds token ids rather than text."""
    path = split_weight(path)[0]
    if path.is_dir():
        return (path / INDEX).is_file() or (path / "train.bin").is_file()
    return path.name == INDEX or path.suffix == ".bin"


@contextmanager
def kept(paths: Sequence[Path]) -> Iterator[list[Path]]:
    """`paths`, of which those that can be read only once (standard input, pipes) are copied to files."""
    with TemporaryDirectory() as folder:
        yield [
            _keep(path, Path(folder) / f"input-{i}{''.join(path.suffixes)}") for i, path in enumerate(paths)
        ]


def _keep(path: Path, copy: Path) -> Path:
    if Source(inputs=(path,)).read_once is None:
        return path
    opened = nullcontext(sys.stdin.buffer) if path == Path("-") else path.open("rb")
    with opened as stream, copy.open("wb") as file:
        shutil.copyfileobj(stream, file)
    return copy


def load_data(
    paths: Sequence[Path], config: RunConfig, note: Callable[[str], object] = lambda _: None
) -> tuple[TokenDataset, Tokenizer]:
    """The dataset of text files or token sets, and its tokenizer; note: see note_special_token.

    Raises FileNotFoundError or DataError for text that cannot be read, else as tokenise and load_token_sets.
    """
    if any(is_token_set(path) or split_weight(path)[1] is not None for path in paths):
        return load_token_sets(paths, config)
    source = Source(inputs=tuple(paths), text_field=config.data.text_field, errors=config.data.errors)
    tokenizer = _choose_tokenizer(config.data.tokenizer, source)
    pieces = iter(replace(source, cut=tokenizer.safe_cut))
    if (first := next(pieces, None)) is None:
        raise no_text(paths)
    noted = note_special_token(chain([first], pieces), tokenizer, note)
    return tokenise(noted, tokenizer, config), tokenizer


def _choose_tokenizer(name: str, source: Source) -> Tokenizer:
    if name != "char":
        return build_tokenizer(name)
    source.check_rereadable("this tokenizer needs two passes over the text")
    found = characters(replace(source, cut="anywhere"))
    if not found:
        raise no_text(source.inputs)
    return char_tokenizer(found)


def tokenise(pieces: Iterable[Piece], tokenizer: Tokenizer, config: RunConfig) -> TokenDataset:
    """The dataset of a text, which is that of the token set `fusedgpt prepare` makes of it.

    Memory grows with the tokens, not with the text. Raises ValueError if there is too little for one window.
    """
    train, val = encode_streams(pieces, tokenizer, config.data.val_fraction)
    streams: dict[str, Any] = {"train": train.ids, "train_ends": train.document_ends}
    streams |= {"val": val.ids, "val_ends": val.document_ends}
    return _dataset(TokenSet(**streams, tokenizer=tokenizer), config)


def load_token_sets(paths: Sequence[Path], config: RunConfig) -> tuple[TokenDataset, Tokenizer]:
    """The dataset of one or more token sets, memory-mapped, and their tokenizer.

    paths: folders of `fusedgpt prepare` or nanoGPT (train.bin, val.bin), or .bin files of uint16 ids. Several
    are mixed in proportion to their weights (`a:0.7`, `b:0.3`), or to their tokens if none has a weight. For
    .bin files without a meta.json, config.data.tokenizer says what the ids mean; without a val.bin, the last
    config.data.val_fraction is held out. Raises FileNotFoundError, DataError or ValueError for unusable data.
    """
    folders, given = zip(*map(split_weight, paths), strict=True)
    opened = [_open(path, config) for path in folders]
    tokenizer = opened[0].tokenizer
    for path, one in zip(folders, opened, strict=True):
        if not _same_ids(one.tokenizer, tokenizer):
            raise DataError(
                f"{folders[0]} and {path} were made with different tokenizers: prepare one of them again"
            )
    wanted = config.data.tokenizer
    if wanted in ("char", "byte") and wanted != tokenizer.kind:
        raise DataError(f"--tokenizer {wanted}: {folders[0]} was made with another: leave it out")
    datasets = [_dataset(one, config) for one in opened]
    weights = [weight for weight in given if weight is not None]
    if 0 < len(weights) < len(given):
        raise DataError("give every --data a weight (folder:0.7), or none of them")
    return mix_datasets(datasets, weights or [len(one.train) for one in datasets]), tokenizer


def load_validation_tokens(path: Path, tokenizer: Tokenizer) -> Tokens:
    """The ids of a token set to evaluate on: its validation stream, or all of a .bin file.

    Raises FileNotFoundError or DataError if there are none, or another tokenizer made them.
    """
    if folder := _set_folder(path):
        opened = open_token_set(folder)
        stream, made_by = opened.val, opened.tokenizer
    else:
        file = path / "val.bin" if path.is_dir() else path
        made_by = bin_tokenizer(file, tokenizer)
        stream = open_bin(file, made_by)
    if not _same_ids(made_by, tokenizer):
        raise DataError(f"{path} was made with another tokenizer than the model's: prepare its text again")
    if not len(stream):
        raise DataError(f"{path} holds nothing out to evaluate on: prepare it with --val-fraction")
    return stream


def _open(path: Path, config: RunConfig) -> TokenSet:
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    if not is_token_set(path):
        raise DataError(
            f"{path} is text: only token sets can be mixed or weighted; make one with `fusedgpt prepare`"
        )
    if folder := _set_folder(path):
        return open_token_set(folder)
    file = path / "train.bin" if path.is_dir() else path
    return open_nanogpt_set(file, config.data.tokenizer, config.data.val_fraction)


def _set_folder(path: Path) -> Path | None:
    """The folder of a set of `fusedgpt prepare`, which its index may stand for; None if `path` is none."""
    if path.name == INDEX:
        return path.parent
    return path if (path / INDEX).is_file() else None


def _same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    return a is b or ((a.kind, a.eot_id) == (b.kind, b.eot_id) and a.definition() == b.definition())


def _dataset(one: TokenSet, config: RunConfig) -> TokenDataset:
    check_length(len(one.train), config.max_length)
    borders = val_borders = None
    if config.data.packing:
        if one.train_ends is None or one.val_ends is None:
            raise DataError("a .bin file does not say where documents end: packing needs `fusedgpt prepare`")
        borders, val_borders = (
            pack_documents(ends, config.max_length) for ends in (one.train_ends, one.val_ends)
        )
    return TokenDataset(
        train=one.train,
        val=one.val,
        max_length=config.max_length,
        train_documents=1 if one.train_ends is None else len(one.train_ends),
        val_documents=int(len(one.val) > 0) if one.val_ends is None else len(one.val_ends),
        eot_id=one.tokenizer.eot_id,
        document_masks=config.data.document_masks,
        borders=borders,
        val_borders=val_borders,
        token_bytes=_token_bytes(one.tokenizer),
    )


def _token_bytes(tokenizer: Tokenizer) -> Tensor | None:
    lengths = tokenizer.token_bytes()
    return None if lengths is None else torch.tensor(lengths, dtype=torch.int64)
