"""Checkpoints under kills, failing disks, damage and rivals: what is on disk is whole or refused.

The rows of docs/dev/fault_tests.md's table are named at each part. The small counts run always, the full ones
with `-m soak`.
"""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_faults import is_made, made
from faulty_disk import Crash, FaultyDisk
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fusedgpt.train.run import checkpoint as checkpoints
from fusedgpt.train.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    CheckpointStore,
    load_checkpoint,
)
from fusedgpt.train.run.lock import run_lock

FAULTS = Path(__file__).parents[2] / "helpers" / "checkpoint_faults.py"
TINY = 8  # numbers a tensor, so that a damaged bit is often one that matters


def faults(*arguments: object, prefix: tuple[str, ...] = ()) -> dict[str, Any]:
    """What a mode of checkpoint_faults.py reports."""
    command = [*prefix, sys.executable, *map(str, (FAULTS, *arguments))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


def filled(root: Path, *steps: int, keep_last: int = 9, size: int = TINY) -> CheckpointStore:
    """A store with a checkpoint of each of these steps."""
    store = CheckpointStore(root, keep_last=keep_last)
    for step in steps:
        store.save(made(step, size=size))
    return store


def names(root: Path) -> list[str]:
    return sorted(os.listdir(root))


# --- what a save makes ---


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path / "run" / "checkpoints", keep_last=2)
    assert store.newest() == (None, [])
    path = store.save(made(1000))
    assert path == tmp_path / "run" / "checkpoints" / "step-00001000"
    assert names(path) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    assert is_made(load_checkpoint(path))
    found, skipped = store.newest()
    assert found is not None
    assert is_made(found)
    assert skipped == []
    assert path.stat().st_mode & 0o777 == path.parent.stat().st_mode & 0o777 == 0o700


def bits(tensor: torch.Tensor) -> tuple[torch.dtype, tuple[int, ...], bytes]:
    flat = tensor.reshape(-1).contiguous()
    return tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes()


@st.composite
def any_tensor(draw: st.DrawFn) -> torch.Tensor:
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64]))
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    n_bytes = torch.Size(shape).numel() * dtype.itemsize
    raw = draw(st.binary(min_size=n_bytes, max_size=n_bytes))  # every bit pattern, NaNs too
    flat = torch.tensor(list(raw), dtype=torch.uint8).view(dtype) if raw else torch.zeros(0, dtype=dtype)
    return flat.reshape(shape)


_STEMS = st.from_regex(r"[a-z0-9_]{1,20}", fullmatch=True)
_TENSORS = st.dictionaries(st.text(max_size=20).filter(lambda name: name != "__metadata__"), any_tensor())
_LEAVES = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text()
_JSON = st.recursive(_LEAVES, lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(), x, max_size=3))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    step=st.integers(0, 99_999_999),
    tensors=st.dictionaries(_STEMS, _TENSORS, max_size=3),
    state=st.dictionaries(st.text(), _JSON, max_size=4),
)
def test_any_checkpoint_comes_back(
    tmp_path: Path, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]
) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    store.remove_all()
    store.save(Checkpoint(step=step, tensors=tensors, state=state))
    found = store.newest()[0]
    assert found is not None
    assert found.step == step
    assert found.state == state
    assert {k: {n: bits(t) for n, t in v.items()} for k, v in found.tensors.items()} == {
        k: {n: bits(t) for n, t in v.items()} for k, v in tensors.items()
    }


def test_a_path_that_is_no_utf8_and_a_loss_that_is_no_number_come_back(tmp_path: Path) -> None:
    state = {"data": os.fsdecode(b"/data/\xff.txt"), "best": float("inf")}
    store = CheckpointStore(tmp_path, keep_last=1)
    assert load_checkpoint(store.save(Checkpoint(step=1, tensors={}, state=state))).state == state


def test_loaded_tensors_outlive_their_files(tmp_path: Path) -> None:
    loaded = load_checkpoint(filled(tmp_path, 1).root / "step-00000001")
    for path in tmp_path.glob("*/*.safetensors"):
        path.write_bytes(b"\xff" * path.stat().st_size)  # in place: a mapped file would show through
    assert is_made(loaded, size=TINY)


