"""Files to documents."""

from __future__ import annotations

from pathlib import Path

import pytest

from fusedgpt.model.tokenizer import byte_tokenizer
from fusedgpt.train.config import build_config
from fusedgpt.train.data.prepare import read_documents, tokenise


def test_reads_files_and_folders_in_order(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name, text in {"b.txt": "B", "a.TXT": "A", "sub/c.md": "C", "d.bin": "D", "e.csv": "E"}.items():
        (tmp_path / name).write_text(text)
    assert read_documents([tmp_path]) == ["A", "B", "C"]
    assert read_documents([tmp_path / "e.csv", tmp_path / "sub"]) == ["E", "C"]  # a file named is read


def test_text_is_read_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("\ufeffé\r\nx\n".encode())
    assert read_documents([tmp_path / "a.txt"]) == ["é\r\nx\n"]  # but for the byte order mark


def test_unusable_text_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no file or folder .*absent"):
        read_documents([tmp_path / "absent"])
    with pytest.raises(ValueError, match=r"holds no .txt or .md files"):
        read_documents([tmp_path])
    (tmp_path / "a.txt").write_text(" \n")
    with pytest.raises(ValueError, match=r"a\.txt is empty"):
        read_documents([tmp_path])
    (tmp_path / "a.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"a\.txt is not UTF-8 text \(byte 3\)"):
        read_documents([tmp_path])


def test_tokenise_ends_every_document() -> None:
    config = build_config({"block_size": 4, "val_fraction": 0.0})
    dataset = tokenise(["ab", "c"], byte_tokenizer(), config)
    assert dataset.train.tolist() == [97, 98, 256, 99, 256]
    assert dataset.max_length == 4
