"""Checkpoints: a run's resumable state on disk, which survives kills, full disks and flipped bits.

A checkpoint is a directory `step-00001000` of safetensors files, `state.json` and `manifest.json`, which has
the size and SHA-256 of each file and of itself. It is written under a hidden name, synced, then renamed.
docs/dev/fault_tests.md says what is tested and how.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, StringConstraints, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusedgpt.kernels.errors import InputError
from fusedgpt.model.files import sync, sync_all

MANIFEST = "manifest.json"
STATE = "state.json"
_FORMAT = 2
_MAX_STEP = 10**8 - 1
_MAX_MANIFEST_BYTES, _MAX_STATE_BYTES = 1 << 16, 1 << 24
_STEP = re.compile(r"step-([0-9]{8})")
# What a killed save or removal leaves behind; "replaced" is a checkpoint whose step is saved again.
_TEMPORARY = re.compile(r"\.(saving|replaced|removing)-(step-[0-9]{8})")
_STEM = re.compile(r"[a-z0-9_]{1,50}")
_FILE = r"^([a-z0-9_]{1,50}\.safetensors|state\.json)$"
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(InputError):
    """A directory that is not a checkpoint, or a damaged one."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a run stands after `step` steps."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by file stem ("model", "optimizer", "best"), then by name; CPU
    state: dict[str, Any]  # JSON: cursor, dropout, best loss, config ...


class _FileEntry(BaseModel, frozen=True, strict=True, extra="forbid"):
    size: int
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class _Manifest(BaseModel, frozen=True, strict=True):
    step: int = Field(ge=0, le=_MAX_STEP)
    files: dict[Annotated[str, StringConstraints(pattern=_FILE)], _FileEntry]


