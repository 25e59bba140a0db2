"""From files to documents, from documents to token windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fusedgpt.model.tokenizer import Tokenizer
from fusedgpt.train.config import RunConfig
from fusedgpt.train.data.dataset import TokenDataset, build_dataset

TEXT_SUFFIXES = (".txt", ".md")


def read_documents(paths: Sequence[Path]) -> list[str]:
    """One document a file: each path itself, or the text files below it, in the order of their names.

    Raises FileNotFoundError for a missing path, ValueError for an empty folder or file, or text that is not
    UTF-8.
    """
    files = [file for path in paths for file in _text_files(path)]
    return [_read_text(file) for file in files]


def _text_files(path: Path) -> list[Path]:
    if path.is_dir():
        found = sorted(f for f in path.rglob("*") if f.suffix.lower() in TEXT_SUFFIXES and f.is_file())
        if not found:
            raise ValueError(f"{path} holds no {' or '.join(TEXT_SUFFIXES)} files")
        return found
    if not path.exists():
        raise FileNotFoundError(f"there is no file or folder {path}")
    return [path]


def _read_text(file: Path) -> str:
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{file} is not UTF-8 text (byte {error.start}); convert it first") from None
    if not text.strip():
        raise ValueError(f"{file} is empty")
    return text


def tokenise(documents: Sequence[str], tokenizer: Tokenizer, config: RunConfig) -> TokenDataset:
    """The dataset of `documents`. Raises ValueError where there is too little text for one window."""
    return build_dataset(
        tokenizer.encode_batch(documents),
        eot_id=tokenizer.eot_id,
        max_length=config.max_length,
        val_fraction=config.data.val_fraction,
        seed=config.train.seed,
    )
