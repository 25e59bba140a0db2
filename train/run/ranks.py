"""The processes of a run under torchrun: how they wait for each other, and how they end.

torchrun starts `size` processes, the ranks, and sets their environment. Rank 0, the first, alone prints,
locks, logs and saves. The ranks talk over torch.distributed, whose calls give up after TIMEOUT, and over its
key-value store, where each rank leaves a sign of life every few seconds: work that may take one rank longer
ends in `meet`, which waits for as long as the others live.
"""

from __future__ import annotations

import json
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.distributed_c10d import PrefixStore, Store
from torch.distributed.rendezvous import rendezvous

from fusedgpt.kernels.errors import InputError, UserError
from fusedgpt.train.run.world import World

TIMEOUT = 40.0  # seconds: within a minute of a rank's death or hang the others have ended
_JOINING = timedelta(minutes=10)  # until all ranks have reached the store
_HEARTBEAT = 2.0  # seconds
_LONGEST_POLL = 0.1
_GLOO = re.compile(
    "gloo|Application timeout|Timed out waiting|Connection closed"
)  # it has no errors of its own
_FIRST_TO_SPEAK = 0.5  # seconds for rank 0 to report an error that all ranks have


class RankLost(UserError):
    """Another rank is dead or hangs."""


class RankLeft(UserError):
    """Another rank ended by itself; it has said why."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("")
        self.exit_code = exit_code


class Ranks(World):
    """One of several processes."""

    def __init__(self, rank: int, size: int, local_rank: int, store: Store) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self._store, self._meetings, self._gatherings = store, 0, 0
        self._asked: tuple[Tensor, torch.distributed.Work] | None = None
        self._beats, self._heard = [0] * size, [0.0] * size  # each rank's heartbeats, and when they changed
        clone = store.clone()  # type: ignore[attr-defined, unused-ignore]  # a store serves one thread
        threading.Thread(target=self._show_life, args=(clone,), name="heartbeat", daemon=True).start()

    def device(self, name: str) -> str:
        """See World."""
        if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
            return name
        if name not in ("auto", "cuda"):
            raise InputError(
                f"--device {name}: torchrun gives each process its GPU, leave it at auto or cuda"
            )
        if not torch.distributed.is_nccl_available():
            raise InputError(
                "several GPUs need NCCL, which this build of torch lacks; gloo serves --device cpu"
            )
        n_gpus = torch.cuda.device_count()
        if self.local_rank >= n_gpus:
            raise InputError(
                f"no GPU is left for this rank: give torchrun --nproc-per-node {n_gpus} or fewer"
            )
        return f"cuda:{self.local_rank}"

    def meet(self) -> None:
        """See World."""
        self._meetings += 1
        key, pause = f"meeting/{self._meetings}", 0.001
        self._heard = [time.monotonic()] * self.size
        self._store.add(key, 1)
        looked = time.monotonic()
        while self._store.add(key, 0) < self.size:
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_POLL)
            if time.monotonic() - looked > _HEARTBEAT:
                self._look_after_others()
                looked = time.monotonic()

    def _look_after_others(self) -> None:
        for rank in set(range(self.size)) - {self.rank}:
            if self._store.check([f"left/{rank}"]):
                raise RankLeft(int(self._store.get(f"left/{rank}")))
            beats = self._store.add(f"alive/{rank}", 0)
            if beats != self._beats[rank]:
                self._beats[rank], self._heard[rank] = beats, time.monotonic()
            elif time.monotonic() - self._heard[rank] > TIMEOUT:
                raise RankLost(f"rank {rank} has shown no sign of life for {TIMEOUT:.0f} s")

    def _show_life(self, store: Store) -> None:
        try:
            while True:
                store.add(f"alive/{self.rank}", 1)
                time.sleep(_HEARTBEAT)
        except RuntimeError:  # the store has ended, and with it the run
            return

    def from_first(self, make: Callable[[], Any]) -> Any:
        """See World."""
        content = json.dumps(make()).encode() if self.first else b""
        self.meet()
        length = torch.tensor(len(content))
        torch.distributed.broadcast(length, 0)
        data = torch.zeros(int(length), dtype=torch.uint8)
        if self.first:
            data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        torch.distributed.broadcast(data, 0)
        return json.loads(data.numpy().tobytes())

    def check_alike(self, facts: Mapping[str, Any], device: str) -> None:
        """See World."""
        all_facts = self._gather(facts)
        gpus = self._gather(_gpu(self.device(device)))
        for rank, theirs in enumerate(all_facts):
            for name, value in theirs.items():
                if value != all_facts[0].get(name):
                    there = f"rank {rank} has {value}, rank 0 has {all_facts[0].get(name)}"
                    raise InputError(f"the ranks differ in {name}: {there}")
            if gpus[rank] is not None and gpus.index(gpus[rank]) != rank:
                shared = f"ranks {gpus.index(gpus[rank])} and {rank} share a GPU"
                raise InputError(f"{shared}: start one process per GPU, --nproc-per-node gpu")

    def _gather(self, value: Any) -> list[Any]:
        """The JSON of each rank."""
        self._gatherings += 1
        name = f"gathered/{self._gatherings}"
        self._store.set(f"{name}/{self.rank}", json.dumps(value))
        self.meet()
        return [json.loads(self._store.get(f"{name}/{rank}")) for rank in range(self.size)]

    def agree(self, *values: int) -> tuple[int, ...]:
        """See World."""
        before = self._asked
        asked = torch.tensor(values, dtype=torch.int64)
        work = torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX, async_op=True)
        self._asked = asked, work
        if before is None:
            return (0,) * len(values)
        before[1].wait()
        return tuple(before[0].tolist())

    def say_goodbye(self, code: int, *, speaks: bool) -> bool:
        """Tell the others that this rank ends; whether it is to say why, as the first that `speaks`."""
        try:
            if speaks and not self.first:
                time.sleep(_FIRST_TO_SPEAK)
            earliest = speaks and self._store.add("spoken", 1) == 1
            self._store.set(f"left/{self.rank}", str(code))
        except RuntimeError:  # the store has ended with the process that held it
            return speaks
        return earliest

    def sum(self, x: Tensor) -> Tensor:
        """See World."""
        torch.distributed.all_reduce(x)
        return x


_joined: Ranks | None = None


def _gpu(device: str) -> str | None:
    """What tells a GPU from all others; None for a CPU."""
    return str(torch.cuda.get_device_properties(device).uuid) if device.startswith("cuda") else None


def join_ranks() -> Ranks:
    """This process's place; see world.join."""
    global _joined
    if _joined is not None:
        return _joined
    store, rank, size = next(iter(rendezvous("env://", timeout=_JOINING)))
    store = PrefixStore(f"fusedgpt/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    _joined = Ranks(rank, size, int(os.environ.get("LOCAL_RANK", rank)), store)
    _joined.meet()  # to import all of this takes some ranks longer than others
    store.set_timeout(timedelta(seconds=TIMEOUT))  # gloo waits in it for ranks that may have died since
    on_gpus = torch.cuda.is_available() and torch.distributed.is_nccl_available()
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if on_gpus else "gloo",
        store=PrefixStore("group", store),
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    return _joined


def explain_lost(error: Exception) -> str:
    """What to say of an error of torch.distributed; empty for others."""
    if not isinstance(error, torch.distributed.DistError) and not _GLOO.search(str(error)):
        return ""
    first = re.sub(r"^\[[^]]*\] ", "", str(error).splitlines()[0])  # without the place in gloo's source
    return f"another rank is gone or hangs: {first.split('. ')[0]}"


def leave(message: str, code: int) -> NoReturn:
    """End this process, one of several; the first rank to fail says why, the others add nothing.

    Without the interpreter's clean-up, in which threads of gloo and NCCL may hang.
    """
    speaks = os.environ.get("RANK") == "0"  # of an error before they met, which all have
    if _joined is not None:
        speaks = _joined.say_goodbye(code, speaks=bool(message))
        message = f"rank {_joined.rank}: {message}"
    if message and speaks:
        sys.stderr.write(f"fusedgpt: {message}\n")
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(code)
