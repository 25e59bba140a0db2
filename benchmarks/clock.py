"""The clock of the benchmarks: device time on a GPU, without the launching; the host's on a CPU."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from itertools import cycle, islice
from typing import Any, TypeVar

import torch

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
_FLUSH_BYTES = 1 << 29  # exceeds any L2
_SECONDS, _ROUNDS = 0.2, (10, 100)  # of a measurement, and its least and most calls
T = TypeVar("T")
Prepare = Callable[[], Any]
Call = Callable[[Any], Any]


def nothing() -> None:
    """For a call that needs no preparation."""


def choose(gpu: T, cpu: T) -> T:
    """`gpu` where there is one, else `cpu`."""
    return gpu if CUDA else cpu


class Timed:
    """call(prepare()) of several inputs in turn, each to be timed without its prepare.

    All run a few times first: compiling, memory, clocks. On a GPU they become CUDA graphs, so that short
    calls are not timed at the speed of Python. What cannot be captured, e.g. since it waits for the device,
    is launched as it is: `captured` says so.
    """

    def __init__(self, *rotation: tuple[Prepare, Call]) -> None:
        self._rotation, self.captured = list(rotation), False
        if not CUDA:
            self.results()
            return
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.results()
        torch.cuda.current_stream().wait_stream(stream)
        try:
            with torch.cuda.stream(torch.cuda.current_stream()):
                pool = torch.cuda.graph_pool_handle()
                self._rotation = [_capture(prepare, call, pool) for prepare, call in rotation]
            self.captured = True
        except RuntimeError:  # and PyTorch's generator of random numbers waits for the end of the capture
            fresh = torch.Generator(DEVICE).graphsafe_get_state()
            torch.cuda.default_generators[torch.cuda.current_device()].graphsafe_set_state(fresh)

    def results(self) -> list[Any]:
        """What the call returns for each of the inputs."""
        return [call(prepare()) for prepare, call in self._rotation]

    def samples(self) -> list[float]:
        """Milliseconds of each call: on other inputs than the last, and with none of them in the L2 cache."""
        rounds = 3
        if CUDA:
            torch.cuda.synchronize()
            start = time.perf_counter()
            self.results()
            torch.cuda.synchronize()
            each = (time.perf_counter() - start) / len(self._rotation)
            rounds = min(max(int(_SECONDS / each), _ROUNDS[0]), _ROUNDS[1])
        flush = torch.zeros(_FLUSH_BYTES // 4 if CUDA else 0, dtype=torch.int32, device=DEVICE)
        spans = []
        for prepare, call in islice(cycle(self._rotation), rounds):
            prepared, begin, end = prepare(), moment(), moment()
            flush.sum()  # read, not written: else the timed call would write the flushed lines back
            begin.record()
            call(prepared)
            end.record()
            spans.append((begin, end))
        if CUDA:
            torch.cuda.synchronize()
        return [begin.elapsed_time(end) for begin, end in spans]


def _capture(prepare: Prepare, call: Call, pool: Any) -> tuple[Prepare, Call]:
    """Both as CUDA graphs of one memory pool: the second reads what the first has written."""
    before, timed = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is nothing to prepare
        with torch.cuda.graph(before, pool=pool):
            made = prepare()
    with torch.cuda.graph(timed, pool=pool):
        out = call(made)

    def replay(_: None) -> Any:
        timed.replay()
        return out

    return before.replay, replay


class _HostMoment:
    """torch.cuda.Event on the host's clock."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _HostMoment) -> float:
        return 1e3 * (end.seconds - self.seconds)


def moment() -> Any:
    return torch.cuda.Event(enable_timing=True) if CUDA else _HostMoment()
