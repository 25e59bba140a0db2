"""Every op against its float64 reference, and against PyTorch in the same dtype: `fusedgpt kernels check`.

The standard: err(ours) <= 1.5 x err(PyTorch, same dtype) forward and <= 2 x backward, as ||out - truth|| /
||truth|| for each output, where a correctly rounded truth counts as PyTorch's error if PyTorch does better;
and in half precision no bias: the mean signed error is ~0. The tests call `measure` with more shapes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from fusedgpt.kernels import ops, reference

Inputs = dict[str, Tensor]
Function = Callable[..., Tensor | tuple[Tensor, ...]]

_FACTOR = {"forward": 1.5, "backward": 2.0}
SEED, OFFSET = 7, 3 << 40  # of every dropout here


@dataclass(frozen=True, kw_only=True)
class Case:
    """One op at one shape: `ours`, `truth` (run in float64) and `torch` take the same inputs by name."""

    op: str
    shape: str
    inputs: Callable[[torch.Generator], Inputs]  # float64 on the CPU, or integers
    ours: Function
    truth: Function
    torch: Function
    fp32_inputs: frozenset[str] = frozenset()  # these stay fp32 while the others take the dtype


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The worst output of one case in one dtype and direction."""

    op: str
    shape: str
    dtype: str
    direction: str  # "forward" or "backward"
    output: str  # "out 0", or the input whose gradient it is
    error: float  # ||ours - truth|| / ||truth||
    torch_error: float  # the same of PyTorch in this dtype
    limit: float
    bias: float  # mean signed error towards the truth's sign / rms error
    bias_limit: float

    @property
    def ok(self) -> bool:
        """Whether error and bias are within their limits; False where either is NaN."""
        return self.error <= self.limit and abs(self.bias) <= self.bias_limit


def measure(case: Case, dtype: torch.dtype, device: torch.device, *, seed: int = 0) -> list[Finding]:
    """[forward, backward] findings of the Triton path of `case`; [forward] if nothing has a gradient."""
    exact = case.inputs(torch.Generator().manual_seed(seed))
    rounded = {
        name: _cast(x, torch.float32 if name in case.fp32_inputs else dtype) for name, x in exact.items()
    }
    rounded = {name: x.to(device) for name, x in rounded.items()}
    wide = {name: _cast(x, torch.float64) for name, x in rounded.items()}
    truth, upstream = _run(case.truth, wide, None)
    with insist_on_triton():
        ours, _ = _run(case.ours, rounded, upstream)
    theirs, _ = _run(case.torch, rounded, upstream)
    findings = []
    for direction in truth:
        compared = [
            _compare(case, dtype, direction, name, ours[direction][name], theirs[direction][name], expected)
            for name, expected in truth[direction].items()
        ]
        if compared:
            findings.append(max(compared, key=lambda f: (not f.ok, f.error / f.limit if f.limit else 0.0)))
    return findings


@contextmanager
def insist_on_triton() -> Iterator[None]:
    """FUSEDGPT_KERNELS=triton within the block."""
    before = os.environ.get("FUSEDGPT_KERNELS")
    os.environ["FUSEDGPT_KERNELS"] = "triton"
    try:
        yield
    finally:
        if before is None:
            del os.environ["FUSEDGPT_KERNELS"]
        else:
            os.environ["FUSEDGPT_KERNELS"] = before


def _cast(x: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) if x.is_floating_point() else x


def _run(
    function: Function, inputs: Inputs, upstream: list[Tensor] | None
) -> tuple[dict[str, Inputs], list[Tensor]]:
    """Outputs and gradients by name, and the upstream gradients used (drawn if None)."""
    leaves = {name: x.detach().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    outputs = function(**leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    if upstream is None:
        generator = torch.Generator().manual_seed(1)
        upstream = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y) for y in outputs]
    results = {"forward": {f"out {i}": y.detach() for i, y in enumerate(outputs)}, "backward": {}}
    if any(y.requires_grad for y in outputs):
        torch.autograd.backward(outputs, [d.to(y.dtype) for d, y in zip(upstream, outputs, strict=True)])
        results["backward"] = {name: x.grad for name, x in leaves.items() if x.grad is not None}
    return results, upstream


def _compare(
    case: Case, dtype: torch.dtype, direction: str, name: str, ours: Tensor, theirs: Tensor, truth: Tensor
) -> Finding:
    size = truth.norm().item() or math.sqrt(truth.numel()) or 1.0  # all inputs are of unit scale
    error, torch_error = ours.double() - truth, (theirs.double() - truth).norm().item() / size
    one_rounding = (truth.to(ours.dtype).double() - truth).norm().item() / size
    if truth.norm() == 0.0:
        one_rounding = torch.finfo(ours.dtype).eps
    rms = error.norm().item() / math.sqrt(max(truth.numel(), 1))
    bias = (error * truth.sign()).mean().item() / rms if rms else 0.0
    rows = truth.numel() / truth.shape[-1] if truth.ndim else 1.0
    half = ours.dtype in (torch.float16, torch.bfloat16)
    return Finding(
        op=case.op,
        shape=case.shape,
        dtype=str(dtype).removeprefix("torch."),
        direction=direction,
        output=name,
        error=error.norm().item() / size,
        torch_error=torch_error,
        limit=_FACTOR[direction] * max(torch_error, one_rounding),
        bias=bias,
        bias_limit=0.02 + 5.0 / math.sqrt(max(rows, 1.0)) if half else math.inf,
    )


def _scalars(device: torch.device) -> dict[str, Tensor]:
    return {"seed": torch.tensor(SEED, device=device), "offset": torch.tensor(OFFSET, device=device)}


def dropout_case(N: int, C: int, p: float = 0.3) -> Case:
    """ops.dropout on (N, C)."""

    def truth(x: Tensor) -> Tensor:
        return reference.dropout(x, p, **_scalars(x.device))

    return Case(
        op="dropout",
        shape=f"({N}, {C}), p {p}",
        inputs=lambda generator: {"x": torch.randn(N, C, dtype=torch.float64, generator=generator)},
        ours=lambda x: ops.dropout(x, p, **_scalars(x.device)),
        truth=truth,
        torch=truth,
    )