class CheckpointStore:
    """The checkpoints of one run, in `root`. Only the holder of the run's lock may save or remove."""

    def __init__(self, root: Path, *, keep_last: int) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; a run needs at least 1 checkpoint")
        self.root, self.keep_last = root, keep_last
        self._whole: dict[int, bool] = {}  # by step: verified or written since this store was made
        # A future, since Thread.join of Python 3.11 believes a thread finished when Ctrl-C interrupts it. The
        # interpreter finishes a save in flight before it exits.
        self._executor = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: futures.Future[Path] | None = None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write it to disk, all or nothing; then remove all but the newest `keep_last` undamaged ones.

        Raises OSError if it cannot be written: what was there before is still there.
        """
        target = self.root / f"step-{checkpoint.step:08d}"
        saving, replaced = (target.with_name(f".{state}-{target.name}") for state in ("saving", "replaced"))
        with explained(f"cannot save {target}"):
            make_directory(self.root)
            self._clean_up()  # first, for its space
            try:  # at any moment a whole one can be found
                _write_checkpoint(checkpoint, saving)
                if _is_directory(target):
                    os.rename(target, replaced)
                os.rename(saving, target)
                sync(self.root)
            except BaseException:
                with suppress(OSError):
                    self._clean_up()
                raise
        self._whole[checkpoint.step] = True
        with explained(f"saved {target}, but cannot remove older checkpoints"):
            self._clean_up()
            self._rotate(checkpoint.step)
        return target

    def save_in_background(self, checkpoint: Checkpoint) -> None:
        """`save` in a thread; the caller must not change the checkpoint, nor the store, until it is done.

        Waits for the save in flight first and raises its error.
        """
        self.wait()
        self._saving = self._executor.submit(self.save, checkpoint)

    def wait(self) -> bool:
        """Wait for the save in flight and raise its error, once. Returns whether there was one."""
        if self._saving is None:
            return False
        futures.wait([self._saving])  # if Ctrl-C interrupts this, it stays the save in flight
        saving, self._saving = self._saving, None
        saving.result()
        return True

    def is_idle(self) -> bool:
        """Whether `wait` would not wait."""
        return self._saving is None or self._saving.done()

    def steps(self) -> list[int]:
        """The steps with a checkpoint that looks complete, ascending; nothing is hashed."""
        found = self._checkpoints().items()
        return sorted(step for step, path in found if _is_directory(path) and (path / MANIFEST).is_file())

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest undamaged checkpoint, and for each newer one a line that says why it was skipped."""
        skipped: list[str] = []
        for step, path in sorted(self._checkpoints().items(), reverse=True):
            try:
                checkpoint = load_checkpoint(path)
                self._whole[step] = True
                return checkpoint, skipped
            except CheckpointError as error:
                self._whole[step] = False
                skipped.append(str(error))
        return None, skipped

    def steps_after(self, step: int) -> list[int]:
        """Those of later checkpoints, damaged or not, ascending."""
        return sorted(s for s, path in self._checkpoints().items() if s > step and _is_directory(path))

    def move_after(self, step: int, folder: Path) -> None:
        """Move the checkpoints after `step` into a new `folder` on the same disk, the newest last."""
        with explained(f"cannot move the checkpoints after step {step} to {folder}"):
            self._clean_up()
            make_directory(folder)
            for later in self.steps_after(step):
                name = f"step-{later:08d}"
                os.rename(self.root / name, folder / name)
            sync(folder)
            sync(self.root)

    def further_bytes(self, checkpoint_bytes: int) -> int:
        """What saves will need beyond what the checkpoints have now, if each has this size.

        While one is saved the `keep_last` before it are still there; the first thing a save does is to remove
        what killed saves left.
        """
        kept = _n_bytes(filter(_is_directory, self._checkpoints().values()))
        dead = _n_bytes(path for path in _leftovers(self.root) if not path.name.startswith(".replaced"))
        return max(checkpoint_bytes, (self.keep_last + 1) * checkpoint_bytes - kept) - dead

    def remove_all(self) -> None:
        """Remove every checkpoint, damaged or not, and what killed saves left; nothing else in `root`."""
        if not self.root.exists():
            return
        with explained(f"cannot remove the checkpoints in {self.root}"):
            self._clean_up()
            for path in filter(_is_directory, _matching(self.root, _STEP)):
                self._remove(path)
            sync(self.root)
        self._whole.clear()

    def _checkpoints(self) -> dict[int, Path]:
        """By step, what has a checkpoint's name; a replaced one where its replacement is missing."""
        replaced = [path for path in _leftovers(self.root) if path.name.startswith(".replaced")]
        return {_step(path): path for path in (*replaced, *_matching(self.root, _STEP))}

    def _clean_up(self) -> None:
        """Remove what a killed save or removal left; put back a replaced checkpoint without replacement."""
        leftovers = _leftovers(self.root)
        if leftovers:
            sync(self.root)  # else a power cut could undo the renames that made these superfluous
        for path in leftovers:
            target = path.with_name(path.name[-len("step-00000000") :])
            if path.name.startswith(".replaced") and not target.exists():
                os.rename(path, target)
            else:
                shutil.rmtree(path)

    def _rotate(self, just_saved: int) -> None:
        """Remove what is older than the newest `keep_last` undamaged checkpoints."""
        n_whole = 0
        for path in reversed(_matching(self.root, _STEP)):
            if n_whole >= self.keep_last and _step(path) != just_saved and _is_directory(path):
                self._remove(path)
            elif self._is_whole(_step(path), path):
                n_whole += 1

    def _is_whole(self, step: int, path: Path) -> bool:
        """Whether its hashes match; computed once, since that reads every file."""
        if step not in self._whole:
            self._whole[step] = False
            with suppress(CheckpointError):
                _verify(path)
                self._whole[step] = True
        return self._whole[step]

    def _remove(self, path: Path) -> None:
        removing = path.with_name(f".removing-{path.name}")
        os.rename(path, removing)  # first: nothing half deleted may have a checkpoint's name
        sync(self.root)
        shutil.rmtree(removing)


def load_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a directory; files that its manifest does not list are not read.

    Raises CheckpointError if a listed file is missing or differs in a single bit.
    """
    manifest = _verify(folder)
    files = [folder / name for name in sorted(manifest.files) if name != STATE]
    return Checkpoint(
        step=manifest.step,
        tensors={path.stem: _read_tensors(path) for path in files},
        state=_read_json(folder / STATE, _MAX_STATE_BYTES),
    )


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an OSError into one line: what was being done, why it failed, what to do."""
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in _OUT_OF_SPACE else "check the disk and its permissions"
        raise OSError(f"{what}: {error.strerror or error}; {remedy} or choose another --run-dir") from None


