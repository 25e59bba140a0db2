"""Files and folders are there as a whole or not at all."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest

from fusedgpt.model.files import beside, publish, sync, to_json, write_file


def fail_at(n: int) -> Callable[[int], None]:
    """An fsync that fails the nth time."""
    calls = 0

    def fsync(_: int) -> None:
        nonlocal calls
        calls += 1
        if calls == n:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    return fsync


def content(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize("data", ["naïve", "naïve".encode()])
def test_a_file_is_written_and_replaced(tmp_path: Path, data: str | bytes) -> None:
    write_file(tmp_path / "a", "old")
    write_file(tmp_path / "a", data)
    assert content(tmp_path) == {"a": "naïve"}
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o644


def test_a_file_in_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_file(Path("a"), "text")
    assert content(tmp_path) == {"a": "text"}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_file(tmp_path / "a", "old")
    monkeypatch.setattr(os, "fsync", fail_at(1))
    with pytest.raises(OSError, match="Input/output error"):
        write_file(tmp_path / "a", "new")
    assert content(tmp_path) == {"a": "old"}
    assert len(list(tmp_path.iterdir())) == 1


def make(folder: Path) -> None:
    with beside(folder) as temporary:
        temporary.mkdir()
        (temporary / "1").write_text("one")
        (temporary / "2").write_text("two")
        publish(temporary, folder)


def test_a_folder_appears_as_a_whole(tmp_path: Path) -> None:
    (tmp_path / "f").mkdir()  # an empty one is replaced
    make(tmp_path / "f")
    assert content(tmp_path) == {"f/1": "one", "f/2": "two"}


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_a_folder_whose_sync_fails_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, n: int
) -> None:
    """Two files, the folder, and the one that it is in."""
    monkeypatch.setattr(os, "fsync", fail_at(n))
    with pytest.raises(OSError, match="Input/output error"):
        make(tmp_path / "f")
    assert list(tmp_path.iterdir()) == []


def test_nothing_of_a_folder_is_overwritten(tmp_path: Path) -> None:
    make(tmp_path / "f")
    (tmp_path / "f" / "1").write_text("mine")
    with pytest.raises(OSError, match="not empty"):
        make(tmp_path / "f")
    assert content(tmp_path) == {"f/1": "mine", "f/2": "two"}


def refuse_folders(descriptor: int) -> None:
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))


def test_where_folders_cannot_be_synced_they_are_written_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", refuse_folders)
    make(tmp_path / "f")
    assert content(tmp_path) == {"f/1": "one", "f/2": "two"}


@pytest.mark.parametrize(
    ("code", "calls"), [(0, ["full"]), (errno.ENOTSUP, ["full", "fsync"]), (errno.EIO, ["full"])]
)
def test_macos_syncs_through_the_cache_of_the_drive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, calls: list[str]
) -> None:
    called: list[str] = []

    def control(_: int, command: int) -> None:
        called.append("full")
        assert command == 51
        if code:
            raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", control)
    monkeypatch.setattr(os, "fsync", lambda _: called.append("fsync"))
    with pytest.raises(OSError, match="Input/output") if code == errno.EIO else nullcontext():
        sync(tmp_path)
    assert called == calls


def test_json_has_no_nan() -> None:
    value = {"a": [math.nan, 1.5, (math.inf, "é")], "b": {"c": -math.inf}, "d": 2}
    assert json.loads(to_json(value)) == {"a": [None, 1.5, [None, "é"]], "b": {"c": None}, "d": 2}
    assert to_json(["é"], ensure_ascii=False) == '["é"]'


def test_it_does_without_torch() -> None:
    code = "import sys, fusedgpt.model.files; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
