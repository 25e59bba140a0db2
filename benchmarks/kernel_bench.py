"""What the kernel benchmarks share: the clock, the ceilings, the gate and the table.

    python -m pytest benchmarks/ [-k attention] [--benchmark-json FILE] [--interpreted]

On a GPU: bf16, real sizes, device time, L2 flushed before each call; fractions are of a big bf16 matmul and a
big copy of the same run (measured again at its end: drift shows). On a CPU: toy sizes in fp32 that exercise
every line and say nothing about speed; `ours` is what the model uses there, with --interpreted the kernel.
Nothing is timed unless the op's check against float64 passes. Figures are pytest-benchmark's extra_info: its
own statistics are of the host's clock, which on a GPU sees launches only.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor

from fusedgpt.kernels import cases, check, ops

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
DTYPE = torch.bfloat16 if CUDA else torch.float32
DIRECTIONS = ("forward", "backward", "both")
_FLUSH_BYTES = 1 << 30  # beyond any L2, and long enough to write for Python to launch what is timed meanwhile
_SECONDS, _ROUNDS = 0.5, (10, 200)  # a measurement's length, and how many calls at least and at most
T = TypeVar("T")
Call = Callable[[Any], object]


def choose(gpu: T, cpu: T) -> T:
    """`gpu` where there is one, else `cpu`."""
    return gpu if CUDA else cpu


@dataclass(frozen=True, kw_only=True)
class Ceilings:
    """The most this machine does: TFLOP/s of a matmul in DTYPE, GB/s read and written by a copy."""

    tflops: float
    gbps: float


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One contender at one point; `ms` is the median."""

    op: str
    shape: str
    direction: str
    contender: str
    ms: float
    p20: float
    p80: float
    tflops: float | None
    gbps: float | None
    of_ceiling: float  # the fraction of the ceiling that bounds the op
    peak_mb: float | None  # allocated during the call beyond what was before; None on a CPU


def samples(prepare: Callable[[], Any], call: Call, pedantic: Any = None) -> list[float]:
    """Milliseconds of call(prepare()) without prepare, repeated by pytest-benchmark's `pedantic` if given."""
    flush = torch.empty(_FLUSH_BYTES if CUDA else 0, dtype=torch.uint8, device=DEVICE)
    spans: list[tuple[Any, Any]] = []

    def set_up() -> tuple[tuple[Any], dict[str, Any]]:
        prepared = prepare()
        flush.zero_()
        return (prepared,), {}

    def timed(prepared: Any) -> None:
        begin, end = _moment(), _moment()
        begin.record()
        call(prepared)
        end.record()
        spans.append((begin, end))

    rounds = _rounds(prepare, call)
    if pedantic is not None:
        pedantic(timed, setup=set_up, rounds=rounds)
    else:
        for _ in range(rounds):
            timed(*set_up()[0])
    if CUDA:
        torch.cuda.synchronize()
    return [begin.elapsed_time(end) for begin, end in spans]


class _HostMoment:
    """torch.cuda.Event on the host's clock."""

    def record(self) -> None:
        self.seconds = time.perf_counter()

    def elapsed_time(self, end: _HostMoment) -> float:
        return 1e3 * (end.seconds - self.seconds)


def _moment() -> Any:
    return torch.cuda.Event(enable_timing=True) if CUDA else _HostMoment()


def _rounds(prepare: Callable[[], Any], call: Call) -> int:
    """Warm up (compiling, allocating, clocks), and how often to measure."""
    if not CUDA:
        call(prepare())
        return 3
    for _ in range(5):
        call(prepare())
    torch.cuda.synchronize()
    begin = time.perf_counter()
    call(prepare())
    torch.cuda.synchronize()
    fitting = int(_SECONDS / (time.perf_counter() - begin))
    return min(max(fitting, _ROUNDS[0]), _ROUNDS[1])


