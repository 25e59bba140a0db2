"""nanoGPT's data: .bin files of uint16 token ids, and a meta.json beside them that says what the ids mean.

llm.c's .bin files for GPT-2 are the same behind a header of 1,024 bytes.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from fusedgpt.model.tokenizer import Tokenizer, build_tokenizer, char_tokenizer
from fusedgpt.train.data.text.sources import DataError
from fusedgpt.train.data.tokens.shards import BLOCK, Part, TokenSet, TokenStream, map_file

_MAX_META_BYTES = 64 << 20
_DTYPE = np.dtype("<u2")
_LLM_C, _LLM_C_HEADER = np.array(20240520, "<i4").tobytes(), 512  # llm.c's magic number; ids in its header
_CONVERSION = "convert it with numpy: fromfile(OLD, '<u4').astype('<u2').tofile(NEW)"


def open_nanogpt_set(file: Path, tokenizer: str, val_fraction: float) -> TokenSet:
    """A .bin file, and val.bin beside a train.bin; without one the end of the .bin is held out.

    tokenizer: its name, if there is no meta.json. Raises DataError or ValueError for unusable files.
    """
    made_by = bin_tokenizer(file, tokenizer)
    train = open_bin(file, made_by)
    beside = file.with_name("val.bin")
    if file.name == "train.bin" and beside.is_file():
        val = open_bin(beside, made_by)
    else:
        border = len(train) - round(len(train) * val_fraction)
        train, val = train.cut(0, border), train.cut(border, len(train))
    return TokenSet(train=train, val=val, train_ends=None, val_ends=None, tokenizer=made_by)


def open_bin(file: Path, tokenizer: Tokenizer) -> TokenStream:
    """The ids of a .bin file. Raises DataError if it is truncated, of uint32 or of another vocabulary."""
    size = file.stat().st_size
    if size % _DTYPE.itemsize:
        raise DataError(f"{file} is truncated: {size:,} bytes are not a whole number of uint16 ids")
    if tokenizer.vocab_size > 2**16:
        raise DataError(
            f"{file} is read as uint16, which cannot hold the {tokenizer.vocab_size:,} ids of the tokenizer: "
            f"make a token set of the text with `fusedgpt prepare`"
        )
    ids = map_file(file, size // _DTYPE.itemsize, _DTYPE)
    if bytes(ids[:2]) == _LLM_C:
        ids = ids[_LLM_C_HEADER:]
    if len(ids) % 2 == 0 and ids[:BLOCK:2].any() and not ids[1:BLOCK:2].any():
        raise DataError(f"{file} holds uint32, not uint16 ids (every second is 0): {_CONVERSION}")
    hashed = f"{len(ids)} ".encode() + ids[:BLOCK].tobytes() + ids[-BLOCK:].tobytes()
    stream = TokenStream([Part(ids, str(file), tokenizer.vocab_size)], hashlib.sha256(hashed).hexdigest())
    stream.check_ids()
    return stream


def bin_tokenizer(file: Path, otherwise: Tokenizer | str) -> Tokenizer:
    """The tokenizer that the meta.json beside `file` names; without one, `otherwise` (or its name)."""
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
    """The tokenizer of a meta.json: {"stoi": {character: id}}, or {"tokenizer": name or path}."""
    try:
        if meta.stat().st_size > _MAX_META_BYTES:
            raise ValueError(f"it is over {_MAX_META_BYTES} bytes")
        content = json.loads(meta.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read {meta}: {' '.join(str(error).split())[:200]}") from None
    name, stoi = (
        (content.get("tokenizer"), content.get("stoi")) if isinstance(content, dict) else (None, None)
    )
    if isinstance(name, str):
        return build_tokenizer(name)
    if not isinstance(stoi, dict) or not stoi or not all(map(_is_character, stoi, stoi.values())):
        raise DataError(f'{meta} needs "stoi", the id of each character, or "tokenizer", a name or a path')
    characters = sorted(stoi)
    if [stoi[character] for character in characters] != list(range(len(characters))):
        raise DataError(f"{meta}: ids that do not follow the order of the characters are not supported")
    return char_tokenizer("".join(characters))


def _is_character(name: str, number: object) -> bool:
    return type(number) is int and len(name) == 1 and not "\ud800" <= name <= "\udfff"
