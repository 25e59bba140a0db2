"""The clock of the benchmarks, and the ceilings of this machine: a large matmul and a large copy.

    python -m benchmarks.ceilings [--precisions fp32 bf16]

On a GPU device time, with L2 flushed before each call. On a CPU the matmul is the faster of torch's and
oneDNN's, which ours uses in fp32 (kernels/cpu/linear.py).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch

from benchmarks.arguments import make_parser
from benchmarks.report import record
from fusedgpt.kernels.cpu.linear import matmul_nt

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
_FLUSH_BYTES = 1 << 30  # exceeds any L2, and takes long enough to write for Python to launch what is timed
_SECONDS, _ROUNDS = 0.5, (10, 200)  # of a measurement, and its least and most calls
T = TypeVar("T")
Call = Callable[[Any], object]


def choose(gpu: T, cpu: T) -> T:
    """`gpu` where there is one, else `cpu`."""
    return gpu if CUDA else cpu


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """TFLOP/s of a matmul in one dtype, GB/s read and written by a copy."""

    tflops: float
    gbps: float


def samples(prepare: Callable[[], Any], call: Call) -> list[float]:
    """Milliseconds of each call(prepare()), without prepare, after a warm-up (compiling, memory, clocks)."""
    for _ in range(choose(5, 1)):
        call(prepare())
    rounds = 3
    if CUDA:
        torch.cuda.synchronize()
        start = time.perf_counter()
        call(prepare())
        torch.cuda.synchronize()
        rounds = min(max(int(_SECONDS / (time.perf_counter() - start)), _ROUNDS[0]), _ROUNDS[1])
    flush = torch.empty(_FLUSH_BYTES if CUDA else 0, dtype=torch.uint8, device=DEVICE)
    spans = []
    for _ in range(rounds):
        prepared, begin, end = prepare(), moment(), moment()
        flush.zero_()
        begin.record()
        call(prepared)
        end.record()
        spans.append((begin, end))
    if CUDA:
        torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in spans]


class _HostMoment:
    """torch.cuda.Event on the host's clock."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _HostMoment) -> float:
        return 1e3 * (end.seconds - self.seconds)


def moment() -> Any:
    return torch.cuda.Event(enable_timing=True) if CUDA else _HostMoment()


def measure_ceilings(dtype: torch.dtype) -> Ceilings:
    """Medians of a matmul of 8192^3 and a copy of 1 GiB; on a CPU the best of 1024^3 and 64 MiB."""
    n, size = choose((8192, 1 << 30), (1024, 1 << 26))
    a, b = (torch.randn(n, n, device=DEVICE).to(dtype) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    matmuls: list[Call] = [lambda _: a @ b, *([] if CUDA else [lambda _: matmul_nt(a, b)])]
    middle = choose(statistics.median, min)
    matmul = min(middle(samples(lambda: None, call)) for call in matmuls)
    copy = middle(samples(lambda: None, lambda _: target.copy_(source)))
    return Ceilings(tflops=2e-9 * n**3 / matmul, gbps=2e-6 * size / copy)


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--precisions", nargs="+", default=list(DTYPES), choices=DTYPES)
    for name in parser.parse_args().precisions:
        record.emit({"suite": "ceilings", "dtype": name, **asdict(measure_ceilings(DTYPES[name]))})


if __name__ == "__main__":
    main()