@pytest.mark.parametrize(
    ("step", "tensors", "state", "message"),
    [
        (-1, {}, {}, "step -1 is not in 0"),
        (10**8, {}, {}, "step 100000000 is not in 0"),
        (1, {"../model": {}}, {}, "cannot be a file stem"),
        (1, {"": {}}, {}, "cannot be a file stem"),
        (1, {"model": {"__metadata__": torch.zeros(1)}}, {}, "reserves the name"),
        (1, {}, {"text": "x" * (1 << 24)}, "the state has 16,"),
    ],
)
def test_what_could_not_be_read_back_is_not_written(
    tmp_path: Path, step: int, tensors: dict[str, Any], state: dict[str, Any], message: str
) -> None:
    store = filled(tmp_path, 7)
    with pytest.raises(ValueError, match=message):
        store.save(Checkpoint(step=step, tensors=tensors, state=state))
    assert names(tmp_path) == ["step-00000007"]


def test_shared_tensors_are_refused_and_leave_nothing(tmp_path: Path) -> None:
    x = torch.zeros(4)
    with pytest.raises(RuntimeError, match="share memory"):
        filled(tmp_path).save(Checkpoint(step=1, tensors={"model": {"a": x, "b": x}}, state={}))
    assert names(tmp_path) == []


# --- rotation ---


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for keep_last in (3, 1):
        store = filled(tmp_path, *range(1, 6), keep_last=keep_last)
        assert store.steps() == list(range(6 - keep_last, 6))
    with pytest.raises(ValueError, match="keep_last is 0; a run needs at least 1"):
        CheckpointStore(tmp_path, keep_last=0)


@pytest.mark.parametrize("fresh", [False, True], ids=["same process", "new process"])
def test_damaged_ones_do_not_count_as_kept(tmp_path: Path, fresh: bool) -> None:
    """1 is good, 2 and 3 are damaged but of the right size: after saving 4, keeping 2 means 1 and 4."""
    store = filled(tmp_path, 1, 2, 3, keep_last=3)
    for step in (2, 3):
        flip(tmp_path / f"step-{step:08d}" / "model.safetensors", 700)
    store = CheckpointStore(tmp_path, keep_last=2)
    if not fresh:
        assert len(store.newest()[1]) == 2
    store.save(made(4, size=TINY))
    assert {1, 4} <= set(store.steps())
    store.save(made(5, size=TINY))
    assert store.steps() == [4, 5]


def test_what_was_just_saved_is_kept_though_later_steps_are_there(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2, 8, 9, keep_last=9)
    store = CheckpointStore(tmp_path, keep_last=2)
    store.save(made(3, size=TINY))
    assert store.steps() == [3, 8, 9]


def test_a_step_saved_again_replaces_the_damaged_one(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2, 3)
    for step in (2, 3):
        flip(tmp_path / f"step-{step:08d}" / "state.json", 9)
    store = CheckpointStore(tmp_path, keep_last=2)
    found, skipped = store.newest()
    assert found is not None
    assert found.step == 1
    assert len(skipped) == 2
    store.save(made(2, size=TINY, variant=5))
    found, skipped = store.newest()
    assert found is not None
    assert found.state["seed"] == 5
    assert len(skipped) == 1
    store.save(made(3, size=TINY, variant=5))
    assert store.newest()[1] == []
    assert names(tmp_path) == ["step-00000002", "step-00000003"]