def _write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write a checkpoint into a new directory, synced. Raises ValueError for what could not be loaded."""
    if not 0 <= checkpoint.step <= _MAX_STEP:
        raise ValueError(f"step {checkpoint.step} is not in 0..{_MAX_STEP}")
    for stem, tensors in checkpoint.tensors.items():
        if not _STEM.fullmatch(stem):
            raise ValueError(f"{stem!r} cannot be a file stem: lower-case letters, digits and _ only")
        if "__metadata__" in tensors:
            raise ValueError(f"{stem}: safetensors reserves the name __metadata__")
    state = _encode(checkpoint.state)
    if len(state) > _MAX_STATE_BYTES:
        raise ValueError(f"the state has {len(state):,} bytes as JSON, over {_MAX_STATE_BYTES:,}")
    os.mkdir(folder, 0o700)
    try:
        for stem, tensors in checkpoint.tensors.items():
            values = {name: tensor.contiguous() for name, tensor in tensors.items()}
            save_file(values, folder / f"{stem}.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error)) from None
    (folder / STATE).write_bytes(state)
    files = {path.name: _file_entry(path) for path in sorted(folder.iterdir())}
    manifest = {"files": files, "format": _FORMAT, "step": checkpoint.step}
    (folder / MANIFEST).write_bytes(_encode(manifest | {"sha256": _seal(manifest)}))
    sync_all(folder)


def _file_entry(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:  # file_digest reads in chunks and releases the GIL
        return {"sha256": hashlib.file_digest(file, "sha256").hexdigest(), "size": path.stat().st_size}


def _seal(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(_encode(manifest)).hexdigest()


def _encode(content: dict[str, Any]) -> bytes:
    """JSON in one fixed form. ASCII, since a path may hold lone surrogates, which UTF-8 cannot encode."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("ascii")


def _verify(folder: Path) -> _Manifest:
    """The manifest of a checkpoint whose files match it. Raises CheckpointError."""
    try:
        if not _is_directory(folder):
            raise CheckpointError(f"{folder} is no directory")
        manifest = _read_manifest(folder)
        for name, entry in manifest.files.items():  # sizes first, as they cost nothing
            size = (folder / name).lstat().st_size
            if size != entry.size:
                raise CheckpointError(f"{folder / name} is damaged: {size} bytes instead of {entry.size}")
        for name, entry in manifest.files.items():
            with _open(folder / name) as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            if digest != entry.sha256:
                raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    return manifest


def _read_manifest(folder: Path) -> _Manifest:
    path = folder / MANIFEST
    content = _read_json(path, _MAX_MANIFEST_BYTES)
    if content.pop("sha256", None) != _seal(content):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one it holds")
    if content.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {content.get('format')!r}, this version reads {_FORMAT}")
    try:
        manifest = _Manifest.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise CheckpointError(f"{path}: {'.'.join(map(str, first['loc']))!a}: {first['msg']}") from None
    if STATE not in manifest.files:
        raise CheckpointError(f"{path} lists no {STATE}")
    named = re.search(r"step-([0-9]{8})$", folder.name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{folder} is damaged: its manifest is that of step {manifest.step}")
    return manifest


def _read_json(path: Path, max_bytes: int) -> dict[str, Any]:
    """The JSON object in a file. Raises CheckpointError."""
    try:
        with _open(path) as file:
            raw = file.read(max_bytes + 1)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
    if len(raw) > max_bytes:
        raise CheckpointError(f"{path} has over {max_bytes:,} bytes")
    try:
        content = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} is not a JSON object")
    return content


def _read_tensors(path: Path) -> dict[str, Tensor]:
    """A safetensors file's tensors, copied so that they outlive the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _open(path: Path) -> BufferedReader:
    """Open a regular file for reading; links are not followed."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointError(f"{path} is no regular file")
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def _is_directory(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def make_directory(path: Path) -> None:
    """Make it and its parents, for this user alone."""
    if not path.is_dir():
        path.mkdir(parents=True, mode=0o700)
        sync(path.parent)


def _n_bytes(folders: Iterable[Path]) -> int:
    return sum(file.lstat().st_size for folder in folders for file in folder.iterdir())


def _step(path: Path) -> int:
    return int(path.name[-8:])


def _matching(root: Path, pattern: re.Pattern[str]) -> list[Path]:
    """The entries of `root` whose full name matches, of whatever kind they are, sorted."""
    names = sorted(os.listdir(root)) if root.is_dir() else []
    return [root / name for name in names if pattern.fullmatch(name)]


def _leftovers(root: Path) -> list[Path]:
    """The directories that killed saves and removals left in `root`."""
    return [path for path in _matching(root, _TEMPORARY) if _is_directory(path)]
