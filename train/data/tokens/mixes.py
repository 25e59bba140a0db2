"""Training data that is tokenised already: our token sets, nanoGPT's .bin files, and mixes of them."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fusedgpt.model.tokenizer import Tokenizer, build_tokenizer, char_tokenizer, load_tokenizer
from fusedgpt.train.config import RunConfig
from fusedgpt.train.data.text.prepare import read_documents, tokenise
from fusedgpt.train.data.text.sources import DataError
from fusedgpt.train.data.tokens.dataset import (
    TokenDataset,
    check_length,
    mix_datasets,
    pack_documents,
    token_bytes,
)
from fusedgpt.train.data.tokens.shards import INDEX, TokenStream, map_file, open_stream, read_index

_MAX_META_BYTES = 64 << 20
_NANOGPT_DTYPE = np.dtype("<u2")


@dataclass(frozen=True, kw_only=True)
class _OpenSet:
    """Streams, where documents end (None: unknown), and what made the ids."""

    train: TokenStream
    val: TokenStream
    ends: tuple[NDArray[np.integer], NDArray[np.integer]] | None
    tokenizer: Tokenizer


def split_weight(path: Path) -> tuple[Path, float | None]:
    """`folder:0.3` as (folder, 0.3); (path, None) where there is no weight, or a file of that whole name."""
    name, colon, weight = str(path).rpartition(":")
    if not colon or path.exists():
        return path, None
    try:
        return Path(name), float(weight)
    except ValueError:
        return path, None


def is_prepared(path: Path) -> bool:
    """Whether `path`, with or without a weight, holds token ids, not text."""
    path = split_weight(path)[0]
    if path.is_dir():
        return (path / INDEX).is_file() or (path / "train.bin").is_file()
    return path.name == INDEX or path.suffix == ".bin"


def read_data(paths: Sequence[Path], config: RunConfig) -> tuple[TokenDataset, Tokenizer]:
    """What `train --data` names, text or token sets: its windows, and what made the ids.

    Raises as read_documents, tokenise and open_dataset do.
    """
    if any(is_prepared(path) or split_weight(path)[1] is not None for path in paths):
        return open_dataset(paths, config)
    texts = read_documents(paths)
    tokenizer = build_tokenizer(config.data.tokenizer, text="".join(texts))
    return tokenise(texts, tokenizer, config), tokenizer


def open_dataset(paths: Sequence[Path], config: RunConfig) -> tuple[TokenDataset, Tokenizer]:
    """The windows of one or more token sets, memory-mapped, and the tokenizer that made their ids.

    paths: folders that `fusedgpt prepare` made, or nanoGPT's (train.bin, val.bin), or .bin files of uint16;
    several are mixed in the proportion of their weights (`a:0.7`, `b:0.3`), without weights in that of their
    tokens. For .bin files, a meta.json beside them or config.data.tokenizer says what the ids mean, and
    config.data.val_fraction how much of their end is held out where there is no val.bin. Raises
    FileNotFoundError, DataError or ValueError for what cannot be used.
    """
    if text := [path for path in paths if not is_prepared(path)]:
        raise _not_prepared(text[0])
    wanted = [split_weight(path) for path in paths]
    opened = [_open(path, config) for path, _ in wanted]
    for (path, _), one in zip(wanted, opened, strict=True):
        if not _same_ids(one.tokenizer, opened[0].tokenizer):
            raise DataError(
                f"{wanted[0][0]} and {path} were made with different tokenizers: prepare one of them again"
            )
    datasets = [_windows(one, config) for one in opened]
    weights = _weights([weight for _, weight in wanted], datasets)
    return mix_datasets(datasets, weights), opened[0].tokenizer


def open_held_out(path: Path, tokenizer: Tokenizer) -> TokenStream:
    """The ids of a token set to evaluate on: what it holds out, or all of a .bin file.

    Raises FileNotFoundError or DataError where there are none, or they are not `tokenizer`'s.
    """
    if path.name == INDEX or (path / INDEX).is_file():
        opened = _open_ours(path.parent if path.name == INDEX else path)
        stream, made_by = opened.val, opened.tokenizer
    else:
        file = path / "val.bin" if path.is_dir() else path
        made_by = _nanogpt_tokenizer(file, tokenizer)
        stream = _open_bin(file, made_by)
    if not _same_ids(made_by, tokenizer):
        raise DataError(f"{path} was made with another tokenizer than the model's: prepare its text again")
    if not len(stream):
        raise DataError(f"{path} holds nothing out to evaluate on: prepare it with --val-fraction")
    return stream


def _not_prepared(path: Path) -> Exception:
    real = split_weight(path)[0]
    if not real.exists():
        return FileNotFoundError(f"there is no file or folder {real}")
    return DataError(
        f"{real} is text: a mix, or what has a weight, is of token sets; make one with `fusedgpt prepare`"
    )


def _weights(given: list[float | None], datasets: list[TokenDataset]) -> list[float]:
    weights = [weight for weight in given if weight is not None]
    if not weights:
        return [float(len(one.train)) for one in datasets]
    if len(weights) < len(given):
        raise DataError("give every --data a weight (folder:0.7), or none of them")
    if not all(0 < weight < math.inf for weight in weights):
        raise DataError(f"weights must be positive numbers, got {', '.join(f'{w:g}' for w in weights)}")
    return weights


def _windows(one: _OpenSet, config: RunConfig) -> TokenDataset:
    max_length, packing = config.max_length, config.data.packing
    check_length(len(one.train), max_length)
    if packing and one.ends is None:
        raise DataError("a .bin file does not say where documents end, which packing takes: prepare the text")
    counts = (len(one.ends[0]), len(one.ends[1])) if one.ends else (1, int(len(one.val) > 0))
    return TokenDataset(
        train=one.train,
        val=one.val,
        max_length=max_length,
        train_documents=counts[0],
        val_documents=counts[1],
        eot_id=one.tokenizer.eot_id,
        document_masks=config.data.document_masks,
        borders=pack_documents(one.ends[0], max_length) if packing and one.ends else None,
        token_bytes=token_bytes(one.tokenizer),
    )


def _same_ids(a: Tokenizer, b: Tokenizer) -> bool:
    return a is b or (a.kind == b.kind and a._definition() == b._definition())


def _open(path: Path, config: RunConfig) -> _OpenSet:
    if path.name == INDEX or (path / INDEX).is_file():
        return _open_ours(path.parent if path.name == INDEX else path)
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return _open_nanogpt(path / "train.bin" if path.is_dir() else path, config)


def _open_ours(folder: Path) -> _OpenSet:
    index = read_index(folder)
    try:
        tokenizer = load_tokenizer(folder)
    except (OSError, ValueError) as error:
        raise DataError(f"{folder}: {error}") from None
    if (tokenizer.vocab_size, tokenizer.eot_id) != (index.vocab_size, index.eot_id):
        raise DataError(
            f"{folder}: tokenizer.json has {tokenizer.vocab_size} ids, the index says {index.vocab_size}: "
            f"one of them is of another set"
        )
    train, train_ends = open_stream(folder, index, "train")
    val, val_ends = open_stream(folder, index, "val")
    return _OpenSet(train=train, val=val, ends=(train_ends, val_ends), tokenizer=tokenizer)


def _open_nanogpt(file: Path, config: RunConfig) -> _OpenSet:
    """A .bin, and the val.bin beside a train.bin; else the end of the .bin is held out."""
    tokenizer = _nanogpt_tokenizer(file, config.data.tokenizer)
    train = _open_bin(file, tokenizer)
    beside = file.with_name("val.bin")
    if file.name == "train.bin" and beside.is_file():
        val = _open_bin(beside, tokenizer)
    else:
        border = len(train) - round(len(train) * config.data.val_fraction)
        train, val = train.cut(0, border), train.cut(border, len(train))
    return _OpenSet(train=train, val=val, ends=None, tokenizer=tokenizer)


def _open_bin(file: Path, tokenizer: Tokenizer) -> TokenStream:
    size = file.stat().st_size
    if size % _NANOGPT_DTYPE.itemsize:
        raise DataError(f"{file} is truncated: {size:,} bytes are no whole number of uint16 ids")
    ids = map_file(file, size // _NANOGPT_DTYPE.itemsize, _NANOGPT_DTYPE)
    stream = TokenStream([ids], names=[str(file)], vocab_size=tokenizer.vocab_size)
    stream.hash_ends()
    stream.check_ids()
    return stream


def _nanogpt_tokenizer(file: Path, otherwise: Tokenizer | str) -> Tokenizer:
    """What made the ids, by the meta.json beside `file`; without one it is `otherwise`, or that name's."""
    meta, pickled = file.with_name("meta.json"), file.with_name("meta.pkl")
    if meta.is_file():
        return _meta_tokenizer(meta)
    if pickled.is_file():
        raise DataError(
            f"{pickled} is a pickle, which may run any code and is not read: write its `stoi` to {meta} "
            f'as {{"stoi": {{"a": 0, ...}}}} with the script that made it'
        )
    if isinstance(otherwise, Tokenizer):
        return otherwise
    if otherwise == "char":
        raise DataError(f"{file} does not say which characters its ids are: put a meta.json beside it")
    return build_tokenizer(otherwise)


def _meta_tokenizer(meta: Path) -> Tokenizer:
    """What meta.json says made the ids: {"stoi": {character: id}}, or {"tokenizer": name or path}."""
    try:
        if meta.stat().st_size > _MAX_META_BYTES:
            raise ValueError(f"it is over {_MAX_META_BYTES} bytes")
        content = json.loads(meta.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {meta}: {' '.join(str(error).split())[:200]}") from None
    if isinstance(content, dict) and isinstance(content.get("tokenizer"), str):
        return build_tokenizer(content["tokenizer"])
    stoi: Any = content.get("stoi") if isinstance(content, dict) else None
    if not _is_character_table(stoi):
        raise DataError(f'{meta} needs "stoi", the id of each character, or "tokenizer", a name or a path')
    characters = sorted(stoi)
    if [stoi[character] for character in characters] != list(range(len(characters))):
        raise DataError(f"{meta}: ids that do not follow the order of the characters are not supported")
    return char_tokenizer("".join(characters))


def _is_character_table(stoi: Any) -> bool:
    whole = isinstance(stoi, dict) and bool(stoi) and all(type(i) is int for i in stoi.values())
    return whole and all(len(c) == 1 and not "\ud800" <= c <= "\udfff" for c in stoi)
