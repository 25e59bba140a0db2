"""What test_checkpoint.py does to a store in processes of their own; one JSON line says what came of it.

Usage: python tests/helpers/checkpoint_faults.py {kill,full,file-limit,lock,exit} FOLDER [COUNT]
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fusedgpt.train.run.checkpoint import Checkpoint, CheckpointStore
from fusedgpt.train.run.lock import run_lock

_BUDGETS = 16


def made(step: int, *, size: int = 64, variant: int = 0) -> Checkpoint:
    """A checkpoint whose content follows from its step."""
    numbers = torch.arange(size) + step + 1000 * variant
    tensors = {
        "model": {"h.0.weight": numbers.float(), "h.0.bias": numbers[:3].bfloat16()},
        "optimizer": {"h.0.weight.m": numbers * 0.5, "step": torch.tensor(step)},
    }
    return Checkpoint(step=step, tensors=tensors, state={"step": step, "seed": variant, "cursor": [step, 7]})


def is_made(checkpoint: Checkpoint, *, size: int = 64, variants: tuple[int, ...] = (0,)) -> bool:
    """Whether it is, bit for bit, what `made` makes."""
    return any(_same(checkpoint, made(checkpoint.step, size=size, variant=v)) for v in variants)


def _same(ours: Checkpoint, theirs: Checkpoint) -> bool:
    return ours.state == theirs.state and all(
        ours.tensors[stem].keys() == tensors.keys()
        and all(torch.equal(ours.tensors[stem][k], v) for k, v in tensors.items())
        for stem, tensors in theirs.tensors.items()
    )


def kill(root: Path, count: int) -> dict[str, Any]:
    """Kill `count` processes that save, replace, rotate and load, each going on where the last was killed.

    They are forked, for importing torch takes longer than all that each of them does.
    """
    rng, seen = random.Random(count), Counter[str]()
    saved = most_lost = unrecoverable = 0
    for _ in range(count):
        acknowledged, loading = _run_until_killed(root, rng, saved)
        names = [path.name for path in root.iterdir()] if root.exists() else []
        seen.update({name.split("-")[0].strip(".") for name in names if name.startswith(".")})
        seen["loading"] += loading
        found, skipped = CheckpointStore(root, keep_last=1).newest()
        whole = found is None or is_made(found)
        step = found.step if found else 0
        most_lost = max(most_lost, acknowledged - step)  # of those that were acknowledged: none may be
        unrecoverable += bool(skipped) or not whole or not acknowledged <= step <= acknowledged + 1
        saved = step
    return {
        "kills": count,
        "unrecoverable": unrecoverable,
        "acknowledged_saves_lost": most_lost,
        "saves": saved,
        "during": dict(seen),
    }


def _run_until_killed(root: Path, rng: random.Random, saved: int) -> tuple[int, bool]:
    """The last step that a process acknowledged before it was killed, and whether it was loading then."""
    keep_last, child_seed = rng.randint(1, 3), rng.random()
    delay = rng.uniform(0, rng.choice([0.003, 0.2]))  # the short ones end while it loads
    source, sink = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            _save_for_ever(root, keep_last, random.Random(child_seed), sink)
        finally:
            os._exit(1)  # only reached by an error, whose traceback the parent's stderr has
    os.close(sink)
    reports = os.read(source, 1)  # it is under way
    time.sleep(delay)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    while chunk := os.read(source, 1 << 16):
        reports += chunk
    os.close(source)
    lines = reports.decode().split("\n")
    steps = [int(line) for line in lines[:-1] if line.isdigit()]
    return max([saved, *steps]), "loaded" not in lines[len(lines) - lines[::-1].index("load") :]


def _save_for_ever(root: Path, keep_last: int, rng: random.Random, sink: int) -> None:
    while True:
        store = CheckpointStore(root, keep_last=keep_last)
        os.write(sink, b"load\n")
        found, skipped = store.newest()
        os.write(sink, b"loaded\n")
        assert not skipped, skipped
        step = found.step if found else 0
        for _ in range(3):
            step += rng.random() < 0.7 or step == 0  # else the same step again
            if rng.random() < 0.5:
                store.save_in_background(made(step))
                store.wait()
            else:
                store.save(made(step))
            os.write(sink, f"{step}\n".encode())


def full(folder: Path, _count: int) -> dict[str, Any]:
    """Saves on a tmpfs of its own that has too little room, by 16 amounts, and on one that is read-only."""
    _mount(folder, "-t", "tmpfs", "-o", "size=16m", "tmpfs")
    root, size = folder / "checkpoints", 40_000
    store = CheckpointStore(root, keep_last=2)
    store.save(made(1, size=size))
    used = _used(folder)
    store.save(made(2, size=size))
    needed = _used(folder) - used
    store = CheckpointStore(root, keep_last=1)
    store.save(made(3, size=size))

    def limit(budget: int) -> None:
        _mount(folder, "-o", f"remount,size={used + budget}")

    rows = [_attempt(root, size, limit, (needed - 4096) * i // (_BUDGETS - 1)) for i in range(_BUDGETS)]
    limit(needed)
    store.save(made(4, size=size))
    _mount(folder, "-o", "remount,ro")
    read_only = _attempt(root, size, lambda _: None, 0)
    return {"rows": rows, "read_only": read_only, "kept": store.steps()}


def file_limit(folder: Path, _count: int) -> dict[str, Any]:
    """Saves under 16 limits to the size of a file (RLIMIT_FSIZE), for where nothing may be mounted."""
    root, size = folder / "checkpoints", 40_000
    CheckpointStore(root, keep_last=2).save(made(3, size=size))
    largest = max(path.stat().st_size for path in root.glob("*/*"))

    def limit(budget: int) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (budget, resource.RLIM_INFINITY))

    rows = [_attempt(root, size, limit, (largest - 1) * i // (_BUDGETS - 1)) for i in range(_BUDGETS)]
    limit(resource.RLIM_INFINITY)
    store = CheckpointStore(root, keep_last=1)
    store.save(made(4, size=size))
    return {"rows": rows, "kept": store.steps()}


def _attempt(root: Path, size: int, limit: Callable[[int], None], budget: int) -> dict[str, Any]:
    """What saving says where there is only so much room, and what is there afterwards."""
    store, error = CheckpointStore(root, keep_last=1), None
    before = store.steps()
    limit(budget)
    try:
        if budget % 2:
            store.save(made(9, size=size))
        else:
            store.save_in_background(made(9, size=size))
            store.wait()
    except OSError as raised:
        error = str(raised)
    found, skipped = store.newest()
    whole = found is not None and is_made(found, size=size) and not skipped
    names = sorted(os.listdir(root))
    kept = whole and store.steps() == before and names == [f"step-{step:08d}" for step in before]
    return {"budget": budget, "error": error, "kept": kept}


def _mount(folder: Path, *arguments: str) -> None:
    subprocess.run(["mount", *arguments, folder], check=True)


def _used(folder: Path) -> int:
    status = os.statvfs(folder)
    return (status.f_blocks - status.f_bfree) * status.f_frsize


def lock(folder: Path, _count: int) -> dict[str, Any]:
    """Holds the run's lock until it is killed."""
    with run_lock(folder):
        print(json.dumps({"pid": os.getpid()}), flush=True)
        time.sleep(600)
    return {}


def leave(folder: Path, _count: int) -> dict[str, Any]:
    """Ends with an error while a save is under way."""
    CheckpointStore(folder, keep_last=1).save_in_background(made(1, size=2_000_000))
    print(json.dumps({"at_exit": os.listdir(folder) if folder.exists() else []}), flush=True)
    raise SystemExit(3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    modes = {"kill": kill, "full": full, "file-limit": file_limit, "lock": lock, "exit": leave}
    mode, where, *rest = sys.argv[1:]
    print(json.dumps(modes[mode](Path(where), int(rest[0]) if rest else 0)))
