"""Checkpoints: a run's resumable state on disk, which no kill, full disk or flipped bit may take away.

A checkpoint is a directory `step-00001000` of safetensors files, `state.json` and `manifest.json`, which has
the size and SHA-256 of each of them and of itself. It is written under a hidden name, synced, then renamed.
docs/reliability.md says what is tested and how.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import stat
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fusedgpt.model.files import sync

MANIFEST = "manifest.json"
STATE = "state.json"
_FORMAT = 1
_MAX_STEP = 10**8 - 1
_MAX_MANIFEST_BYTES = 1 << 16
_MAX_STATE_BYTES = 1 << 24
_STEP = re.compile(r"step-([0-9]{8})")
# What a save or removal leaves behind when it dies; "replaced" is a checkpoint whose step is saved again.
_TEMPORARY = re.compile(r"\.(saving|replaced|removing)-(step-[0-9]{8})")
_STEM = re.compile(r"[a-z0-9_]{1,50}")
_FILE = re.compile(r"[a-z0-9_]{1,50}\.safetensors|state\.json")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class CheckpointError(ValueError):
    """A directory that is no checkpoint, or one that is damaged."""


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """Where a run stands after `step` steps."""

    step: int
    tensors: dict[str, dict[str, Tensor]]  # by file stem ("model", "optimizer", "best"), then by name; CPU
    state: dict[str, Any]  # JSON: cursor, dropout, best loss, config ...


class CheckpointStore:
    """The checkpoints of one run, in `root`. Only the holder of the run's lock may save or remove."""

    def __init__(self, root: Path, *, keep_last: int) -> None:
        if keep_last < 1:
            raise ValueError(f"keep_last is {keep_last}; a run needs at least 1 checkpoint")
        self.root, self.keep_last = root, keep_last
        self._whole: dict[int, bool] = {}  # what was found out or written since this store was made
        # A future, for Thread.join of Python 3.11 takes a thread for finished when Ctrl-C interrupts it. The
        # interpreter finishes a save in flight before it exits.
        self._executor = futures.ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._saving: futures.Future[Path] | None = None

    def save(self, checkpoint: Checkpoint) -> Path:
        """Write it to disk, all or nothing; then remove all but the newest `keep_last` whole ones.

        Waits for the save in flight first, whose failure this newer one makes up for. Raises OSError where it
        cannot be written: what was there before is still there.
        """
        if self._saving is not None:
            futures.wait([self._saving])
        self._saving = None
        return self._save(checkpoint)

    def save_in_background(self, checkpoint: Checkpoint) -> None:
        """`save` in a thread; nobody may change the checkpoint until it is done.

        Waits for the save in flight first, and raises what that one failed with.
        """
        self.wait()
        self._saving = self._executor.submit(self._save, checkpoint)

    def wait(self) -> None:
        """Until the save in flight is done; raises what it failed with, once."""
        if self._saving is None:
            return
        futures.wait([self._saving])  # where Ctrl-C interrupts this, it stays the save in flight
        saving, self._saving = self._saving, None
        saving.result()

    def steps(self) -> list[int]:
        """The steps of which there is a checkpoint that looks complete, ascending; nothing is hashed."""
        found = self._checkpoints().items()
        return sorted(step for step, path in found if _is_directory(path) and (path / MANIFEST).is_file())

    def newest(self) -> tuple[Checkpoint | None, list[str]]:
        """The newest checkpoint that is whole, and one line for each newer one: why it was skipped."""
        skipped = []
        for step, path in sorted(self._checkpoints().items(), reverse=True):
            try:
                checkpoint = load_checkpoint(path)
            except CheckpointError as error:
                self._whole[step] = False
                skipped.append(str(error))
                continue
            self._whole[step] = True
            return checkpoint, skipped
        return None, skipped

    def remove_all(self) -> None:
        """Remove every checkpoint, whole or not, and what dead saves left; nothing else in `root`."""
        if self._saving is not None:
            futures.wait([self._saving])
        self._saving = None
        if not self.root.exists():
            return
        with _explained(f"cannot remove the checkpoints in {self.root}"):
            self._clean_up()
            for _, path in sorted(_named(self.root, _STEP).items()):
                if _is_directory(path):
                    self._remove(path)
            sync(self.root)
        self._whole.clear()

    def _checkpoints(self) -> dict[int, Path]:
        """By step, whatever has a checkpoint's name; a replaced one where its replacement is missing."""
        replaced = {
            int(path.name[-8:]): path for path in _leftovers(self.root) if path.name.startswith(".replaced")
        }
        return replaced | _named(self.root, _STEP)

    def _save(self, checkpoint: Checkpoint) -> Path:
        _check(checkpoint)
        target = self.root / f"step-{checkpoint.step:08d}"
        with _explained(f"cannot save {target}"):
            _make_directory(self.root)
            self._clean_up()  # before it is needed: the space
            try:
                self._publish(checkpoint, target)
            except BaseException:
                with suppress(OSError):
                    self._clean_up()
                raise
        self._whole[checkpoint.step] = True
        with _explained(f"saved {target}, but cannot remove older checkpoints"):
            self._clean_up()
            self._rotate(checkpoint.step)
        return target

    def _publish(self, checkpoint: Checkpoint, target: Path) -> None:
        """Write it under a temporary name and rename it, so that at any moment a whole one can be found."""
        saving, replaced = (target.with_name(f".{state}-{target.name}") for state in ("saving", "replaced"))
        _write_checkpoint(checkpoint, saving)
        if _is_directory(target):
            os.rename(target, replaced)
        os.rename(saving, target)
        sync(self.root)

    def _clean_up(self) -> None:
        """Remove what a dead save or removal left; put back a replaced checkpoint without a replacement."""
        leftovers = _leftovers(self.root)
        if leftovers:
            sync(self.root)  # nothing is deleted on the strength of a rename that a power cut could undo
        for path in leftovers:
            target = path.with_name(path.name[-len("step-00000000") :])
            if path.name.startswith(".replaced") and not target.exists():
                os.rename(path, target)
            else:
                shutil.rmtree(path)

    def _rotate(self, just_saved: int) -> None:
        """Remove what is older than the newest `keep_last` whole ones, damaged or not."""
        n_whole = 0
        for step, path in sorted(_named(self.root, _STEP).items(), reverse=True):
            if n_whole >= self.keep_last and step != just_saved and _is_directory(path):
                self._remove(path)
            elif self._is_whole(step, path):
                n_whole += 1

    def _is_whole(self, step: int, path: Path) -> bool:
        """Whether its hashes hold; looked up once, for that reads all of it."""
        if step not in self._whole:
            try:
                _verify(path)
                self._whole[step] = True
            except CheckpointError:
                self._whole[step] = False
        return self._whole[step]

    def _remove(self, path: Path) -> None:
        removing = path.with_name(f".removing-{path.name}")
        os.rename(path, removing)  # first, so that nothing half deleted has a checkpoint's name
        sync(self.root)
        shutil.rmtree(removing)