def test_only_directories_with_a_checkpoints_name_are_removed(tmp_path: Path) -> None:
    root, outside = tmp_path / "checkpoints", tmp_path / "outside"
    filled(root, 1)
    shutil.copytree(root / "step-00000001", outside)
    others = ["step-1", "step-000000001", "step-00000001.bak", "xstep-00000001", "step-０0000001", "best"]
    others += [".saving-step-1", ".removing-step-00000001~"]
    for name in others:
        (root / name).mkdir()
    (root / "step-00000002").symlink_to(outside)
    (root / ".removing-step-00000002").symlink_to(outside)
    (root / "step-00000003").write_text("a file")
    left = sorted([*others, "step-00000002", ".removing-step-00000002", "step-00000003"])
    store = CheckpointStore(root, keep_last=1)
    store.save(made(4, size=TINY))
    assert names(root) == sorted([*left, "step-00000004"])
    assert store.steps() == [4]
    store.remove_all()
    assert names(root) == left
    assert is_made(checkpoints.load_checkpoint(outside), size=TINY)
    with pytest.raises(OSError, match=r"cannot save .*step-00000002: Not a directory"):
        store.save(made(2))


def test_remove_all_of_nothing(tmp_path: Path) -> None:
    CheckpointStore(tmp_path / "absent", keep_last=1).remove_all()
    assert not (tmp_path / "absent").exists()


# --- in the background ---


