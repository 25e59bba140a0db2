"""Times one contender of one op at one shape, after the op has passed its check.

    python -m pytest benchmarks/ [-k attention]

On a GPU: bf16, real sizes, device time (clock.py); fractions are of a large bf16 matmul and a large copy of
the same run. On a CPU: toy sizes in fp32 that exercise every line and say nothing about speed; `ours` is what
the model uses there, with FUSEDGPT_KERNELS=triton the kernel.
Nothing is timed unless the op's check against float64 passes. Calls take turns on ROTATED inputs. After the
timing these are changed, and what was timed must return what a fresh call does. --compile-only runs
everything once and times nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.ceilings import DTYPES, Ceilings
from benchmarks.clock import CUDA, DEVICE, Call, Prepare, Timed, choose, nothing
from benchmarks.report.record import Row, summary
from fusedgpt.kernels import ops
from fusedgpt.kernels.tools import cases, check

PRECISION = choose("bf16", "fp32")
DTYPE = DTYPES[PRECISION]
DIRECTIONS = ("forward", "backward", "both")
ROTATED = choose(3, 2)  # inputs; clock.py also flushes the L2 cache
AGREEMENT = 0.02  # ||timed - fresh|| / ||fresh||: rivals may add in any order


@functools.cache
def faults(case: cases.Case) -> list[str]:
    """What is wrong with the op at `case`."""
    return [finding.fault for finding in check.measure(case, DTYPE, DEVICE) if not finding.ok]


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` under torch.compile; on a CPU without the C++ compiler, which would take most of the run."""
    torch.compiler.reset()  # every test compiles the same code for another shape
    return torch.compile(function, dynamic=False, fullgraph=True, backend=choose("inductor", "aot_eager"))


def phases(function: Callable[..., Any], inputs: dict[str, Tensor], direction: str) -> tuple[Prepare, Call]:
    """(prepare, call) that time the forward without gradients, the backward alone, or both."""
    if direction == "forward":
        detached = {name: x.detach() for name, x in inputs.items()}
        return nothing, lambda _: function(**detached)
    leaves = [x for x in inputs.values() if x.requires_grad]

    def outputs() -> tuple[Tensor, ...]:
        return tensors(function(**inputs))

    upstream = [torch.randn_like(y) for y in outputs()]

    def backward(made: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(made, leaves, upstream)

    return (outputs, backward) if direction == "backward" else (nothing, lambda _: backward(outputs()))


def shifted(inputs: dict[str, Tensor], by: int) -> dict[str, Tensor]:
    """Other values for each input: its own, moved by another number of elements than the next one's."""
    moved = {name: x.detach().roll(by * i) for i, (name, x) in enumerate(inputs.items(), 1)}
    return {name: x.requires_grad_(inputs[name].requires_grad) for name, x in moved.items()}


def stale(timed: Timed, calls: list[tuple[Prepare, Call]], rotation: list[dict[str, Tensor]]) -> str:
    """What is wrong with the results of `timed` beside those of `calls`, once their inputs have changed."""
    with torch.no_grad():
        for inputs in rotation:
            for name, x in shifted(inputs, 1).items():
                inputs[name].copy_(x)
    pair = timed.results(), [call(prepare()) for prepare, call in calls]
    outputs = ([y for result in results for y in tensors(result)] for results in pair)
    for got, expected in zip(*outputs, strict=True):
        error, size = ((got.double() - expected.double()).norm().item(), expected.double().norm().item())
        if not error <= AGREEMENT * size:
            return f"no speed: after the timing its result is {error:.2e} off, of {size:.2e}"
    return ""


def tensors(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


@functools.cache
def liger(name: str) -> Callable[..., Tensor]:
    """A function of Liger-Kernel; skips the test where there is no GPU or no such package."""
    if not (CUDA and find_spec("liger_kernel")):
        pytest.skip("Liger needs a GPU and its package")
    function: Callable[..., Tensor] = getattr(import_module("liger_kernel.transformers.functional"), name)
    return function


def randn(*shape: int) -> Tensor:
    """Activations that require gradients."""
    return torch.randn(shape, device=DEVICE).to(DTYPE).requires_grad_()


def weight(*shape: int) -> Tensor:
    """A parameter, fp32 as the trainer keeps it."""
    return torch.randn(shape, device=DEVICE).mul_(0.02).requires_grad_()


def counters() -> dict[str, Tensor]:
    """seed and offset of a dropout."""
    return {name: torch.tensor(x, device=DEVICE) for name, x in cases.COUNTERS.items()}


class Bench:
    """The fixture `bench`: one test measures one contender at one point."""

    def __init__(self, ceilings: Ceilings | None) -> None:
        self.ceilings = ceilings  # None: time nothing
        self.row: Row = {}  # what was measured

    def contend(
        self,
        case: cases.Case,
        contender: str,
        inputs: dict[str, Tensor],
        direction: str = "forward",
        *,
        shape: tuple[int, ...],
        flops: float,
        bytes_: float,
        **functions: Callable[..., Any],
    ) -> None:
        """Time functions[contender] on `inputs`; "compiled" is functions["eager"] under torch.compile."""
        function = compiled(functions["eager"]) if contender == "compiled" else functions[contender]
        rotation = [inputs, *(shifted(inputs, i) for i in range(1, ROTATED))]
        calls = [phases(function, x, direction) for x in rotation]
        work = {"flops": flops, "bytes_": bytes_}
        self.run(case, contender, direction, str(shape), calls, rotation, **work)

    def run(
        self,
        case: cases.Case,
        contender: str,
        direction: str,
        shape: str,
        calls: list[tuple[Prepare, Call]],
        rotation: list[dict[str, Tensor]],
        *,
        flops: float,
        bytes_: float,
    ) -> None:
        """Check the op, then time call(prepare()), which costs `flops` and `bytes_` of memory traffic.

        rotation: what the result of each of `calls` depends on; empty where a call changes its own inputs.
        Skips ours on a GPU where the op would run its reference. Each object `case` is checked once.
        """
        if contender.startswith("ours") and CUDA and ops.backend(case.op, DEVICE, DTYPE) != "triton":
            pytest.skip(f"{case.op} has no Triton kernel here")
        if (found := faults(case)) and self.ceilings:
            pytest.fail(f"no speed for a wrong kernel: {found[0]}", pytrace=False)
        peak_mb = _peak_mb(*calls[0])
        if not self.ceilings:
            return
        timed = Timed(*calls)
        time = summary([timed.samples()])
        if rotation and (wrong := stale(timed, calls, rotation)):
            pytest.fail(wrong, pytrace=False)
        compute_ms, memory_ms = flops / self.ceilings.tflops * 1e-9, bytes_ / self.ceilings.gbps * 1e-6
        floor_ms = max(compute_ms, memory_ms)  # the two may overlap
        work, unit = (flops * 1e-9, "TFLOP/s") if compute_ms > memory_ms else (bytes_ * 1e-6, "GB/s")
        self.row = {
            "suite": "kernels",
            "name": f"{case.op} {direction}",
            "shape": shape,
            "dtype": PRECISION,
            "contender": contender,
            **time,
            "rate": work / time["ms"],
            "unit": unit,
            "flops": flops,
            "bytes": bytes_,
            "floor_ms": floor_ms,
            "gap": time["ms"] / floor_ms,
            "peak_mb": peak_mb,
            "captured": timed.captured,
        }


def _peak_mb(prepare: Prepare, call: Call) -> float | None:
    """Memory that the call allocates beyond what was there before; None on a CPU."""
    if not CUDA:
        return None
    call(prepare())  # compiles
    prepared = prepare()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    call(prepared)
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6
