"""The contenders of a training benchmark in processes of their own: their checks, their times."""

from __future__ import annotations

import contextlib
import os
import resource
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.clock import CUDA, choose
from benchmarks.report import record
from benchmarks.report.record import Row
from benchmarks.workloads import contenders
from fusedgpt.model.config import PRESETS, GPTConfig

TOY = GPTConfig(vocab_size=257, block_size=64, n_layer=2, n_head=2, n_embd=32)
SHAPES = {**PRESETS, "toy": TOY}
BACKENDS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
GATE_STEPS = 3
PATIENCE = choose(100, 900)  # seconds without a sign of a contender, which is a fault then
WAIT = 30.0  # seconds, for those that compile while others are ready


@dataclass(frozen=True, kw_only=True)
class Point:
    """What all contenders of one comparison are given."""

    preset: str
    precision: str
    batch_size: int
    length: int
    dropout: float
    peer: Path | None

    @property
    def config(self) -> GPTConfig:
        shape = SHAPES[self.preset]
        block_size = max(self.length, shape.block_size)
        return shape.model_copy(update={"dropout": self.dropout, "block_size": block_size})


def serve(pipe: Connection, contender: str, point: Point, began: float) -> None:
    """A contender's process: send the row of its `gate`, then one of times for each number of steps received.

    Sends {"fault": ...} or {"skipped": ...} instead, and ends, if the contender raises.
    """
    # AOTAutograd's cache ignores sdpa_kernel: "fa2" would get what "cudnn" has compiled.
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = f"{cache_dir()}/{contender}"
    batch = contenders.tokens(point.batch_size, point.length, point.config.vocab_size)
    backend = BACKENDS.get(contender.rpartition("-")[2])
    try:
        with sdpa_kernel(backend) if backend else contextlib.nullcontext():
            loss, step, model = contenders.build(contender, point.config, batch, point.precision, point.peer)
            model.train(point.dropout == 0.0)  # the losses of the gate are without dropout
            first = gate(loss, step, began)
            if not model.training:
                model.train()
                for _ in range(GATE_STEPS):  # which compile what dropout adds, before others are timed
                    step()
            pipe.send(first)
            while steps := pipe.recv():
                times = contenders.step_times(step, steps)
                pipe.send(stopped_learning(loss, first) or {"times": times, "peak_mb": peak_memory() / 1e6})
    except Exception as error:  # whatever a contender raises, the others are still worth measuring
        memory = isinstance(error, torch.OutOfMemoryError)
        pipe.send({"skipped" if memory else "fault": record.text(error)})


def peak_memory() -> int:
    """Bytes: of torch on a GPU, of the whole process on a CPU."""
    if not CUDA:
        return 1000 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    torch.cuda.empty_cache()  # for the other contenders
    return torch.cuda.max_memory_allocated()


def gate(loss: Callable[[], Tensor] | None, step: Callable[[], object], began: float) -> Row:
    """The losses before and after GATE_STEPS steps, and the seconds from `began` to the end of the first."""
    start = time.time()
    before = loss_of(loss)
    lost = time.time() - start
    step()
    if CUDA:
        torch.cuda.synchronize()
    first_step_s = time.time() - began - lost
    for _ in range(GATE_STEPS - 1):
        step()
    after = loss_of(loss)
    if CUDA:
        torch.cuda.empty_cache()  # for the other contenders
    return {"losses": [before, after], "first_step_s": first_step_s}


@torch.no_grad()
def loss_of(loss: Callable[[], Tensor] | None) -> float | None:
    return None if loss is None else float(loss())


def stopped_learning(loss: Callable[[], Tensor] | None, first: Row) -> Row:
    """A fault if the steps that were timed have not lowered the loss; {} if they have."""
    after = loss_of(loss)
    lower = after is None or after < first["losses"][0]  # False for NaN
    return {} if lower else {"fault": f"no speed: the loss after the timed steps is {after:.4f}"}


class Entrant:
    """A contender in a process of its own, which stays for all its runs: it starts and compiles once.

    On a GPU several may be made at once, and start and compile in parallel.
    """

    def __init__(self, name: str, point: Point) -> None:
        context = get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, name, point, time.time()), daemon=True)
        self.process.start()
        theirs.close()
        if not CUDA:
            self.pipe.poll(PATIENCE)  # on a CPU one after the other

    def answer(self) -> Row:
        """What the process sends next; a fault if it ends or hangs instead."""
        if not self.pipe.poll(PATIENCE):
            return {"fault": f"nothing came from its process in {PATIENCE} s"}
        try:
            row: Row = self.pipe.recv()
        except (EOFError, OSError):
            self.process.join()
            return {"fault": f"its process ended with exit code {self.process.exitcode}"}
        return row

    def time(self, steps: int) -> Row:
        """Times of that many steps and the peak memory so far, or why there are none."""
        with contextlib.suppress(OSError):  # it has ended
            self.pipe.send(steps)
        return self.answer()

    def close(self) -> None:
        """Without its exit handlers: inductor's may wait for minutes (pytorch #162199)."""
        self.process.kill()
        self.process.join()


def wait_for(entrants: Iterable[Entrant]) -> None:
    """Until all can answer, so that none disturbs what is timed; not for ever, since one may hang."""
    end = time.monotonic() + WAIT
    for entrant in entrants:
        entrant.pipe.poll(max(0.0, end - time.monotonic()))