@contextmanager
def held_back(
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[tuple[threading.Event, threading.Event, list[int]]]:
    """Writing waits for the second event and sets the first; how many were at it at once."""
    begun, go, active, most = threading.Event(), threading.Event(), [], [0]
    write = checkpoints._write_checkpoint

    def slow(checkpoint: Checkpoint, folder: Path) -> None:
        active.append(checkpoint.step)
        most[0] = max(most[0], len(active))
        begun.set()
        assert go.wait(30)
        write(checkpoint, folder)
        active.remove(checkpoint.step)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_write_checkpoint", slow)
        try:
            yield begun, go, most
        finally:
            go.set()


def test_saves_in_the_background_come_one_after_the_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = CheckpointStore(tmp_path, keep_last=9)
    with held_back(monkeypatch) as (begun, go, most):
        store.save_in_background(made(1))
        assert begun.wait(30)
        assert store.steps() == []
        threading.Timer(0.05, go.set).start()
        store.save_in_background(made(2))
        assert 1 in store.steps()  # the second was only begun when the first was there
        store.wait()
        store.save(made(3))
        store.save_in_background(made(4))
        store.wait()
    assert store.steps() == [1, 2, 3, 4]
    assert most == [1]


@pytest.mark.parametrize("call", ["wait", "save_in_background"])
def test_a_failure_in_the_background_is_raised_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = filled(tmp_path, 1)
    with failing_fsync(monkeypatch):
        store.save_in_background(made(2))
        with suppress(OSError):
            store._saving.result()  # type: ignore[union-attr]
    with pytest.raises(OSError, match=r"cannot save .*step-00000002: Input/output error; check the disk"):
        store.save_in_background(made(3)) if call == "save_in_background" else store.wait()
    store.wait()
    assert store.steps() == [1]


@contextmanager
def failing_fsync(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        yield


def test_ctrl_c_while_waiting_leaves_the_save_in_flight(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
    store = CheckpointStore(tmp_path, keep_last=1)

    def interrupted(call: Callable[..., Any], *args: Any) -> None:
        main = threading.main_thread().ident
        threading.Timer(0.1, signal.pthread_kill, [main, signal.SIGINT]).start()
        call(*args)

    try:
        with held_back(monkeypatch) as (begun, go, most):
            store.save_in_background(made(1))
            assert begun.wait(30)
            with pytest.raises(KeyboardInterrupt):
                interrupted(store.wait)
            with pytest.raises(KeyboardInterrupt):
                interrupted(store.save_in_background, made(2))
            threading.Timer(0.1, go.set).start()
            store.save_in_background(made(3))
            store.wait()
    finally:
        signal.signal(signal.SIGINT, before)
    assert most == [1]
    assert store.steps() == [3]


def test_a_process_that_ends_finishes_its_save_first(tmp_path: Path) -> None:
    command = [sys.executable, str(FAULTS), "exit", str(tmp_path / "c")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done.stderr
    assert "step-00000001" not in json.loads(done.stdout)["at_exit"]  # or this shows nothing
    assert is_made(load_checkpoint(tmp_path / "c" / "step-00000001"), size=2_000_000)
    assert names(tmp_path / "c") == ["step-00000001"]


# --- row 1: kill -9 ---


@pytest.mark.parametrize("count", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_kills_lose_no_checkpoint(tmp_path: Path, count: int) -> None:
    report = faults("kill", tmp_path / "checkpoints", count)
    print(report)
    assert report["kills"] == count
    assert report["unrecoverable"] == 0
    assert report["acknowledged_saves_lost"] == 0
    wanted = {"saving"} if count < 200 else {"saving", "replaced", "removing", "loading"}
    assert all(report["during"].get(moment) for moment in wanted)  # the kills came when it matters


# --- row 2: the nth operation fails ---


def half_deleted(folder: Path) -> None:
    (folder / "manifest.json").unlink()


def with_leftovers(root: Path) -> None:
    """Step 5 is good; a save of 6 and a removal of 4 died."""
    filled(root, 4, 5, 6)
    for name, step in (("saving", 6), ("removing", 4)):
        os.rename(root / f"step-{step:08d}", root / f".{name}-step-{step:08d}")
        half_deleted(root / f".{name}-step-{step:08d}")


def half_replaced(root: Path) -> None:
    """The only checkpoint, 5, was to be replaced when the process died between two renames."""
    filled(root, 5)
    os.rename(root / "step-00000005", root / ".replaced-step-00000005")
    filled(root / "x", 5)
    os.rename(root / "x" / "step-00000005", root / ".saving-step-00000005")
    (root / "x").rmdir()


def replaced(root: Path) -> None:
    """Step 5 was replaced and what it replaced is half deleted."""
    half_replaced(root)
    os.rename(root / ".saving-step-00000005", root / "step-00000005")
    half_deleted(root / ".replaced-step-00000005")


def fallen_back(root: Path) -> None:
    """Step 5 is good, 6 and 7 are damaged."""
    filled(root, 5, 6, 7)
    for step in (6, 7):
        flip(root / f"step-{step:08d}" / "optimizer.safetensors", 700)


# what is there; how many are kept; the step that is saved (None: remove_all); the steps that may be found
SCENARIOS: dict[str, tuple[Callable[[Path], Any], int, int | None, set[int | None]]] = {
    "the first": (lambda root: root.mkdir(), 1, 6, {None, 6}),
    "in no directory yet": (lambda root: None, 1, 6, {None, 6}),
    "keep 1": (lambda root: filled(root, 5), 1, 6, {5, 6}),
    "keep 2 of 4": (lambda root: filled(root, 3, 4, 5), 2, 6, {5, 6}),
    "the only one again": (lambda root: filled(root, 5), 1, 5, {5}),
    "leftovers": (with_leftovers, 1, 6, {5, 6}),
    "half replaced": (half_replaced, 1, 6, {5, 6}),
    "half replaced, again": (half_replaced, 1, 5, {5}),
    "replaced": (replaced, 1, 6, {5, 6}),
    "fallen back": (fallen_back, 1, 6, {5, 6}),
    "remove all": (lambda root: filled(root, 4, 5), 2, None, {None, 4, 5}),
}


@pytest.mark.parametrize("mode", FaultyDisk.MODES)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_whatever_operation_fails_the_last_or_the_one_before_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scenario: str, mode: str
) -> None:
    prepare, keep_last, step, allowed = SCENARIOS[scenario]
    template, root = tmp_path / "template", tmp_path / "checkpoints"
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: None
    )  # thousands of them; the faulty disk counts its own
    prepare(template)
    for n in itertools.count(1):
        shutil.rmtree(root, ignore_errors=True)
        if template.exists():
            shutil.copytree(template, root)
        store = CheckpointStore(root, keep_last=keep_last)
        store.newest()
        disk = FaultyDisk(root, mode, n)
        with monkeypatch.context() as patch:
            disk.install(patch)
            with suppress(Crash, OSError):
                store.save(made(step, size=TINY, variant=1)) if step else store.remove_all()
        if mode == "power" and not disk.failed:
            disk.lose_power()  # after it returned
        found = check_recovery(root, allowed, damaged={6, 7} if scenario == "fallen back" else set())
        if not disk.failed:
            break
    assert found == step  # without a failure it does what it should
    assert n > 10, "most operations went unseen"


def check_recovery(root: Path, allowed: set[int | None], damaged: set[int]) -> int | None:
    """The step that is found, one of the allowed; none is half a checkpoint, and the next save clears up."""
    store = CheckpointStore(root, keep_last=1)
    found, skipped = store.newest()
    step = found.step if found else None
    assert step in allowed, skipped
    assert found is None or is_made(found, size=TINY, variants=(0, 1))
    assert {int(re.search(r"step-(\d{8})", line)[1]) for line in skipped} <= damaged  # type: ignore[index]
    later = max(store.steps(), default=0) + 1
    store.save(made(later, size=TINY))
    assert names(root) == [f"step-{later:08d}"]
    return step


def test_an_error_while_removing_old_ones_says_that_the_new_one_is_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    filled(tmp_path, 1)

    def fail(*args: Any, **options: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "rmdir", fail)
        with pytest.raises(OSError, match=r"^saved .*2, but cannot remove older checkpoints: Input/output"):
            CheckpointStore(tmp_path, keep_last=1).save(made(2))
    assert CheckpointStore(tmp_path, keep_last=1).steps() == [2]


# --- row 3: disk full, I/O errors, read-only ---

NEW_NAMESPACE = ("unshare", "--user", "--map-root-user", "--mount")


def check_refusals(rows: list[dict[str, Any]], message: str) -> None:
    for row in rows:
        assert row["kept"], row
        assert re.fullmatch(
            rf"cannot save \S+step-00000009: {message} or choose another --run-dir", row["error"]
        )


def may_mount(folder: Path) -> bool:
    if not shutil.which("unshare"):
        return False
    command = [*NEW_NAMESPACE, "mount", "-t", "tmpfs", "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True).returncode == 0


def test_a_full_disk_and_a_read_only_one(tmp_path: Path) -> None:
    if not may_mount(tmp_path):
        pytest.skip("no file system may be mounted here")
    report = faults("full", tmp_path, prefix=NEW_NAMESPACE)
    assert len(report["rows"]) == 16
    check_refusals(report["rows"], "No space left on device; free some space")
    check_refusals([report["read_only"]], "Read-only file system; check the disk and its permissions")
    assert report["kept"] == [4]  # with enough room it saved, and rotated


def test_a_file_size_limit(tmp_path: Path) -> None:
    report = faults("file-limit", tmp_path)
    assert len(report["rows"]) == 16
    check_refusals(report["rows"], "File too large; free some space")
    assert report["kept"] == [4]


@pytest.mark.parametrize("file", ["model.safetensors", "state.json", "manifest.json"])
def test_a_file_that_cannot_be_read_makes_it_fall_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    store = filled(tmp_path, 1, 2)
    bad, real = tmp_path / "step-00000002" / file, os.open

    def fail(path: Any, *args: Any, **options: Any) -> int:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(os, "open", fail)
    found, skipped = store.newest()
    assert found is not None
    assert found.step == 1
    assert skipped == [f"{bad} cannot be read: Input/output error"]


@pytest.mark.parametrize("parent", ["/proc", "file"])
def test_a_root_that_cannot_be_made(tmp_path: Path, parent: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=r"^cannot save .*: .*; check the disk and its permissions or choose"):
        CheckpointStore(tmp_path / parent / "run", keep_last=1).save(made(1))


def test_further_bytes_are_those_of_a_save_beside_the_kept_ones(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path, keep_last=2)
    assert store.further_bytes(100) == 300  # two kept and the one that is being saved
    size = sum(file.stat().st_size for file in store.save(made(1)).iterdir())
    assert store.further_bytes(size) == 2 * size
    store.save(made(2))
    assert store.further_bytes(size) == size
    (tmp_path / "step-00000002").rename(tmp_path / ".saving-step-00000002")  # the next save removes it first
    assert store.further_bytes(size) == size
    assert CheckpointStore(tmp_path, keep_last=1).further_bytes(size) == 0


# --- row 4: damage ---


def flip(path: Path, bit: int) -> None:
    with open(path, "r+b") as file:  # in place: ext4 syncs a file that is emptied and written anew
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def falls_back(root: Path) -> str:
    """The one line that says why step 2 was skipped for step 1."""
    found, skipped = CheckpointStore(root, keep_last=1).newest()
    assert found is not None
    assert is_made(found, size=TINY)
    assert found.step == 1, "damage went unseen"
    assert len(skipped) == 1
    assert "\n" not in skipped[0]
    return skipped[0]


@pytest.mark.parametrize("count", [200, pytest.param(2000, marks=pytest.mark.soak)])
def test_every_flipped_bit_is_seen(tmp_path: Path, count: int) -> None:
    filled(tmp_path, 1, 2)
    rng, files = random.Random(count), sorted((tmp_path / "step-00000002").iterdir())
    assert len(files) == 4
    for i in range(count):
        path = files[i % len(files)]
        bit = rng.randrange(8 * path.stat().st_size)
        flip(path, bit)
        assert path.name in falls_back(tmp_path) or path.name == "manifest.json"
        flip(path, bit)
    assert CheckpointStore(tmp_path, keep_last=1).newest()[1] == []


@pytest.mark.parametrize("every", [7, pytest.param(1, marks=pytest.mark.soak)])
def test_every_bit_of_every_file_is_seen(tmp_path: Path, every: int) -> None:
    path = filled(tmp_path, 1).root / "step-00000001"
    for file in sorted(path.iterdir()):
        for bit in range(0, 8 * file.stat().st_size, every):
            flip(file, bit)
            with pytest.raises(CheckpointError):
                load_checkpoint(path)
            flip(file, bit)
    load_checkpoint(path)


def manifest_with(**changes: Any) -> Callable[[Path], None]:
    """A change of the manifest by somebody who makes its own hash right again."""

    def edit(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        sign(path, {**manifest, **changes})

    return edit


def sign(path: Path, manifest: dict[str, Any]) -> None:
    content = {key: value for key, value in manifest.items() if key != "sha256" and value != "absent"}
    sealed = content | {"sha256": checkpoints._seal(content)}
    anew(path / "manifest.json", checkpoints._encode(sealed))


def anew(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def sign_files(path: Path) -> None:
    """The manifest that fits the files as they are."""
    files = {p.name: checkpoints._file_entry(p) for p in path.iterdir() if p.name != "manifest.json"}
    sign(path, {"files": files, "format": 2, "step": 2})


def rewritten(name: str, content: bytes) -> Callable[[Path], None]:
    """A file with other content and a manifest that fits it."""

    def edit(path: Path) -> None:
        (path / name).write_bytes(content)
        sign_files(path)

    return edit


def swap(name: str) -> Callable[[Path], Any]:
    return lambda path: shutil.copy(path.parent / "step-00000001" / name, path / name)


def link(name: str) -> Callable[[Path], None]:
    """The file moves away and a symbolic link leads to it."""

    def edit(path: Path) -> None:
        elsewhere = path.parent / "elsewhere"
        (path / name).rename(elsewhere)
        (path / name).symlink_to(elsewhere)

    return edit


def whole_swap(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.parent / "step-00000001", path)


GOOD_ENTRY = {"sha256": "0" * 64, "size": 3}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: os.truncate(p / "model.safetensors", 100), "damaged: 100 bytes instead of"),
        (lambda p: os.truncate(p / "state.json", 0), "damaged: 0 bytes instead of"),
        (lambda p: os.truncate(p / "manifest.json", 100), "is not JSON"),
        (lambda p: os.truncate(p / "manifest.json", 0), "is not JSON"),
        (lambda p: (p / "model.safetensors").unlink(), "model.safetensors cannot be read: No such file"),
        (lambda p: (p / "state.json").unlink(), "state.json cannot be read: No such file"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json cannot be read: No such file"),
        (swap("model.safetensors"), "model.safetensors is damaged: its SHA-256"),
        (swap("state.json"), "state.json is damaged"),
        (swap("manifest.json"), "its manifest is that of step 1"),
        (whole_swap, "its manifest is that of step 1"),
        (link(""), "is no directory"),
        (link("model.safetensors"), "damaged: .* bytes instead|is no regular file"),
        (link("state.json"), "damaged: .* bytes instead|is no regular file"),
        (link("manifest.json"), "is no regular file"),
        (lambda p: (p / "manifest.json").write_bytes(b" " * (1 << 20)), "has over 65,536 bytes"),
        (lambda p: (p / "manifest.json").write_bytes(b"[" * 60_000), "is not JSON: maximum recursion"),
        (lambda p: (p / "manifest.json").write_bytes(b"9" * 60_000), "is not JSON: Exceeds the limit"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff"), "is not JSON"),
        (lambda p: (p / "manifest.json").write_bytes(b"[]"), "is not a JSON object"),
        (manifest_with(format=3), "has format 3, this version reads 2"),
        (manifest_with(step="2"), "'step': Input should be a valid integer"),
        (manifest_with(step=True), "'step': Input should be a valid integer"),
        (manifest_with(step=-1), "'step': Input should be greater than or equal to 0"),
        (manifest_with(files=[]), "'files': Input should be a valid dictionary"),
        (manifest_with(files={}), "lists no state.json"),
        (
            manifest_with(files={"state.json": GOOD_ENTRY, "../x.safetensors": GOOD_ENTRY}),
            "should match",
        ),
        (manifest_with(files={"state.json": GOOD_ENTRY, "manifest.json": GOOD_ENTRY}), "should match"),
        (
            manifest_with(files={"state.json": {"sha256": "0" * 64, "size": 3.0}}),
            "should be a valid integer",
        ),
        (
            manifest_with(files={"state.json": {"sha256": "0" * 63, "size": 3}}),
            "should match",
        ),
        (manifest_with(files={"state.json": 7}), "Input should be a valid dictionary"),
        (rewritten("state.json", b"[]"), "state.json is not a JSON object"),
        (rewritten("state.json", b"[" * 100_000), "state.json is not JSON: maximum recursion"),
        (rewritten("state.json", b" " * (1 << 25)), "state.json has over 16,777,216 bytes"),
        (rewritten("model.safetensors", b"x" * 100), "model.safetensors is damaged: "),
        (rewritten("model.safetensors", b""), "model.safetensors is damaged: "),
    ],
)
def test_damage_is_seen_and_skipped(tmp_path: Path, damage: Callable[[Path], Any], message: str) -> None:
    filled(tmp_path, 1, 2)
    damage(tmp_path / "step-00000002")
    assert re.search(message, falls_back(tmp_path))


def test_a_file_that_the_manifest_does_not_name_is_not_read(tmp_path: Path) -> None:
    path = filled(tmp_path, 1).root / "step-00000001"
    (path / "extra.safetensors").write_bytes(b"x")
    (path / ".DS_Store").mkdir()
    assert load_checkpoint(path).tensors.keys() == {"model", "optimizer"}
    assert is_made(load_checkpoint(path), size=TINY)


def test_a_checkpoint_copied_elsewhere_loads(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    shutil.copytree(tmp_path / "step-00000001", tmp_path / "mine")
    assert load_checkpoint(tmp_path / "mine").step == 1


def test_none_that_is_whole_is_none(tmp_path: Path) -> None:
    store = filled(tmp_path, 1, 2)
    for path in tmp_path.glob("*/state.json"):
        path.write_text("{}")
    found, skipped = store.newest()
    assert found is None
    assert [Path(line.split()[0]).parent.name for line in skipped] == ["step-00000002", "step-00000001"]


WEIRD: list[Any] = [
    None,
    True,
    -1,
    0,
    2**70,
    1e999,
    "",
    "\x00",
    "état",
    [],
    {},
    [[]],
    {"size": 1},
    "step",
    "0" * 64,
]


def fuzzed(raw: bytes, rng: random.Random) -> bytes:
    """`raw` with a few bytes changed, cut, doubled or put in."""
    data = bytearray(raw)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(5)
        if kind == 0 and at < len(data):
            data[at] = rng.randrange(256)
        elif kind == 1:
            del data[at : at + rng.randint(1, 20)]
        elif kind == 2:
            data[at:at] = rng.randbytes(rng.randint(1, 9))
        elif kind == 3:
            data[at:at] = data[: rng.randint(0, 60)]
        else:
            data[at:at] = rng.choice([b"{", b"[" * 3000, b'"', b"1" * 5000, b"\\ud800", b"NaN", b",", b":"])
    return bytes(data)


def replace_somewhere(value: Any, rng: random.Random) -> Any:
    """A JSON value with one of its parts replaced."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        key = rng.choice(list(value))
        new_key = rng.choice([key, key, key, key[:-1], key + "x", "../" + key])
        return {k: v for k, v in value.items() if k != key} | {new_key: replace_somewhere(value[key], rng)}
    return rng.choice(WEIRD)


@pytest.mark.parametrize("count", [400, pytest.param(100_000, marks=pytest.mark.soak)])
def test_fuzzed_files_raise_only_checkpoint_errors(tmp_path: Path, count: int) -> None:
    path = filled(tmp_path, 2).root / "step-00000002"
    good = {file.name: file.read_bytes() for file in path.iterdir()}
    rng, refused = random.Random(count), 0
    for i in range(count):
        name = ("manifest.json", "state.json", "model.safetensors", "signed")[i % 4]
        if name == "signed":
            changed = replace_somewhere(json.loads(good["manifest.json"]), rng)
            sign(path, changed if isinstance(changed, dict) else {"files": changed})
        else:
            anew(path / name, fuzzed(good[name], rng))
            if name != "manifest.json":
                sign_files(path)
        try:
            load_checkpoint(path)
        except CheckpointError:
            refused += 1
        for file, raw in good.items():
            anew(path / file, raw)
    assert refused > count // 2
    load_checkpoint(path)


# --- row 10: two trainers, one run directory ---


def test_the_lock_names_its_holder_and_goes_with_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "new" / "run"
    holder = subprocess.Popen([sys.executable, FAULTS, "lock", run_dir], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None
        assert json.loads(holder.stdout.readline()) == {"pid": holder.pid}
        for _ in range(2):  # having tried does not take the lock from its holder
            with pytest.raises(ValueError, match=rf"in use by process {holder.pid} on '.+'; end that or"):  # noqa: SIM117
                with run_lock(run_dir):
                    pass
        assert run_dir.stat().st_mode & 0o777 == 0o700
    finally:
        holder.kill()
        holder.wait()
    with run_lock(run_dir):
        assert json.loads((run_dir / "trainer.json").read_text())["pid"] == os.getpid()


def test_the_lock_can_be_had_again(tmp_path: Path) -> None:
    for _ in range(2):
        with run_lock(tmp_path):
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()} on"), run_lock(tmp_path):
                pass
            assert (tmp_path / "trainer.json").exists()
        assert not (tmp_path / "trainer.json").exists()


def test_an_error_of_the_run_passes_through_the_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"^what the run failed with$"), run_lock(tmp_path):
        raise OSError("what the run failed with")
    with run_lock(tmp_path):
        pass


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"pid": "x", "host": 1}', "[" * 50_000])
def test_a_holder_that_cannot_be_read_is_another_process(tmp_path: Path, content: str) -> None:
    with run_lock(tmp_path):
        (tmp_path / "trainer.json").write_text(content)
        with pytest.raises(ValueError, match="is in use by another process; end that"), run_lock(tmp_path):
            pass


def test_a_run_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(OSError, match=r"^cannot lock .*file/run: Not a directory; check"),
        run_lock(tmp_path / "file" / "run"),
    ):
        pass


def test_waiting_for_a_save_is_not_busy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = CheckpointStore(tmp_path, keep_last=1)
    with held_back(monkeypatch) as (_, go, _):
        store.save_in_background(made(1))
        threading.Timer(0.3, go.set).start()
        begin = time.thread_time()
        store.wait()
        assert time.thread_time() - begin < 0.1
