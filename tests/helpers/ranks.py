"""Several processes as torchrun starts them, over gloo, forked from one that has imported what they need."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch.distributed import TCPStore

_PRELOADED = [
    "fusedgpt.train.pipeline", "fusedgpt.train.cli.main", "fusedgpt.train.run.ranks",
    "torch.distributed.fsdp", "torch._dynamo",
]  # fmt: skip


def _context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    return context


def _store() -> TCPStore:
    """The store that torchrun's agent keeps for its ranks."""
    return TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def _enter(rank: int, size: int, port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        "GLOO_SOCKET_IFNAME": "lo",
    }  # fmt: skip


def run_ranks(size: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """What function(world, *args) returns in each of `size` new processes; raises what one of them raises."""
    store = _store()
    with ProcessPoolExecutor(size, mp_context=_context()) as pool:
        ranks = [pool.submit(_run, rank, size, store.port, function, args) for rank in range(size)]
        return [rank.result() for rank in ranks]


def _run(rank: int, size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    from fusedgpt.train.run.world import join

    _enter(rank, size, port)
    world: Any = join()
    try:
        result = function(world, *args)
        world.meet()
    except BaseException:
        if size > 1:
            world.say_goodbye(1, speaks=False)  # else the others wait for it
        raise
    return result


def launch(
    size: int, arguments: Sequence[Any], folder: Path, faulty: dict[int, Callable[[], None]] | None = None
) -> Any:
    """`fusedgpt ARGUMENTS` on `size` ranks, started: (processes, store, output files); see outcome."""
    store = _store()
    processes = []
    for rank in range(size):
        args = (rank, size, store.port, list(map(str, arguments)), str(folder), (faulty or {}).get(rank))
        processes.append(_context().Process(target=_command, args=args))
        processes[-1].start()
    return processes, store


def command(size: int, arguments: Sequence[Any], folder: Path, **options: Any) -> list[tuple[int, str, str]]:
    """(exit code, standard output, standard error) of each rank of `fusedgpt ARGUMENTS` in `folder`."""
    processes, _store = launch(size, arguments, folder, **options)
    for process in processes:
        process.join(300)
    return [
        (process.exitcode, (folder / f"out{rank}").read_text(), (folder / f"err{rank}").read_text())
        for rank, process in enumerate(processes)
    ]


def _command(
    rank: int, size: int, port: int, arguments: list[str], folder: str, fault: Callable[[], None] | None
) -> None:
    from fusedgpt.train.cli.main import main

    _enter(rank, size, port)
    os.chdir(folder)
    for number, name in ((1, "out"), (2, "err")):
        file = os.open(f"{name}{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    if fault is not None:
        fault()
    main(arguments)
