"""What the kernel benchmarks share: the gate, what is noted of a measurement, and the table.

    python -m pytest benchmarks/ [-k attention] [--benchmark-json FILE] [--interpreted]

On a GPU: bf16, real sizes, device time, L2 flushed before each call; fractions are of a big bf16 matmul and a
big copy of the same run (measured again at its end: drift shows). On a CPU: toy sizes in fp32 that exercise
every line and say nothing about speed; `ours` is what the model uses there, with --interpreted the kernel.
Nothing is timed unless the op's check against float64 passes. Figures are pytest-benchmark's extra_info: its
own statistics are of the host's clock, which on a GPU sees launches only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ceilings import CUDA, DEVICE, DTYPES, Call, Ceilings, choose, samples
from benchmarks.report import record
from fusedgpt.kernels import ops
from fusedgpt.kernels.tools import cases, check

PRECISION = choose("bf16", "fp32")
DTYPE = DTYPES[PRECISION]
DIRECTIONS = ("forward", "backward", "both")


@dataclass(frozen=True, kw_only=True)
class Figures:
    """One contender at one point, in the fields of record.py."""

    name: str  # op and direction
    shape: str
    contender: str
    ms: float
    p20: float
    p80: float
    spread: float
    flops: float | None
    bytes: float | None
    floor_ms: float
    gap: float
    rate: float  # of what bounds the op
    unit: str
    peak_mb: float | None  # allocated during the call beyond what was before; None on a CPU
    suite: str = "kernels"
    dtype: str = PRECISION


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
        """Check the op, then time call(prepare()), which costs `flops` and `bytes_` of memory traffic.

        case: made once a file, for it is checked once.
        """
        wrong = faults(case)
        if wrong:
            pytest.fail(f"no speed for a wrong kernel: {wrong[0]}", pytrace=False)
        self.benchmark.group = f"{case.op} {shape} {direction}"
        peak = _peak_mb(prepare, call)
        p20, ms, p80 = record.percentiles(samples(prepare, call, self.benchmark.pedantic))
        ceilings = asdict(self.ceilings)
        computes = flops / ceilings["tflops"] * 1e-9 > bytes_ / ceilings["gbps"] * 1e-6
        figures = Figures(
            name=f"{case.op} {direction}",
            shape=shape,
            contender=contender,
            ms=ms,
            p20=p20,
            p80=p80,
            spread=round((p80 - p20) / ms, 4),
            rate=flops / ms * 1e-9 if computes else bytes_ / ms * 1e-6,
            unit="TFLOP/s" if computes else "GB/s",
            peak_mb=peak,
            **record.floor(ms, flops=flops, bytes_=bytes_, **ceilings),
        )
        self.benchmark.extra_info.update(asdict(figures))
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
        f"{'op, direction, shape':<58}{'contender':<14}{'ms (p20, p80)':<32}{'rate':<15}ceiling     MB  ours"
    ]
    ours = {(f.name, f.shape): f.ms for f in results if f.contender == "ours"}
    for f in results:
        mine = ours.get((f.name, f.shape))
        lines.append(
            f"{f'{f.name} {f.shape}':<58}{f.contender:<14}"
            f"{f'{f.ms:.4f} ({f.p20:.4f}, {f.p80:.4f})':<32}{f'{f.rate:.1f} {f.unit}':<15}{1 / f.gap:>6.1%}"
            f"{'' if f.peak_mb is None else f'{f.peak_mb:.0f}':>7}  {f'{f.ms / mine:.2f}x' if mine else ''}"
        )
    return lines
