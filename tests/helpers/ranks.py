"""Two processes in one group of torch.distributed, over gloo."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def run_two(function: Callable[..., None], folder: Path, *args: Any) -> None:
    """function(rank, *args) in each of two new processes; raises what one of them raises."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    torch.multiprocessing.spawn(_rank, args=(function, str(folder), args), nprocs=2)


def _rank(rank: int, function: Callable[..., None], folder: str, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(f"{folder}/store", 2)
    torch.distributed.init_process_group("gloo", rank=rank, world_size=2, store=store)
    function(rank, *args)
    torch.distributed.destroy_process_group()
    os._exit(0)  # a thread of gloo's that outlives Python's exit has been seen to abort the process