def load_checkpoint(folder: Path) -> Checkpoint:
    """The checkpoint in a directory; files that its manifest does not name are not read.

    Raises CheckpointError where one that it names is missing or differs in a single bit.
    """
    manifest = _verify(folder)
    tensors = {
        Path(name).stem: _read_tensors(folder / name) for name in sorted(manifest["files"]) if name != STATE
    }
    state = _read_json(folder / STATE, _MAX_STATE_BYTES)
    return Checkpoint(step=manifest["step"], tensors=tensors, state=state)


def check_space(root: Path, n_bytes: int) -> None:
    """Raises OSError where there is no room for `n_bytes` on the disk that holds, or will hold, `root`."""
    existing = next(path for path in (root, *root.absolute().parents) if path.is_dir())
    # What a dead save or removal left goes before the next save.
    dead = [path for path in _leftovers(root) if not path.name.startswith(".replaced")]
    free = shutil.disk_usage(existing).free + sum(f.lstat().st_size for path in dead for f in path.iterdir())
    if free < n_bytes:
        raise OSError(
            f"{root} has {free:,} bytes free and needs {n_bytes:,}; "
            "free some space or choose another --run-dir"
        )


@contextmanager
def run_lock(run_dir: Path) -> Iterator[None]:
    """Keeps every other trainer out of `run_dir`; however the process ends, the kernel drops the lock.

    Raises ValueError naming the process that holds it, OSError where no lock can be had.
    """
    # The holder has a file of its own, because older versions of filelock truncate the lock's while they try.
    holder = run_dir / "trainer.json"
    lock = FileLock(run_dir / "trainer.lock", timeout=0)
    with _explained(f"cannot lock {run_dir}"):
        _make_directory(run_dir)
        try:
            lock.acquire()
        except Timeout:
            raise ValueError(
                f"{run_dir} is in use by {_describe_holder(holder)}; end that or choose another --run-dir"
            ) from None
        except NotImplementedError:
            raise OSError(errno.ENOSYS, "its file system has no locks") from None
    try:
        with _explained(f"cannot lock {run_dir}"):
            holder.write_bytes(_encode({"host": socket.gethostname(), "pid": os.getpid()}))
        yield
    finally:
        with suppress(OSError):
            holder.unlink()
        lock.release()


