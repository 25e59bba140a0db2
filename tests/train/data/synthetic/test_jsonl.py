"""JSONL files: cut lines, foreign files, two writers, what cannot be written."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fusedgpt.train.data.synthetic import jsonl
from fusedgpt.train.data.synthetic.jsonl import (
    JsonLines,
    read_objects,
    read_texts,
    text_of,
    write_objects,
)


def test_what_is_appended_is_there_again(tmp_path: Path) -> None:
    rows = [{"text": "a\nb"}, {"text": "\ud800 料理 \u2028"}, {"n": 1.5}]
    path = tmp_path / "new" / "a.jsonl"
    with JsonLines(path) as file:
        assert file.records == []
        file.append(rows[:2])
        file.append(rows[2:])
    with JsonLines(path) as file:
        assert file.records == rows
    assert path.read_bytes().count(b"\n") == 3
    assert list(read_objects(path)) == rows


@pytest.mark.parametrize("cut", range(1, 14))
def test_a_cut_last_line_is_mended(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"a": 1}\n' + b'{"text": "b"}\n'[:-cut])
    with JsonLines(path) as file:
        assert file.records == [{"a": 1}, {"text": "b"}][: 2 if cut == 1 else 1]
        file.append([{"c": 3}])
    assert list(read_objects(path))[-1] == {"c": 3}
    assert path.read_bytes().endswith(b'\n{"c": 3}\n')


BIG_NUMBER = '{"a": ' + "9" * 5000 + "}"


@pytest.mark.parametrize("line", ["5", "[1]", "{", "nonsense", '"text"', "[" * 100_000, BIG_NUMBER])
def test_a_line_that_is_no_object_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"a": 1}\n\n' + line + '\n{"b": 2}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 3: expected a JSON object"):
        JsonLines(path)
    assert path.read_text().count("\n") == 4
    with pytest.raises(ValueError, match="line 3"):  # and the lock is free again
        JsonLines(path)


def test_a_line_too_long_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jsonl, "_MAX_LINE_BYTES", 100)
    (tmp_path / "a").write_text('{"a": "' + "x" * 200 + '"}\n')
    with pytest.raises(ValueError, match="line 1: over 100 bytes"):
        list(read_objects(tmp_path / "a"))


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "a.jsonl"), pytest.raises(OSError, match="another process is writing"):
        JsonLines(tmp_path / "a.jsonl")
    JsonLines(tmp_path / "a.jsonl").close()


def test_links_and_folders_are_refused(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("precious")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "target")
    for name in ("link.jsonl", "."):
        with pytest.raises(OSError, match="cannot write"):
            JsonLines(tmp_path / name)
    assert (tmp_path / "target").read_text() == "precious"


def test_short_writes_are_completed_and_each_append_is_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, synced = os.write, []
    with JsonLines(tmp_path / "a.jsonl") as file:
        monkeypatch.setattr(jsonl.os, "write", lambda descriptor, data: write(descriptor, data[:3]))
        monkeypatch.setattr(jsonl.os, "fsync", synced.append)
        file.append([{"text": "abc"}])
        file.append([{"text": "def"}])
    assert [record["text"] for record in read_objects(tmp_path / "a.jsonl")] == ["abc", "def"]
    assert len(synced) == 2


def test_a_full_disk_costs_the_last_record_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if data.startswith(b'{"text": "def'):
            return write(descriptor, data[:5])
        if data.startswith(b't": "def'):
            raise OSError(28, "No space left on device")
        return write(descriptor, data)

    path = tmp_path / "a.jsonl"
    with JsonLines(path) as file, monkeypatch.context() as patch:
        patch.setattr(jsonl.os, "write", full)
        file.append([{"text": "abc"}])
        with pytest.raises(OSError, match="No space left"):
            file.append([{"text": "def"}])
    assert path.read_bytes() == b'{"text": "abc"}\n{"tex'
    with JsonLines(path) as file:
        assert file.records == [{"text": "abc"}]


@given(st.binary(max_size=200))
@settings(max_examples=200, deadline=None)
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.mktemp("any") / "a.jsonl"
    path.write_bytes(content)
    try:
        with JsonLines(path) as file:
            assert all(isinstance(record, dict) for record in file.records)
    except ValueError:
        assert path.read_bytes().startswith(content[: content.rfind(b"\n") + 1])


def test_text_of(tmp_path: Path) -> None:
    assert text_of({"text": "a", "b": 1}, tmp_path) == "a"
    for record in ({}, {"text": 5}, {"content": "a"}):
        with pytest.raises(ValueError, match='every line needs a "text"'):
            text_of(record, tmp_path)


def test_texts_are_read_and_a_line_without_one_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n\n{"text": "b", "n": 1}\n')
    assert read_texts(path) == ["a", "b"]
    path.write_text('{"text": "a"}\n\n{"txet": "b"}\n')
    with pytest.raises(ValueError, match=r"a.jsonl, line 3: .*this has only \['txet'\]"):
        read_texts(path)
    path.write_text("\n")
    with pytest.raises(ValueError, match=r"a.jsonl holds no texts"):
        read_texts(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot write .*file/a.jsonl: "):
        JsonLines(tmp_path / "file" / "a.jsonl")


def test_a_failed_replacement_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a"
    write_objects(path, [{"text": "old"}])

    def fail(_: int) -> None:
        raise OSError("no")

    monkeypatch.setattr(jsonl.os, "fsync", fail)
    with pytest.raises(OSError, match="no"):
        write_objects(path, [{"text": "new"}])
    assert path.read_text() == '{"text": "old"}\n'
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    write_objects(path, [{"text": "é"}])
    assert json.loads(path.read_text()) == {"text": "é"}
    assert path.stat().st_mode & 0o777 == 0o644
