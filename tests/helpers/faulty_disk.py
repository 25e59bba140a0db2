"""A disk on which some operation fails, for tests in one process."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch

from fusedgpt.train.run import checkpoint

_OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir")


class Crash(BaseException):
    """The process is no more: nothing that it would do next is done."""


class FaultyDisk:
    """Counts what is done to the disk below `root` and lets the nth of it fail.

    once: it raises an I/O error. full: from it on, all that needs space does. kill: nothing happens any more.
    power: as kill, and what was not synced is lost: renames, the content of files, names in directories.
    A write that fails has written half.
    """

    MODES = ("once", "full", "kill", "power")

    def __init__(self, root: Path, mode: str, n: int) -> None:
        self.root, self.mode, self.n, self.count = root, mode, n, 0
        self.unsynced: set[int] = set()  # inodes
        self.renames: list[tuple[Path, Path]] = []
        self.real = {name: getattr(os, name) for name in _OPERATIONS}
        self.real |= {"save_file": safetensors.torch.save_file, "write_bytes": Path.write_bytes}

    @property
    def failed(self) -> bool:
        return self.count >= self.n

    def install(self, patch: pytest.MonkeyPatch) -> None:
        for name in _OPERATIONS:
            patch.setattr(os, name, self._operation(name))
        patch.setattr(os, "fsync", self._fsync)
        patch.setattr(checkpoint, "save_file", self._writing("save_file", path_at=1))
        patch.setattr(Path, "write_bytes", self._writing("write_bytes", path_at=0))

    def _step(self, needs_space: bool) -> None:
        self.count += 1
        if self.count < self.n:
            return
        if self.mode == "once" and self.count == self.n:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        if self.mode == "full" and needs_space:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if self.mode in ("kill", "power"):
            if self.mode == "power" and self.count == self.n:
                self.lose_power()
            raise Crash

    def _operation(self, name: str) -> Callable[..., None]:
        def operation(*args: Any, **options: Any) -> None:
            self._step(needs_space=name == "mkdir")
            self.real[name](*args, **options)
            if name == "rename":
                self.renames.append((Path(args[0]), Path(args[1])))

        return operation

    def _writing(self, name: str, path_at: int) -> Callable[..., Any]:
        def write(*args: Any, **options: Any) -> None:
            path = Path(args[path_at])
            alive = not self.failed
            if alive:
                self.real[name](*args, **options)
                self.unsynced |= {path.stat().st_ino, path.parent.stat().st_ino}
            try:
                self._step(needs_space=True)
            except BaseException:
                if alive and path.exists():
                    os.truncate(path, path.stat().st_size // 2)
                raise
            if not alive:
                self.real[name](*args, **options)

        return write

    def _fsync(self, descriptor: int) -> None:
        self._step(needs_space=True)
        inode = os.fstat(descriptor).st_ino
        self.unsynced.discard(inode)
        if inode == self.root.stat().st_ino:
            self.renames.clear()

    def lose_power(self) -> None:
        for source, target in reversed(self.renames):
            if target.exists() and not source.exists():
                self.real["rename"](target, source)
        for path in sorted(self.root.rglob("*")):
            if path.stat().st_ino in self.unsynced and path.is_file():
                os.truncate(path, 0)
        for folder in [path for path in self.root.iterdir() if path.stat().st_ino in self.unsynced]:
            for path in folder.iterdir() if folder.is_dir() else ():
                self.real["unlink"](path)