def _describe_holder(path: Path) -> str:
    try:
        holder = _read_json(path, _MAX_MANIFEST_BYTES)
        return f"process {int(holder['pid'])} on {str(holder['host'])!a}"
    except (ValueError, KeyError, TypeError):
        return "another process"


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """An OSError becomes one line that says what was being done, why that failed and what to do."""
    try:
        yield
    except OSError as error:
        remedy = "free some space" if error.errno in _OUT_OF_SPACE else "check the disk and its permissions"
        raise OSError(f"{what}: {error.strerror or error}; {remedy} or choose another --run-dir") from None


def _check(checkpoint: Checkpoint) -> None:
    """Raises ValueError for what could be written but not read back."""
    if not 0 <= checkpoint.step <= _MAX_STEP:
        raise ValueError(f"step {checkpoint.step} is not in 0..{_MAX_STEP}")
    for stem, tensors in checkpoint.tensors.items():
        if not _STEM.fullmatch(stem):
            raise ValueError(f"{stem!r} cannot be a file stem: lower-case letters, digits and _ only")
        if "__metadata__" in tensors:
            raise ValueError(f"{stem}: safetensors reserves the name __metadata__")


def _write_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """All files of a checkpoint into a new directory, synced. The state first, for it may be no JSON."""
    state = _encode(checkpoint.state)
    if len(state) > _MAX_STATE_BYTES:
        raise ValueError(f"the state has {len(state):,} bytes as JSON, over {_MAX_STATE_BYTES:,}")
    os.mkdir(folder, 0o700)
    for stem, tensors in checkpoint.tensors.items():
        _write_tensors(folder / f"{stem}.safetensors", tensors)
    (folder / STATE).write_bytes(state)
    files = {path.name: _hash_and_sync(path) for path in sorted(folder.iterdir())}
    manifest = {"files": files, "format": _FORMAT, "step": checkpoint.step}
    (folder / MANIFEST).write_bytes(_encode(manifest | {"sha256": _seal(manifest)}))
    sync(folder / MANIFEST)
    sync(folder)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    try:
        save_file({k: v.contiguous() for k, v in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        code = int(number[1]) if number else errno.EIO
        raise OSError(code, os.strerror(code) if number else str(error)) from None


def _hash_and_sync(path: Path) -> dict[str, Any]:
    """The manifest's entry of a file; hashed while the page cache still has it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
        return {"sha256": _sha256(file), "size": os.fstat(file.fileno()).st_size}


def _sha256(file: BufferedReader) -> str:
    return hashlib.file_digest(file, "sha256").hexdigest()  # in chunks, without the GIL


def _seal(manifest: dict[str, Any]) -> str:
    """The SHA-256 of a manifest, computed without it."""
    return hashlib.sha256(_encode(manifest)).hexdigest()


def _encode(content: dict[str, Any]) -> bytes:
    """JSON in one fixed form. ASCII, since a path in a config may hold what UTF-8 has no code for."""
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode("ascii")


def _verify(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint all of whose files are what it says. Raises CheckpointError."""
    try:
        if not _is_directory(folder):
            raise CheckpointError(f"{folder} is no directory")
        manifest = _read_manifest(folder)
        for name, entry in manifest["files"].items():  # sizes first, for they cost nothing
            size = (folder / name).lstat().st_size
            if size != entry["size"]:
                raise CheckpointError(f"{folder / name} is damaged: {size} bytes instead of {entry['size']}")
        for name, entry in manifest["files"].items():
            with _open(folder / name) as file:
                if _sha256(file) != entry["sha256"]:
                    raise CheckpointError(f"{folder / name} is damaged: its SHA-256 is not the manifest's")
    except OSError as error:
        raise CheckpointError(f"{error.filename or folder} cannot be read: {error.strerror}") from None
    return manifest


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    manifest = _read_json(path, _MAX_MANIFEST_BYTES)
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    if manifest.get("sha256") != _seal(content):
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one it holds")
    if manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path} has format {manifest.get('format')!r}, this version reads {_FORMAT}")
    files, step = manifest.get("files"), manifest.get("step")
    if type(step) is not int or not 0 <= step <= _MAX_STEP:
        raise CheckpointError(f"{path}: step is {step!r}, not an integer in 0..{_MAX_STEP}")
    if not isinstance(files, dict) or STATE not in files:
        raise CheckpointError(f"{path} names no {STATE}")
    for name, entry in files.items():
        if not _FILE.fullmatch(name) or not _is_entry(entry):
            raise CheckpointError(f"{path}: {name!a}: {entry!a} is no entry of a checkpoint's file")
    named = re.search(r"step-([0-9]{8})$", folder.name)
    if named and int(named[1]) != step:
        raise CheckpointError(f"{folder} is damaged: its manifest is that of step {step}")
    return manifest


def _is_entry(entry: object) -> bool:
    return (
        isinstance(entry, dict)
        and entry.keys() == {"sha256", "size"}
        and type(entry["size"]) is int
        and isinstance(entry["sha256"], str)
        and _SHA256.fullmatch(entry["sha256"]) is not None
    )


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
    """A safetensors file's tensors, copied, so that they outlive the file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged: {error}") from None


def _open(path: Path) -> BufferedReader:
    """A regular file for reading; no link is followed."""
    if not stat.S_ISREG(path.lstat().st_mode):
        raise CheckpointError(f"{path} is no regular file")
    return open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb")


def _is_directory(path: Path) -> bool:
    """Whether it is a directory itself, and not a link to one."""
    return path.is_dir() and not path.is_symlink()


def _make_directory(path: Path) -> None:
    if not path.is_dir():
        path.mkdir(parents=True, mode=0o700)
        sync(path.parent)


def _named(root: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """By step, what in `root` has a name that matches in full, of whatever kind it is."""
    names = os.listdir(root) if root.is_dir() else []
    return {int(name[-8:]): root / name for name in names if pattern.fullmatch(name)}


def _leftovers(root: Path) -> list[Path]:
    """The directories that dead saves and removals left in `root`."""
    names = sorted(os.listdir(root)) if root.is_dir() else []
    return [root / name for name in names if _TEMPORARY.fullmatch(name) and _is_directory(root / name)]