def measure_ceilings() -> Ceilings:
    """Of a matmul of 8192^3 and a copy of 1 GiB; toys on a CPU."""
    n, size = choose((8192, 1 << 30), (256, 1 << 24))
    a, b = (torch.randn(n, n, device=DEVICE).to(DTYPE) for _ in range(2))
    source = torch.zeros(size, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    matmul = statistics.median(samples(lambda: None, lambda _: a @ b))
    copy = statistics.median(samples(lambda: None, lambda _: target.copy_(source)))
    return Ceilings(tflops=2e-9 * n**3 / matmul, gbps=2e-6 * size / copy)


@functools.cache
def faults(case: cases.Case) -> list[str]:
    """What is wrong with the op at `case`."""
    return [finding.fault for finding in check.measure(case, DTYPE, DEVICE) if not finding.ok]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile; on a CPU without the C++ compiler, which would take most of the run."""
    torch.compiler.reset()  # every test compiles the same code for another shape
    return torch.compile(function, dynamic=False, fullgraph=True, backend=choose("inductor", "aot_eager"))


def phases(
    function: Callable[..., Any], inputs: dict[str, Tensor], direction: str
) -> tuple[Callable[[], Any], Call]:
    """(prepare, call) that time the forward without gradients, the backward alone, or both."""
    if direction == "forward":
        detached = {name: x.detach() for name, x in inputs.items()}
        return (lambda: None), lambda _: function(**detached)
    leaves = [x for x in inputs.values() if x.requires_grad]

    def outputs() -> tuple[Tensor, ...]:
        out = function(**inputs)
        return out if isinstance(out, tuple) else (out,)

    upstream = [torch.randn_like(y) for y in outputs()]

    def backward(made: tuple[Tensor, ...]) -> object:
        return torch.autograd.grad(made, leaves, upstream)

    return (outputs, backward) if direction == "backward" else ((lambda: None), lambda _: backward(outputs()))


class Bench:
    """The fixture `bench`: one test measures one contender at one point."""

    def __init__(self, benchmark: Any, ceilings: Ceilings, results: list[Figures]) -> None:
        self.benchmark, self.ceilings, self.results = benchmark, ceilings, results

    def randn(self, *shape: int) -> Tensor:
        """Activations, with gradient."""
        return torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_()

    def weight(self, *shape: int) -> Tensor:
        """A parameter, fp32 as the trainer keeps it."""
        return torch.randn(shape, device=DEVICE).mul_(0.02).requires_grad_()

    def counters(self) -> tuple[Tensor, Tensor]:
        """seed and offset of a dropout."""
        return torch.tensor(cases.SEED, device=DEVICE), torch.tensor(cases.OFFSET, device=DEVICE)

    def contender(self, name: str, op: str, **functions: Callable[..., Any]) -> Callable[..., Any]:
        """functions[name]; for "compiled" functions["eager"] compiled. "ours" must be a kernel on a GPU."""
        if name == "ours" and CUDA and ops.backend(op, DEVICE, DTYPE) != "triton":
            pytest.skip(f"{op} has no Triton kernel here")
        return compiled(functions["eager"]) if name == "compiled" else functions[name]

    def run(
        self,
        case: cases.Case,
        contender: str,
        direction: str,
        shape: str,
        prepare: Callable[[], Any],
        call: Call,
        *,
        flops: float = 0.0,
        bytes_: float = 0.0,
    ) -> None:
        """Check the op, then time call(prepare()), which costs `flops`, or else `bytes_` of memory traffic.

        case: made once a file, for it is checked once.
        """
        wrong = faults(case)
        if wrong:
            pytest.fail(f"no speed for a wrong kernel: {wrong[0]}", pytrace=False)
        self.benchmark.group = f"{case.op} {shape} {direction}"
        peak = _peak_mb(prepare, call)
        times = sorted(samples(prepare, call, self.benchmark.pedantic))
        ms = statistics.median(times)
        tflops, gbps = flops / ms * 1e-9 or None, bytes_ / ms * 1e-6 or None
        figures = Figures(
            op=case.op,
            shape=shape,
            direction=direction,
            contender=contender,
            ms=ms,
            p20=times[int(0.2 * len(times))],
            p80=times[int(0.8 * len(times))],
            tflops=tflops,
            gbps=gbps,
            of_ceiling=tflops / self.ceilings.tflops if tflops else (gbps or 0.0) / self.ceilings.gbps,
            peak_mb=peak,
        )
        self.benchmark.extra_info.update(asdict(figures), ceilings=asdict(self.ceilings))
        self.results.append(figures)


def _peak_mb(prepare: Callable[[], Any], call: Call) -> float | None:
    if not CUDA:
        return None
    prepared = prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(prepared)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def table(results: list[Figures]) -> list[str]:
    """Lines; the last column is how many times faster ours is than the contender."""
    lines = [
        f"{'op, shape, direction':<58}{'contender':<14}{'ms (p20, p80)':<32}{'rate':<15}ceiling     MB  ours"
    ]
    ours = {(f.op, f.shape, f.direction): f.ms for f in results if f.contender == "ours"}
    for f in results:
        rate = f"{f.tflops:.1f} TFLOP/s" if f.tflops else f"{f.gbps or 0.0:.0f} GB/s"
        mine = ours.get((f.op, f.shape, f.direction))
        lines.append(
            f"{f'{f.op} {f.shape} {f.direction}':<58}{f.contender:<14}"
            f"{f'{f.ms:.4f} ({f.p20:.4f}, {f.p80:.4f})':<32}{rate:<15}{f.of_ceiling:>6.1%}"
            f"{'' if f.peak_mb is None else f'{f.peak_mb:.0f}':>7}  {f'{f.ms / mine:.2f}x' if mine else ''}"
        )
    return lines
