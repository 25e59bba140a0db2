"""Times one contender of one op at one shape, after the op has passed its check.

    python -m pytest benchmarks/ [-k attention] [--benchmark-json FILE]

On a GPU: bf16, real sizes, device time, L2 flushed before each call; fractions are of a large bf16 matmul and
a large copy of the same run, measured again at its end. On a CPU: toy sizes in fp32 that exercise every line
and say nothing about speed; `ours` is what the model uses there, with FUSEDGPT_KERNELS=triton the kernel.
Nothing is timed unless the op's check against float64 passes. The figures are in pytest-benchmark's
extra_info: its own statistics are of the host's clock, which on a GPU sees launches only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ceilings import CUDA, DEVICE, DTYPES, Call, Ceilings, choose, samples
from benchmarks.report.record import Row, summary
from fusedgpt.kernels import ops
from fusedgpt.kernels.tools import cases, check

PRECISION = choose("bf16", "fp32")
DTYPE = DTYPES[PRECISION]
DIRECTIONS = ("forward", "backward", "both")


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


def randn(*shape: int) -> Tensor:
    """Activations that require gradients."""
    return torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_()


def weight(*shape: int) -> Tensor:
    """A parameter, fp32 as the trainer keeps it."""
    return torch.randn(shape, device=DEVICE).mul_(0.02).requires_grad_()


def counters() -> dict[str, Tensor]:
    """seed and offset of a dropout."""
    return {
        "seed": torch.tensor(cases.SEED, device=DEVICE),
        "offset": torch.tensor(cases.OFFSET, device=DEVICE),
    }


class Bench:
    """The fixture `bench`: one test measures one contender at one point."""

    def __init__(self, benchmark: Any, ceilings: Ceilings) -> None:
        self.benchmark, self.ceilings = benchmark, ceilings

    def contend(
        self,
        case: cases.Case,
        contender: str,
        inputs: dict[str, Tensor],
        direction: str = "forward",
        *,
        shape: Sequence[int],
        flops: float,
        bytes_: float,
        **functions: Callable[..., Any],
    ) -> None:
        """Time functions[contender] on `inputs`; "compiled" is functions["eager"] under torch.compile."""
        self.need_kernel(case.op, contender)
        function = compiled(functions["eager"]) if contender == "compiled" else functions[contender]
        prepare, call = phases(function, inputs, direction)
        label = f"({', '.join(map(str, shape))})"
        self.run(case, contender, direction, label, prepare, call, flops=flops, bytes_=bytes_)

    def need_kernel(self, op: str, contender: str) -> None:
        """Skip ours on a GPU where the op would run its reference."""
        if contender.startswith("ours") and CUDA and ops.backend(op, DEVICE, DTYPE) != "triton":
            pytest.skip(f"{op} has no Triton kernel here")

    def run(
        self,
        case: cases.Case,
        contender: str,
        direction: str,
        shape: str,
        prepare: Callable[[], Any],
        call: Call,
        *,
        flops: float,
        bytes_: float,
    ) -> None:
        """Check the op, then time call(prepare()), which costs `flops` and `bytes_` of memory traffic.

        case: one object per file, for it is checked once.
        """
        if wrong := faults(case):
            pytest.fail(f"no speed for a wrong kernel: {wrong[0]}", pytrace=False)
        self.benchmark.group = f"{case.op} {shape} {direction}"
        peak_mb = _peak_mb(prepare, call)
        row = summary([samples(prepare, call, self.benchmark.pedantic)])
        compute_ms, memory_ms = flops / self.ceilings.tflops * 1e-9, bytes_ / self.ceilings.gbps * 1e-6
        floor_ms = max(compute_ms, memory_ms)  # the two may overlap
        bound = {"rate": bytes_ / row["ms"] * 1e-6, "unit": "GB/s"}
        if compute_ms > memory_ms:
            bound = {"rate": flops / row["ms"] * 1e-9, "unit": "TFLOP/s"}
        self.benchmark.extra_info.update(
            suite="kernels",
            name=f"{case.op} {direction}",
            shape=shape,
            dtype=PRECISION,
            contender=contender,
            **row,
            **bound,
            flops=flops,
            bytes=bytes_,
            floor_ms=floor_ms,
            gap=row["ms"] / floor_ms,
            peak_mb=peak_mb,
        )


def _peak_mb(prepare: Callable[[], Any], call: Call) -> float | None:
    """Memory that the call allocates beyond what was there before; None on a CPU."""
    if not CUDA:
        return None
    prepared = prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(prepared)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def table(results: Sequence[Row]) -> list[str]:
    """Lines of text; the last column is how many times faster ours is than the contender."""
    lines = [f"{'op, direction, shape':<58}{'contender':<14}{'ms':<20}{'rate':<15}ceiling     MB  ours"]
    ours = {(row["name"], row["shape"]): row["ms"] for row in results if row["contender"] == "ours"}
    for row in results:
        mine = ours.get((row["name"], row["shape"]))
        op, spread = f"{row['name']} {row['shape']}", f"{row['ms']:.4f} ± {row['spread'] / 2:.1%}"
        rate, peak = f"{row['rate']:.1f} {row['unit']}", row["peak_mb"]
        lines.append(
            f"{op:<58}{row['contender']:<14}{spread:<20}{rate:<15}{1 / row['gap']:>6.1%}"
            f"{'' if peak is None else f'{peak:.0f}':>7}  " + (f"{row['ms'] / mine:.2f}x" if mine else "")
        )
    return lines
